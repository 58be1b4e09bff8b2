"""The learner's side of the conversation with the actors: one thread with the ROUTER, and a thread-safe API.

    with LearnerService(config, prompts, tokenize, fingerprints, probe_token_ids) as service:
        service.wait_for_members(1, timeout_s=300)
        groups = service.take_batch(timeout_s=600)

One lock guards the state (coordinator and reception). The thread takes it to handle what arrived and to send; an
API call takes it, changes the state, and wakes the thread, so that a command leaves with the next turn. Nobody holds it
while waiting. An exception in the thread is raised by the API calls that are waiting and by every later one.

A turn costs a dozen calls of the system, and may wait for the interpreter as often. Therefore turns begin PERIOD_S
apart at least: hundreds of small messages a second share them, and a training loop in the main thread is left in peace.
"""

import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from types import TracebackType
from typing import Self, TypeVar

from common.addresses import advertised_host, in_url
from common.config import Config, ConfigError, TransportConfig
from common.connections import Refusal
from common.keys import LearnerKeys, refuse_open
from common.stopping import is_crash
from common.tasks import Share
from common.transport import LINGER_MS, LearnerSocket
from common.types import (
    JSON,
    Float32Array,
    Int32Array,
    MemberId,
    Prompt,
    TrajectoryGroup,
    WeightsPhase,
    WeightsReport,
)
from common.wire import WireError
from learner.rollouts import snapshot
from learner.rollouts.coordinator import Coordinator
from learner.rollouts.evaluation import Begun, EvalResult, Evaluation
from learner.rollouts.history import Course
from learner.rollouts.prompts import PromptStream
from learner.rollouts.reception import Reception
from learner.rollouts.snapshot import Snapshot

logger = logging.getLogger(__name__)

TICK_S = 0.25  # longest sleep of the thread: silence is noticed this late
PERIOD_S = 0.003  # from the beginning of a turn to that of the next, at least
LONGEST_TURN_S = 0.1  # of handling what arrived; what is left then is the next turn's
AT_ONCE = 8  # messages that are handled before their answers leave
BEHIND_S = 2.0  # for which nobody counts as silent, because what arrived is not read yet
STOP_S = 5.0  # how long actors may take to say bye

T = TypeVar("T")


class BatchTimeout(TimeoutError):
    """No full batch in time; says how many groups are there, which actors, and what each of them holds."""


class StillWaiting(Exception):
    """Not yet, and the time-out is not over: see to other things, then repeat the call, which goes on with the wait."""


class MembersWaiting(Exception):
    """Ready actors do not hold the current version: serve them with it, then repeat the call."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__(f"waiting for the current weights: {', '.join(names)}")
        self.names = names


class LearnerService:
    """Context manager. `__enter__` binds the socket and starts the thread (ConfigError when the port is taken, or when
    it is not clear which address actors reach).

    Any thread may call any method. Every wait takes a time-out whose message says who was waited for.
    `fingerprints` are those of `model_fingerprints`; `probe_token_ids` are sent to every actor that joins; `tokenize`
    gives a prompt's token ids; `shares` are those of PromptStream; `former_port` is that of the learner before, if any.
    `run_id` and `incarnation` say which run this is and how often its learner was started (learner/rundir.py),
    `vocab_size` how many tokens the model can draw. Without `keys` (common/keys.py) anybody who reaches the socket may
    take part, so it must be bound to loopback unless transport.curve=off.

    With `turn_s` set, a wait raises StillWaiting after so many seconds, and at once after `interrupt`.
    """

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        tokenize: Callable[[Prompt], Sequence[int] | Int32Array],
        fingerprints: tuple[str, str],
        probe_token_ids: Sequence[int],
        shares: Sequence[Share] = (),
        *,
        keys: LearnerKeys | None = None,
        former_port: int = 0,
        run_id: str = "",
        incarnation: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        self.turn_s = float("inf")
        self._config = config
        self._keys = keys
        self._former_port = former_port
        self._waits: dict[str, float] = {}  # for what, and since when: those that were interrupted
        self._is_interrupted = False
        self._called_for: set[MemberId] = set()  # those of MembersWaiting, since the last wait with an answer
        stream = PromptStream(prompts, config.seed, shares)
        self._coordinator = Coordinator(config, stream, tokenize, incarnation=incarnation, vocab_size=vocab_size)
        self._reception = Reception(
            config, self._coordinator, fingerprints, probe_token_ids, run_id, incarnation, time.monotonic()
        )
        self._changed = threading.Condition()
        self._socket: LearnerSocket | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._ticked_s = float("-inf")
        self._is_stopping = False
        self._is_closing = False

    def __enter__(self) -> Self:
        transport = self._config.transport
        self._advertised_host = advertised_host(transport)
        refuse_open(transport, self._keys)
        self._socket = self._bound(transport)
        self._thread = threading.Thread(target=self._run, args=(self._socket,), name="service", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Actors are sent home, unless the learner crashes: then they wait for the next one."""
        if not is_crash(error):
            self.stop("the run is over" if error is None else f"the learner ends: {error}")
        else:
            self._close()

    def _bound(self, transport: TransportConfig) -> LearnerSocket:
        """On the configured port, or, when that is any, on the one where actors of the learner before look for it."""
        if transport.port == 0 and self._former_port:
            try:
                return LearnerSocket(transport.host, self._former_port, transport.max_message_mb, self._keys)
            except ConfigError as error:
                logger.warning("actors of the learner before will not find this one: %s", error)
        return LearnerSocket(transport.host, transport.port, transport.max_message_mb, self._keys)

    @property
    def endpoint(self) -> str:
        """tcp://HOST:PORT that actors connect to: the advertised host, which nobody else needs to bind."""
        return f"tcp://{in_url(self._advertised_host)}:{self._open_socket().port}"

    # ---- batches

    def take_batch(self, timeout_s: float) -> list[TrajectoryGroup]:
        """Exactly prompts_per_step groups that passed the consumption gate, in the order of staleness.batching.

        Raises BatchTimeout, MembersWaiting when actors have to be served with the current version first, or ConfigError
        when the verdicts say that there is no point in going on.
        """
        what, ledger = f"a batch of {self._config.rollout.prompts_per_step} groups", self._coordinator.ledger
        return self._wait(ledger.take_batch, timeout_s, what, BatchTimeout, joiners_first=True)

    def wait_window_sampled(self, timeout_s: float) -> None:
        """Until the admission window is full and nothing of it is in flight. Raises as take_batch does."""

        def is_sampled() -> bool | None:
            return self._coordinator.ledger.is_window_sampled() or None

        self._wait(is_sampled, timeout_s, "a full admission window", BatchTimeout, joiners_first=True)

    def set_version(self, version: int, steps_done: int) -> None:
        """After every step: the version that is current now, and the steps done, warm-up included."""
        with self._locked():
            self._coordinator.set_version(version, steps_done)

    def set_warmup(self, steps: int) -> None:
        """The critic's warm-up takes `steps` steps; those that follow are policy steps."""
        with self._locked():
            self._coordinator.ledger.pace.warmup_steps = steps

    def begin_anew(self) -> None:
        """The waits that StillWaiting or MembersWaiting has interrupted begin when they are repeated."""
        with self._locked():
            self._waits.clear()

    # ---- members and weights

    def members(self) -> tuple[str, ...]:
        """Connected and ready actors, sorted by name."""
        with self._locked():
            return self._coordinator.members()

    def member_ids(self) -> tuple[MemberId, ...]:
        """The same, each as the process that it is."""
        with self._locked():
            return self._coordinator.member_ids()

    def waiting_ids(self) -> tuple[MemberId, ...]:
        """Those of them that do not hold the current version."""
        with self._locked():
            return self._waiting()

    def has_company(self) -> bool:
        """Whether an actor takes part, starts up, or was heard so recently that it may still come back."""
        with self._locked():
            return self._coordinator.has_company(time.monotonic())

    def judge_ready(self, judge: Callable[[Float32Array], str | None]) -> None:
        """Dismiss actors for whose probe [probe tokens - 1], scored with the model folder that they loaded, `judge` has
        a reason: those that have become ready by now, and all that do while the run is at the folder's weights."""
        with self._locked():
            self._reception.judge_ready(judge)

    def wait_for_members(self, count: int, timeout_s: float) -> tuple[str, ...]:
        """At least `count` ready actors. Raises TimeoutError."""

        def attempt() -> tuple[str, ...] | None:
            members = self._coordinator.members()
            return members if len(members) >= count else None

        return self._wait(attempt, timeout_s, f"{count} ready actor(s)", TimeoutError)

    def command(
        self,
        phase: WeightsPhase,
        version: int,
        payloads: Mapping[MemberId, dict[str, JSON]],
        timeout_s: float,
        meanwhile: Callable[[], None] | None = None,
    ) -> dict[MemberId, WeightsReport]:
        """Send one phase to the members, call `meanwhile` here, then wait for the reports, errors included.

        An actor that is lost, or silent for `timeout_s` from the start, is not in the result. What that means for it
        is the caller's to say.
        """
        deadline = time.monotonic() + timeout_s
        with self._locked():
            command = self._reception.begin(phase, version, payloads)
        try:
            if meanwhile is not None:
                meanwhile()
            with self._changed:
                remaining_s = max(0.0, deadline - time.monotonic())
                self._changed.wait_for(lambda: self._failure is not None or not command.missing(), remaining_s)
        finally:
            with self._changed:
                self._reception.end(command)
        with self._locked():
            return dict(command.reports)

    def lost_ids(self) -> tuple[MemberId, ...]:
        """Those of the last command that were lost, or replaced, before they could report."""
        with self._locked():
            return self._reception.lost

    def dismiss(self, member: MemberId, reason: str) -> None:
        """It has to leave; its leases go back to pending."""
        with self._locked():
            self._reception.dismiss_member(member, reason)

    def quarantine(self, member: MemberId, reason: str, version: int) -> None:
        """Dismiss an actor whose weights of `version` are wrong, and drop what it drew with them, wherever that is."""
        with self._locked():
            self._reception.quarantine(member, reason, version)

    # ---- evaluation

    def evaluate(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        temperature: float,
        version: int,
        begun: Begun | None = None,
    ) -> None:
        """Start an evaluation, which shares the actors with training, or go on with what a checkpoint held of it.
        RuntimeError while another one runs."""
        with self._locked():
            evaluation = Evaluation(prompts, samples_per_prompt, temperature, version, started_s=time.monotonic())
            self._coordinator.ledger.evaluate(evaluation, begun)

    def poll_evaluation(self) -> EvalResult | None:
        """The finished evaluation's result, once; else None."""
        with self._locked():
            return self._coordinator.ledger.poll_evaluation()

    def wait_evaluation(self, timeout_s: float) -> EvalResult:
        """Raises TimeoutError when nothing of it has come for that long, or MembersWaiting as take_batch does."""
        ledger = self._coordinator.ledger

        def attempt() -> EvalResult | None:
            result = ledger.poll_evaluation()
            if result is None:
                self._raise_if_waiting()
            return result

        return self._wait(attempt, timeout_s, "the evaluation", TimeoutError, since=ledger.evaluation_moved_s)

    # ---- reports and checkpoints; these work after stop() as well

    def stats(self) -> dict[str, float]:
        """Counters since the start of the run and gauges of now (Coordinator.stats), and refused connections."""
        with self._changed:
            refusals = self._socket.refusals if self._socket is not None else Counter[Refusal]()
            counts = {f"transport/{reason}": float(refusals[reason]) for reason in Refusal}
            counts["transport/ignored_watches"] = float(self._reception.observers.num_ignored)
            counts["transport/refused_greetings"] = float(self._reception.num_refused)
            return self._coordinator.stats() | counts

    def show(self, course: Course) -> None:
        """What observers are told of training from now on."""
        with self._changed:
            self._reception.observers.course = course

    def snapshot(self) -> Snapshot:
        """Between two steps: what a checkpoint has to hold of the data side."""
        with self._changed:
            return snapshot.take(self._coordinator, time.monotonic())

    def restore(self, state: Snapshot) -> None:
        """Before the first actor connects. Raises ConfigError when the checkpoint belongs to other data."""
        with self._changed:
            snapshot.restore(self._coordinator, state)

    # ---- the end

    def stop(self, reason: str, timeout_s: float = STOP_S) -> None:
        """Tell every actor to leave, wait for their byes, close the socket. A second call does nothing."""
        if self._thread is None or self._socket is None:
            return
        with self._changed:
            self._is_stopping = True
            self._reception.begin_stop(reason)
            self._socket.wake()
            self._changed.wait_for(lambda: self._failure is not None or not self._reception.names, timeout_s)
            if left := self._reception.names:
                logger.warning("no bye within %g s from %s", timeout_s, ", ".join(left))
        self._close()

    def interrupt(self) -> None:
        """Ends every wait that has turns, now and from now on; any thread may call it."""
        with self._changed:
            self._is_interrupted = True
            self._changed.notify_all()

    def _close(self) -> None:
        if self._thread is None or self._socket is None:
            return
        with self._changed:
            self._is_closing = True
            self._socket.wake()
        limit_s = 2 * LINGER_MS / 1000
        self._thread.join(limit_s)
        if self._thread.is_alive():
            logger.error("the service thread did not end within %g s", limit_s)
        self._thread = None

    # ---- inside an API call

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The state, to be changed; what that puts down to be sent leaves with the next turn."""
        with self._changed:
            socket = self._open_socket()
            yield
            self._changed.notify_all()
            socket.wake()

    def _open_socket(self) -> LearnerSocket:
        if isinstance(self._failure, WireError):  # a prompt's row or a payload that is no JSON, or is too large
            raise ConfigError(
                f"the learner has something to send that cannot travel: {self._failure}"
            ) from self._failure
        if self._failure is not None:
            raise RuntimeError(f"the service thread failed: {self._failure!r}") from self._failure
        if self._socket is None or self._is_closing:
            raise RuntimeError("the service is not running")
        return self._socket

    def _beside_joiners(self, attempt: Callable[[], T | None]) -> T | None:
        """Joiners go first, until they are served. Who has come meanwhile does not keep what is ready."""
        if not self._called_for or self._called_for & set(self._waiting()):
            self._raise_if_waiting()
        result = attempt()
        if result is None:
            self._raise_if_waiting()
        else:
            self._called_for.clear()
        return result

    def _raise_if_waiting(self) -> None:
        if waiting := self._waiting():
            self._called_for.update(waiting)
            raise MembersWaiting(tuple(member.name for member in waiting))

    def _waiting(self) -> tuple[MemberId, ...]:
        return tuple(self._coordinator.member(name).id for name in self._coordinator.waiting_for_weights())

    def _wait(
        self,
        attempt: Callable[[], T | None],
        timeout_s: float,
        what: str,
        timeout: type[TimeoutError],
        *,
        joiners_first: bool = False,
        since: Callable[[], float] = lambda: -math.inf,
    ) -> T:
        """Repeat `attempt` whenever something changed, until its result is not None; StillWaiting between turns.

        The time-out begins anew `since` something came of what is waited for. A row of joiners puts it off only where
        nobody else could sample; when it is over they count no more.
        """
        with self._changed:
            now = time.monotonic()
            started, turn_ends = self._waits.pop(what, now), now + self.turn_s
            while True:
                socket = self._open_socket()
                if (problem := self._coordinator.ledger.verdicts.problem) is not None:
                    raise ConfigError(problem)
                started = max(started, since())
                is_over = time.monotonic() >= started + timeout_s
                try:
                    result = self._beside_joiners(attempt) if joiners_first and not is_over else attempt()
                except MembersWaiting as waiting:
                    if len(waiting.names) == len(self._coordinator.members()):
                        raise
                    if not is_over:
                        self._waits[what] = started
                        raise
                    result = None
                if result is not None:
                    socket.wake()  # what was taken or dropped makes room for leases
                    return result
                now = time.monotonic()
                if now >= started + timeout_s:
                    raise timeout(f"waited {timeout_s:g} s for {what}: {self._coordinator.describe(now)}")
                if now >= turn_ends or self._is_interrupted:
                    self._waits[what] = started
                    raise StillWaiting(what)
                self._changed.wait(min(started + timeout_s, turn_ends) - now)

    # ---- the thread

    def _run(self, socket: LearnerSocket) -> None:
        _step_aside()
        try:
            is_last = False
            while not is_last:
                socket.poll(TICK_S)
                is_last = self._is_closing  # read before the turn: what was put down earlier still leaves
                started = time.monotonic()
                self._turn(socket, started)
                time.sleep(max(0.0, started + PERIOD_S - time.monotonic()))
        except BaseException as error:
            logger.exception("the service thread failed")
            with self._changed:
                self._failure = error
                self._changed.notify_all()
        finally:
            socket.close()

    def _turn(self, socket: LearnerSocket, now: float) -> None:
        """Handle what arrived, then what time brings, and send: a peer is not lost while its message waits.

        The socket takes messages from the senders in turn. So nobody waits for more than AT_ONCE of those that somebody
        floods it with, however much work each of them makes.
        """
        arriving, is_behind = socket.receive(), False
        while arrived := list(islice(arriving, AT_ONCE)):  # decoded before the lock is taken
            with self._changed:
                for identity, message in arrived:
                    self._reception.handle(identity, message, now)
                self._reception.deliver(socket.send)
            if is_behind := time.monotonic() - now > LONGEST_TURN_S:
                break
        with self._changed:
            if not is_behind or now - self._ticked_s > BEHIND_S:
                self._ticked_s = now
                self._reception.tick(now)
            if not self._is_stopping:
                self._coordinator.dispatch(now)
            self._reception.deliver(socket.send)
            self._reception.note_losses()
            self._changed.notify_all()


def _step_aside() -> None:
    """To the last of the process's cores. The training loop and this thread wake each other whenever one lets go of the
    interpreter, and Linux likes to put a thread where it was woken: on one core both would wait for each other."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        os.sched_setaffinity(0, cores[-1:])  # of this thread alone

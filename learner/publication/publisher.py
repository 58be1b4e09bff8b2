"""Publication: how the learner's policy becomes the next version in every actor.

`Publisher.publish(version)` brings a version to all members, `Publisher.serve(version)` to those who joined late, over
a group of their own, while the others go on sampling. Both are collectives over the learner's ranks. All of them
gather the weights bucket by bucket (learner/publication/buckets.py), and rank 0 leads the members through the phases of
WeightsPhase (learner/publication/control.py) and sends (learner/publication/transfer.py). An attempt on rank 0 is

    PAUSE -> INIT, when the members are not those of the last time -> START -> UPDATE per bucket -> FINISH

and RESUME follows when it worked. While one bucket is sent, the next one is gathered. Between two buckets all ranks
learn whether to go on, so that nobody gathers for nothing. An attempt that failed is repeated with whoever is left.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeAlias

import torch
import torch.distributed as dist

from common.broadcast import Background, Buffers
from common.config import Config
from common.types import MemberId, WeightsPhase
from learner.networks.model import Policy
from learner.publication.buckets import BUCKET_BYTES, Bucket, PolicySource, gather
from learner.publication.control import ActorControl, Channel, Costs, Deadlines, PublishError, names
from learner.publication.probe import Probe, Verdict
from learner.publication.transfer import Line, Transfer, transfer_for

logger = logging.getLogger(__name__)

Members: TypeAlias = Callable[[ActorControl], tuple[MemberId, ...]]  # whom to reach, of those who are there

_NOBODY: Verdict[MemberId] = Verdict(good=(), refused={}, difference=None, largest=None)

FRUITLESS_ATTEMPTS = 3  # failed attempts in a row after which nobody had to leave: it is no actor's fault then
LOST_IN_A_ROW = 3  # publications in which a member was lost, one after another, after which it leaves


class _Decision(IntEnum):
    """What rank 0 tells the others."""

    GO_ON = 0
    NO_MEMBERS = 1
    GIVE_UP = 2


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What one publication cost and whom it reached."""

    version: int
    members: tuple[MemberId, ...]
    seconds: float
    costs: Costs
    # Of the probe (learner/publication/probe.py), in nats; None when no actor scored it
    probe_difference: float | None  # mean over its tokens, of the member where it is largest
    probe_max: float | None = None  # over members and tokens
    probe_floor: float | None = None  # the mean that was seen at version 0

    def metrics(self) -> dict[str, float]:
        """As they are logged, those of the actors on rank 0 only: what was measured."""
        probe = {
            "weights/probe_difference": self.probe_difference,
            "weights/probe_max": self.probe_max,
            "weights/probe_floor": self.probe_floor,
        }
        return {name: value for name, value in probe.items() if value is not None} | {
            "weights/gather_s": self.costs.gather_s,
            "weights/send_s": self.costs.send_s,
            "weights/wait_s": self.costs.wait_s,
        }


@dataclass
class Publisher:
    """Brings versions to members. `control` is None on ranks other than 0.

    A version names one set of weights: who joins late gets what the others got, also when the policy has moved on
    since. For that a copy is kept where it can happen, with weights.publish_every > 1 or staleness.exact: one set of
    weights in host memory, shared out over the ranks like the policy. It is the smallest mend: joiners that wait for
    the next publication would deadlock a run without other actors, and a version in between would break the count
    that the staleness bound rests on. After a resume, the version under way is the weights of the checkpoint.
    """

    config: Config
    policy: Policy
    control: ActorControl | None
    rank: int
    probe_token_ids: torch.Tensor  # int64 [probe tokens]
    new_transfer: Callable[[Config], Transfer] = transfer_for
    bucket_bytes: int = BUCKET_BYTES
    _source: PolicySource = field(init=False)
    # Rank 0 only: memory for buckets, the way to all members, those who got the last version over it, those of whom one
    # has broken it and those of whom one has broken the way to joiners, nobody knows which, and the attempt under way.
    _buffers: Buffers | None = field(init=False)
    _main: Line = field(init=False)
    _proven: set[MemberId] = field(default_factory=set, init=False)
    _suspected: set[MemberId] = field(default_factory=set, init=False)
    _doubted: set[MemberId] = field(default_factory=set, init=False)
    _failed_alone: set[MemberId] = field(
        default_factory=set, init=False
    )  # of the doubted, while nobody held the version
    _num_lost: Counter[MemberId] = field(default_factory=Counter, init=False)  # publications in a row, by member
    _channel: Channel | None = field(default=None, init=False)
    _sending: Background[None] | None = field(default=None, init=False)
    _version: int | None = field(default=None, init=False)  # the last one that was held
    probe: Probe = field(init=False)

    def __post_init__(self) -> None:
        moves_on = self.config.weights.publish_every > 1 or self.config.staleness.exact
        self._source = PolicySource(self.policy, getattr(torch, self.config.model.dtype.value), keeps=moves_on)
        self._deadlines = Deadlines(self.config.weights.timeout_s)
        self._main = self._new_line()
        self._buffers = Buffers() if self.control is not None else None
        self.probe = Probe(self.config, self.probe_token_ids)

    def hold(self, version: int) -> None:
        """From now on the policy's present weights are `version`; a collective. A second call for it does nothing."""
        if version != self._version:
            self._source.hold()
            self.probe.measure(self.policy, version)
            self._version = version

    def publish(self, version: int) -> Publication:
        """Brings every member to `version`: the policy's present weights, or, when it is the version that was
        published last, those of that time. Called by all ranks together.

        With no actor connected, or none left, it reaches nobody: whoever comes later is served before it gets a
        lease. When FRUITLESS_ATTEMPTS attempts in a row failed without anybody to blame, those who have joined since
        the last publication are left out. If that works, they are suspected: one at a time takes part in the
        publications that follow, and leaves if it fails again; the others are served as joiners. Raises PublishError
        on every rank when there is nobody to leave out.
        """
        self.hold(version)
        newcomers = self._newcomers()
        try:
            publication = self._reach(version, self._main, self._trusted)
        except PublishError as error:
            if self._decided(_Decision.GO_ON if newcomers else _Decision.GIVE_UP) is _Decision.GIVE_UP:
                raise
            publication = self._reach(version, self._main, self._known)
            if publication.members:
                reason = f"the weights could be sent to the others without it, and not with it: {error}"
                self._accuse(newcomers, self._suspected, reason)
        self._proven = set(publication.members)
        self._suspected -= self._proven
        self._doubted -= self._proven
        return publication

    def serve(self, version: int) -> Publication:
        """Brings those members that lack `version`, the one that is held, to it. Nobody else pauses or takes part.
        Called by all ranks together, and again as long as somebody waits.

        A joiner to which nothing can be sent twice leaves, if others hold the version: they show whose fault that is.
        Of several that failed together each is tried alone then. Raises PublishError where nobody holds it and all of
        them have failed, or one has twice and nobody was served in between.
        """
        assert version == self._version, f"version {version} is not the one that is held, which is {self._version}"
        joiners = self._next_joiners()
        if set(joiners) & set(self._main.members):  # came back: its workers leave one group for the other
            self._main.close()
        side = self._new_line()
        try:
            served = self._reach(
                version, side, lambda control: tuple(member for member in control.member_ids() if member in joiners)
            )
        except PublishError as error:
            if self._decided(self._suspect(joiners, error)) is _Decision.GIVE_UP:
                raise
            return Publication(version=version, members=(), seconds=0.0, costs=Costs(), probe_difference=None)
        finally:
            side.close()
        self._doubted.difference_update(served.members)
        if served.members:
            self._failed_alone.clear()
        if served.members:
            logger.info("version %d has reached %s in %.2f s", version, names(served.members), served.seconds)
        return served

    def shutdown(self) -> None:
        """Ends the transfer; the next attempt makes a new one."""
        self._main.close()

    def _reach(self, version: int, line: Line, members: Members) -> Publication:
        """Delivers to `members`, and judges what came of it."""
        started, costs = time.monotonic(), Costs()
        verdict = self._finish(version, line) if self._deliver(version, line, members, costs) else _NOBODY
        return Publication(
            version=version,
            members=verdict.good,
            seconds=time.monotonic() - started,
            costs=costs,
            probe_difference=verdict.difference,
            probe_max=verdict.largest,
            probe_floor=self.probe.floor,
        )

    def _deliver(self, version: int, line: Line, members: Members, costs: Costs) -> bool:
        """Attempts until all of `members`, asked before each, have the weights; False when there are none."""
        problem, fruitless, gone = "", 0, set[MemberId]()

        def present() -> tuple[MemberId, ...]:
            there = members(self.control) if self.control is not None else ()
            return tuple(member for member in there if member not in gone)

        while True:
            asked = present()
            decision = _Decision.GO_ON if asked else _Decision.NO_MEMBERS
            decision = self._decided(_Decision.GIVE_UP if fruitless == FRUITLESS_ATTEMPTS else decision)
            if decision is _Decision.GIVE_UP:
                raise PublishError(f"version {version} was not published and no actor is to blame: {problem}")
            if decision is _Decision.NO_MEMBERS:
                logger.warning("version %d goes to nobody: no actor is there to take it", version)
                line.close()
                return False
            found = self._attempt(version, line, asked, costs)
            if self._channel is not None:
                gone |= self._channel.lost
                self._note_lost(self._channel.lost)
            if found is None:
                return True
            problem = found
            logger.warning("publication of version %d: %s", version, problem)
            lost = set(asked) - set(present())
            gone |= lost  # who comes back is served as a joiner, lest it fail for ever
            fruitless = 0 if lost else fruitless + 1

    def _attempt(self, version: int, line: Line, members: tuple[MemberId, ...], costs: Costs) -> str | None:
        """One try on all ranks; None when it worked, else the problem."""
        problem = self._agreed_problem(lambda: self._begin(version, line, members, costs))
        if problem is None:
            for bucket in _clocked(gather(self._source, self.bucket_bytes, self._buffers), costs):
                problem = self._agreed_problem(self._wait)
                if problem is not None:
                    break
                self._send(line, bucket)
            else:
                problem = self._agreed_problem(self._end)
        if problem is not None:
            line.close()
        return problem

    # ---- rank 0's part, nothing elsewhere

    def _note_lost(self, lost: Iterable[MemberId]) -> None:
        """Who is lost in every publication leaves: it would be served for ever."""
        assert self.control is not None
        for member in lost:
            self._num_lost[member] += 1
            if self._num_lost[member] == LOST_IN_A_ROW:
                del self._num_lost[member]
                self.control.dismiss(member, f"its connection was lost in {LOST_IN_A_ROW} publications in a row")

    def _new_line(self) -> Line:
        return Line(lambda: self.new_transfer(self.config))

    def _next_joiners(self) -> tuple[MemberId, ...]:
        """All who wait, but one at a time of those who failed together."""
        waiting = self.control.waiting_ids() if self.control is not None else ()
        trusted = tuple(member for member in waiting if member not in self._doubted)
        return trusted or tuple(sorted(waiting, key=lambda member: (member in self._failed_alone, member))[:1])

    def _suspect(self, joiners: tuple[MemberId, ...], error: PublishError) -> _Decision:
        """After a delivery to them that failed with nobody to blame: whether the run goes on, and without whom."""
        if self.control is None:
            return _Decision.GO_ON
        waiting = set(self.control.waiting_ids())
        if set(self.control.member_ids()) == waiting:  # nobody shows that the weights can be sent
            is_hopeless = len(joiners) == 1 and joiners[0] in self._failed_alone
            self._doubted.update(joiners)
            self._failed_alone.update(joiners if len(joiners) == 1 else ())
            return _Decision.GO_ON if waiting - self._failed_alone and not is_hopeless else _Decision.GIVE_UP
        self._accuse(joiners, self._doubted, f"others hold the weights, and they could not be sent to it: {error}")
        return _Decision.GO_ON

    def _accuse(self, members: tuple[MemberId, ...], accused: set[MemberId], reason: str) -> None:
        """One of them is to blame. It leaves if it is alone and was accused before, else all of them are accused."""
        if self.control is not None and len(members) == 1 and members[0] in accused:
            self.control.dismiss(members[0], reason)
        accused.update(members)

    def _trusted(self, control: ActorControl) -> tuple[MemberId, ...]:
        """All members, but one at a time of those who are suspected."""
        members = control.member_ids()
        left_out = [member for member in members if member in self._suspected][1:]
        return tuple(member for member in members if member not in left_out)

    def _known(self, control: ActorControl) -> tuple[MemberId, ...]:
        """Those who got the last version with the others."""
        return tuple(member for member in control.member_ids() if member in self._proven)

    def _newcomers(self) -> tuple[MemberId, ...]:
        """Those of the trusted who are not known, if anybody is."""
        if self.control is None or not (known := self._known(self.control)):
            return ()
        return tuple(member for member in self._trusted(self.control) if member not in known)

    def _begin(self, version: int, line: Line, members: tuple[MemberId, ...], costs: Costs) -> None:
        """PAUSE, INIT when the members are not those of the last time, START."""
        if self.control is None:
            return
        self._sending = None
        self._channel = Channel(self.control, members, version, self._deadlines, costs)
        self._channel.pause()
        line.meet(self._channel)
        self._channel.run(WeightsPhase.START)

    def _send(self, line: Line, bucket: Bucket | None) -> None:
        """UPDATE, in a thread: the next bucket is gathered meanwhile."""
        if bucket is not None and self._channel is not None:
            channel = self._channel
            self._sending = Background(lambda: line.send(channel, bucket))

    def _wait(self) -> None:
        """Until the bucket that is being sent has arrived everywhere."""
        sending, self._sending = self._sending, None
        if sending is None:
            return
        try:
            sending.result(self._deadlines.thread_s)
        except TimeoutError as error:
            raise PublishError(f"the sending thread does not come back: {error}") from error

    def _end(self) -> None:
        self._wait()
        if self._channel is not None:
            self._channel.run(WeightsPhase.FINISH)

    # ---- between ranks

    def _agreed_problem(self, part: Callable[[], None]) -> str | None:
        """Rank 0 plays its part; then all ranks know whether that failed. A collective."""
        problem = None
        try:
            part()
        except PublishError as error:
            problem = str(error)
        if self._decided(_Decision.GO_ON if problem is None else _Decision.GIVE_UP) is _Decision.GO_ON:
            return None
        return problem or "rank 0 could not reach the actors (see its log)"

    def _decided(self, decision: _Decision) -> _Decision:
        """Rank 0's decision on all ranks."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return decision
        code = torch.tensor([decision], dtype=torch.int64)
        dist.broadcast(code, src=0)
        return _Decision(int(code.item()))

    # ---- the probe

    def _finish(self, version: int, line: Line) -> Verdict[MemberId]:
        """Resumes generation, and dismisses members whose probe is not the learner's own. Who is lost meanwhile is
        served when it is back."""
        if self.control is None or self._channel is None:
            return _NOBODY
        asked = self._channel.members
        reports = self.control.command(
            WeightsPhase.RESUME, version, {actor: {} for actor in asked}, self.config.weights.timeout_s
        )
        lost = self.control.lost_ids()
        self._note_lost(lost)
        if lost:
            line.close()  # who comes back may have lost its end of the transfer too
        verdict = self.probe.judge(version, tuple(member for member in asked if member not in lost), reports)
        for actor, reason in verdict.refused.items():
            self.control.quarantine(actor, reason, version)
        for actor in verdict.good:
            self._num_lost.pop(actor, None)
        return verdict


def _clocked(buckets: Iterator[Bucket | None], costs: Costs) -> Iterator[Bucket | None]:
    """Books the time that gathering takes."""
    while True:
        started = time.monotonic()
        try:
            bucket = next(buckets)
        except StopIteration:
            return
        finally:
            costs.gather_s += time.monotonic() - started
        yield bucket

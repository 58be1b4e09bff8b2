"""The supervisor: starts the processes of a run, watches them and leaves none behind.

Children come in two kinds. Leaders (the learner's ranks) decide: the run succeeds when all of them have exited with 0.
When one crashes or is killed, all are started again, from their newest checkpoint; when one gives up by itself the run
ends with its code. Followers (actors) serve: one that was ready and dies is started again, one that dies before it
was ever ready is not, because it would only die again (unless its leaders died meanwhile). Both have a budget of
restarts (common/restarts.py).

A follower that is given up does not end the run, because others may take part, from other machines as well. The leaders
know who does; they ask here (common/control.py) whether somebody may still come, and end the run when nobody may.

The first SIGINT, SIGTERM or SIGHUP asks the leaders to finish (they save a checkpoint and send all actors home), the
second ends everything at once, unless it is an echo of the first (common/stopping.py).
"""

import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from common.causes import CRASHED, signal_name
from common.child import CannotStart, Child, ChildSpec
from common.config import ConfigError
from common.console import Console
from common.control import Status, fitting
from common.family import Family
from common.restarts import RestartBudget
from common.types import JSON

RESTARTED = "ASYNC_VAPO_RESTARTED"  # environment variable of leaders that the supervisor has started again

FAREWELL_S = 10.0  # for followers to leave by themselves after the leaders have ended
STOP_S = 4.0  # from asking a group of children to leave until they are killed
LEADERS_END_S = 60.0  # between the first and the last leader's end
MAX_FOLLOWERS = 512  # on one machine, that can be asked for while the run goes on
SETTLE_S = 2.0  # from a leader's failure: others fail because of it, and who was the first may be seen late


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: the exit code for the shell, and one sentence unless all went well or it has been said."""

    exit_code: int
    message: str | None


class Supervisor:
    """Runs children to the end of the run; none of them outlives `run`.

    Args:
        specs: of leaders and of the followers to begin with.
        log_dir: made when absent.
        stop_timeout_s: how long leaders may take to finish after the first interrupt.
        recruit: spec of one more follower beside those that are given. Raises ConfigError when there is no room.
        run_dir: where RUN/control will be; None: no other process is listened to.
        console: what shows the run; None: lines as they come.
    """

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        log_dir: Path,
        *,
        stop_timeout_s: float = 60.0,
        recruit: Callable[[Sequence[ChildSpec]], ChildSpec] | None = None,
        run_dir: Path | None = None,
        console: Console | None = None,
    ) -> None:
        log_dir.mkdir(parents=True, exist_ok=True)
        self._log_dir = log_dir
        self._stop_timeout_s = stop_timeout_s
        self._recruit = recruit
        self._leaders = [Child(spec, log_dir) for spec in specs if spec.is_leader]
        self._followers = [Child(spec, log_dir) for spec in specs if not spec.is_leader]
        self._num_wanted = len(self._followers)
        first = self._leaders[0].spec
        self._budget = RestartBudget(first.restarts, first.restart_window_s)  # of the leaders
        self._family = Family(lambda: self._children, self._command, run_dir, console or Console())
        self._interrupts = self._family.interrupts  # so far
        self._leaders_lost_at = -math.inf  # monotonic, of their last crash
        # Monotonic times: of the first leader's good end, when a failure's culprit is known, when all start again
        self._first_end: float | None = None
        self._culprit_known_at: float | None = None
        self._leaders_start_at: float | None = None

    def run(self) -> Outcome:
        """Start all, return when the run has ended and every process is gone."""
        with self._family:
            try:
                for leader in self._leaders:
                    self._family.start(leader)
            except CannotStart as error:
                return self._wind_down(Outcome(exit_code=1, message=str(error)))
            for child in self._followers:
                self._start_follower(child)
            return self._wind_down(self._watch())

    @property
    def _children(self) -> list[Child]:
        return [*self._leaders, *self._followers]

    def _watch(self) -> Outcome:
        """The first thing that ends the run."""
        while True:
            outcome = self._judge(time.monotonic())
            if outcome is not None:
                return outcome
            self._family.pump(self._next_deadline())

    def _judge(self, now: float) -> Outcome | None:
        if self._interrupts:
            number = self._interrupts[0]
            return Outcome(exit_code=128 + number, message=f"interrupted by {signal_name(number)}")
        for child in self._followers:
            self._look_after(child, now)
        return self._judge_leaders(now)

    # ---- followers

    def _look_after(self, child: Child, now: float) -> None:
        """Whatever is due: its next life, its end, the end of the patience with it."""
        if child.start_again_at is not None:
            if now >= child.start_again_at:
                self._family.kill_orphans()  # what the former life left behind may hold its memory or port
                self._start_follower(child)
        elif not child.is_running:
            if not child.is_settled and child.was_started:
                child.is_settled = True
                self._follower_ended(child, now)
        elif child.leave_by is not None and now >= child.leave_by:
            self._family.say(f"{child.spec.name} did not leave within {child.spec.leave_timeout_s:g} s and is killed")
            child.send_signal(signal.SIGKILL)
            child.leave_by = math.inf
        elif child.why_given_up is None and not child.is_ready and now >= child.started_at + child.spec.start_timeout_s:
            child.send_signal(signal.SIGKILL)
            self._give_up(
                child,
                f"{child.spec.name} was not ready within {child.spec.start_timeout_s:g} s (log: {child.log_path})",
            )

    def _start_follower(self, child: Child) -> str:
        """What became of it."""
        try:
            self._family.start(child)
        except CannotStart as error:
            self._try_later(child, str(error), time.monotonic())
            return str(error)
        return _started(child.spec)

    def _follower_ended(self, child: Child, now: float) -> None:
        self._family.drain(child)
        self._family.kill_orphans()
        if child.why_given_up is not None:  # killed for that reason
            return
        if child.leave_by is not None:
            self._family.say(f"{child.spec.name} has left")
            return
        if child.exit_code == 0:  # the leaders have sent it home
            if self._was_sent_home_by_the_lost(child, now):
                child.start_again_at = now + FAREWELL_S  # unless it was by those of today, which end then
            return
        how = child.how_it_ended()
        if not child.was_ready and not child.is_ready and child.started_at > self._leaders_lost_at:
            self._give_up(child, f"{how}, before it was ready")
            return
        self._try_later(child, how, now)

    def _was_sent_home_by_the_lost(self, child: Child, now: float) -> bool:
        """By leaders that thought that the run was over and then crashed, and it took its time: the others are at work
        by now, and wait for it."""
        is_over = self._leaders_start_at is not None or not any(leader.is_running for leader in self._leaders)
        is_recent = now < self._leaders_lost_at + child.spec.leave_timeout_s
        return not is_over and is_recent and child.started_at < self._leaders_lost_at

    def _try_later(self, child: Child, why: str, now: float) -> None:
        backoff_s = child.budget.take(now)
        if backoff_s is None:
            self._give_up(child, f"{why}; {child.budget} are used up")
            return
        child.start_again_at = now + backoff_s
        self._family.say(f"{why}; starting it again in {backoff_s:g} s")

    def _give_up(self, child: Child, why: str) -> None:
        child.why_given_up = why
        self._family.say(f"warning: {why}; it is not started again, the run goes on while another actor takes part")

    # ---- leaders

    def _judge_leaders(self, now: float) -> Outcome | None:
        """Whether they have ended the run; starts them again when one has crashed."""
        if self._leaders_start_at is not None:
            if now >= self._leaders_start_at:
                return self._start_leaders_again()
            return None
        ended = [leader for leader in self._leaders if not leader.is_running]
        if any(leader.exit_code != 0 for leader in ended):
            return self._leaders_failed(len(ended) == len(self._leaders), now)
        if len(ended) == len(self._leaders):
            return Outcome(exit_code=0, message=None)
        if ended and self._first_end is None:
            self._first_end = now
        if self._first_end is not None and now >= self._first_end + LEADERS_END_S:
            names = ", ".join(leader.spec.name for leader in self._leaders if leader.is_running)
            return Outcome(exit_code=1, message=f"{names} did not end within {LEADERS_END_S:g} s of the first rank")
        return None

    def _start_leaders_again(self) -> Outcome | None:
        self._leaders_start_at = self._culprit_known_at = self._first_end = None
        try:
            for leader in self._leaders:
                self._family.start(leader, **{RESTARTED: "1"})
        except CannotStart as error:
            return Outcome(exit_code=1, message=str(error))
        for child in self._followers:
            if child.was_sent_home:  # by leaders that thought that the run was over
                self._start_follower(child)
        return None

    def _leaders_failed(self, all_ended: bool, now: float) -> Outcome | None:
        if self._culprit_known_at is None:
            self._culprit_known_at = now + SETTLE_S
        if not all_ended and now < self._culprit_known_at:
            return None
        failed = [leader for leader in self._leaders if not leader.is_running and leader.exit_code != 0]
        # A rank whose peer is gone crashes in its next collective: it is the last to be blamed.
        culprit = min(failed, key=lambda leader: (not leader.was_killed, leader.exit_code == CRASHED))
        for leader in self._leaders:
            self._family.drain(leader)
        how = culprit.how_it_ended()
        if not culprit.has_crashed:
            return Outcome(exit_code=culprit.exit_code, message=how)
        backoff_s = self._budget.take(now)
        if backoff_s is None:
            used_up = f"; {self._budget} are used up" if self._budget.limit else ""
            return Outcome(exit_code=culprit.exit_code, message=how + used_up)
        self._kill_leaders()
        self._leaders_lost_at, self._leaders_start_at = now, now + backoff_s
        self._family.say(f"{how}; starting the learner again in {backoff_s:g} s, from its newest checkpoint")
        return None

    def _kill_leaders(self) -> None:
        """Those that are left wait for one that is gone."""
        for leader in self._leaders:
            leader.send_signal(signal.SIGKILL)
        for leader in self._leaders:
            leader.popen.wait()
            self._family.drain(leader)
        self._family.kill_orphans()

    def _next_deadline(self) -> float | None:
        """Monotonic time at which `_judge` may have something to do without anything having happened."""
        times = [self._leaders_start_at, self._culprit_known_at if self._leaders_start_at is None else None]
        if self._first_end is not None:
            times.append(self._first_end + LEADERS_END_S)
        for child in self._followers:
            times.append(child.start_again_at)
            if child.is_running:
                times.append(child.leave_by)
                if not child.is_ready and child.why_given_up is None:
                    times.append(child.started_at + child.spec.start_timeout_s)
        return min((time for time in times if time is not None), default=None)

    # ---- the end

    def _wind_down(self, outcome: Outcome) -> Outcome:
        """Leaders finish first, when interrupted; then followers leave; another interrupt ends the patience."""
        patience = len(self._interrupts)
        if self._interrupts:
            outcome = self._let_leaders_finish(outcome, patience)
        if all(leader.has_finished for leader in self._leaders):  # and has sent the followers home
            staying = [child for child in self._followers if child.is_ready or not self._interrupts]
            self._wait(staying, FAREWELL_S, patience)
        for group in (self._followers, self._leaders):
            for child in group:
                child.send_signal(signal.SIGINT)  # never an echo of what it was told before
            self._wait(group, STOP_S, patience)
        return outcome

    def _let_leaders_finish(self, outcome: Outcome, patience: int) -> Outcome:
        """They finish their step, save a checkpoint and send the actors home; who is not at work yet leaves now."""
        number = self._interrupts[0]
        for leader in self._leaders:
            leader.send_signal(number if number in (signal.SIGINT, signal.SIGTERM) else signal.SIGTERM)
        for child in self._followers:
            if not child.is_ready:
                child.send_signal(signal.SIGINT)
        self._wait(self._leaders, self._stop_timeout_s, patience)
        slow = [leader.spec.name for leader in self._leaders if leader.is_running]
        if slow and len(self._interrupts) == patience:
            return Outcome(
                exit_code=outcome.exit_code,
                message=f"{outcome.message}; {', '.join(slow)} did not stop within {self._stop_timeout_s:g} s "
                "(learner.stop_timeout_s) and is killed: what was trained since the newest checkpoint is lost",
            )
        failed = [child for child in self._leaders if not child.is_running and child.was_started]
        failed = [child for child in failed if child.exit_code not in (0, 128 + number, 128 + signal.SIGTERM)]
        if failed and self._leaders_start_at is None:
            return Outcome(exit_code=outcome.exit_code, message=f"{outcome.message}; {failed[0].how_it_ended()}")
        return outcome

    def _wait(self, children: Sequence[Child], timeout_s: float, patience: int) -> None:
        """Until all of them have ended, the time is up, or another interrupt came."""
        deadline = time.monotonic() + timeout_s
        while any(child.is_running for child in children) and time.monotonic() < deadline:
            if len(self._interrupts) > patience:
                return
            self._family.pump(deadline)

    # ---- requests of other processes

    def _command(self, request: JSON) -> JSON:
        """Raises ConfigError for what is not possible."""
        match request:
            case {"command": "status"}:
                return asdict(self._status())
            case {"command": "resize", "count": int(count)} if count >= 0:
                return {"done": fitting(self._resize(count))}
        raise ConfigError(f"the supervisor does not know the request {request!r:.200}")

    def _status(self) -> Status:
        given_up = [child.why_given_up for child in self._followers if child.why_given_up is not None]
        return Status(wanted=self._num_wanted, active=len(self._active), given_up=tuple(fitting(given_up)))

    @property
    def _active(self) -> list[Child]:
        return [child for child in self._followers if child.is_active]

    def _resize(self, count: int) -> list[str]:
        """Starts or dismisses followers until `count` take part; what was done. All of it is possible, or nothing."""
        if self._interrupts or self._recruit is None:
            raise ConfigError("the run is about to end: its actors stay as they are")
        if count > MAX_FOLLOWERS:
            raise ConfigError(f"{count} local actors are more than {MAX_FOLLOWERS}: start others on other machines")
        active = self._active
        new = list[ChildSpec]()
        in_use = [child.spec for child in self._followers if child.is_running or child.is_active]
        for _ in range(count - len(active)):
            new.append(self._recruit([*in_use, *new]))
        self._num_wanted = count
        names = {spec.name for spec in new}
        self._followers = [child for child in self._followers if child.spec.name not in names]
        recruits = [Child(spec, self._log_dir) for spec in new]
        self._followers += recruits
        return [*map(self._start_follower, recruits), *map(self._dismiss, active[count:])]

    def _dismiss(self, child: Child) -> str:
        child.leave_by = time.monotonic() + child.spec.leave_timeout_s
        child.start_again_at = None
        child.send_signal(signal.SIGTERM if child.is_ready else signal.SIGINT)
        if not child.is_running:
            return f"{child.spec.name} is not started again"
        return f"{child.spec.name} leaves; it has {child.spec.leave_timeout_s:g} s to finish what it samples"


def _started(spec: ChildSpec) -> str:
    cores = ",".join(map(str, spec.cores)) or "any"
    gpus = spec.environment.get("CUDA_VISIBLE_DEVICES")
    return f"{spec.name} is started on cores {cores}" + (f" and GPU {gpus}" if gpus else "")


def deal_cores(cores: Sequence[int], num_children: int) -> list[tuple[int, ...]]:
    """Cores of each child: contiguous shares, as equal as possible; too few: one each, round-robin."""
    if len(cores) < num_children:
        return [(cores[i % len(cores)],) for i in range(num_children)]
    share, extra = divmod(len(cores), num_children)
    starts = [i * share + min(i, extra) for i in range(num_children + 1)]
    return [tuple(cores[start:stop]) for start, stop in pairwise(starts)]

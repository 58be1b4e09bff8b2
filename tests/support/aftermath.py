"""What a run under chaos came to: judged by its files, its processes' logs, and what was done to them.

The history is the one that remained: steps that a killed learner had done and its successor did again count as the
successor did them.
"""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from common.control import CONTROL_VARIABLE
from common.loading import read_config
from common.metrics import read_jsonl
from common.types import TrajectoryGroup
from learner.checkpoint import complete_steps, step_folder
from learner.leader import ROLLOUTS
from learner.rollouts.leases import LEASES_PER_LIFE
from learner.rollouts.record import Record
from learner.rollouts.snapshot import read_snapshot
from tests.support.network_engine import stamp

WEIGHTS_TIMEOUT_S = 6.0
TIME_FORMAT = "%Y-%m-%d %H:%M:%S,%f"


class Kind(StrEnum):
    """What happens to an actor, or to the learner."""

    KILL = "kill"  # SIGKILL
    STOP = "stop"  # SIGSTOP, and SIGCONT before anybody's time is up: nobody may be dismissed for it
    FREEZE = "freeze"  # SIGSTOP for longer than an actor may be silent
    HANG = "hang"  # its engine draws nothing any more
    WEDGE = "wedge"  # its engine does not answer either
    RESIZE = "resize"  # actors leave or join, as by `run.py actors --count`
    LEARNER = "kill the learner"


@dataclass
class Event:
    at_s: float  # of the clock on the wall
    kind: Kind
    name: str  # of whom; empty for RESIZE
    detail: str = ""
    pid: int = 0  # of that actor's process
    until_s: float = float("inf")  # STOP and FREEZE: when it went on; HANG and WEDGE: when that process ended

    def __str__(self) -> str:
        at = datetime.fromtimestamp(self.at_s).strftime("%H:%M:%S.%f")[:-3]
        return f"{at}  {self.kind:<16} {self.name} {self.detail}".rstrip()


HUNG = (Kind.HANG, Kind.WEDGE)


@dataclass(frozen=True)
class Excuse:
    """An actor may be dismissed for `reason` while it suffers one of `kinds`, and for `after_s` seconds more.

    Who hangs does so until its process ends, and that process alone is excused; so is one that was frozen, for as long
    as the learner may have waited for it.
    """

    reason: str  # how it begins
    kinds: tuple[Kind, ...]
    after_s: float = 0.0
    count: int = 1  # of these events, to the same process


# Nothing excuses any other reason: a malformed message, refused groups, other weights, an error of its own.
EXCUSES = (
    Excuse("its engine has drawn no token in ", HUNG),
    Excuse("it did not answer within ", (Kind.WEDGE,)),
    Excuse("it did not answer within ", (Kind.FREEZE,), after_s=WEIGHTS_TIMEOUT_S),
    Excuse("others hold the weights, and they could not be sent to it: ", (Kind.WEDGE,)),
    Excuse("others hold the weights, and they could not be sent to it: ", (Kind.FREEZE,), after_s=WEIGHTS_TIMEOUT_S),
    Excuse("its connection was lost in ", (Kind.FREEZE,), after_s=WEIGHTS_TIMEOUT_S, count=3),
)
REFUSED = "the learner refused this actor: "  # what a dismissed one says, before the reason


def is_excused(events: Collection[Event], name: str, reason: str, at_s: float) -> bool:
    """Whether what has happened to this actor explains why it was dismissed."""
    for excuse in EXCUSES:
        theirs = [e for e in events if e.name == name and e.kind in excuse.kinds and e.at_s <= at_s]
        for last in theirs:
            of_it = [event for event in theirs if event.pid == last.pid]
            is_in_time = at_s <= last.until_s + excuse.after_s
            if reason.startswith(excuse.reason) and is_in_time and len(of_it) >= excuse.count:
                return True
    return False


def excused_share(events: Collection[Event], names: Collection[str], began_s: float, ended_s: float) -> float:
    """Of all (actor, second): those in which a dismissal would be excused, for whatever reason is excused then."""
    seconds = np.arange(began_s, ended_s)
    reasons = {excuse.reason for excuse in EXCUSES}
    excused = [any(is_excused(events, name, reason, at_s) for reason in reasons) for name in names for at_s in seconds]
    return float(np.mean(excused)) if excused else 0.0


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the run came to, and what was wrong with it."""

    seed: int
    settings: list[str]
    seconds: float
    events: dict[str, int]  # by kind
    steps: int
    prompts: int
    steps_again: int  # done by a learner that was killed, and done again
    actor_starts: int
    dropped: dict[str, int]  # groups by reason, as the last line of the metrics has them
    prefix_tokens: int  # handed on with a prompt that came back
    max_age: int  # versions, read from the tokens
    bound: int  # max_staleness
    tokens: int
    dismissed: int
    excused: float  # share of (actor, second) in which a dismissal would have been
    faults: list[str]


class Aftermath:
    """Of the run in `run_dir`, which was to train `steps` steps, the first of them the critic's warm-up, and with them
    every prompt of one epoch.

    The chaos was to last `minutes`.
    """

    def __init__(self, run_dir: Path, steps: int, events: Sequence[Event], minutes: float) -> None:
        self._run_dir = run_dir
        self._steps = steps
        self._events = events
        self._minutes = minutes
        self._config = read_config(run_dir / "config.yaml")
        self._ledger = list(read_jsonl(run_dir / "ledger.jsonl"))
        rows = list(read_jsonl(run_dir / "metrics.jsonl"))
        self._done_s = max(row["time"] for row in rows if "time/step_s" in row)  # the last step
        self._last = next(row for row in reversed(rows) if "time/step_s" in row)
        record = Record(run_dir)
        self._groups = {step: record.groups(step) for step in range(1, record.last_step + 1)}
        self._ages = np.concatenate([self._ages_of(step, groups) for step, groups in self._groups.items()])
        self._learner_log = (run_dir / "logs" / "learner-0.log").read_text(errors="replace")

    def found(self, seed: int, settings: list[str], seconds: float, faults: list[str]) -> Found:
        """With `faults` in front of those that are found here."""
        train_log = (self._run_dir.parent / "train.log").read_text(errors="replace")
        starts = self._config.actors.count + train_log.count("starting it again in ")
        drops = {name.removeprefix("drops/"): n for name, n in self._last.items() if name.startswith("drops/") and n}
        return Found(
            seed=seed,
            settings=settings,
            seconds=round(seconds, 1),
            events=dict(Counter(str(event.kind) for event in self._events)),
            steps=len(self._groups),
            prompts=len(self._ledger),
            steps_again=sum(map(int, re.findall(r"(\d+) steps are done again", self._learner_log))),
            actor_starts=starts + sum(event.detail.count("is started on") for event in self._events),
            dropped=drops,
            prefix_tokens=self._last["tokens/prefix"],
            max_age=int(self._ages.max()),
            bound=self._config.staleness.max_staleness,
            tokens=len(self._ages),
            dismissed=self._learner_log.count(" is dismissed: "),
            excused=round(excused_share(self._events, self._actors(), self._began_s, self._done_s), 3),
            faults=[
                *faults,
                *self._too_little_chaos(),
                *self._wrong_history(),
                *self._wrong_ages(),
                *self._unfinished(),
                *self._innocents(),
            ],
        )

    @property
    def _began_s(self) -> float:
        """The first event of the chaos."""
        return min((event.at_s for event in self._events), default=self._done_s)

    def _actors(self) -> set[str]:
        return {path.stem for path in (self._run_dir / "logs").glob("actor-*.log")}

    def _too_little_chaos(self) -> Iterator[str]:
        """Events or steps that end too early, or a minute in which no engine hung."""
        wanted_s, ends_s = 60.0 * self._minutes, {"events": max((event.at_s for event in self._events), default=0.0)}
        for what, end_s in (ends_s | {"steps": self._done_s}).items():
            if end_s - self._began_s < wanted_s:
                yield f"{what} end {end_s - self._began_s:.0f} s after the first event, and not {wanted_s:.0f} s"
        hung = {int((event.at_s - self._began_s) // 60) for event in self._events if event.kind in HUNG}
        if lacking := set(range(int((self._done_s - self._began_s) // 60))) - hung:
            yield f"no engine hung in the minutes {sorted(lacking)}"

    def _wrong_history(self) -> Iterator[str]:
        """Not each prompt of the epoch once, in whole steps, or something of a future that was undone."""
        num_prompts, uids = self._config.task.num_train, Counter(row["prompt_uid"] for row in self._ledger)
        if twice := [uid for uid, count in uids.items() if count > 1]:
            yield f"trained more than once: {twice}"
        if len(uids) != num_prompts:
            yield f"{len(uids)} of the {num_prompts} prompts of the epoch were trained"
        by_step = Counter(row["step"] for row in self._ledger)
        if by_step != dict.fromkeys(range(1, self._steps + 1), self._config.rollout.prompts_per_step):
            yield f"groups by step: {sorted(by_step.items())}"
        recorded = [(step, group.lease.lease_id) for step, groups in self._groups.items() for group in groups]
        if recorded != [(row["step"], row["lease_id"]) for row in self._ledger]:
            yield "record and ledger differ"
        lives = re.findall(r"it goes on after step (\d+)", self._learner_log)
        for life, after in enumerate(map(int, lives), start=2):
            lost = [row for row in self._ledger if row["step"] > after and row["lease_id"] < life * LEASES_PER_LIFE]
            if lost:
                yield f"trained after step {after} by learner {life}, leased by one before: {lost}"

    def _ages_of(self, step: int, groups: list[TrajectoryGroup]) -> "np.ndarray[Any, np.dtype[np.int32]]":
        """Of all tokens, in versions, when they were trained."""
        version = max(0, step - 2) // self._config.weights.publish_every
        return np.concatenate([version - group.completed.versions for group in groups])

    def _wrong_ages(self) -> Iterator[str]:
        bound = self._config.staleness.max_staleness
        if self._ages.min() < 0 or self._ages.max() > bound:
            yield f"tokens of ages {sorted(set(self._ages.tolist()))}, the bound is {bound}"
        for step, groups in self._groups.items():
            for group in groups:
                token_ids, versions = group.completed.token_ids.tolist(), group.completed.versions.tolist()
                if token_ids != list(map(stamp, versions)):
                    yield f"step {step}, lease {group.lease.lease_id}: tokens {token_ids} say other than {versions}"

    def _unfinished(self) -> Iterator[str]:
        for gauge in ("queue/in_flight_groups", "queue/buffered_groups"):
            if self._last[gauge]:
                yield f"{gauge} is {self._last[gauge]} at the end"
        checkpoints = self._run_dir / "checkpoints"
        if self._steps not in complete_steps(checkpoints):
            yield f"there is no checkpoint of step {self._steps}"
            return
        snapshot, _ = read_snapshot(step_folder(checkpoints, self._steps) / ROLLOUTS, 0.0)
        if untrained := snapshot.state["untrained"]:
            yield f"the last checkpoint has untrained prompts: {untrained}"

    def _innocents(self) -> Iterator[str]:
        """Who was dismissed, or ended with an error, although nothing had happened to it that would explain it."""
        for at_s, name, reason in _lines(self._learner_log, r"WARNING .* actor (\S+) is dismissed: (.*)"):
            if not is_excused(self._events, name, reason, at_s):
                yield f"{name} is dismissed although nothing had happened to it that explains it: {reason}"
        for path in sorted((self._run_dir / "logs").glob("actor-*.log")):
            for at_s, name, reason in _lines(
                path.read_text(errors="replace"), r"ERROR actors\.main: actor (\S+): (.*)"
            ):
                if not is_excused(self._events, name, reason.removeprefix(REFUSED), at_s):
                    yield f"{name} failed although nothing had happened to it that explains it: {reason}"


def _lines(log: str, pattern: str) -> Iterator[tuple[float, str, str]]:
    """Time and groups of the lines that match after time and role."""
    for at, name, text in re.findall(rf"^(\S+ \S+) \S+ {pattern}$", log, re.MULTILINE):
        yield datetime.strptime(at, TIME_FORMAT).timestamp(), name, text


class Leftovers:
    """What a run may leave behind besides its files. `look` at its processes from time to time while it lives."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._seen: set[psutil.Process] = set()
        self._mapped: set[Path] = set()

    def look(self, processes: Collection[psutil.Process]) -> None:
        self._seen.update(processes)
        self._mapped = self._mapped.union(*map(_shared_memory, processes))

    def faults(self) -> Iterator[str]:
        """After the end of the run."""
        alive = {process for process in self._seen if process.is_running()}
        alive |= {process for process in psutil.process_iter() if self._is_ours(process)}
        yield from (f"{process} is left over" for process in alive)
        run_dir, logs = self._run_dir, self._run_dir / "logs"
        paths = [*run_dir.glob("control"), *run_dir.glob("*.tmp"), *logs.glob(".*.ready"), *self._mapped]
        paths += [*run_dir.glob("checkpoints/incomplete_*"), *run_dir.parent.glob(f".{run_dir.name}.*/")]
        yield from (f"{path} is left over" for path in paths if path.exists())

    def _is_ours(self, process: psutil.Process) -> bool:
        """Whether the run's folder is on its command line, or in the environment that it began with."""
        try:
            names = [*process.cmdline(), process.environ().get(CONTROL_VARIABLE, "")]
        except psutil.Error:
            return False
        return process.pid != os.getpid() and any(str(self._run_dir.parent) in name for name in names)


def _shared_memory(process: psutil.Process) -> set[Path]:
    """Files in /dev/shm that it has mapped."""
    try:
        maps = Path(f"/proc/{process.pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return set()
    return {Path(path) for path in re.findall(r" (/dev/shm/\S+)$", maps, re.MULTILINE)}

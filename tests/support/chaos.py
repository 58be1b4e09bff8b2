"""A run under chaos: its processes are killed, stopped, hung, sent away and added at random, and the run is judged.

`train` with a learner and six actors, each a process (forked_train.py); only the engines are not vLLM. The chaos goes
on until the run has trained its one epoch.
"""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from common.config import Batching, ConfigError
from common.control import ask
from common.metrics import read_jsonl
from learner.checkpoint import complete_steps
from tests.support.aftermath import HUNG, WEIGHTS_TIMEOUT_S, Aftermath, Event, Found, Kind, Leftovers
from tests.support.runs import ROOT

NUM_ACTORS, FEWEST_ACTORS = 6, 3
PROMPTS_PER_STEP = 4
STEPS_A_MINUTE = 48  # more than free cores do in one, chaos included
HEARTBEAT_TIMEOUT_S, LEASE_TIMEOUT_S, DRAIN_S = 3.0, 2.5, 2.0
HANGS_S = (5.0, 35.0)  # in each minute of chaos, the time at which an engine hangs in any case
SETTINGS = (
    "name=run",
    "model.path=configs/models/chain_sum",
    "model.max_model_len=128",
    "task.name=chain_sum",
    "task.num_heldout=4",
    f"rollout.prompts_per_step={PROMPTS_PER_STEP}",
    "rollout.group_size=2",
    "rollout.max_tokens=40",
    "algorithm.critic_warmup_steps=1",
    "learner.mini_batches=1",
    "learner.record=true",
    "learner.restarts=100",
    "learner.restart_window_s=20",
    f"actors.count={NUM_ACTORS}",
    "actors.groups_in_flight=2",
    "actors.restarts=100",
    "actors.restart_window_s=4",
    f"actors.drain_s={DRAIN_S}",
    "actors.start_timeout_s=60",
    "transport.heartbeat_s=0.2",
    f"transport.heartbeat_timeout_s={HEARTBEAT_TIMEOUT_S}",
    f"transport.lease_timeout_s={LEASE_TIMEOUT_S}",
    "transport.grace_s=1",
    "transport.reconnect_s=60",
    f"weights.timeout_s={WEIGHTS_TIMEOUT_S}",
    "checkpoint.every=2",
    "eval.every=0",
    "eval.num_prompts=2",
    "eval.samples_per_prompt=1",
)
FREQUENCIES = {Kind.KILL: 4, Kind.STOP: 4, Kind.FREEZE: 1, Kind.HANG: 1, Kind.WEDGE: 1, Kind.RESIZE: 3}
SIGNALS = {
    Kind.KILL: signal.SIGKILL,
    Kind.STOP: signal.SIGSTOP,
    Kind.FREEZE: signal.SIGSTOP,
    Kind.HANG: signal.SIGUSR1,
    Kind.WEDGE: signal.SIGUSR2,
}
STOPPED_FOR = {Kind.STOP: (0.1, 0.75), Kind.FREEZE: (1.3, 2.0)}  # times HEARTBEAT_TIMEOUT_S


@dataclass
class Chaos:
    """One run in `folder`/run, and what happens to it, for `minutes` at least. `pause_s` is the range of the time
    between two events."""

    folder: Path
    seed: int
    minutes: float = 1.0
    learner_kills: int = 2
    limit_s: float = 480.0
    pause_s: tuple[float, float] = (0.8, 2.4)
    events: list[Event] = field(default_factory=list)
    steps: int = field(init=False)

    def __post_init__(self) -> None:
        self.steps = round(STEPS_A_MINUTE * self.minutes)
        self.steps += 1 - self.steps % 2  # one of warm-up, and publish_every has to divide the others
        draw = self._draw = random.Random(self.seed)
        self.settings = [
            f"seed={self.seed}",
            f"staleness.max_staleness={draw.choice([1, 2])}",
            f"staleness.batching={draw.choice(list(Batching))}",
            f"weights.publish_every={draw.choice([1, 1, 2])}",
            f"learner.steps={self.steps - 1}",
            f"task.num_train={self.steps * PROMPTS_PER_STEP}",
        ]
        part = self.steps / (self.learner_kills + 1)
        self._learner_kills_at = [int(part * (i + draw.uniform(0.6, 1.2))) for i in range(self.learner_kills)]
        self._stopped: dict[psutil.Process, float] = {}  # and until when (monotonic)
        self._suffering: dict[psutil.Process, list[Event]] = {}  # whose end is to come
        self._began_s = 0.0  # of the first event (monotonic)
        self._num_hangs = 0  # that were due
        self._hang_s = draw.uniform(*HANGS_S)  # when the next one is, after that
        self.run_dir = self.folder / "run"
        self._leftovers = Leftovers(self.run_dir)

    def run(self) -> Found:
        """Returns when the run has ended; it is killed after `limit_s`."""
        command = [sys.executable, "-m", "tests.support.forked_train", "train", f"runs_dir={self.folder}"]
        began = time.monotonic()
        with (self.folder / "train.log").open("wb") as log:
            train = subprocess.Popen([*command, *SETTINGS, *self.settings], cwd=ROOT, stdout=log, stderr=log)
            try:
                self._supervisor = psutil.Process(train.pid)
                self._torment(train, began + self.limit_s)
            finally:
                for process in self._stopped:
                    _signal(process, signal.SIGCONT)
                if train.poll() is None:
                    train.kill()  # its guardian ends the rest
                    train.wait()
        seconds = time.monotonic() - began
        if not (self.run_dir / "ledger.jsonl").is_file():
            raise RuntimeError(f"the run did not begin: {(self.folder / 'train.log').read_text()}")
        faults = [] if train.returncode == 0 else [f"train ended with {train.returncode} after {seconds:.0f} s"]
        if self._learner_kills_at:
            faults.append(f"the learner was not killed after the steps {self._learner_kills_at}")
        faults += self._leftovers.faults()
        return Aftermath(self.run_dir, self.steps, self.events, self.minutes).found(
            self.seed, self.settings, seconds, faults
        )

    def report(self, found: Found) -> str:
        """For whoever has to find out what went wrong."""
        logs = [self.folder / "train.log", *sorted((self.run_dir / "logs").glob("*.log"))]
        return "\n".join(
            [
                f"chaos of seed {self.seed} in {self.folder}: {' '.join(self.settings)}",
                *map(str, self.events),
                *(f"== {path.name}\n{path.read_text(errors='replace')[-5000:]}" for path in logs),
                f"== faults, seed {self.seed}",
                *found.faults,
            ]
        )

    def _torment(self, train: "subprocess.Popen[bytes]", deadline: float) -> None:
        next_at = 0.0
        while train.poll() is None and (now := time.monotonic()) < deadline:
            for process in [process for process, until in self._stopped.items() if now >= until]:
                _signal(process, signal.SIGCONT)
                del self._stopped[process]
                self._end(process, (Kind.STOP, Kind.FREEZE))
            for process in [process for process in self._suffering if not process.is_running()]:
                self._end(process, tuple(Kind))
            if now >= next_at:
                next_at = now + self._draw.uniform(*self.pause_s)
                self._strike()
            time.sleep(0.05)  # the beat of the chaos

    def _strike(self) -> None:
        children = self._children()
        ready = {name: child for name, child in children.items() if self._is_ready(name)}
        if not ready:
            return
        if "learner-0" in children and self._is_learner_due():
            del self._learner_kills_at[0]
            _signal(children["learner-0"], signal.SIGKILL)
            self._note(Kind.LEARNER, "learner-0", "")
            return
        if self._is_hang_due() and (
            free := sorted(name for name, child in ready.items() if child not in self._stopped)
        ):
            self._num_hangs += 1
            self._hang_s = 60.0 * self._num_hangs + self._draw.uniform(*HANGS_S)
            name = self._draw.choice(free)
            self._do(self._draw.choice(HUNG), name, ready[name])
            return
        (kind,) = self._draw.choices(list(FREQUENCIES), list(FREQUENCIES.values()))
        if kind is Kind.RESIZE:
            self._resize(self._draw.randint(FEWEST_ACTORS, NUM_ACTORS))
            return
        name = self._draw.choice(sorted(ready))
        self._do(kind, name, ready[name])

    def _do(self, kind: Kind, name: str, process: psutil.Process) -> None:
        if process in self._stopped and kind is not Kind.KILL:
            return
        seconds = HEARTBEAT_TIMEOUT_S * self._draw.uniform(*STOPPED_FOR[kind]) if kind in STOPPED_FOR else 0.0
        if seconds:
            self._stopped[process] = time.monotonic() + seconds
        _signal(process, SIGNALS[kind])
        event = self._note(kind, name, f"process {process.pid}" + (f" for {seconds:.1f} s" if seconds else ""))
        event.pid = process.pid
        self._suffering.setdefault(process, []).append(event)

    def _end(self, process: psutil.Process, kinds: Collection[Kind]) -> None:
        """Of what this process suffers."""
        events = self._suffering.pop(process, [])
        for event in events:
            if event.kind in kinds:
                event.until_s = time.time()
        if left := [event for event in events if event.kind not in kinds]:
            self._suffering[process] = left

    def _is_hang_due(self) -> bool:
        return bool(self.events) and time.monotonic() - self._began_s >= self._hang_s

    def _resize(self, count: int) -> None:
        try:
            done = ask(self.run_dir, {"command": "resize", "count": count})["done"]
        except (ConfigError, TimeoutError) as error:  # it ends just now
            done = [str(error)]
        self._note(Kind.RESIZE, "", f"to {count}: {'; '.join(done) or 'as it is'}")

    def _note(self, kind: Kind, name: str, detail: str) -> Event:
        if not self.events:
            self._began_s = time.monotonic()
        self.events.append(Event(time.time(), kind, name, detail))
        return self.events[-1]

    def _children(self) -> dict[str, psutil.Process]:
        """The learner and the actors that live, by name."""
        found = {}
        try:
            processes = self._supervisor.children(recursive=True)
        except psutil.NoSuchProcess:
            return {}
        self._leftovers.look(processes)
        for process in processes:
            try:
                if process.ppid() == self._supervisor.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.name()] = process
            except psutil.NoSuchProcess:
                continue
        return found

    def _is_ready(self, name: str) -> bool:
        """Of a process that was there before: the mark of its predecessor goes before it comes."""
        return (self.run_dir / "logs" / f".{name}.ready").exists()

    def _is_learner_due(self) -> bool:
        """Without a checkpoint its end would be that of the run."""
        if not self._learner_kills_at or not complete_steps(self.run_dir / "checkpoints"):
            return False
        steps = (row["step"] for row in read_jsonl(self.run_dir / "metrics.jsonl"))
        return max(steps, default=0) >= self._learner_kills_at[0]


def _signal(process: psutil.Process, number: int) -> None:
    """Nothing to one that is gone; a reused pid is never hit."""
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return

"""The supervisor: starts the processes of a run, watches them and leaves none behind.

Children come in two kinds. Leaders (the learner's ranks) decide: the run succeeds when all of them have
exited with 0, and fails with the first that does not. Followers (actors) serve: one that was ready and dies
is started again, one that dies before it was ever ready ends the run, because it would only die again.
"""

import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil

from common.processtree import Guardian, adopt_orphans, child_setup, descendants, family, kill, reap_adopted

READY_FILE = "ASYNC_VAPO_READY_FILE"  # environment variable: file that a follower makes when it is ready

FAREWELL_S = 10.0  # for followers to leave by themselves after the leaders have ended well
STOP_S = 4.0  # from asking a group of children to leave until they are killed; two groups stay under 10 s
LEADERS_END_S = 60.0  # between the first and the last leader's end
MAX_BACKOFF_S = 30.0
TAIL_BYTES = 64 * 1024

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Interrupt|Timeout|Exit)\b")


def announce_ready() -> None:
    """Called by a follower that has started up, so that it is started again if it dies later."""
    path = os.environ.get(READY_FILE)
    if path:
        Path(path).touch()


@dataclass(frozen=True, kw_only=True)
class ChildSpec:
    """How to start one process of a run."""

    name: str  # also of its log file
    command: tuple[str, ...]
    environment: Mapping[str, str]  # on top of this process's own
    cores: tuple[int, ...] = ()  # that it may run on; empty: any
    is_leader: bool = False
    is_echoed: bool = False  # its standard output also goes to the console
    restarts: int = 0  # followers: how often it is started again
    start_timeout_s: float = 300.0  # followers: from start to announce_ready


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: the exit code for the shell, and one sentence unless all went well or it has been said."""

    exit_code: int
    message: str | None


class Child:
    """One process and its log. States: started -> (ready ->) exited, and back to started for a follower."""

    def __init__(self, spec: ChildSpec, log_dir: Path) -> None:
        self.spec = spec
        self.log_path = log_dir / f"{spec.name}.log"
        self.ready_path = log_dir / f".{spec.name}.ready"
        self.num_starts = 0
        self.was_ready = False  # in this or an earlier life
        self.start_again_at: float | None = None  # monotonic; set while it waits for its next life
        self._popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start in a session of its own; output to the log, but stdout of an echoed child to a pipe."""
        self.ready_path.unlink(missing_ok=True)
        self.start_again_at = None
        environment = {**os.environ, **self.spec.environment, READY_FILE: str(self.ready_path.absolute())}
        with self.log_path.open("ab") as log:
            self._popen = subprocess.Popen(
                self.spec.command,
                env=environment | {"PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if self.spec.is_echoed else log,
                stderr=log,
                start_new_session=True,
                preexec_fn=child_setup(self.spec.cores),
            )
        self.num_starts += 1
        self.started_at = time.monotonic()

    @property
    def popen(self) -> "subprocess.Popen[bytes]":
        assert self._popen is not None
        return self._popen

    @property
    def is_running(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    @property
    def is_ready(self) -> bool:
        self.was_ready = self.was_ready or self.ready_path.exists()
        return self.ready_path.exists()

    def ask_to_stop(self) -> None:
        """SIGTERM to the process itself; its own children are its business as long as it lives."""
        if self.is_running:
            self.popen.terminate()

    def how_it_ended(self) -> str:
        """ "actor-0 ended with exit code 2: <its last error line> (log: ...)"."""
        code = self.popen.poll()
        assert code is not None
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        return f"{self.spec.name} ended with {how}: {last_error(self.log_path)} (log: {self.log_path})"

    @property
    def exit_code(self) -> int:
        """As a shell reports it: 128 + n for signal n."""
        code = self.popen.poll()
        assert code is not None
        return code if code >= 0 else 128 - code


def last_error(log: Path) -> str:
    """The line of a log that says best why its process ended: "error: ...", an exception, or the last."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        text = _ANSI.sub("", file.read().decode(errors="replace"))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    exceptions = [line for line in lines if _EXCEPTION.match(line)]
    return (exceptions or lines or ["no output"])[-1]


class Supervisor:
    """Runs children to the end of the run.

    One thread, the main one. Signals (SIGCHLD, SIGINT, SIGTERM) arrive as bytes on a pipe that the loop
    selects on beside the output of echoed children, so an exit is seen at once and nothing is polled.
    Invariant: every process below this one that was not there when the supervisor was made belongs to the
    run, and none of them outlives `run`. While it runs, the process must start no others.
    """

    def __init__(self, specs: Sequence[ChildSpec], log_dir: Path) -> None:
        log_dir.mkdir(parents=True, exist_ok=True)
        self._children = [Child(spec, log_dir) for spec in specs]
        self._leaders = [child for child in self._children if child.spec.is_leader]
        self._followers = [child for child in self._children if not child.spec.is_leader]
        self._foreign = {process.pid for process in descendants()}
        self._selector = selectors.DefaultSelector()
        self._interrupts: list[int] = []  # SIGINT and SIGTERM so far
        self._handled: set[tuple[str, int]] = set()  # (name, life) whose end was dealt with
        self._first_leader_end: float | None = None

    def run(self) -> Outcome:
        """Start all, return when the run has ended and every process is gone."""
        adopt_orphans()
        with Guardian() as guardian, self._signals():
            self._guardian = guardian
            self._foreign.add(guardian.pid)
            try:
                for child in self._children:
                    self._start(child)
                outcome = self._watch()
                self._stop(outcome)
            finally:
                self._kill_everything()
        return outcome

    def _start(self, child: Child) -> None:
        child.start()
        self._guardian.protect(child.popen.pid)
        if child.popen.stdout is not None:
            os.set_blocking(child.popen.stdout.fileno(), False)
            self._selector.register(child.popen.stdout, selectors.EVENT_READ, child)

    def _watch(self) -> Outcome:
        """The first thing that ends the run."""
        while True:
            outcome = self._judge()
            if outcome is not None:
                return outcome
            self._pump(self._next_deadline())

    def _judge(self) -> Outcome | None:
        if self._interrupts:
            number = signal.Signals(self._interrupts[0])
            return Outcome(exit_code=128 + number, message=f"interrupted by {number.name}")
        for child in self._children:
            if child.start_again_at is None and not child.is_running:
                outcome = self._handle_end(child)
                if outcome is not None:
                    return outcome
        if all(not leader.is_running for leader in self._leaders):
            return Outcome(exit_code=0, message=None)
        return self._check_deadlines(time.monotonic())

    def _handle_end(self, child: Child) -> Outcome | None:
        """What the end of `child` means for the run; None: it goes on."""
        life = (child.spec.name, child.num_starts)
        if life in self._handled:
            return None
        self._handled.add(life)
        self._drain(child)
        if child.exit_code == 0:
            if child.spec.is_leader and self._first_leader_end is None:
                self._first_leader_end = time.monotonic()
            return None
        if child.spec.is_leader or not (child.is_ready or child.was_ready):
            return Outcome(exit_code=child.exit_code, message=child.how_it_ended())
        if child.num_starts > child.spec.restarts:
            message = f"{child.how_it_ended()}; its {child.spec.restarts} restarts are used up"
            return Outcome(exit_code=child.exit_code, message=message)
        backoff_s = min(2.0 ** (child.num_starts - 1), MAX_BACKOFF_S)
        child.start_again_at = time.monotonic() + backoff_s
        _say(f"{child.how_it_ended()}; starting it again in {backoff_s:g} s")
        return None

    def _check_deadlines(self, now: float) -> Outcome | None:
        """Restarts that are due, followers that are not ready, leaders that do not follow the first out."""
        for child in self._followers:
            if child.start_again_at is not None and now >= child.start_again_at:
                self._kill_orphans()  # what the former life left behind may hold its memory or port
                self._start(child)
            limit_s = child.spec.start_timeout_s
            if child.is_running and now >= child.started_at + limit_s and not child.is_ready:
                return Outcome(
                    exit_code=1,
                    message=f"{child.spec.name} was not ready within {limit_s:g} s; its last words: "
                    f"{last_error(child.log_path)} (log: {child.log_path})",
                )
        if self._first_leader_end is not None and now >= self._first_leader_end + LEADERS_END_S:
            names = ", ".join(leader.spec.name for leader in self._leaders if leader.is_running)
            return Outcome(exit_code=1, message=f"{names} did not end within {LEADERS_END_S:g} s of the first rank")
        return None

    def _next_deadline(self) -> float | None:
        """Monotonic time at which `_check_deadlines` may have something to do."""
        times = [child.start_again_at for child in self._followers if child.start_again_at is not None]
        times += [
            child.started_at + child.spec.start_timeout_s
            for child in self._followers
            if child.is_running and not child.is_ready
        ]
        if self._first_leader_end is not None:
            times.append(self._first_leader_end + LEADERS_END_S)
        return min(times, default=None)

    def _stop(self, outcome: Outcome) -> None:
        """Followers first, so that they can say goodbye to the leaders; a second interrupt ends patience."""
        patience = len(self._interrupts)
        if outcome.exit_code == 0:
            self._wait(self._followers, FAREWELL_S, patience)
        for group in (self._followers, self._leaders):
            for child in group:
                child.ask_to_stop()
            self._wait(group, STOP_S, patience)

    def _wait(self, children: Sequence[Child], timeout_s: float, patience: int) -> None:
        """Until all of them have ended, the time is up, or another interrupt came."""
        deadline = time.monotonic() + timeout_s
        while any(child.is_running for child in children) and time.monotonic() < deadline:
            if len(self._interrupts) > patience:
                return
            self._pump(deadline)

    def _kill_everything(self) -> None:
        """Kill what is still there, again until nothing is (a process may be forking)."""
        deadline = time.monotonic() + STOP_S
        while alive := descendants(self._foreign):
            kill(alive)
            for child in self._children:
                if child.num_starts:
                    child.popen.poll()
            reap_adopted(self._foreign | {child.popen.pid for child in self._children if child.num_starts})
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes {[process.pid for process in alive]} survive SIGKILL")
            time.sleep(0.01)  # SIGKILL takes effect asynchronously and adopted processes send no event
        for child in self._children:
            if child.num_starts:
                child.popen.wait()
                self._drain(child)
                child.ready_path.unlink(missing_ok=True)
        reap_adopted(self._foreign)

    def _kill_orphans(self) -> None:
        """Kill the descendants that no living child of ours accounts for."""
        reap_adopted(self._foreign | {child.popen.pid for child in self._children if child.num_starts})
        living = {child.popen.pid for child in self._children if child.is_running}
        orphans = descendants(self._foreign | family(living))
        kill(orphans)
        psutil.wait_procs(orphans, timeout=STOP_S)

    def _pump(self, deadline: float | None) -> None:
        """Wait for a signal, output or the deadline; copy output and note interrupts."""
        timeout_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        for key, _ in self._selector.select(timeout_s):
            if isinstance(key.data, Child):
                self._copy_output(key.data)
            else:
                numbers = os.read(key.fd, 4096)
                self._interrupts += [number for number in numbers if number != signal.SIGCHLD]

    def _copy_output(self, child: Child) -> bool:
        """One piece of an echoed child's output to console and log; False when there is none now or ever."""
        stream = child.popen.stdout
        assert stream is not None
        try:
            piece = os.read(stream.fileno(), 65536)
        except BlockingIOError:
            return False
        if not piece:
            self._selector.unregister(stream)
            stream.close()
            return False
        with child.log_path.open("ab") as log:
            log.write(piece)
        self._write_console(piece)
        return True

    def _write_console(self, piece: bytes) -> None:
        """A reader that went away (`train | head`) ends the run like an interrupt."""
        try:
            sys.stdout.buffer.write(piece)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self._interrupts.append(signal.SIGPIPE)

    def _drain(self, child: Child) -> None:
        """What an ended child had still written."""
        while child.popen.stdout is not None and not child.popen.stdout.closed and self._copy_output(child):
            pass

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGCHLD, SIGINT and SIGTERM become bytes on a pipe while this is open."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        os.set_blocking(reader, False)
        before_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        numbers = (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, lambda number, frame: None) for number in numbers}
        self._selector.register(reader, selectors.EVENT_READ)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before_fd)
            self._selector.close()
            os.close(reader)
            os.close(writer)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def deal_cores(cores: Sequence[int], num_children: int) -> list[tuple[int, ...]]:
    """Cores of each child: contiguous shares, as equal as possible; too few: one each, round-robin."""
    if len(cores) < num_children:
        return [(cores[i % len(cores)],) for i in range(num_children)]
    share, extra = divmod(len(cores), num_children)
    starts = [i * share + min(i, extra) for i in range(num_children + 1)]
    return [tuple(cores[start:stop]) for start, stop in pairwise(starts)]

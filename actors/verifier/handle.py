"""A worker as its template process sees it: what was handed to it, and how long the first of that has taken."""

import math
import os
import signal
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

_READ_BYTES = 1 << 16
_COMPUTING_S = 0.001  # processor time between two looks that shows that a worker is not asleep


@dataclass(eq=False, slots=True)
class Answer:
    """A request on its way to a verdict."""

    id: bytes
    body: bytes  # JSON
    started_s: float = math.inf  # when a worker took it up: its time limit counts from here
    spent_s: float = 0.0  # processor time that its longest attempt could use


@dataclass(eq=False)
class Handle:
    """A forked worker, and the answers that it has not replied to, of which it is judging the first."""

    pid: int
    channel: socket.socket
    modules: frozenset[str]  # heavy modules that the template held when it forked this worker
    answers: deque[Answer] = field(default_factory=deque)
    started_s: float = 0.0  # when it took up the first
    started_cpu_s: float = 0.0  # its processor time then
    cpu_limit_s: float = 0.0  # it interrupts an answer that takes longer; 0: it does not
    seen_s: float = 0.0  # used_s() at the last look
    is_computing: bool = False  # at the last look; asleep it takes nobody's time
    is_stopped: bool = False
    was_stopped: bool = False  # at any time since it took up the first answer
    is_overdue: bool = False  # a spare, if there is one, may take the next answer already
    _partial: bytes = b""

    @property
    def fd(self) -> int:
        return self.channel.fileno()

    def send(self, answers: list[Answer], cpu_limit_s: float, wall_limit_s: float, is_hurried: bool) -> None:
        """Hands over answers, each of which may take that long (0: as long as it likes); in a hurry none of them begins
        what takes long. Raises OSError when the worker is gone."""
        self.answers.extend(answers)
        self.cpu_limit_s = cpu_limit_s
        limits = b"%d %d %d" % (round(1e6 * cpu_limit_s), round(1e6 * wall_limit_s), is_hurried)
        self._begin(self._cpu_s())
        self.channel.sendall(b"".join(b"%s %s\n" % (limits, answer.body) for answer in answers))

    def receive(self) -> list[bytes] | None:
        """The reply lines that have arrived, without their ends; None when the worker is gone."""
        try:
            data = self.channel.recv(_READ_BYTES)
        except OSError:
            return None
        *lines, self._partial = (self._partial + data).split(b"\n")
        return lines if data else None

    def finish_first(self, took_cpu_s: float) -> Answer:
        """Takes the first answer out, for which there is a reply; from now on the worker judges the next."""
        answer = self.answers.popleft()
        self.stop(False)
        self._begin(self.started_cpu_s + took_cpu_s)
        return answer

    def _begin(self, cpu_s: float) -> None:
        self.started_s, self.started_cpu_s = time.monotonic(), cpu_s
        self.seen_s = 0.0
        self.is_overdue = self.was_stopped = False
        if self.answers:
            self.answers[0].started_s = min(self.answers[0].started_s, self.started_s)

    def _cpu_s(self) -> float:
        return time.clock_gettime((~self.pid << 3) | 2)  # Linux: the clock of another process's processor time

    def used_s(self) -> float:
        """Processor time that the first answer has taken so far. Raises OSError when the worker is gone."""
        return self._cpu_s() - self.started_cpu_s

    def look(self) -> None:
        """Sees whether the worker has computed since the last look."""
        used_s = self.used_s()
        self.is_computing = used_s - self.seen_s >= _COMPUTING_S
        self.seen_s = used_s

    def is_asleep(self) -> bool:
        """Whether the worker waits for something other than a processor."""
        stat = Path(f"/proc/{self.pid}/stat").read_bytes()
        return stat.rpartition(b")")[2].split()[0] != b"R"

    def stop(self, is_stopped: bool) -> None:
        """Stops the process, or lets it go on."""
        if is_stopped != self.is_stopped:
            os.kill(self.pid, signal.SIGSTOP if is_stopped else signal.SIGCONT)
            self.is_stopped = is_stopped
            self.was_stopped = self.was_stopped or is_stopped

    def kill(self) -> None:
        """Ends the process, which the caller must reap."""
        os.kill(self.pid, signal.SIGKILL)  # first: a worker that finds its channel closed complains
        self.channel.close()

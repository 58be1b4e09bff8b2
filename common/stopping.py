"""How a role is asked to stop: the first SIGINT or SIGTERM lets it finish, the second ends it at once.

Slurm and torchrun both tell every process of a job, so that one request comes as two SIGTERM: see `is_echo`. SIGHUP, of
a terminal that went away, is as SIGTERM, unless it is ignored, as under nohup.
"""

import errno
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from common.causes import disk_problem, is_raised_by_library

ECHO_S = 5.0  # from the first signal: SIGTERM is no second request, but the same one from somebody else


# What a write to a console meets whose reader (`train | head`) or terminal went away.
GONE = (errno.EPIPE, errno.EIO)


class Interrupted(Exception):
    """The role was asked to stop by the signal `number`."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number

    def __reduce__(self) -> tuple[type["Interrupted"], tuple[int]]:
        """torch sends what it is raised with to the other ranks."""
        return Interrupted, (self.number,)


class RunEnds(Exception):
    """All ranks have agreed to end before the last step; `reason` is None on ranks that leave saying it to rank 0."""

    def __init__(self, reason: Exception | None) -> None:
        super().__init__(str(reason or "rank 0 ends the run"))
        self.reason = reason


def is_crash(error: BaseException | None) -> bool:
    """Whether nobody foresaw this end, so that the role may be started again and others should wait for it."""
    if isinstance(error, RunEnds):
        return is_crash(error.reason)
    if not isinstance(error, Exception) or isinstance(error, Interrupted):
        return False
    if isinstance(error, (ValueError, TimeoutError, FloatingPointError)):
        return is_raised_by_library(error)
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return False
    return disk_problem(error, ".") is None


def stop_numbers() -> tuple[signal.Signals, ...]:
    """The signals that ask this process to stop."""
    is_deaf = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM) if is_deaf else (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """The first signal of stop_numbers but SIGINT, which Python sees to, raises Interrupted here; the others are for
    naught, as they would interrupt what it has begun to clean up. In the main thread."""
    has_raised = False

    def handle(number: int, frame: object) -> None:
        nonlocal has_raised
        if not has_raised:
            has_raised = True
            raise Interrupted(number)

    numbers = [number for number in stop_numbers() if number != signal.SIGINT]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def postponed_signals() -> Iterator[None]:
    """Those that ask to stop come when this ends. For the start of a process: Python's hooks around a fork swallow what
    a handler raises in them, and with it the request."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stop_numbers())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def silence() -> None:
    """Nobody reads standard output any more: what is still written there is lost, and no error."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def has_lost_reader() -> bool:
    """Whether nobody reads standard output any more; then it is silenced."""
    console = select.poll()
    console.register(sys.stdout.fileno(), 0)  # errors are told in any case
    is_lost = any(event & select.POLLERR for _, event in console.poll(0))
    if is_lost:
        silence()
    return is_lost


def is_echo(number: int, since_first_s: float) -> bool:
    """Whether the signal `number`, so long after the first one, asks for nothing new. SIGINT, which a person sends,
    always does."""
    return number in (signal.SIGTERM, signal.SIGHUP) and since_first_s < ECHO_S


class StopSignals:
    """SIGINT, SIGTERM and SIGHUP to this process, as a context manager of the main thread.

    At first a signal raises Interrupted in the main thread, wherever that is. After `defer` it is only noted as
    `number`, for whoever asks between two pieces of work. A thread reads the signals from a pipe, so that the second
    (no echo) counts while the main thread is inside a collective, and so does the end of `timeout_s` after the first
    (None: who has sent it sees to that). Either ends the process on the spot, with exit code 128 + number.
    """

    def __init__(self, timeout_s: float | None) -> None:
        self.number: int | None = None  # of the first signal
        self._first_at = math.inf  # monotonic
        self._has_raised = False
        self._timeout_s = timeout_s
        self._is_deferred = False
        self._wake: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._fd_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._handlers_before = {number: signal.signal(number, self._handle) for number in stop_numbers()}
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)

    def defer(self, wake: Callable[[], None]) -> None:
        """From now on the first signal is noted; `wake` is called then, in a thread, to end a wait."""
        self._wake, self._is_deferred = wake, True
        if self.number is not None:
            wake()

    def _handle(self, number: int, frame: object) -> None:
        if not self._is_deferred and not self._has_raised:
            self._has_raised = True  # an echo would interrupt what the first one has begun to clean up
            raise Interrupted(number)

    def _watch(self) -> None:
        """Until the other end of the pipe is closed."""
        while True:
            ready, _, _ = select.select([self._reader], [], [], self._time_left())
            if not ready:
                assert self.number is not None
                self._leave(self.number, f"no stop within {self._timeout_s:g} s of {_name(self.number)}: killed")
            received = os.read(self._reader, 4096)
            if not received:
                return
            for number in received:
                if number in self._handlers_before:
                    self._note(number)

    def _time_left(self) -> float | None:
        if self.number is None or self._timeout_s is None:
            return None
        return max(0.0, self._first_at + self._timeout_s - time.monotonic())

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number, self._first_at = number, now
            self._wake()
        elif not is_echo(number, now - self._first_at):
            self._leave(number, f"ended at once by a second signal, {_name(number)}")

    def _leave(self, number: int, how: str) -> None:
        print(f"error: {how}; what was done since the newest checkpoint is lost", file=sys.stderr, flush=True)
        os._exit(128 + number)


def _name(number: int) -> str:
    return signal.Signals(number).name

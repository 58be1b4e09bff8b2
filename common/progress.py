"""How far a long task is: a line that renews itself on a terminal, a line now and then in a log."""

import sys
import time
from types import TracebackType
from typing import Self

QUIET_S = 3.0  # a task that ends earlier shows nothing
TERMINAL_S = 0.2  # between two lines
LOG_S = 15.0


class Progress:
    """Context manager; on stdout, stderr is for what went wrong. `update` is cheap: call it as often as you like."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._is_terminal = sys.stdout.isatty()
        self._started = time.monotonic()
        self._next = self._started + QUIET_S
        self._is_shown = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_shown and self._is_terminal:
            sys.stdout.write("\n")

    def update(self, done: int) -> None:
        now = time.monotonic()
        if now < self._next and not (self._is_shown and done == self._total):
            return
        self._next = now + (TERMINAL_S if self._is_terminal else LOG_S)
        self._is_shown = True
        left_s = (now - self._started) / max(done, 1) * (self._total - done)
        line = f"{self._what}: {done:,} of {self._total:,} {self._unit} ({done / self._total:.0%}), {left_s:.0f} s left"
        sys.stdout.write(f"\r{line:<78}" if self._is_terminal else f"{line}\n")
        sys.stdout.flush()

"""The last lines of a terminal, which are drawn anew again and again while everything else scrolls by above them.

The cursor is never hidden and no mode of the terminal is changed, so that whatever ends the process leaves a terminal
as it should be: the last drawing, and below it a free line.
"""

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.text import Text

_SIZE = (80, 24)  # of a terminal that does not say


def can_draw() -> bool:
    """Whether standard output is a terminal that a region can be drawn on."""
    return (
        sys.stdout.isatty()
        and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")
        and not os.environ.get("CI")
        and (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    )


class Region:
    """On standard output. Invariant: the cursor is on the line below those that `_widths` tells of."""

    def __init__(self) -> None:
        self._real = Console()
        self._widths: list[int] = []  # cells of each line that is drawn
        self._shown: RenderableType | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines that a drawing may have."""
        width, height = _terminal_size()
        return width - 1, height - 1  # a full last column wraps on some terminals; the last line is the cursor's

    def draw(self, what: RenderableType) -> None:
        """In the place of what was drawn before. Nothing while the terminal takes no more (Ctrl-S)."""
        if not select.select([], [sys.stdout], [], 0)[1]:
            return
        width, height = self.size
        self._shown = what
        lines = self._rendered(what, width)[:height]
        drawn = "".join(f"{line}\x1b[K\n" for line in lines)
        self._put(f"{self._to_start()}{drawn}\x1b[J")
        self._widths = [cell_len(Text.from_ansi(line).plain) for line in lines]

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """For whole lines to be written above it."""
        shown = self._shown
        self.erase()
        yield
        if shown is not None:
            self.draw(shown)

    def erase(self) -> None:
        """Leaves the cursor where the region began."""
        if self._widths:
            self._put(f"{self._to_start()}\x1b[J")
        self._widths, self._shown = [], None

    def _to_start(self) -> str:
        """A terminal that has become narrower has wrapped what was drawn."""
        width = _terminal_size()[0]
        num_lines = sum(max(1, -(-cells // width)) for cells in self._widths)
        return "\r" + (f"\x1b[{num_lines}A" if num_lines else "")

    def _rendered(self, what: RenderableType, width: int) -> list[str]:
        console = Console(
            file=io.StringIO(),
            force_terminal=True,
            color_system=self._real.color_system,  # type: ignore[arg-type]
            no_color=self._real.no_color,
            width=width,
            highlight=False,
            legacy_windows=False,
        )
        with console.capture() as captured:
            console.print(what)
        return captured.get().rstrip("\n").split("\n")

    def _put(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _terminal_size() -> tuple[int, int]:
    try:
        width, height = os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        return _SIZE
    return (width or _SIZE[0], height or _SIZE[1])

"""`run.py show RUN`: samples of a run, one after the other in a pager, or all of a step where there is no terminal."""

import os
import re
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

from rich.console import Console, Group
from rich.text import Text

from common.samples import Sample, read_samples, sampled_steps, samples_folder
from common.transcript import Color, scale, transcript

HELP = "space/b page  n/p response  ]/[ step  c color  q quit"
_KEY = re.compile(r"\x1b\[[0-9;]*[A-Za-z~]|\x1bO[A-Z]|.", re.DOTALL)
_SAME = {  # what terminals send, as the letters that stand for it
    "\x1b[A": "k", "\x1bOA": "k", "\x1b[B": "j", "\x1bOB": "j", "\x1b[C": "n", "\x1bOC": "n", "\x1b[D": "p",
    "\x1bOD": "p", "\x1b[5~": "b", "\x1b[6~": " ", "\n": "j", "\r": "j", "\x1b": "q", "\x04": "q",
}  # fmt: skip


class Choice(StrEnum):
    """Which samples of a step are shown, and in which order."""

    ALL = "all"
    WRONG = "wrong"  # those that are not right
    RIGHT = "right"
    LONGEST = "longest"  # all, by number of tokens
    STALE = "stale"  # all, by the age of the oldest token


def show(run_dir: Path, step: int | None, choice: Choice, color: Color) -> None:
    """Shows the samples of `step`, None: of the newest. Raises ValueError when there are none of it."""
    steps = sampled_steps(run_dir)
    if not steps:
        raise ValueError(f"{samples_folder(run_dir)} has no samples: no step was begun yet, or samples.groups is 0")
    console = Console(highlight=False)
    has_colors = console.color_system is not None and not console.no_color
    pages = Pages(run_dir, steps[-1] if step is None else step, choice, color if has_colors else None)
    if console.is_terminal and not console.is_dumb_terminal and sys.stdin.isatty():
        _turn(pages, console)
        return
    for text in pages.all():
        console.print(text, "", soft_wrap=True, sep="\n")


class Pages:
    """Where the reader is: a step, one of its samples, the first line of it that is seen. Keys move from there."""

    def __init__(self, run_dir: Path, step: int, choice: Choice, color: Color | None) -> None:
        self._run_dir = run_dir
        self._choice = choice
        self._color = color
        self._number, self._top = 0, 0
        self._lines: list[Text] = []  # of the sample, as wide as it was drawn last
        self._height = 1  # lines of it that were drawn last
        self._open(step)

    def all(self) -> Iterator[Text]:
        """Every sample of the step from beginning to end."""
        for number in range(max(1, len(self._samples))):
            self._number = number
            yield self._text()

    def draw(self, console: Console, width: int, height: int) -> Group:
        """A screen full; its last line says where one is."""
        self._height = max(1, height - 1)
        self._lines = list(self._text().wrap(console, width))
        self._top = min(self._top, self._last_top)
        seen = self._lines[self._top : self._top + self._height]
        below = [Text()] * (self._height - len(seen))
        return Group(*seen, *below, self._status(width))

    def press(self, key: str) -> bool:
        """Goes where `key` leads; whether there is still something to be shown."""
        match key:
            case "q":
                return False
            case " " if self._top < self._last_top:
                self._top = min(self._top + self._height, self._last_top)
            case "n" | " ":
                self._go_to(self._number + 1)
            case "p":
                self._go_to(self._number - 1)
            case "b":
                self._top = max(0, self._top - self._height)
            case "j":
                self._top = min(self._top + 1, self._last_top)
            case "k":
                self._top = max(0, self._top - 1)
            case "]" | "[":
                self._change_step(1 if key == "]" else -1)
            case "c" if self._color is not None:
                colors = list(Color)
                self._color = colors[(colors.index(self._color) + 1) % len(colors)]
        return True

    @property
    def _last_top(self) -> int:
        return max(0, len(self._lines) - self._height)

    def _open(self, step: int) -> None:
        self._step = step
        self._all = read_samples(self._run_dir, step)
        self._samples = chosen(self._all, self._choice)
        self._number, self._top = 0, 0

    def _go_to(self, number: int) -> None:
        if 0 <= number < len(self._samples):
            self._number, self._top = number, 0

    def _change_step(self, direction: int) -> None:
        """To the next sampled step, which in a live run may be a new one."""
        steps = [step for step in sampled_steps(self._run_dir) if (step - self._step) * direction > 0]
        if steps:
            self._open(min(steps) if direction > 0 else max(steps))

    def _text(self) -> Text:
        if not self._samples:
            return Text(f"none of the {len(self._all)} samples of step {self._step} is {self._choice}")
        place = f"{self._number + 1} of {len(self._samples)}"
        place += f" {self._choice}" if len(self._samples) < len(self._all) else ""
        ends = None if self._color is None else scale(self._all, self._color)
        return transcript(self._samples[self._number], place, self._color, ends)

    def _status(self, width: int) -> Text:
        end = min(self._top + self._height, len(self._lines))
        number = min(self._number + 1, len(self._samples))
        where = f" step {self._step}  {number}/{len(self._samples)}  {end / len(self._lines):4.0%}  "
        line = Text(where + HELP, "reverse", no_wrap=True, overflow="ellipsis")
        line.truncate(width, pad=True)
        return line


def chosen(samples: list[Sample], choice: Choice) -> list[Sample]:
    """Those of `samples` that `choice` asks for, in its order."""
    match choice:
        case Choice.ALL:
            return samples
        case Choice.WRONG:
            return [sample for sample in samples if not sample.is_right]
        case Choice.RIGHT:
            return [sample for sample in samples if sample.is_right]
        case Choice.LONGEST:
            return sorted(samples, key=lambda sample: -len(sample.tokens))
        case Choice.STALE:
            return sorted(samples, key=lambda sample: -sample.staleness)


def keys(typed: str) -> list[str]:
    """The keys that a terminal has sent, one by one."""
    return [_SAME.get(key, key) for key in _KEY.findall(typed)]


def _turn(pages: Pages, console: Console) -> None:
    """Until the reader has had enough, or the terminal is gone."""
    with _single_keys() as stdin, console.screen() as screen:
        while True:
            screen.update(pages.draw(console, console.width, console.height))
            typed = os.read(stdin, 1024).decode(errors="ignore")
            if not typed or not all(pages.press(key) for key in keys(typed)):
                return


@contextmanager
def _single_keys() -> Iterator[int]:
    """Standard input that gives every key at once and shows none. Ctrl-C stays a signal."""
    stdin = sys.stdin.fileno()
    before = termios.tcgetattr(stdin)
    try:
        tty.setcbreak(stdin)
        yield stdin
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)

"""What is on the terminal while a run goes on and after it, by a terminal that obeys what is written to it."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.text import Text

from common import console as console_module
from common.config import Config, ConsoleStyle, LearnerConfig, LoggingConfig, ModelConfig
from common.console import Console, LiveConsole, console_for
from common.metrics import format_progress, is_progress
from common.observer import RunOver
from common.region import Region, can_draw
from common.types import RunStatus
from common.wire import WireError
from tests.support.runs import ROOT
from tests.support.screen import Screen
from tests.support.statuses import make_status

STEP = format_progress(3, 20, {"reward/mean": 0.5})
CONFIG = Config(name="demo", model=ModelConfig(path="none"))
HEIGHT = 30
LIMIT_S = 60.0


class Terminal:
    """A pseudo-terminal of 80 columns, and what it shows."""

    def __init__(self) -> None:
        self.ours, self.theirs = pty.openpty()
        self.screen = Screen(80)
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, 80, 0, 0))

    @property
    def text(self) -> str:
        while select.select([self.ours], [], [], 0)[0]:
            self.screen.feed(os.read(self.ours, 1 << 16).decode())
        return self.screen.text


@contextmanager
def on_terminal() -> Iterator[Terminal]:
    """Standard output and standard error are one; in the test itself, because pytest sets them before its call."""
    terminal = Terminal()
    with pytest.MonkeyPatch.context() as patch, os.fdopen(terminal.theirs, "w", encoding="utf-8") as stream:
        patch.setenv("TERM", "xterm")
        patch.delenv("CI", raising=False)
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        yield terminal
    os.close(terminal.ours)


class FakeObserver:
    """Knows what `told` says: a status, or what is raised instead."""

    told: RunStatus | Exception | None = None

    def __init__(self, *_: object) -> None:
        self.heard_s = 0.0

    def look(self, now: float) -> RunStatus | None:
        if isinstance(self.told, Exception):
            raise self.told
        if self.told is not None:
            self.heard_s = now
        return self.told

    def close(self) -> None:
        """Nothing was opened."""


@contextmanager
def live_console() -> Iterator[tuple[LiveConsole, Terminal]]:
    with on_terminal() as terminal, pytest.MonkeyPatch.context() as patch:
        patch.setattr(console_module, "Observer", FakeObserver)
        console = console_for(CONFIG)
        assert isinstance(console, LiveConsole)
        yield console, terminal


def tell(live: LiveConsole, told: RunStatus | Exception | None) -> None:
    """The next drawing."""
    assert isinstance(live._observer, FakeObserver)
    live._observer.told = told
    live.draw(live.draw_at)


# ---- a region


def test_a_region_is_drawn_in_its_own_place_below_everything_else() -> None:
    with on_terminal() as terminal:
        region = Region()
        print("before")
        region.draw(Text("one\ntwo\nthree"))
        region.draw(Text("four\nfive"))
        with region.lifted():
            print("between")
        assert terminal.text == "before\nbetween\nfour\nfive"
        region.erase()
        print("after")
        assert terminal.text == "before\nbetween\nafter"


def test_a_terminal_that_becomes_narrower_has_wrapped_the_region() -> None:
    with on_terminal() as terminal:
        region = Region()
        print("before")
        region.draw(Text("x" * 60 + "\n" + "y" * 30))
        assert terminal.text
        fcntl.ioctl(terminal.ours, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, 40, 0, 0))
        terminal.screen = Screen(40)  # wraps anew
        terminal.screen.feed("before\r\n" + "x" * 60 + "\r\n" + "y" * 30 + "\r\n")
        region.draw(Text("z"))
        assert terminal.text == "before\nz"


def test_a_region_is_never_higher_than_the_terminal() -> None:
    with on_terminal() as terminal:
        Region().draw(Text("\n".join(map(str, range(100)))))
        assert len(terminal.text.splitlines()) == HEIGHT - 1


# ---- the console


def test_lines_stay_and_steps_are_left_out_while_they_are_seen_otherwise() -> None:
    with live_console() as (live, terminal):
        live.draw(live.draw_at)
        assert "demo  learner and actors are starting" in terminal.text
        live.write(f"{STEP}\n".encode())
        assert STEP.split()[0] in terminal.text, "nobody has said yet how the run stands"
        tell(live, make_status())
        live.write(b"a line\nhalf a ")
        live.say("a warning")
        live.write(b"line\n" + f"{STEP}  again\n".encode())
        text = terminal.text
        assert text.splitlines()[1:4] == ["a line", "a warning", "half a line"] and "again" not in text
        assert "demo  step 10/20" in text and "far-away" in text.splitlines()[-1]
        live.close()
        assert terminal.text.splitlines() == [STEP, "a line", "a warning", "half a line", f"{STEP}  again"]
        live.write(b"the summary\n")
        assert terminal.text.splitlines()[-1] == "the summary"


def test_a_learner_that_does_not_answer_gets_its_lines_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with live_console() as (live, terminal):
        tell(live, make_status())
        monkeypatch.setattr(live._observer, "look", lambda now: make_status())
        live.draw(live.draw_at + 20.0)
        assert "has not answered for 0:21" in terminal.text
        live.write(f"{STEP}\n".encode())
        assert terminal.text.startswith(STEP)


def test_a_run_that_ends_is_not_asked_any_more() -> None:
    with live_console() as (live, terminal):
        tell(live, make_status())
        tell(live, RunOver("the run is complete"))
        live.draw(live.draw_at)
        assert terminal.text.startswith("demo  ends: the run is complete  0:0")


def test_where_nobody_may_look_there_are_lines() -> None:
    with live_console() as (live, terminal):
        tell(live, WireError("no"))
        live.write(f"{STEP}\n".encode())
        assert terminal.text == f"warning: a line a step is all that is shown (no)\n{STEP}"
        assert live.draw_at == float("inf")


def test_only_a_terminal_is_drawn_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with on_terminal():
        assert can_draw() and type(console_for(CONFIG)) is LiveConsole
        plain = Config(model=ModelConfig(path="none"), logging=LoggingConfig(console=ConsoleStyle.plain))
        replay = Config(model=ModelConfig(path="none"), learner=LearnerConfig(replay="runs/x"))
        assert type(console_for(plain)) is type(console_for(replay)) is Console
        for name, value in (("TERM", "dumb"), ("TERM", ""), ("CI", "true")):
            with monkeypatch.context() as changed:
                changed.setenv(name, value)
                assert not can_draw()
        with (tmp_path / "log").open("w", encoding="utf-8") as file:
            monkeypatch.setattr(sys, "stdout", file)
            assert not can_draw()
        with (tmp_path / "log").open("w", encoding="latin-1") as file:
            monkeypatch.setattr(file, "isatty", lambda: True, raising=False)
            monkeypatch.setattr(sys, "stdout", file)
            assert not can_draw()


@pytest.mark.parametrize("stage", ["step", "critic warm-up", "done", "replayed"])
def test_every_line_of_a_step_is_known_as_such(stage: str) -> None:
    assert is_progress(format_progress(7, 120, {"time/step_s": 1.0}, stage))
    assert not is_progress(f"ALARM after {stage} 7: ...")


# ---- a supervisor on a terminal


def run_on_terminal(run_dir: Path, how: str, interrupt: bool = False) -> tuple[int, str]:
    """Exit code, and what is on the terminal at the end."""
    terminal = Terminal()
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    run_dir.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "support" / "watched_run.py"), str(run_dir), how],
        env={**environment, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
        stdin=terminal.theirs, stdout=terminal.theirs, stderr=terminal.theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    deadline = time.monotonic() + LIMIT_S
    while process.poll() is None:
        assert time.monotonic() < deadline, terminal.text
        if interrupt and "demo  step 10/20" in terminal.text:
            os.write(terminal.ours, b"\x03")  # Ctrl-C
            interrupt = False
        select.select([terminal.ours], [], [], 0.1)
        assert terminal.text is not None
    text = terminal.text
    os.close(terminal.theirs)
    os.close(terminal.ours)
    return process.returncode, text


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("dies", 137, "learner-0 was killed with SIGKILL"),
        ("waits", 130, "interrupted by SIGINT"),
    ],
)
def test_whatever_ends_a_run_leaves_a_clean_terminal(tmp_path: Path, how: str, code: int, message: str) -> None:
    ended, text = run_on_terminal(tmp_path / "demo", how, interrupt=how == "waits")
    first, *steps, last = re.sub(r"\n(?=\S* ?\()", "", text).splitlines()
    assert ended == code
    assert first == "a line of the learner's"
    assert last.startswith(f"ended with {code}: {message}") or message in text
    assert "actor-0" not in text and "accuracy" not in text
    assert all(line.startswith("step ") or line == "^C" or message in text for line in steps)

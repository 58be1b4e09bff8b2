"""Progress is shown of what takes long, and fits where it is written."""

import io
import sys

import pytest

from common import progress
from common.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def shown(clock: Clock, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, seconds: float) -> str:
    """What a task of 10 rows that takes `seconds` in all writes."""
    monkeypatch.setattr(sys, "stdout", stream)
    with Progress("tokenizing", 10, "rows") as bar:
        for done in range(1, 11):
            clock.now += seconds / 10
            bar.update(done)
    return stream.getvalue()


def test_what_ends_soon_shows_nothing(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(clock, io.StringIO(), monkeypatch, 2.0) == ""
    assert shown(clock, Terminal(), monkeypatch, 2.0) == ""


def test_a_log_gets_a_line_now_and_then_and_the_last(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(clock, io.StringIO(), monkeypatch, 50.0).splitlines()
    assert lines == [
        "tokenizing: 1 of 10 rows (10%), 45 s left",
        "tokenizing: 4 of 10 rows (40%), 30 s left",
        "tokenizing: 7 of 10 rows (70%), 15 s left",
        "tokenizing: 10 of 10 rows (100%), 0 s left",
    ]


def test_a_terminal_gets_one_line_that_renews_itself(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(clock, Terminal(), monkeypatch, 50.0)
    assert text.count("\r") == 10 and text.count("\n") == 1
    assert text.rstrip().endswith("tokenizing: 10 of 10 rows (100%), 0 s left")

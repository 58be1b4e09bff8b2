"""Long lines for terminals."""

import os
import shutil
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.lines import broken, for_terminal

LINE = "accuracy   0.193 [0.099, 0.342] -> 0.292 (held out, avg@8); during: 0.234 for version 5"


@given(st.lists(st.text("ab-/", min_size=1, max_size=30)), st.integers(1, 100), st.integers(0, 20))
def test_words_stay_whole_and_in_order_and_lines_fit_where_words_do(words: list[str], space: int, indent: int) -> None:
    line, width = " ".join(words), indent + space
    parts = broken(line, width, indent).split("\n")
    assert " ".join(part.strip() for part in parts) == line
    assert all(part.startswith(" " * indent) for part in parts[1:])
    assert all(len(part) <= width or " " not in part.strip() for part in parts)


def test_only_a_terminal_gets_them_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((60, 20)))
    assert for_terminal(LINE, 11) == LINE
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert for_terminal(f"{LINE}\nidle       0%", 11).split("\n") == [
        "accuracy   0.193 [0.099, 0.342] -> 0.292 (held out, avg@8);",
        "           during: 0.234 for version 5",
        "idle       0%",
    ]

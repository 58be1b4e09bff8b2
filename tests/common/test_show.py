"""`run.py show`: what keys do, what is printed without a terminal, and that a real terminal is left as it was."""

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import run
from common.show import Choice, Color, Pages, chosen, keys
from common.types import Verdict
from tests.common.test_samples import keep, make_sample
from tests.support.runs import ROOT

KEYS = " bjknp][cqx"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sampled steps; the last has a long wrong response, a right one, and a right one with old tokens."""
    folder = tmp_path_factory.mktemp("run")
    for step in (1, 5):
        keep(folder, make_sample(step=step))
    wrong = make_sample(("word ",) * 200, step=9, verdict=Verdict.WRONG, reward=-1.0)
    keep(folder, make_sample(("short",), step=9), wrong, make_sample(("s", "tale"), step=9, versions=(1, 5)))
    return folder


def seen(pages: Pages, width: int = 60, height: int = 12) -> str:
    console = Console(file=open(os.devnull, "w"), width=width, height=height)  # noqa: SIM115
    with console.capture() as capture:
        console.print(pages.draw(console, width, height))
    return capture.get()


def test_keys_move_through_lines_samples_and_steps(run_dir: Path) -> None:
    pages = Pages(run_dir, 9, Choice.ALL, Color.ADVANTAGE)
    assert "step 9  1/3" in seen(pages) and "sample     1 of 3 of step 9" in seen(pages)
    pages.press("n")
    assert "step 9  2/3" in seen(pages) and "wrong" in seen(pages)
    beginning = seen(pages)
    pages.press("j")
    assert seen(pages).splitlines()[0] == beginning.splitlines()[1]
    pages.press("k")
    assert seen(pages) == beginning
    for _ in range(40):  # to its end, and on
        if "2/3" in seen(pages):
            pages.press(" ")
    assert "step 9  3/3" in seen(pages)
    pages.press("[")
    assert "step 5  1/1" in seen(pages)
    pages.press("]")
    assert "step 9  1/3" in seen(pages)
    assert not pages.press("q")


@settings(max_examples=30)
@given(st.text(KEYS, max_size=20), st.integers(1, 30), st.integers(5, 200))
def test_no_key_leads_astray(run_dir: Path, typed: str, height: int, width: int) -> None:
    pages = Pages(run_dir, 9, Choice.WRONG, Color.VERSION)
    for key in typed:
        assert pages.press(key) == (key != "q")
        lines = seen(pages, width, height).splitlines()
        assert len(lines) == max(2, height)


def test_a_page_is_a_screen_and_its_last_line_fits(run_dir: Path) -> None:
    pages = Pages(run_dir, 9, Choice.LONGEST, Color.VALUE)
    for width in (20, 80, 160):
        lines = seen(pages, width, 24).splitlines()
        assert len(lines) == 24 and len(lines[-1]) <= width
    assert "q quit" in seen(pages, 80, 24)


def test_choices_filter_or_order(run_dir: Path) -> None:
    short, long, stale = Pages(run_dir, 9, Choice.ALL, Color.VALUE)._samples
    found = {choice: chosen([short, long, stale], choice) for choice in Choice}
    assert found[Choice.WRONG] == [long] and found[Choice.RIGHT] == [short, stale]
    assert found[Choice.LONGEST] == [long, stale, short] and found[Choice.STALE] == [stale, short, long]


def test_what_terminals_send_for_arrows_and_pages() -> None:
    assert keys("\x1b[A\x1bOBn\x1b[6~q\x1b[1;5H") == ["k", "j", "n", " ", "q", "\x1b[1;5H"]


def test_without_a_terminal_all_of_the_newest_step_is_printed(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["show", str(run_dir)]) == 0
    out = capsys.readouterr().out
    assert (
        "\x1b" not in out
        and "advantage " not in out
        and out.count("step 9") == 3
        and "word word" in out
        and "stale" in out
    )
    assert run.main(["show", str(run_dir), "--step", "5", "--wrong"]) == 0
    assert capsys.readouterr().out == "none of the 1 samples of step 5 is wrong\n\n"


def test_mistakes_are_one_sentence(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["show", str(run_dir), "--step", "7"]) == 2
    assert capsys.readouterr().err == (
        f"error: {run_dir} has no samples of step 7: {run_dir}/samples has those of 3 steps, 1 to 9\n"
    )
    assert run.main(["show", str(tmp_path)]) == 2
    assert "has no samples" in capsys.readouterr().err


def test_in_a_terminal_keys_turn_pages_and_the_terminal_is_left_as_it_was(run_dir: Path) -> None:
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), "show", str(run_dir)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"},
    )
    try:
        out = b""
        for key, awaited in ((b"n", b"1/3"), (b"[", b"2/3"), (b"q", b"1/1")):
            while awaited not in out:
                out += os.read(ours, 65536)
            out = b""
            os.write(ours, key)
        assert process.wait(60.0) == 0
        while b"\x1b[?1049l" not in out:  # the screen that was there before
            out += os.read(ours, 65536)
        assert termios.tcgetattr(theirs) == before
    finally:
        process.kill()
        os.close(ours)
        os.close(theirs)

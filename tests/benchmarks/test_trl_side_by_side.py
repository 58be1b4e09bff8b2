"""The arithmetic of the comparison with TRL, without TRL: clocks, CPU seconds, when an accuracy is reached."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import trl_side_by_side
from benchmarks.measured_process import Usage, last_error, run_measured
from benchmarks.trl_side_by_side import Point, Result, Try, Way, first_at, render, render_tries, result, timeline

USAGE = Usage(launched=100.0, load=1.0, samples=[[110.0, 8.0], [120.0, 28.0]])
ROWS = [
    {"step": 1, "time": 112.0, "time/step_s": 2.0, "tokens/generated": 50.0},
    {"step": 2, "time": 115.0, "time/step_s": 3.0, "tokens/generated": 90.0},
    {"step": 3, "time": 119.0, "time/step_s": 4.0, "tokens/generated": 150.0},
    {"step": 3, "time": 125.0, "accuracy/heldout": 1.0},  # an evaluation after the end
]


def points(*accuracies: float) -> list[Point]:
    return [
        Point(step=4 * i, wall_s=10.0 * i, cpu_s=5.0 * i, tokens=1e3 * i, accuracy=a) for i, a in enumerate(accuracies)
    ]


def made_up(seed: int, *accuracies: float) -> Result:
    return Result(
        side="A",
        seed=seed,
        start_s=20.0,
        start_cpu_s=30.0,
        step_s=2.5,
        step_cpu_s=1.25,
        step_tokens=250.0,
        load=0.0,
        points=points(*accuracies),
    )


def test_cpu_seconds_lie_on_straight_lines_between_the_looks_from_none_at_the_launch() -> None:
    assert [USAGE.cpu_at(at) for at in (90.0, 100.0, 105.0, 110.0, 115.0, 120.0, 130.0)] == [0, 0, 4, 8, 18, 28, 28]


def test_the_clock_begins_with_the_first_batch_and_counts_no_start() -> None:
    began, batches = timeline(ROWS, USAGE)
    assert began == 110.0
    assert [(p.step, p.wall_s, p.cpu_s, p.tokens) for p in batches] == [(1, 2, 4, 50), (2, 5, 10, 90), (3, 9, 18, 150)]


def test_an_accuracy_is_reached_with_the_first_evaluation_at_or_above_it() -> None:
    curve = points(0.2, 0.6, 0.5, 0.9)
    first, second = first_at(curve, 0.6), first_at(curve, 0.8)
    assert first is not None and (first.step, first.wall_s) == (4, 10.0)
    assert second is not None and (second.step, second.wall_s) == (12, 30.0)
    assert first_at(curve, 0.95) is None


def test_a_result_has_the_start_apart_and_points_only_where_weights_were_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trl_side_by_side, "read_jsonl", lambda path: ROWS)
    run = SimpleNamespace(side="A", seed=0, config=SimpleNamespace(run_dir=tmp_path))
    found = result(run, USAGE, {0: 0.2, 2: 0.5, 3: 0.7})  # type: ignore[arg-type]
    assert (found.start_s, found.start_cpu_s) == (10.0, 8.0)
    assert (found.step_s, found.step_cpu_s, found.step_tokens) == (3.0, 6.0, 50.0)
    assert [(p.step, p.wall_s, p.accuracy) for p in found.points] == [(0, 0.0, 0.2), (2, 5.0, 0.5), (3, 9.0, 0.7)]


def test_a_side_has_a_mean_only_of_what_all_its_runs_have_reached() -> None:
    lines = render([made_up(0, 0.2, 0.6, 0.9), made_up(1, 0.2, 0.4, 0.7)], (0.6, 0.8)).splitlines()
    assert lines[2].startswith(
        "| A | 0 | 20 (30) | 2.50 | 1.25 | 250 | 4 | 10 | 5 | 1,000 | 8 | 20 | 10 | 2,000 | 0.900"
    )
    assert lines[4].startswith("| A | mean | 20 (30) | 2.50 | 1.25 | 250 | 6 | 15 | 8 | 1,500 | - | - | - | - | 0.800")


def test_a_way_to_generate_that_does_not_run_is_said_with_its_reason() -> None:
    table = render_tries(
        [Try(way=Way("x", 1), step_s=0.5), Try(way=Way("y", 2, bf16=True), step_s=None, reason="no GPU")]
    )
    assert "| x, 1 thread | 0.50 |" in table and "| y, 2 threads, bf16 | no GPU |" in table


def test_the_cpu_seconds_of_a_command_include_those_of_its_children(tmp_path: Path) -> None:
    burn = "import time\nwhile time.process_time() < 1.2: pass"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    core = min(os.sched_getaffinity(0))
    usage = run_measured([sys.executable, "-c", code], dict(os.environ), [core], tmp_path / "log", 60.0)
    assert usage.samples[-1][1] > 0.3 and usage.samples == sorted(usage.samples)


def test_a_command_that_fails_is_said_with_the_last_error_of_its_log(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    with pytest.raises(RuntimeError, match="ValueError: no such thing"):
        run_measured(
            [sys.executable, "-c", "raise ValueError('no such thing')"],
            dict(os.environ),
            [core],
            tmp_path / "log",
            60.0,
        )
    assert last_error("[rank0]:   x\n[rank0]: AttributeError: no x\n[rank0]: a note\n") == "AttributeError: no x"
    assert last_error("a note: ErrorX\nall is well\n") == ""


def test_without_trl_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trl_side_by_side.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        trl_side_by_side.main(["--seeds", "0"])
    assert "pip install --no-deps -r benchmarks/requirements.txt" in capsys.readouterr().err


def test_only_what_is_installed_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl_side_by_side, "PACKAGES", ("torch", "no-such-package"))
    assert list(trl_side_by_side.versions()) == ["torch"]

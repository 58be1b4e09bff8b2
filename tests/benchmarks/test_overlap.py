"""The arithmetic of the benchmark of overlapping, from made-up runs: timed steps, bound, shares, and what it runs."""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import overlap, timed_run
from benchmarks.overlap import BOUNDS, COMMON, DONE, POINTS, STEPS, Gain, command, name_of, read_gains
from common.loading import load_config, save_config
from common.types import JSON

COST = {"wall_s": 90.0, "cpu_s": 120.0, "others": 0.01, "load": 0.5, "yardstick_s": 0.2, "commit": "abc"}


def metrics(step_s: float, wait_s: float, publish_s: float, idle: float) -> Iterator[dict[str, JSON]]:
    """Steps that take this long where they are timed, and 10 s where the pipeline fills and empties."""
    for step in range(1, STEPS + 1):
        is_timed = step in overlap.timed_steps()
        yield {
            "step": step,
            "time": step,
            "version": step,
            "time/step_s": (step_s + (0.01 if step % 2 else -0.01)) if is_timed else 10.0,
            "time/wait_for_batch_s": wait_s if is_timed else 5.0,
            "time/train_s": (step_s - wait_s - publish_s) if is_timed else 1.0,
            "time/publish_s": publish_s,
            "tokens/generated": 100 * step,
            "actors/connected": 1,
            "actors/idle_fraction": idle,
            "staleness/hist": {"0": 30.0, "1": 10.0},
        }
    last = {"accuracy/heldout": 0.5, "accuracy/heldout_low": 0.402, "accuracy/heldout_high": 0.598}
    yield {"step": STEPS, "time": STEPS, "version": STEPS, "accuracy/version": STEPS, **last}


def write(runs_dir: Path, point: str, bound: int, rows: Iterator[dict[str, JSON]], repeat: int = 0) -> None:
    folder = runs_dir / name_of(point, bound, repeat)
    folder.mkdir(parents=True)
    settings = command(point, bound, runs_dir, [0, 1], repeat)
    names = [settings[i + 1] for i, word in enumerate(settings) if word == "-c"]
    save_config(
        load_config(names, [word for word in settings if "=" in word and word[0] != "-"]), folder / "config.yaml"
    )
    groups = [
        {"step": step, "lease_id": step, "versions": [0, 0], "lengths": [30, 10], "rewards": [1, 0], "actor": "actor-0",
         "generation_s": 1.0, "verification_s": 0.0}
        for step in range(1, STEPS + 1)
    ]  # fmt: skip
    for name, lines in (("metrics.jsonl", rows), ("ledger.jsonl", groups)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / DONE).write_text(json.dumps(COST))


@pytest.fixture
def gains(tmp_path: Path) -> list[Gain]:
    """In turns 2 s of generation and 1 s of the rest; overlapped 2.5 and 2 s a step."""
    write(tmp_path, "2:1", 0, metrics(3.0, 2.0, 0.2, 0.3))
    write(tmp_path, "2:1", 1, metrics(2.5, 1.4, 0.3, 0.08))
    write(tmp_path, "2:1", 2, metrics(2.0, 1.0, 0.2, 0.2))
    return list(read_gains(list(POINTS), tmp_path))


def test_speed_up_and_bound_are_those_of_the_timed_steps(gains: list[Gain]) -> None:
    one, two = gains
    assert (one.arm.max_staleness, two.arm.max_staleness) == (1, 2)
    assert one.sync.steps == len(overlap.timed_steps()) == STEPS - overlap.FILLING - overlap.EMPTYING
    assert one.generate_s == pytest.approx(2.0) and one.train_s == pytest.approx(1.0, abs=0.01)
    assert one.bound == pytest.approx(1.5, abs=0.01)
    assert one.speed_up == pytest.approx(1.2, abs=0.01) and two.speed_up == pytest.approx(1.5, abs=0.01)
    assert one.of_bound == pytest.approx(0.8, abs=0.01)
    assert one.sync.step_error_s == pytest.approx(0.01 / one.sync.steps**0.5, rel=0.1)
    assert one.arm.tokens == 40 and one.arm.age_mean == 0.25


def test_what_a_step_takes_longer_is_told_from_both_sides(gains: list[Gain]) -> None:
    assert gains[0].at_work == pytest.approx(0.92)
    losses = gains[0].losses
    assert losses["longer than the bound"] == pytest.approx(0.5, abs=0.01)
    assert losses["learner waits"] == pytest.approx(1.4)
    assert losses["trains longer"] == pytest.approx(0.0, abs=0.01)
    assert losses["publishes longer"] == pytest.approx(0.1)
    assert losses["actor samples longer"] == pytest.approx(0.92 * 2.5 - 0.7 * 3.0, abs=0.01)
    assert losses["is paused"] == pytest.approx(0.08 * 2.5, abs=0.01) and losses["is without work"] == 0.0
    assert gains[1].losses["is paused"] == pytest.approx(0.2)
    assert gains[1].losses["is without work"] == pytest.approx(0.2, abs=0.01)


def test_table_json_and_drawing_show_each_run(gains: list[Gain]) -> None:
    table = overlap.render(gains)
    assert len(re.findall(r"^\| (2:1)? \| [012] \|", table, re.MULTILINE)) == 5  # three runs, then two losses
    assert "| 2.00 | 1.00 |" in table and "**0.80**" in table and "0.500 ± 0.050" in table and "1.0%" in table
    rows = json.loads(overlap.written(gains))
    assert [row["of_bound"] for row in rows] == [gain.of_bound for gain in gains]
    texts = " ".join(ElementTree.fromstring(overlap.drawn(gains)).itertext())
    assert "bound" in texts and "max_staleness=1" in texts and "max_staleness=2" in texts


def test_repeats_are_averaged_and_the_error_is_that_of_what_scatters_more(tmp_path: Path) -> None:
    for repeat, step_s in enumerate((2.0, 2.6)):
        write(tmp_path, "2:1", 0, metrics(3.0, 2.0, 0.2, 0.3), repeat)
        write(tmp_path, "2:1", 1, metrics(step_s, 1.0, 0.2, 0.2), repeat)
    (gain,) = read_gains(list(POINTS), tmp_path)
    assert gain.arm.step_s == pytest.approx(2.3, abs=0.01) and len(gain.arm.costs) == 2
    assert gain.arm.step_error_s == pytest.approx(0.3, abs=0.01)
    assert gain.sync.step_error_s == pytest.approx(0.01 / (2 * gain.sync.steps) ** 0.5, rel=0.1)
    assert "| 0.50 0.50 | 1.0% | 200 200 |" in overlap.render([gain])


def test_a_point_without_its_synchronous_run_says_nothing(tmp_path: Path) -> None:
    write(tmp_path, "2:1", 1, metrics(2.5, 1.4, 0.3, 0.08))
    assert list(read_gains(list(POINTS), tmp_path)) == []


def test_runs_of_a_point_differ_in_their_bound_alone() -> None:
    for point in POINTS:
        commands = [command(point, bound, Path("runs"), [0, 1]) for bound in BOUNDS]
        alike = {tuple(w for w in c if not w.startswith(("name=", "staleness.max_staleness="))) for c in commands}
        assert len(alike) == 1 and set(COMMON) <= set(commands[0])


def test_what_is_finished_is_not_run_again_and_what_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "1:1", 0, metrics(3.0, 2.0, 0.2, 0.3))
    begun: list[str] = []

    def train(arguments: list[str], timeout_s: float) -> None:
        name = next(word for word in arguments if word.startswith("name=")).removeprefix("name=")
        begun.append(name)
        (tmp_path / name).mkdir()
        if name == name_of("1:1", 1):
            raise RuntimeError("it ended with exit code 1")

    monkeypatch.setattr(timed_run, "train", train)
    (missing,) = overlap.run_all(["1:1"], tmp_path, [0, 1], minutes=10.0)
    assert begun == [name_of("1:1", 1), name_of("1:1", 2)] and missing.startswith(f"{name_of('1:1', 1)}: it ended")
    assert json.loads((tmp_path / name_of("1:1", 2) / DONE).read_text())["wall_s"] >= 0.0
    assert json.loads((tmp_path / name_of("1:1", 2) / DONE).read_text())["yardstick_s"] > 0.0
    assert len(overlap.run_all(["4:1"], tmp_path, [0, 1], minutes=1.0)) == 3, "no run begins that would not end in time"

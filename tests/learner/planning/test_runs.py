"""Speeds from the files of a run, and what is assumed where there is none."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.config import ConfigError
from common.loading import read_config, save_config
from common.types import JSON
from learner.planning.engine import EngineSpeed
from learner.planning.runs import MeasuredRun, measured
from learner.planning.speeds import assumed, through
from tests.support.measured_runs import groups, rows, write_run


def test_a_run_tells_its_speeds_by_hand(tmp_path: Path) -> None:
    """A token takes (1.75 - 2 x 0.5) / 15 s; 50 tokens in a busy second are then 2.5 sequences."""
    run = MeasuredRun(write_run(tmp_path / "run", rows(10), groups(10)))
    assert [row["step"] for row in run.rows] == [3, 4, 5, 6, 7]
    assert run.train_token_s == pytest.approx((2.5 / 40,) * 5)
    assert run.point() == pytest.approx((2.5, 0.05))
    assert (run.trained_tokens_per_s, run.generated_tokens_per_s) == (10.0, 25.0)
    assert (run.learner_idle, run.staleness_mean, run.verification_s) == pytest.approx((0.25, 0.5, 0.2))
    speeds = measured([run])
    assert speeds.publish_s == (0.5,) * 5
    assert speeds.uninformative == pytest.approx(5 / 15)
    lengths = speeds.lengths(0, np.random.default_rng(0), 2, 10)
    assert sorted(lengths.tolist()) == [5, 10], "of one group, cut off at max_tokens"


def test_engines_are_corrected_until_a_simulation_takes_as_long_for_a_token(tmp_path: Path) -> None:
    run = MeasuredRun(write_run(tmp_path / "run", rows(20), groups(20)))
    speeds = measured([run])
    assert run.simulated(speeds).token_s == pytest.approx(run.token_s, rel=0.02)
    assert speeds.engine.sequence_s / speeds.engine.base_s == pytest.approx(0.9 / 2.5 / 0.1), "the line keeps its form"


@pytest.mark.parametrize(
    ("num_steps", "left_out", "sentence"),
    [
        (7, "", r"has 2 policy steps between its beginning and its end, .* let it train 8 or more"),
        (10, "generation_s", r"whose ledger does not tell how long groups took"),
        (0, "", r"has 0 policy steps"),
        (10, "actors/connected", r"has 0 policy steps"),
    ],
)
def test_a_run_that_does_not_tell_is_refused(tmp_path: Path, num_steps: int, left_out: str, sentence: str) -> None:
    def kept(lines: Iterator[dict[str, JSON]]) -> Iterator[dict[str, JSON]]:
        return ({name: value for name, value in line.items() if name != left_out} for line in lines)

    folder = write_run(tmp_path / "run", kept(rows(num_steps)), kept(groups(num_steps)))
    with pytest.raises(ConfigError, match=sentence):
        MeasuredRun(folder)


def test_a_run_that_replays_another_has_no_engines_to_measure(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rows(10), groups(10))
    config = read_config(folder / "config.yaml")
    save_config(replace(config, learner=replace(config.learner, replay="runs/first")), folder / "config.yaml")
    with pytest.raises(ConfigError, match=r"trains on the record of runs/first: give --from that"):
        MeasuredRun(folder)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.yaml"):
        MeasuredRun(tmp_path)


def test_two_concurrencies_give_the_line_through_them() -> None:
    line = through([(10.0, 0.03), (40.0, 0.06)], 0.5)
    assert (line.base_s, line.sequence_s) == pytest.approx((0.02, 0.001))


@pytest.mark.parametrize(
    ("points", "base_s", "sequence_s"),
    [
        ([(10.0, 0.04)], 0.02, 0.002),  # one point: half of it is overhead
        ([(10.0, 0.04), (11.0, 0.08)], 0.02, 0.002),  # too close together
        ([(10.0, 0.04), (40.0, 0.02)], 0.04, 0.0),  # a pass of more sequences is not faster
        ([(10.0, 0.04), (40.0, 0.40)], 0.0, 0.004),  # nor does nothing take less than no time
    ],
)
def test_a_line_that_cannot_be_is_not_drawn(
    points: list[tuple[float, float]], base_s: float, sequence_s: float
) -> None:
    assert through(points, 0.5, 0.25) == EngineSpeed(
        base_s=pytest.approx(base_s), sequence_s=pytest.approx(sequence_s), verification_s=0.25
    )


def test_assumed_speeds_are_those_that_were_asked_for() -> None:
    speeds = assumed(
        actor_tokens_per_s=500.0,
        learner_tokens_per_s=1000.0,
        publish_s=0.25,
        length_mean=200.0,
        length_sigma=0.5,
        sequences=32,
        overhead=0.5,
    )
    assert speeds.engine.tokens_per_s(32) == pytest.approx(500.0)
    assert speeds.engine.pass_s(0) == pytest.approx(speeds.engine.pass_s(32) / 2)
    assert speeds.train_s(7, 3000) == pytest.approx(3.0)
    lengths = speeds.lengths(0, np.random.default_rng(0), 20_000, 1000)
    assert lengths.mean() == pytest.approx(200.0, rel=0.02)
    assert lengths.min() >= 1 and lengths.max() <= 1000

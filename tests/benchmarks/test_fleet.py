"""Processes beside their simulation: what is ideal, what a stand-in engine has drawn, and what the table says."""

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks import fixed_rate
from benchmarks.fixed_rate import ENOUGH, MAX_TOKENS, PLACES, SAMPLES, SPEEDS, TOKEN_S, Drawing
from benchmarks.fleet import compare, drawing, ideal, render, speeds_of
from learner.planning.runs import MeasuredRun
from tests.support.measured_runs import groups, rows, write_run
from tests.support.vllm_support import lease


def test_actors_with_all_places_full_are_ideal_until_the_learner_is_busy() -> None:
    two = [[2, 4], [4, 4]]  # 14 tokens in 4 + 4 passes of one place
    assert ideal(two, 1) == pytest.approx(14 / (8 * TOKEN_S / PLACES))
    assert ideal(two, 2) == pytest.approx(2 * ideal(two, 1))
    assert ideal(two, 1000) == pytest.approx(1 / SPEEDS.train_token_s[0])


def test_four_actors_are_just_enough_for_the_learner() -> None:
    random = np.random.default_rng(1)
    drawn = [SPEEDS.lengths(0, random, SAMPLES, MAX_TOKENS).tolist() for _ in range(4000)]
    assert ideal(drawn, ENOUGH) == pytest.approx(1 / SPEEDS.train_token_s[0], rel=0.03)
    assert ideal(drawn, ENOUGH - 1) < 0.8 / SPEEDS.train_token_s[0]


def test_a_group_is_drawn_one_token_of_each_response_a_pass() -> None:
    begun = Drawing(lease(1, num_samples=8, max_tokens=MAX_TOKENS), 10.0)
    assert begun.lengths.tolist() == SPEEDS.lengths(0, np.random.default_rng(1), 8, MAX_TOKENS).tolist()
    assert begun.num_drawn(10.0) == 0
    assert begun.num_drawn(10.0 + 1.5 * TOKEN_S) == 8
    assert begun.num_drawn(begun.ends_s + 1.0) == begun.lengths.sum()
    assert begun.ends_s == pytest.approx(10.0 + TOKEN_S * begun.lengths.max())


def test_a_run_is_compared_with_its_ideal_and_with_its_simulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = MeasuredRun(write_run(tmp_path / "actors-1", rows(12), groups(12)))
    monkeypatch.setattr(fixed_rate, "TOKEN_S", 0.05)  # 15 passes of 0.05 s for 40 tokens of two groups in two places
    monkeypatch.setattr(fixed_rate, "SPEEDS", replace(SPEEDS, train_token_s=(0.01,)))
    row = compare(run, 1, speeds_of(run))
    assert row.tokens_per_s == pytest.approx(10.0)
    assert row.ideal_tokens_per_s == pytest.approx(40 / 0.75)
    assert row.share == pytest.approx(0.1875)
    assert row.train_pace == pytest.approx(2.5 / 0.4)  # 4 s without waiting and publishing, for 40 tokens
    assert row.learner_idle == pytest.approx(0.25) and row.publish_s == pytest.approx(0.5)
    assert row.ratio == pytest.approx(row.simulated_tokens_per_s / 10.0)
    assert "| 1 | 10 | 53 | 0.19 | 25% |" in render(row)
    texts = [part.text for part in ElementTree.fromstring(drawing([row, replace(row, actors=2)])).iter()]
    assert {"measured", "ideal", "predicted"} <= set(texts)

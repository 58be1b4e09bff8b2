"""The comparison of the planner with runs: which runs there are, and what its table says of them."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.planner import compare, names, render, sibling
from learner.planning.runs import MeasuredRun
from tests.support.measured_runs import groups, rows, write_run


def test_every_run_has_a_sibling_in_the_other_order() -> None:
    assert len(set(names())) == 8
    assert all(sibling(sibling(name)) == name != sibling(name) for name in names())


def test_each_run_is_simulated_with_its_own_speeds_and_with_its_siblings(tmp_path: Path) -> None:
    pair = ("one-admission_order", "one-first_finished")
    runs = {name: MeasuredRun(write_run(tmp_path / name, rows(12), groups(12))) for name in pair}
    found = list(compare(runs))
    assert [(row.run, row.speeds_of, row.is_own) for row in found] == [
        (pair[0], pair[0], True),
        (pair[0], pair[1], False),
        (pair[1], pair[1], True),
        (pair[1], pair[0], False),
    ]
    assert found[0].measured_tokens_per_s == 10.0 and found[0].measured_staleness == 0.5
    assert "| one-admission_order | itself | 10 |" in render(found)


def test_a_ratio_is_within_fifteen_percent_or_not(tmp_path: Path) -> None:
    run = MeasuredRun(write_run(tmp_path / "one-admission_order", rows(12), groups(12)))
    (row,) = compare({"one-admission_order": run})
    exact = replace(row, simulated_tokens_per_s=10.0, simulated_staleness=0.5)
    assert exact.is_within and replace(exact, simulated_tokens_per_s=11.4).is_within
    assert not replace(exact, simulated_tokens_per_s=8.4).is_within
    assert not replace(exact, simulated_staleness=0.6).is_within
    assert not replace(exact, measured_staleness=0.0).is_within
    assert exact.tokens_ratio == pytest.approx(1.0)

"""Runs beside each other: what differs, how they are called, and what came of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from common.config import AlgorithmConfig, Config, OptimizerConfig, StalenessConfig
from common.report.compare import compare, differences, render, to_json
from common.report.html import comparison_page
from tests.support.made_up_run import MadeUp, config, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    bounds = [
        MadeUp(config=config(name=f"bound-{bound}", staleness=StalenessConfig(max_staleness=bound)), accuracies=points)
        for bound, points in ((1, (0.2, 0.5, 0.7)), (4, (0.2, 0.6, 0.8)))
    ]
    return [write_run(folder / made.config.name, made) for made in bounds]


def test_runs_are_called_by_what_differs(runs: list[Path]) -> None:
    found = compare(runs)
    assert found.labels == ("max_staleness=1", "max_staleness=4")
    assert found.differences == {"staleness.max_staleness": ("1", "4")}
    assert found.facts["accuracy, first -> last (95%)"] == ("20% -> 70% (66% to 74%)", "20% -> 80% (76% to 84%)")


def test_runs_that_differ_in_much_or_in_nothing_are_called_by_their_folders(runs: list[Path], tmp_path: Path) -> None:
    same = write_run(tmp_path / "same", MadeUp(config=config(name="other", staleness=StalenessConfig(max_staleness=1))))
    assert compare([runs[0], same]).labels == ("bound-1", "same")
    assert "nothing but where they are" in render(compare([runs[0], same]))
    other = config(seed=3, algorithm=AlgorithmConfig(clip_low=0.1, clip_high=0.1, gamma=0.9))
    much = write_run(tmp_path / "much", MadeUp(config=other))
    assert compare([runs[1], much]).labels == ("bound-4", "much")


def test_labels_are_unique_when_some_of_the_runs_are_alike(runs: list[Path], tmp_path: Path) -> None:
    twin = write_run(tmp_path / "twin", MadeUp(config=config(staleness=StalenessConfig(max_staleness=4))))
    labels = compare([*runs, twin]).labels
    assert labels == ("max_staleness=1", "max_staleness=4 (bound-4)", "max_staleness=4 (twin)")


def test_settings_of_the_same_last_name_are_told_apart() -> None:
    policy, critic = OptimizerConfig(learning_rate=1.0), OptimizerConfig(learning_rate=2.0)
    base = Config()
    other = replace(base, name="elsewhere", learner=replace(base.learner, policy=policy, critic=critic))
    assert set(differences([base, other])) == {"learner.policy.learning_rate", "learner.critic.learning_rate"}


def test_text_json_and_page_have_all_runs_and_what_differs(runs: list[Path]) -> None:
    found = compare(runs)
    text = render(found)
    assert f"A  {runs[0]}: max_staleness=1\nB  {runs[1]}: max_staleness=4\n" in text
    assert "staleness.max_staleness  1  4" in text
    plain = json.loads(json.dumps(to_json(found)))
    assert [run["label"] for run in plain["runs"]] == list(found.labels)
    assert plain["differences"] == {"staleness.max_staleness": ["1", "4"]}
    page = comparison_page(found)
    assert page.count('<svg class="plot"') == 2 and "max_staleness=4" in page
    assert page.count('polyline class="line c0"') == page.count('polyline class="line c1"') == 2

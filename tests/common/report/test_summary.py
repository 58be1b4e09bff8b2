"""The closing summary, from hand-made run directories."""

from dataclasses import replace
from pathlib import Path

import pytest

from common.config import Config, EvalConfig, ModelConfig, OverAge, StalenessConfig
from common.loading import save_config
from common.metrics import RunLog, Value
from common.report.reading import read_run
from common.report.summary import summary
from common.report.text import render


def run_dir(folder: Path, rows: list[dict[str, Value]]) -> Path:
    """A run whose line i+1 is rows[i]."""
    save_config(Config(name="trial", model=ModelConfig(path="gone")), folder / "config.yaml")
    with RunLog(folder) as log:
        for step, values in enumerate(rows, start=1):
            log.log(step, values)
    return folder


def step(seconds: float, **values: Value) -> dict[str, Value]:
    return {"time/step_s": seconds, **{name.replace("__", "/"): value for name, value in values.items()}}


def test_counts_are_last_values_rates_are_totals_over_time_and_shares_are_weighted_by_time(tmp_path: Path) -> None:
    rows = [
        step(1.0, version=0, tokens__generated=100, tokens__trained=50, actors__idle_fraction=0.0, drops__stale=0),
        step(3.0, version=1, tokens__generated=800, tokens__trained=400, actors__idle_fraction=0.4, drops__stale=2),
    ]
    result = summary(run_dir(tmp_path, rows))
    assert (result.num_steps, result.num_versions, result.wall_s) == (2, 1, 4.0)
    assert (result.generated_tokens, result.generated_per_s) == (800, 200.0)
    assert (result.trained_tokens, result.trained_per_s) == (400, 100.0)
    assert result.actors_idle == pytest.approx(0.3)
    assert result.learner_idle is None
    assert result.drops == {"stale": 2}


def test_staleness_is_weighted_by_tokens(tmp_path: Path) -> None:
    rows = [
        step(1.0, staleness__hist={0: 30.0}, staleness__token_max=0),
        step(1.0, staleness__hist={0: 20.0, 2: 50.0}, staleness__token_max=2),
    ]
    result = summary(run_dir(tmp_path, rows))
    assert result.staleness_hist == {0: 50.0, 2: 50.0}
    assert (result.staleness_mean, result.staleness_max) == (1.0, 2.0)
    run = read_run(tmp_path)
    text = render(run)
    assert "mean 1.00, max 2 of at most 2 versions" in text
    assert "2 old  50.0% ####################\n" in text
    masking = replace(run.config, staleness=StalenessConfig(max_staleness=1, over_age=OverAge.mask))
    text = render(replace(run, config=masking))
    assert "mean 1.00, max 2 versions; tokens older than 1 were masked" in text


def test_a_warm_up_that_its_gate_ended_is_counted_as_long_as_it_was(tmp_path: Path) -> None:
    """Planned are 50 steps of warm-up and 30 of the policy."""
    folder = run_dir(tmp_path, [step(1.0)] * 3)
    assert "3 of 80 (3 of critic warm-up) in 3 s" in render(read_run(folder))
    with RunLog(folder) as log:
        log.log(4, step(1.0, staleness__hist={0: 5.0}))
    assert "4 of 33 (3 of critic warm-up) in 4 s" in render(read_run(folder))


def test_accuracy_is_shown_before_during_and_after_with_its_version(tmp_path: Path) -> None:
    rows: list[dict[str, Value]] = [
        {"accuracy/heldout": 0.44, "accuracy/version": 0},
        step(1.0, accuracy__heldout=0.7, accuracy__version=10),
        {"accuracy/heldout": 0.89, "accuracy/version": 30},
    ]
    result = summary(run_dir(tmp_path, rows))
    assert [point.accuracy for point in result.evaluations] == [0.44, 0.7, 0.89]
    assert "0.440 -> 0.890 (held out, avg@4); during: 0.700 for version 10" in render(read_run(tmp_path))


def test_an_accuracy_says_of_how_many_prompts_and_what_of_it_failed(tmp_path: Path) -> None:
    whole = {"accuracy/heldout": 0.5, "accuracy/version": 0, "eval/num_prompts": 8, "eval/num_failed": 0}
    partial = {"accuracy/heldout": 0.25, "accuracy/version": 3, "eval/num_prompts": 8, "eval/num_failed": 2}
    text = render(read_run(run_dir(tmp_path, [whole, partial | {"eval/num_errors": 1}])))
    assert "0.500 -> 0.250 (held out, avg@4, 8 prompts)" in text
    assert "INCOMPLETE for version 3: 2 prompts were not sampled and the verifier failed on 1 responses, which" in text
    assert "INCOMPLETE for version 0" not in text


def test_an_accuracy_has_its_interval_and_says_which_publications_came_in_between(tmp_path: Path) -> None:
    first = {"accuracy/heldout": 0.5, "accuracy/heldout_low": 0.4, "accuracy/heldout_high": 0.6}
    last = {"accuracy/heldout": 0.75, "accuracy/heldout_low": 0.7, "accuracy/heldout_high": 0.8125}
    rows: list[dict[str, Value]] = [
        first | {"accuracy/version": 0, "accuracy/version_newest": 0},
        last | {"accuracy/version": 10, "accuracy/version_newest": 12},
    ]
    text = render(read_run(run_dir(tmp_path, rows)))
    assert "0.500 [0.400, 0.600] -> 0.750 [0.700, 0.812] (held out, avg@4, 95% interval)" in text
    assert "; across publications: versions 10 to 12" in text


def test_an_accuracy_stands_where_its_version_was_published(tmp_path: Path) -> None:
    rows = [
        step(5.0, version=0, tokens__generated=100),
        step(2.0, version=1, tokens__generated=150, accuracy__heldout=0.1, accuracy__version=0),
        step(2.0, version=2, tokens__generated=180),
        step(3.0, version=3, tokens__generated=260, accuracy__heldout=0.5, accuracy__version=2),
    ]
    points = summary(run_dir(tmp_path, rows)).evaluations
    assert [(point.wall_s, point.generated_tokens) for point in points] == [(0.0, 0.0), (9.0, 180.0)]


def test_a_greedy_evaluation_is_called_so(tmp_path: Path) -> None:
    folder = run_dir(tmp_path, [{"accuracy/heldout": 0.5, "accuracy/version": 0, "eval/num_prompts": 8}])
    config = Config(model=ModelConfig(path="gone"), eval=EvalConfig(temperature=0.0))
    save_config(config, folder / "config.yaml")
    assert "0.500 for version 0 (held out, greedy, 8 prompts)" in render(read_run(folder))


def test_verdicts_are_counted_in_the_summary(tmp_path: Path) -> None:
    rows = [step(1.0, verdicts__correct=3, verdicts__wrong=1), step(1.0, verdicts__correct=5, verdicts__error=2)]
    result = summary(run_dir(tmp_path, rows))
    assert result.verdicts == {"correct": 5, "wrong": 1, "error": 2}
    assert "8 responses: correct 5, error 2, wrong 1" in render(read_run(tmp_path))


def test_a_run_that_measured_nothing_yet_is_still_rendered(tmp_path: Path) -> None:
    text = render(read_run(run_dir(tmp_path, [{"version": 0}])))
    assert "not evaluated yet" in text and "not measured" in text and "no group" in text


def test_drops_are_listed_by_reason(tmp_path: Path) -> None:
    text = render(read_run(run_dir(tmp_path, [step(1.0, drops__stale=3, drops__actor_lost=1, drops__failed=0)])))
    assert "4 groups: actor_lost 1, stale 3" in text


def test_rows_that_were_left_out_of_the_data_are_counted_by_reason(tmp_path: Path) -> None:
    folder = run_dir(tmp_path, [step(1.0)])
    assert "left out" not in render(read_run(folder))
    (folder / "data").mkdir()
    reasons = ("too_long", "no_answer", "too_long")
    lines = [f'{{"place": "x", "reason": "{reason}", "text": "y"}}\n' for reason in reasons]
    (folder / "data" / "dropped.jsonl").write_text("".join(lines))
    assert "3 rows of the data: too_long 2, no_answer 1" in render(read_run(folder))

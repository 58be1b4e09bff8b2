"""The arithmetic of the ablation table, on curves that were made up."""

import pytest

from benchmarks.ablations import PLAN
from benchmarks.miniature.comparison import Row, at, paired, render, row_of, until
from benchmarks.miniature.run import Outcome, Point


def outcome(*accuracies: float, tokens: int = 0, failure: str | None = None) -> Outcome:
    """One evaluation every 5 steps, 1000 tokens and 2 CPU seconds each; `tokens` of value pretraining."""
    points = [
        Point(step=5 * i, accuracy=accuracy, tokens=1000 * i, cpu_s=2.0 * i, metrics={})
        for i, accuracy in enumerate(accuracies)
    ]
    return Outcome(points=points, alarms=[], pretraining_tokens=tokens, pretraining_cpu_s=3.0, failure=failure)


def test_accuracy_at_a_place_lies_on_the_line_between_two_evaluations() -> None:
    run = outcome(0.2, 0.6, 0.8)
    assert at(run, "step", 5) == pytest.approx(0.6) and at(run, "tokens", 1500) == pytest.approx(0.7)
    assert at(run, "tokens", 1500, before=1000) == pytest.approx(0.4)
    assert at(run, "tokens", 500, before=1000) == pytest.approx(0.2), "still pretraining"
    assert at(run, "cpu_s", 4.1) is None, "beyond the end"


def test_what_it_takes_to_a_goal() -> None:
    run = outcome(0.2, 0.6, 0.5, 1.0)
    assert until(run, "step", 0.4) == pytest.approx(2.5) and until(run, "tokens", 0.75, before=50) == pytest.approx(
        2550
    )
    assert until(outcome(0.2, 0.3), "step", 0.4) is None and until(run, "step", 0.1) == 0


def test_the_rate_is_that_of_the_highest_curve_and_a_failed_run_counts_what_it_lacks_as_0() -> None:
    row, flat, failed = PLAN.rows[3], outcome(*[0.3] * 9), outcome(0.3, 0.9, failure="not finite")
    tuning = {PLAN.job(row, rate, seed): flat for rate in (1.0, 2.0) for seed in PLAN.tuning_seeds}
    tuning[PLAN.job(row, 2.0, PLAN.tuning_seeds[0])] = failed
    assert PLAN.rate_of(row, tuning, (1.0, 2.0)) == 1.0
    assert PLAN.rate_of(row, {}, (5.0,)) == 5.0


def test_the_table_says_how_many_seeds_got_there() -> None:
    rows = [
        row_of(PLAN, "VAPO", 3e-4, [outcome(0.2, 0.9, 0.9, tokens=100_000), outcome(0.2, 0.5, 0.7, tokens=100_000)])
    ]
    assert rows[0]["tokens_to_goal"] == [pytest.approx(857.14, abs=0.01), None]
    assert rows[0]["tokens_with_pretraining"]["100000"] == [0.2, 0.2]
    text = render(PLAN, rows)
    assert "4.3 (1 of 2)" in text and "0.800 ± 0.141" in text


def test_rows_are_compared_seed_by_seed() -> None:
    assert paired([1.0, 3.0, None], [0.0, 1.0, 5.0], 1) == "+1.5 ± 0.5"
    assert paired([1.0, None], [0.0, 1.0], 1) == "-"
    curves = [outcome(0.2, *[height] * 8) for height in (0.85, 0.95)]
    rows = [row_of(PLAN, "VAPO", 3e-4, curves), row_of(PLAN, "GRPO", 3e-4, list(reversed(curves)))]
    assert "| GRPO | +0.0 ± 0.6 | +0.000 ± 0.100 | +0.000 ± 0.100 |" in render(PLAN, rows)
    assert "less VAPO" not in render(PLAN, rows[1:])


@pytest.mark.parametrize("row", PLAN.rows, ids=lambda row: row.name)
def test_every_row_is_a_configuration(row: Row) -> None:
    config = PLAN.job(row, 1e-4, 0).config()
    assert config.learner.policy.learning_rate == 1e-4 and config.model.path.endswith("contrary_walk")
    assert config.rollout.prompts_per_step * config.rollout.group_size == 128, "as many responses in each row"


def test_rows_share_the_critic_of_their_seed_but_for_those_that_pretrain_it_in_another_way() -> None:
    reference = PLAN.job(PLAN.row("VAPO"), 1e-4, 3).critic_config()
    others = [row.name for row in PLAN.rows if PLAN.job(row, 3e-4, 3).critic_config() != reference]
    assert others == ["frozen attention, K = 2 (SAO's critic)", "two critics, agreement mask (AsyPPO)"]
    assert [row.name for row in PLAN.rows if not PLAN.job(row, 3e-4, 3).reuses_critic] == ["VAPO, its own critic"]
    assert PLAN.job(PLAN.row("VAPO"), 1e-4, 4).critic_config().seed != reference.seed

"""The arithmetic of the table of ages, on curves that were made up."""

from benchmarks import age
from benchmarks.age import ARMS, RATE, cells, course, job, render, render_rates, row_of
from benchmarks.miniature.run import Outcome, Point


def outcome(*accuracies: float, alarms: tuple[tuple[int, str], ...] = (), failure: str | None = None) -> Outcome:
    """One evaluation every 5 steps."""
    points = [Point(step=5 * i, accuracy=a, tokens=0, cpu_s=0.0, metrics={}) for i, a in enumerate(accuracies)]
    return Outcome(points=points, alarms=list(alarms), pretraining_tokens=0, pretraining_cpu_s=0.0, failure=failure)


def test_a_fall_is_below_the_best_so_far_and_a_collapse_is_at_the_end() -> None:
    back = course(outcome(0.2, 0.8, 0.6, 0.85, 0.85, alarms=((7, "m2"), (4, "m2"))))
    assert (back.fall, back.has_collapsed, back.best) == (10, False, 0.85)
    assert course(outcome(0.2, 0.5, 0.9, 0.7, 0.6)).has_collapsed
    assert course(outcome(0.2, 0.3, 0.4)).fall is None
    failed = course(outcome(0.2, 0.9, failure="not finite"))
    assert (failed.fall, failed.has_collapsed) == (5, True)


def test_the_alarm_counts_as_timely_only_before_the_fall() -> None:
    runs = [
        outcome(0.2, 0.8, 0.8, 0.5, 0.5, alarms=((6, "m2"), (12, "ess"), (20, "entropy"))),
        outcome(0.2, 0.8, 0.8, 0.8, 0.8, alarms=((6, "m2"),)),
    ]
    text = render([row_of("none", 4, RATE, runs)])
    assert "| m2 | 1 of 1 | 9 | 1 of 1 |" in text
    assert "| ess | 1 of 1 | 3 | 0 of 1 |" in text
    assert "| entropy | 0 of 1 | - | 0 of 1 |" in text
    assert "| any | 1 of 1 | 9 | 1 of 1 |" in text
    assert "| 4 | 0.65 ± 0.21, 1/2 collapsed |" in text


def test_an_alarm_in_a_run_that_lost_accuracy_without_a_fall_is_told_from_a_false_one() -> None:
    fresh = row_of("none", 0, RATE, [outcome(0.2, 0.9, 0.9)])
    worse = row_of("none", 4, RATE, [outcome(0.2, 0.8, 0.7, alarms=((6, "m2"),)), outcome(0.2, 0.9, 0.9)])
    false = row_of("none", 8, RATE, [outcome(0.2, 0.9, 0.9, alarms=((6, "ess"),))])
    text = render([fresh, worse, false])
    assert "| m2 | 0 of 0 | - | 1 of 4 | 0 of 3 |" in text and "| ess | 0 of 0 | - | 1 of 4 | 1 of 3 |" in text


def test_every_cell_is_a_run_of_the_age_that_it_says() -> None:
    wanted = list(cells(None))
    assert {(arm.name, old) for arm, old, rate, _ in wanted if rate == RATE} == {
        (arm.name, old) for arm in ARMS for old in age.AGES
    }
    jobs = [job(arm, old, seed, rate) for arm, old, rate, seeds in wanted for seed in seeds]
    assert len(set(jobs)) == len(jobs)
    for arm, old, rate, _ in wanted:
        config = job(arm, old, 0, rate).config()
        assert config.staleness.max_staleness == old and config.learner.policy.learning_rate == rate


def test_the_table_of_rates_takes_the_default_rate_from_the_first_table() -> None:
    rows = [
        row_of("decoupled", old, rate, [outcome(0.2, rate * 1000, rate * 1000)] * (5 if rate == RATE else 2))
        for old in age.RATE_AGES
        for rate in age.RATES
    ]
    assert "| 16 | 0.15 ± 0.00 | 0.30 ± 0.00 | 0.60 ± 0.00 | 1.20 ± 0.00 |" in render_rates(rows)

"""The simulation of many actors: what its numbers have to say about the learner's own coordinator."""

import pytest

from benchmarks.scaling import BOUND, ORDERS, SIGMA, Row, measure, measure_turns, render
from common.config import Batching, OverAge

IN_ORDER, FIRST, FIRST_MASKED = ORDERS


def run(order: tuple[Batching, OverAge], slowness: list[float], places: int = 2, steps: int = 40) -> Row:
    return measure(order, places, slowness, steps)


@pytest.mark.parametrize("places", [2, 8])
@pytest.mark.parametrize("order", ORDERS)
def test_a_run_with_a_slow_actor_is_at_least_as_fast_as_without_it(
    order: tuple[Batching, OverAge], places: int
) -> None:
    """But for what it held when it was found out, which a run makes up for with its length."""
    without, beside = (run(order, [1.0] * 3 + slow, places, steps=60) for slow in ([], [10.0]))
    assert beside.tokens_per_s >= 0.998 * without.tokens_per_s


@pytest.mark.parametrize("order", ORDERS)
def test_four_equal_actors_leave_the_learner_idle_for_at_most_15_percent_of_the_time(
    order: tuple[Batching, OverAge],
) -> None:
    assert (BOUND, SIGMA) == (2, 1.0)
    row = run(order, [1.0] * 4)
    assert row.idle <= 0.15 and row.dropped == 0


@pytest.mark.parametrize("order", [IN_ORDER, FIRST])
def test_no_order_drops_a_group_or_trains_one_that_is_too_old(order: tuple[Batching, OverAge]) -> None:
    row = run(order, [1.0, 1.5, 2.0], places=8)
    assert row.oldest <= 2 and row.dropped == 0 and row.masked == 0


def test_with_masking_long_responses_leave_the_learner_busy() -> None:
    assert run(IN_ORDER, [1.0] * 4, places=8).idle > 0.4
    masked = run(FIRST_MASKED, [1.0] * 4, places=8)
    assert masked.idle <= 0.25
    assert 0 < masked.masked < 0.4


def test_twice_the_actors_give_twice_the_tokens_until_the_learner_is_busy() -> None:
    one, two, eight = (run(IN_ORDER, [1.0] * number, steps=30) for number in (1, 2, 8))
    assert two.tokens_per_s == pytest.approx(2 * one.tokens_per_s, rel=0.1)
    assert eight.tokens_per_s >= 0.9 * eight.ideal_tokens_per_s


def test_the_table_has_a_line_for_each_run_and_turns_are_measured() -> None:
    row = run(FIRST_MASKED, [1.0, 1.0], steps=5)
    assert render([row, row]).splitlines()[2:] == [render([row]).splitlines()[2]] * 2
    assert "| 2 | 2 x 1 | first_finished, mask |" in render([row])
    turns = measure_turns(num_actors=20, places=4)
    assert turns["leases"] == 80 and 0 < turns["turn_mean_ms"] <= turns["turn_max_ms"]

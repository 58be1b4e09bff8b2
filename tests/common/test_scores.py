"""Estimators against enumeration of all subsets and all votes, their identities, and how often intervals are right."""

from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.scores import ABSTAINS, estimate, majority, pass_at, powers_up_to, quantile_edges

Array = np.ndarray[Any, Any]

corrects = st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=6)


def slow_pass_at(is_correct: list[bool], k: int) -> Fraction:
    """The share of all subsets of k responses that hold a right one."""
    subsets = list(combinations(is_correct, k))
    return Fraction(sum(any(subset) for subset in subsets), len(subsets))


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_response(is_correct: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(is_correct)))
    (value,) = pass_at([sum(is_correct)], len(is_correct), k)
    assert value == pytest.approx(float(slow_pass_at(is_correct, k)), abs=1e-12)


@given(corrects)
def test_pass_at_1_is_the_mean_and_more_tries_never_hurt(rows: list[list[bool]]) -> None:
    right, num_samples = np.array(rows).sum(axis=1), 6
    curve = np.array([pass_at(right, num_samples, k) for k in range(1, num_samples + 1)])
    np.testing.assert_allclose(curve[0], right / num_samples, atol=1e-12)
    assert (np.diff(curve, axis=0) >= -1e-12).all()
    np.testing.assert_array_equal(curve[-1], right > 0)


def test_pass_at_k_of_many_responses_is_a_probability() -> None:
    assert pass_at([0, 1, 1023, 1024], 1024, 512).tolist() == [0.0, pytest.approx(0.5), 1.0, 1.0]
    with pytest.raises(ValueError, match="pass@5 needs at least 5 responses to a prompt, not 4"):
        pass_at([1], 4, 5)


def slow_majority(votes: list[int], is_correct: list[bool]) -> Fraction:
    counts = {vote: votes.count(vote) for vote in votes if vote != ABSTAINS}
    first = [vote for vote, count in counts.items() if count == max(counts.values())]
    right = [any(c for v, c in zip(votes, is_correct, strict=True) if v == vote) for vote in first]
    return Fraction(sum(right), len(right)) if right else Fraction(0)


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=8), st.integers(-1, 3), st.randoms())
def test_a_vote_elects_the_most_frequent_answer_and_ties_are_an_expectation(
    votes: list[int], right: int, rng: Any
) -> None:
    is_correct = [vote == right and vote != ABSTAINS for vote in votes]
    (value,) = majority(np.array([votes]), np.array([is_correct]))
    assert value == pytest.approx(float(slow_majority(votes, is_correct)))
    order = list(range(len(votes)))
    rng.shuffle(order)
    (shuffled,) = majority(np.array([votes])[:, order], np.array([is_correct])[:, order])
    assert shuffled == value


def test_votes_by_hand() -> None:
    votes = np.array([[0, 0, 1, 2], [0, 0, 1, 1], [ABSTAINS] * 4, [ABSTAINS, ABSTAINS, ABSTAINS, 0], [0, 1, 2, 3]])
    is_correct = np.array([vote == 0 for vote in votes])
    assert majority(votes, is_correct).tolist() == [1.0, 0.5, 0.0, 1.0, 0.25]


@given(st.lists(st.integers(0, 4), min_size=2, max_size=12), st.randoms())
def test_an_interval_holds_its_value_stays_in_the_unit_interval_and_knows_no_order(right: list[int], rng: Any) -> None:
    found = estimate(right, [4] * len(right))
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0
    assert found.value == pytest.approx(sum(right) / (4 * len(right)))
    assert found.high - found.low > 0.01, "not even where all prompts agree"
    rng.shuffle(right)
    again = estimate(right, [4] * len(right))
    assert (again.low, again.high) == (pytest.approx(found.low), pytest.approx(found.high))


def test_the_interval_by_hand() -> None:
    """Prompts that are all right or all wrong are one observation each; P - 1 of them, as s^2 has that divisor."""
    found = estimate([4, 4, 4, 0, 0, 0, 0, 0, 0, 0, 0], [4] * 11)
    n, p, t = 10, 3 / 11, 2.228  # Student's t for 10 degrees of freedom
    middle, half = p + t**2 / (2 * n), t * (p * (1 - p) / n + t**2 / (4 * n**2)) ** 0.5
    assert (found.low, found.high) == (
        pytest.approx((middle - half) / (1 + t**2 / n), abs=1e-3),
        pytest.approx((middle + half) / (1 + t**2 / n), abs=1e-3),
    )


def test_more_responses_to_the_same_prompts_do_not_narrow_an_interval_of_differing_prompts() -> None:
    few, many = estimate([0, 1] * 10, [1] * 20), estimate([0, 32] * 10, [32] * 20)
    assert (few.low, few.high) == (pytest.approx(many.low), pytest.approx(many.high))
    alike = estimate([16] * 20, [32] * 20)
    assert alike.high - alike.low < (many.high - many.low) / 3


def test_a_share_of_prompts_with_different_numbers_of_responses_is_one_of_responses() -> None:
    assert estimate([1, 0, 6], [2, 1, 7]).value == pytest.approx(0.7)


def test_one_prompt_tells_nothing_of_others_and_no_prompt_has_no_share() -> None:
    one = estimate([3], [4])
    assert (one.value, one.low, one.high) == (0.75, 0.0, 1.0)
    with pytest.raises(ValueError, match="no prompts"):
        estimate([], [])


def coverage(num_prompts: int, num_samples: int, alpha: float, beta: float) -> float:
    """How many of 1000 intervals hold the truth, where a prompt's accuracy is drawn from Beta(alpha, beta)."""
    rng, truth, hits = np.random.default_rng(0), alpha / (alpha + beta), 0
    for _ in range(1000):
        right = rng.binomial(num_samples, rng.beta(alpha, beta, size=num_prompts))
        found = estimate(right, np.full(num_prompts, num_samples))
        hits += found.low <= truth <= found.high
    return hits / 1000


@pytest.mark.parametrize("num_prompts", [10, 30, 100])
@pytest.mark.parametrize(("num_samples", "alpha", "beta"), [(1, 0.2, 0.8), (4, 2, 2), (32, 0.5, 0.5)])
def test_about_95_of_100_intervals_hold_the_truth(
    num_prompts: int, num_samples: int, alpha: float, beta: float
) -> None:
    assert 0.93 <= coverage(num_prompts, num_samples, alpha, beta) <= 0.995


def test_the_k_that_are_shown() -> None:
    assert [powers_up_to(k) for k in (1, 2, 6, 32)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8, 16, 32]]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(1, 6))
def test_bins_hold_everything_once_and_equal_lengths_together(lengths: list[int], num_bins: int) -> None:
    edges = quantile_edges(lengths, num_bins)
    assert edges == sorted(set(edges)) and 1 <= len(edges) <= num_bins and edges[-1] == max(lengths)
    counts = np.bincount(np.searchsorted(edges, lengths), minlength=len(edges))
    assert (counts > 0).all() and counts.sum() == len(lengths)


def test_bins_of_different_lengths_are_of_equal_size() -> None:
    assert quantile_edges(range(1, 101), 4) == [25, 50, 75, 100]

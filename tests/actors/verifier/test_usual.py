"""When an answer has taken longer than usual."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.verifier.usual import UsualTime

seconds = st.floats(min_value=0.0, max_value=100.0)


def usual(*times_s: float) -> UsualTime:
    time = UsualTime(floor_s=0.004, first_s=0.3)
    for time_s in times_s:
        time.add(time_s)
    return time


def test_until_ten_answers_are_known_the_first_limit_holds() -> None:
    assert (usual(*[1.0] * 9).limit_s, usual(*[1.0] * 9).is_known) == (0.3, False)
    assert (usual(*[1.0] * 10).limit_s, usual(*[1.0] * 10).is_known) == (1.5, True)


def test_a_class_of_answers_that_always_takes_long_is_usual_and_a_rare_one_is_not() -> None:
    assert usual(*([0.001] * 99 + [0.05]) * 10).limit_s == pytest.approx(0.075)
    assert usual(*([0.001] * 499 + [0.05]) * 2, *[0.001] * 100).limit_s == 0.004


def test_a_verifier_that_becomes_slower_is_followed_at_once_and_one_that_becomes_faster_in_the_end() -> None:
    time = usual(*[0.001] * 1000, *[1.0] * 6)
    assert time.limit_s == 1.5
    for _ in range(1100):
        time.add(0.001)
    assert time.limit_s == 0.004


@given(st.lists(seconds, min_size=10, max_size=1000))
def test_at_most_one_in_two_hundred_and_those_since_renewal_exceed_the_limit(times_s: list[float]) -> None:
    limit_s = usual(*times_s).limit_s
    assert limit_s >= 0.004
    assert sum(time_s > limit_s for time_s in times_s) <= 1 + len(times_s) // 200


@given(st.lists(st.floats(min_value=1.0, max_value=1.4), min_size=10, max_size=300))
def test_no_answer_of_a_steady_verifier_takes_longer_than_usual(times_s: list[float]) -> None:
    assert max(times_s) <= usual(*times_s).limit_s


@given(st.lists(seconds, min_size=1, max_size=1500))
def test_the_mean_is_that_of_the_last_thousand(times_s: list[float]) -> None:
    last = times_s[-1000:]
    assert usual(*times_s).mean_s == pytest.approx(sum(last) / len(last), abs=1e-9)

"""The admission window: AReaL's rule after the warm-up, a bounded run-ahead during it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import AlgorithmConfig, Config, LearnerConfig, RolloutConfig, StalenessConfig, WeightsConfig
from learner.rollouts.pace import Pace


def pace(
    groups: int = 2, staleness: int = 1, every: int = 1, warmup: int = 0, gate: float | None = None, steps: int = 10_000
) -> Pace:
    return Pace(
        Config(
            rollout=RolloutConfig(prompts_per_step=groups),
            staleness=StalenessConfig(max_staleness=staleness),
            weights=WeightsConfig(publish_every=every),
            algorithm=AlgorithmConfig(critic_warmup_steps=warmup, critic_warmup_gate=gate),
            learner=LearnerConfig(steps=steps),
        )
    )


def windows(of: Pace, num_steps: int) -> list[int]:
    found = []
    for step in range(num_steps):
        of.steps_done = step
        found.append(of.window)
    return found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"staleness": 0}, [2, 4, 6]),
        ({"staleness": 2}, [6, 8, 10]),
        ({"staleness": 1, "every": 3}, [12, 12, 12, 18]),
        ({"staleness": 0, "warmup": 3}, [4, 6, 8, 8, 10]),  # one step ahead, then none: the version is the bound
        ({"staleness": 1, "warmup": 3}, [4, 6, 8, 10, 12]),
        ({"staleness": 1, "warmup": 3, "gate": 0.5}, [4, 6, 8, 10, 12]),
        ({"staleness": 0, "warmup": 3, "gate": 0.5}, [4, 6, 8, 8, 10]),
        ({"staleness": 5, "warmup": 1, "steps": 2}, [6, 6, 6, 6]),  # nothing beyond the last step
        ({"staleness": 5, "warmup": 3, "steps": 0}, [6, 6, 6, 6]),
    ],
)
def test_the_window_is_the_admission_rule(settings: dict[str, Any], expected: list[int]) -> None:
    assert windows(pace(**settings), len(expected)) == expected


def test_a_long_warm_up_of_large_batches_is_not_admitted_at_once() -> None:
    assert pace(groups=512, staleness=1, warmup=50).window == 2 * 512


def test_a_warm_up_that_its_gate_ended_admits_what_is_young_enough() -> None:
    ended = pace(staleness=0, warmup=50, gate=0.5)
    assert windows(ended, 3) == [4, 6, 8]
    ended.warmup_steps = 2
    assert ended.window == 2 * (2 + 1)


@given(
    groups=st.integers(1, 3),
    staleness=st.integers(0, 4),
    every=st.integers(1, 4),
    warmup=st.integers(0, 6),
    gate=st.sampled_from([None, 0.5]),
    steps=st.integers(0, 9),
)
def test_the_window_never_shrinks_always_holds_the_next_step_and_ends_with_the_run(groups: int, **rest: Any) -> None:
    num_steps = rest["warmup"] + rest["steps"]
    found = windows(pace(groups, **rest), num_steps)
    assert found == sorted(found)
    assert all(window >= groups * (step + 1) for step, window in enumerate(found))
    assert max(found, default=0) <= groups * num_steps


@given(staleness=st.integers(0, 4), every=st.integers(1, 4), step=st.integers(0, 20))
def test_the_last_group_of_the_window_is_trained_within_the_staleness_bound(
    staleness: int, every: int, step: int
) -> None:
    now = pace(groups=1, staleness=staleness, every=every)
    now.steps_done = step
    last = now.window - 1  # the step that trains the last group
    assert last // every - step // every == staleness


def test_a_resume_with_another_batch_size_counts_what_was_trained_in_steps() -> None:
    before, after = pace(groups=4, staleness=1, warmup=1), pace(groups=3, staleness=1, warmup=1)
    before.steps_done = before.steps_taken = 5
    after.load_state_dict(before.state_dict())
    assert (after.taken, after.window) == (15, 3 * (5 + 2))


@pytest.mark.parametrize(
    ("settings", "steps_done", "expected"),
    [
        ({}, 0, [0, 0, 1, 1, 2]),
        ({"every": 2}, 1, [0, 0, 1, 1, 1, 1, 2]),
        ({"warmup": 2}, 1, [0, 0, 0, 0, 1]),
        ({"warmup": 9, "gate": 0.5}, 1, [0, 0, 0, 0, 1]),
    ],
)
def test_a_group_far_back_in_the_order_is_trained_by_a_later_version(
    settings: dict[str, Any], steps_done: int, expected: list[int]
) -> None:
    of = pace(**settings)
    of.steps_done = of.steps_taken = steps_done
    assert [of.versions_until(place) for place in range(len(expected))] == expected


@given(
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(1, 3),
    st.integers(0, 3),
    st.none() | st.just(0.5),
    st.integers(0, 9),
    st.integers(0, 1),
)
def test_what_the_window_admits_is_young_enough_in_its_place(
    groups: int, staleness: int, every: int, warmup: int, gate: float | None, steps_done: int, under_way: int
) -> None:
    of = pace(groups, staleness, every, warmup, gate)
    of.steps_done, of.steps_taken = steps_done, steps_done + under_way
    last = of.window - of.taken - 1
    assert last < 0 or of.versions_until(last) <= staleness

"""What the picture of a run says, and that it fits the terminal."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from common.dashboard import BARS, clock, dashboard, sparkline
from common.types import RunStatus
from tests.support.statuses import make_status


def drawn(status: RunStatus, width: int = 79, height: int = 29, silent_s: float = 0.0) -> list[str]:
    console = Console(width=width, color_system=None, highlight=False)
    with console.capture() as captured:
        console.print(dashboard(status, width, height, silent_s))
    return [line.rstrip() for line in captured.get().splitlines()]


def with_actors(num: int, **changed: Any) -> RunStatus:
    """The last of them is lost."""
    return make_status(
        member_names=tuple(f"actor-{i}" for i in range(num)),
        member_states=("sampling",) * (num - 1) + ("lost",),
        member_versions=(7,) * num,
        member_tokens_per_s=np.ones(num, np.float32),
        member_leases=np.ones(num, np.int32),
        member_silences_s=np.ones(num, np.float32),
        **({"num_members": num} | changed),
    )


@pytest.mark.parametrize("width", [79, 159])
def test_everything_is_said_whether_the_actors_stand_below_or_beside(width: int) -> None:
    text = "\n".join(drawn(make_status(alarms=("ALARM after step 3: odd",)), width))
    for words in (
        "demo  step 10/20",
        "1:01:40, about 1:30 left",
        "0.400",
        "0.200 to 0.400",
        "+0.25",
        "1.25    largest 2 of at most 2, version 10, ess 0.93",
        "3,400 sampled, 2,900 trained, 8.1 s a step",
        "actors 4%, learner 31%",
        "12 of 16 groups are there, 14 are being sampled",
        "stale 3",
        "ALARM after step 3: odd",
    ):
        assert words in text
    (row,) = (line for line in text.splitlines() if "far-away" in line)
    assert row.split()[-6:] == ["lost", "-", "0", "3", "12.0", "s"]


def test_before_the_first_step_there_is_little_to_say() -> None:
    empty = np.empty(0, np.float32)
    status = make_status(
        step=0, metrics={}, remaining_s=None, rewards=empty, response_lengths=empty, accuracies=empty,
        evaluated_steps=np.empty(0, np.int32), counters={"in_flight_eval_groups": 4.0},
    )  # fmt: skip
    text = "\n".join(drawn(status))
    assert "demo  critic warm-up 0/4" in text and "left" not in text
    assert "held-out, being measured" in text and "version 10, at most 2 behind" in text


def test_a_silent_learner_and_a_failing_verifier_are_said() -> None:
    status = make_status()
    shown = drawn(make_status(metrics=dict(status.metrics) | {"verifier/num_errors": 3.0}), silent_s=65.0)
    assert shown[-2:] == ["VERIFIER ERRORS 3", "the learner has not answered for 1:05: this is how the run stood then"]


def test_where_not_all_actors_fit_those_are_shown_that_something_is_the_matter_with() -> None:
    shown = drawn(with_actors(100), height=18)
    assert any("actor-99" in line and "lost" in line for line in shown)
    assert shown[-1].startswith("and ") and len(shown) <= 18
    assert drawn(with_actors(2, num_members=1000))[-1] == "and 998 more"


@settings(max_examples=25, deadline=None)
@given(st.integers(40, 200), st.integers(18, 60), st.integers(1, 40), st.integers(0, 5))
def test_it_fits_the_terminal(width: int, height: int, num_actors: int, num_alarms: int) -> None:
    status = with_actors(num_actors, alarms=("ALARM " * 50,) * num_alarms)
    shown = drawn(status, width, height, silent_s=10.0)
    assert max(map(len, shown)) <= width
    assert len(shown) <= height


@given(st.lists(st.floats(-1e6, 1e6), max_size=50), st.integers(0, 60))
def test_a_sparkline_goes_from_its_smallest_to_its_largest(values: list[float], width: int) -> None:
    bars = sparkline(values, width)
    assert len(bars) == min(width, len(values))
    if bars and len(set(values)) > 1 and len(bars) == len(values):
        assert bars[values.index(max(values))] == BARS[-1] and bars[values.index(min(values))] == BARS[0]


def test_times_are_short() -> None:
    assert [clock(seconds) for seconds in (0.4, 65, 3600, 90061)] == ["0:00", "1:05", "1:00:00", "25:01:01"]

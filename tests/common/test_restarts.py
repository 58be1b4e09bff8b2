"""A budget of restarts, as a property: never more than the limit in any window, and forgiving."""

from hypothesis import given
from hypothesis import strategies as st

from common.restarts import MAX_BACKOFF_S, RestartBudget


@given(
    limit=st.integers(0, 5),
    window_s=st.floats(1.0, 100.0),
    gaps=st.lists(st.floats(0.0, 60.0), max_size=60),
)
def test_no_window_holds_more_restarts_than_the_limit(limit: int, window_s: float, gaps: list[float]) -> None:
    budget, now, taken = RestartBudget(limit, window_s), 0.0, list[float]()
    for gap in gaps:
        now += gap
        recent = [time for time in taken if now - time < window_s]
        backoff_s = budget.take(now)
        assert (backoff_s is None) == (len(recent) >= limit), "a restart is refused exactly when the window is full"
        if backoff_s is not None:
            assert backoff_s == min(2.0 ** len(recent), MAX_BACKOFF_S)
            taken.append(now)

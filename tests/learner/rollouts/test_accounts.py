"""Accounts: how long a member waits after a failure, and when it has to leave."""

from hypothesis import given
from hypothesis import strategies as st

from learner.rollouts.accounts import FIRST_WAIT_S, LONGEST_WAIT_S, MAX_REFUSED, MAX_STRIKES, Account


def test_the_wait_doubles_with_every_strike_and_one_lease_at_a_time_follows() -> None:
    account, now, waits = Account(), 0.0, []
    for i in range(7):
        account.fail(f"p{i}", now)
        started = now
        while account.room(8, now) == 0:
            now += 0.25
        waits.append(now - started)
        assert account.room(8, now) == 1
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 16.0, 16.0]
    account.succeed()
    assert account.room(8, now) == 8 and account.strikes == 0


def test_what_fails_together_is_one_strike() -> None:
    account = Account()
    for i in range(100):
        account.fail(f"p{i}", 0.1)
    assert account.strikes == 1 and account.verdict is None


def test_one_prompt_that_cannot_be_sampled_ends_nobody() -> None:
    account = Account()
    for i in range(100):
        account.fail("p", i * (LONGEST_WAIT_S + 1))
    assert account.verdict is None


def test_as_many_strikes_over_as_many_prompts_end_a_member() -> None:
    account = Account()
    for i in range(MAX_STRIKES):
        assert account.verdict is None
        account.fail(f"p{i}", i * (LONGEST_WAIT_S + 1))
    assert account.verdict == f"it failed on {MAX_STRIKES} prompts in a row"


def test_refused_groups_are_not_forgotten_over_good_ones() -> None:
    account = Account()
    for i in range(MAX_REFUSED):
        assert account.verdict is None
        account.refuse("p", 100.0 * i)
        account.succeed()
    assert account.verdict == f"{MAX_REFUSED} of its groups were refused"


@given(st.lists(st.tuples(st.floats(0.0, 3.0), st.booleans(), st.integers(0, 3)), max_size=60), st.integers(1, 9))
def test_room_is_never_more_than_the_capacity_nor_kept_back_for_longer_than_the_longest_wait(
    history: list[tuple[float, bool, int]], capacity: int
) -> None:
    account, now = Account(), 0.0
    for passed_s, is_good, prompt in history:
        now += passed_s
        account.succeed() if is_good else account.fail(f"p{prompt}", now)
        assert account.room(capacity, now) == (capacity if is_good else 0)
        assert account.room(capacity, now + FIRST_WAIT_S * 2**account.strikes) <= capacity
        assert account.room(capacity, now + LONGEST_WAIT_S) > 0

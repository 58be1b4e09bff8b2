"""The order of consumption as pure functions: against every possible choice, and over a whole run of versions."""

from collections import Counter
from dataclasses import dataclass
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from learner.rollouts.batching import dues, first_finished, is_due_here


@dataclass(frozen=True)
class Group:
    arrival: int
    oldest_version: int


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[Group], list[int], dict[int, int], int]:
    """What has arrived, the versions of what is still out, room by version (it grows with the version), batch size."""
    versions = st.integers(0, 3)
    buffered = [Group(i, version) for i, version in enumerate(draw(st.lists(versions, max_size=7)))]
    room = sorted(draw(st.lists(st.integers(0, 8), min_size=4, max_size=4)))
    return buffered, draw(st.lists(versions, max_size=5)), dict(enumerate(room)), draw(st.integers(1, 3))


def leaves_room(chosen: tuple[Group, ...], untrained: Counter[int], room: dict[int, int], size: int) -> bool:
    """Whether what remains after this batch has a place in time, where one batch can achieve that at all."""
    for version in room:
        older = sum(count for other, count in untrained.items() if other <= version)
        taken = sum(group.oldest_version <= version for group in chosen)
        if taken < min(size, older - room[version]):
            return False
    return True


@given(situations())
def test_a_batch_waits_only_when_no_choice_would_leave_room_for_what_is_old(
    situation: tuple[list[Group], list[int], dict[int, int], int],
) -> None:
    buffered, out, room, size = situation
    untrained = Counter([*out, *(group.oldest_version for group in buffered)])
    due = dues(untrained, size, room.__getitem__)
    is_possible = any(leaves_room(choice, untrained, room, size) for choice in combinations(buffered, size))
    is_here = is_due_here(due, Counter(group.oldest_version for group in buffered))
    assert (is_here and len(buffered) >= size) == is_possible
    if is_possible:
        chosen = first_finished(buffered, due, size)
        assert len(set(chosen)) == size and chosen == sorted(chosen, key=lambda group: group.arrival)
        assert leaves_room(tuple(chosen), untrained, room, size)


@given(st.lists(st.integers(0, 3), min_size=3, max_size=9))
def test_where_nothing_is_due_the_first_to_arrive_are_taken(versions: list[int]) -> None:
    buffered = [Group(i, version) for i, version in enumerate(versions)]
    due = dues(Counter(versions), 3, lambda version: 100)
    assert first_finished(buffered, due, 3) == buffered[:3]


def test_the_old_are_not_left_for_a_version_that_has_no_place_for_them() -> None:
    """Bound 2, one batch of 2 a version: at version 1 four groups of version 0 are left, version 2 has two places.

    Two of version 1 have come first. They stay young enough for long, but taking one of them now leaves three groups
    of version 0 for version 2.
    """
    buffered = [Group(0, 1), Group(1, 1), Group(2, 0)]
    due = dues({0: 4, 1: 2}, 2, {0: 2, 1: 4}.__getitem__)
    assert due == {0: 2, 1: 2}
    assert not is_due_here(due, {0: 1, 1: 2})
    assert first_finished([*buffered, Group(3, 0)], due, 2) == [Group(2, 0), Group(3, 0)]

"""Which of the groups that have arrived make the next batch.

In admission order those are the oldest leases. When those that finish first may go first, a group whose oldest token is
of version g may still be trained up to version g + max_staleness, so batches are promised in advance. With room(g)
places in the batches after the next one, up to the last of version g + max_staleness,

    due(g) = untrained groups of version g or older - room(g)

of them, if that is positive, have to be in the next batch; for each g, because a batch filled with the young today
would leave more old groups than a later version has places for. The admission window (learner/rollouts/pace.py)
grants no lease for which there is no place, so that due(g) is never more than a batch. Where the window is full, every
place is promised, and the order is that of the versions.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Protocol, TypeVar

from common.config import Batching, Config, OverAge
from learner.rollouts.leases import Slot, Slots
from learner.rollouts.pace import Pace


class Untrained(Protocol):
    @property
    def oldest_version(self) -> int: ...


T = TypeVar("T", bound=Untrained)


def next_slots(slots: Slots, returned: int | None, config: Config, pace: Pace, version: int) -> list[Slot] | None:
    """One for each group of the next batch, in the order of staleness.batching; None when it has to wait.

    `returned`: the turn of the first prompt that came back and has its turn, if there is one. In admission order the
    batch waits for it as for one that is being sampled.
    """
    staleness, num_groups = config.staleness, config.rollout.prompts_per_step
    if len(slots.buffered) < num_groups:
        return None
    if staleness.batching is Batching.admission_order:
        oldest = list(islice(slots.train.values(), num_groups))
        is_overtaking = returned is not None and returned < oldest[-1].turn
        return None if is_overtaking or any(slot.group is None for slot in oldest) else oldest
    due: dict[int, int] = {}
    if staleness.over_age is OverAge.drop:  # of what is masked nobody has to wait
        due = dues(slots.untrained, num_groups, lambda oldest_version: pace.room(version - oldest_version))
    return first_finished(slots.buffered.values(), due, num_groups) if is_due_here(due, slots.arrived) else None


def dues(untrained: Mapping[int, int], size: int, room: Callable[[int], int]) -> dict[int, int]:
    """How many groups of each version or older the next batch must hold, versions ascending.

    Args:
        untrained: groups that are out or buffered, by the version of their oldest token.
        size: groups in a batch. What is overdue beyond it cannot be helped.
        room: places for groups of a version in the batches that follow the next one.
    """
    num_older, due = 0, {}
    for version in sorted(untrained):
        num_older += untrained[version]
        due[version] = min(size, max(0, num_older - room(version)))
    return due


def is_due_here(due: Mapping[int, int], buffered: Mapping[int, int]) -> bool:
    """Whether what is due has arrived. `buffered`: groups that have, by the version of their oldest token."""
    num_older = 0
    for version, count in due.items():
        num_older += buffered.get(version, 0)
        if num_older < count:
            return False
    return True


def first_finished(buffered: Iterable[T], due: Mapping[int, int], size: int) -> list[T]:
    """`size` groups: the first that came of what is due, then the first that came of the rest; in order of arrival.

    `buffered` is in order of arrival, has `size` groups or more, and among them what is due.
    """
    arrived = list(buffered)
    chosen: set[int] = set()
    for version, count in due.items():
        older = (i for i, group in enumerate(arrived) if group.oldest_version <= version and i not in chosen)
        chosen.update(list(islice(older, max(0, count - len(chosen)))))
    rest = (i for i in range(len(arrived)) if i not in chosen)
    chosen.update(list(islice(rest, size - len(chosen))))
    return [arrived[i] for i in sorted(chosen)]

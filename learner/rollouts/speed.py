"""Which actors are fast enough to be of use: a slow one can hold up every batch, which costs more than it brings."""

import logging
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from common.config import Config
from common.types import CompletedGroup
from learner.rollouts.members import Member, Presence

logger = logging.getLogger(__name__)

TOLERANCE = 0.1  # of a version's time: differences below it are noise
# Actors that are all alike differ by tens of percent from group to group, most of all where they share a machine, and
# an engine's first group takes longer than all others
LEAST_FACTOR = 1.5  # times as slow as the slowest one that is of use, below which nobody is too slow
FEWEST_GROUPS = 4  # that an actor is judged by, or as many as it holds at once
MEMORY_VERSIONS = 8  # from which lengths are known


class Speed:
    """The lengths of the newest training groups, and the judgement that follows from them."""

    def __init__(self, config: Config) -> None:
        self._bound = config.staleness.max_staleness
        self._groups = config.rollout.prompts_per_step * config.weights.publish_every  # of a version
        self._sampled_at_once = float("inf")  # groups, at most
        if config.actors.max_num_seqs is not None:
            self._sampled_at_once = config.actors.max_num_seqs / config.rollout.group_size
        self._longest: deque[int] = deque(maxlen=MEMORY_VERSIONS * self._groups)  # response of each group

    def add(self, group: CompletedGroup) -> None:
        self._longest.append(int(group.lengths.max()))

    def places(self, capacity: int) -> float:
        """Groups that an actor samples at once when it holds `capacity` of them."""
        return min(capacity, self._sampled_at_once)

    def judge(self, members: Iterable[Member]) -> None:
        """Says which ready members are too slow. One that is stays so until it would make versions shorter. Those that
        drain or hang get no leases anyway."""
        ready = [member for member in members if member.presence is Presence.READY]
        present = [member for member in ready if member.capacity > 0 and not member.is_hung]
        measured = [
            (member.token_s, member)
            for member in present
            if member.token_s is not None and member.num_timed >= min(FEWEST_GROUPS, member.capacity)
        ]
        if not measured or not self._longest:
            return
        measured.sort(key=lambda pair: pair[0])
        version_s = version_times(
            [token_s for token_s, _ in measured],
            [self.places(member.capacity) for _, member in measured],
            group_tokens=float(np.mean(self._longest)),
            longest=float(np.quantile(self._longest, self._groups / (self._groups + 1))),
            groups=self._groups,
            bound=self._bound,
        )
        num_best, num_useful = within(version_s, 0.0), within(version_s, TOLERANCE)
        for token_s, member in measured:
            slowest_s = measured[(num_best if member.is_slow else num_useful) - 1][0]
            is_slow = token_s >= LEAST_FACTOR * slowest_s
            if is_slow and not member.is_slow:
                times = token_s / measured[0][0]
                logger.warning("actor %s gets no leases: it is %.1f times as slow as the fastest", member.name, times)
            member.is_slow = is_slow


def version_times(
    token_s: Sequence[float], places: Sequence[float], group_tokens: float, longest: float, groups: int, bound: int
) -> list[float]:
    """Seconds that a version lasts at least with the fastest actor, with the two fastest, and so on.

    With the j fastest, the leases of a version are granted within

        s_j = groups * group_tokens / SUM_i<=j (places_i / token_s_i)

    seconds, in which places for them come free, and a version lasts no less than that. The last of them may be of the
    slowest actor and the longest of all, and has to be there when `bound` more versions have ended; so a version lasts

        max(s_j, (s_j + longest * token_s_j) / (1 + bound)).

    Args:
        token_s: seconds for a token of one response, of each actor, ascending; one or more.
        places: groups that each of them samples at once.
        group_tokens: mean length of a group's longest response.
        longest: length of the longest response of a typical version.
        groups: groups in a version.
        bound: max_staleness.
    """
    rate, version_s = 0.0, []
    for seconds, num_places in zip(token_s, places, strict=True):
        rate += num_places / (seconds * group_tokens)
        version_s.append(max(groups / rate, (groups / rate + longest * seconds) / (1 + bound)))
    return version_s


def within(version_s: Sequence[float], tolerance: float) -> int:
    """The largest number of actors with which a version lasts hardly longer than with the best number."""
    return max(j for j, seconds in enumerate(version_s, start=1) if seconds <= (1 + tolerance) * min(version_s))

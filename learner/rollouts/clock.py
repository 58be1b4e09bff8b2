"""The lease clock: which leases get nowhere, because their engine hangs or because it is much slower than others."""

from bisect import bisect_left, insort
from collections import deque
from statistics import median

from common.config import TransportConfig
from common.types import Heartbeat

REMEMBERED = 128  # leases that the medians are of
FEWEST = 4  # leases without which there is no median
MAX_DOUBLINGS = 6  # of a slow actor's rest


class EngineClock:
    """How the leases of one actor grow, in the seconds for which its engine was busy.

    Those stand still while the engine is paused by a publication, asleep or without a request. A lease without a token
    waits behind others, and one that has been sampled is being verified: for them only the engine as a whole counts.
    """

    def __init__(self) -> None:
        self._busy_s = self._grown_s = 0.0
        self._generated_tokens = -1  # the first heartbeat starts the clock: what was before concerns no lease of today
        self._leases: dict[int, tuple[int, float]] = {}  # tokens, and when they became so many

    def beat(self, heartbeat: Heartbeat, is_hung: bool = False) -> bool:
        """Whether the engine gets on: it has drawn a token since the last heartbeat, or it counts as one that hangs and
        has got rid of all leases. What it is busy with while it has none counts for nothing; but that it has none does
        not take back what it stood still before, for they may have been taken from it."""
        is_free = not len(heartbeat.lease_ids)
        if is_free:
            self._grown_s += heartbeat.busy_s - self._busy_s
        self._busy_s = heartbeat.busy_s
        gets_on = heartbeat.generated_tokens > self._generated_tokens or (is_free and is_hung)
        if gets_on:
            self._generated_tokens, self._grown_s = heartbeat.generated_tokens, heartbeat.busy_s
        before, self._leases = self._leases, {}
        for lease_id, tokens in zip(heartbeat.lease_ids.tolist(), heartbeat.lease_tokens.tolist(), strict=False):
            last = before.get(lease_id)
            self._leases[lease_id] = last if last is not None and last[0] == tokens else (tokens, heartbeat.busy_s)
        return gets_on

    @property
    def stalled_s(self) -> float:
        """Since it drew a token, as long as it had a lease."""
        return self._busy_s - self._grown_s

    def stuck_s(self, lease_id: int) -> float:
        """Since this lease grew; 0 while it has no token."""
        tokens, since_s = self._leases.get(lease_id, (0, 0.0))
        return self._busy_s - since_s if tokens else 0.0


class RunningMedian:
    """Of the last REMEMBERED numbers. They are kept sorted: it is asked for with every group."""

    def __init__(self) -> None:
        self._last: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._last)

    def add(self, number: float) -> None:
        self._last.append(number)
        insort(self._sorted, number)
        if len(self._last) > REMEMBERED:
            del self._sorted[bisect_left(self._sorted, self._last.popleft())]

    @property
    def value(self) -> float:
        """Of at least one number."""
        middle = len(self._sorted) // 2
        return median(self._sorted[middle - 1 + len(self._sorted) % 2 : middle + 1])


class LeaseTimes:
    """The training leases that arrived last: how long each took, and how fast the completion grew that grew most.

    A straggler is a lease that takes straggler_factor times the median time and grows so many times slower than the
    median: its actor is slow. A response that is merely long would be as long elsewhere.
    """

    def __init__(self, transport: TransportConfig) -> None:
        self._factor = transport.straggler_factor
        self._least_s = 2 * transport.heartbeat_s  # growth is known from one heartbeat to the next
        self._seconds = RunningMedian()
        self._speed = RunningMedian()  # tokens per second

    def add(self, seconds: float, num_steps: int) -> None:
        """`num_steps` tokens were drawn of the completion that grew most."""
        if seconds > 0 and num_steps > 0:
            self._seconds.add(seconds)
            self._speed.add(num_steps / seconds)

    def is_straggler(self, seconds: float, num_steps: int) -> bool:
        """Of a lease that has been out for so long and has grown by so much."""
        if len(self._seconds) < FEWEST or seconds <= self.limit_s:
            return False
        return num_steps / seconds < self._speed.value / self._factor

    @property
    def limit_s(self) -> float:
        """The time after which a lease may be a straggler."""
        return max(self._least_s, self._factor * self._seconds.value) if self._seconds else 0.0


class Rest:
    """An actor that was too slow gets nothing for a while, twice as long each time, until a lease of it is in time."""

    def __init__(self) -> None:
        self.until_s = float("-inf")
        self._num_in_a_row = 0

    def begin(self, now: float, seconds: float) -> None:
        if now < self.until_s:
            return  # another lease of the same turn
        self.until_s = now + seconds * 2.0 ** min(self._num_in_a_row, MAX_DOUBLINGS)
        self._num_in_a_row += 1

    def end(self) -> None:
        self._num_in_a_row = 0

"""Who has most room for leases, and what is to be sent to whom: both without looking at every member."""

from collections import deque
from collections.abc import Iterator

from common.types import LearnerMessage


class Places:
    """Free places of members, in buckets by their number. Every call takes constant time, spread over all calls.

    Invariant: every member with `free` > 0 is in the bucket of that number alone; no bucket above `_most` has any.
    """

    def __init__(self) -> None:
        self._free: dict[str, int] = {}
        self._buckets: dict[int, dict[str, None]] = {}
        self._most = 0

    def set(self, name: str, free: int) -> None:
        """What is 0 or less is no place."""
        before = self._free.pop(name, 0)
        if before > 0:
            del self._buckets[before][name]
        if free > 0:
            self._free[name] = free
            self._buckets.setdefault(free, {})[name] = None
            self._most = max(self._most, free)

    def most(self) -> str | None:
        """A member that none has more free places than; among several, the one that has had as many for longest."""
        while self._most > 0:
            if bucket := self._buckets.get(self._most):
                return next(iter(bucket))
            self._buckets.pop(self._most, None)
            self._most -= 1
        return None


class Outbox:
    """Messages that wait to be sent. Those to one member stay in order."""

    def __init__(self) -> None:
        self._messages: dict[str, deque[LearnerMessage]] = {}  # no deque is empty

    def append(self, name: str, message: LearnerMessage) -> None:
        self._messages.setdefault(name, deque()).append(message)

    def popleft(self) -> tuple[str, LearnerMessage]:
        name, messages = next(iter(self._messages.items()))
        message = messages.popleft()
        if not messages:
            del self._messages[name]
        return name, message

    def discard(self, name: str) -> None:
        """Everything to this member."""
        self._messages.pop(name, None)

    def clear(self) -> None:
        self._messages.clear()

    def __iter__(self) -> Iterator[tuple[str, LearnerMessage]]:
        return ((name, message) for name, messages in self._messages.items() for message in messages)

    def __bool__(self) -> bool:
        return bool(self._messages)

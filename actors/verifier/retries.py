"""Answers that have had their time and wait for another attempt."""

import heapq
import itertools
from collections.abc import Iterator

from actors.verifier.handle import Answer


class Retries:
    """Those that have had least come first, and of equals the one that has waited longest."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Answer]] = []
        self._order = itertools.count()

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Answer]:
        return (answer for _, _, answer in self._heap)

    def push(self, answer: Answer) -> None:
        heapq.heappush(self._heap, (answer.spent_s, next(self._order), answer))

    def pop(self) -> Answer:
        return heapq.heappop(self._heap)[-1]

    def started_before(self, moment_s: float) -> list[Answer]:
        """Takes out the answers that a worker first took up before that moment."""
        expired = [entry for entry in self._heap if entry[-1].started_s < moment_s]
        if expired:
            self._heap = [entry for entry in self._heap if entry not in expired]
            heapq.heapify(self._heap)
        return [answer for _, _, answer in expired]

"""How long answers usually take, and from when on one is taken to hang."""

import heapq
from collections import deque

_WINDOW = 1000
_FEW = 10
_EXCEPTIONS = 200  # of so many answers one may take longer than usual
_FACTOR = 1.5
_RENEW_EVERY = 100


class UsualTime:
    """What all but one in two hundred of the last thousand answers took, half as much again, and at least `floor_s`.

    So a verifier that always takes a second does not look hung, and neither do the answers of a fast one that take long
    as long as they are one in a hundred. Until ten answers are known the limit is `first_s`.
    """

    def __init__(self, floor_s: float, first_s: float) -> None:
        self.limit_s = first_s
        self.is_known = False
        self._floor_s = floor_s
        self._times_s: deque[float] = deque(maxlen=_WINDOW)
        self._sum_s = 0.0
        self._num_new = 0  # since the limit was last taken from the times

    @property
    def mean_s(self) -> float:
        """The mean of the last thousand."""
        return self._sum_s / max(1, len(self._times_s))

    def add(self, time_s: float) -> None:
        """Takes note of how long an answer took that came to an end by itself."""
        if len(self._times_s) == _WINDOW:
            self._sum_s -= self._times_s[0]
        self._times_s.append(time_s)
        self._sum_s += time_s
        self._num_new += 1
        if len(self._times_s) < _FEW or (self.is_known and time_s <= self.limit_s and self._num_new < _RENEW_EVERY):
            return
        longest = heapq.nlargest(1 + len(self._times_s) // _EXCEPTIONS, self._times_s)
        self.limit_s = max(self._floor_s, _FACTOR * longest[-1])
        self.is_known, self._num_new = True, 0

"""How often a process that dies is started again: so many times within any window of time, ever later."""

from dataclasses import dataclass, field

MAX_BACKOFF_S = 30.0


@dataclass
class RestartBudget:
    """At most `limit` restarts within any `window_s` seconds. Old ones are forgiven, so that a run of weeks survives
    a failure a day, and a process that only dies again does not restart for ever."""

    limit: int
    window_s: float
    _times: list[float] = field(default_factory=list)  # of the restarts that still count, ascending

    def take(self, now: float) -> float | None:
        """Books a restart at the monotonic time `now`; seconds to wait before it, or None when there is none left."""
        self._times = [time for time in self._times if now - time < self.window_s]
        if len(self._times) >= self.limit:
            return None
        self._times.append(now)
        return min(2.0 ** (len(self._times) - 1), MAX_BACKOFF_S)

    def __str__(self) -> str:
        """For a sentence: "its 3 restarts within 3600 s"."""
        return f"its {self.limit} restarts within {self.window_s:g} s"

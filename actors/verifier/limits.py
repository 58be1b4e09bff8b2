"""The time limits that a worker sets to its own answers, and how the code of a verifier takes part in them."""

import math
import resource
import signal
import time
from types import FrameType

_INSIST_S = 0.005  # processor time after which an interruption that was swallowed is repeated
_SHORTEST_PAUSE_S = 1e-4

_is_hurried = False


def take_time() -> None:
    """To be called before what may take long or must not be interrupted: in a hurry the answer is put off until later.

    Raises TakesTime, which must be let through, when others wait and this answer has not been put off yet.
    """
    if _is_hurried:
        raise TakesTime


class Interrupted(BaseException):
    """The answer has had its time. No Exception: a verifier that catches those does not catch this."""


class TakesTime(Interrupted):
    """The answer was about to begin what takes long while others wait."""


class Limits:
    """Raises Interrupted in the answer that is being judged once it has had its time, and again if that is swallowed.

    Only between `start` and `stop`. Uses SIGALRM and the real-time timer: the kernel looks at timers of processor time
    only every few milliseconds.
    """

    def __init__(self) -> None:
        self.is_judging, self.num_interruptions = False, 0
        self._end_cpu_s = self._end_s = math.inf
        self._wall_s, self._num_sleeps = math.inf, 0
        self._looked_cpu_s = self._pause_s = 0.0  # processor time at the last look, and wall-clock time to the next
        signal.signal(signal.SIGALRM, self._check)

    def start(self, cpu_s: float, wall_s: float, is_hurried: bool) -> None:
        """From now on the process may use that much processor time, or if it sleeps so much time in all; 0: any amount.

        Where `is_hurried`, `take_time` raises.
        """
        global _is_hurried
        _is_hurried = is_hurried
        self.num_interruptions = 0
        self._end_cpu_s = time.process_time() + (cpu_s or math.inf)
        self._wall_s = wall_s or math.inf
        self._end_s = time.monotonic() + self._wall_s
        self._num_sleeps = _num_sleeps()
        self.is_judging = True
        if cpu_s:
            self._look_again(cpu_s)

    def stop(self) -> bool:
        """No more interruptions; returns whether there was one since the start."""
        self.is_judging = False
        return self.num_interruptions > 0

    def _look_again(self, after_s: float) -> None:
        self._looked_cpu_s, self._pause_s = time.process_time(), max(after_s, _SHORTEST_PAUSE_S)
        signal.setitimer(signal.ITIMER_REAL, min(self._pause_s, max(self._end_s - time.monotonic(), _SHORTEST_PAUSE_S)))

    def _check(self, signum: int, frame: FrameType | None) -> None:
        if not self.is_judging or self._end_cpu_s == math.inf:  # an alarm of the answer before
            return
        now_cpu_s, now_s = time.process_time(), time.monotonic()
        if now_s >= self._end_s and _num_sleeps() == self._num_sleeps:  # it was other processes that took the time
            self._end_s = now_s + self._wall_s
        if now_cpu_s < self._end_cpu_s and now_s < self._end_s:
            # Looking takes time as well: at an answer that is asleep, less and less often.
            is_asleep = now_cpu_s - self._looked_cpu_s < self._pause_s / 2
            self._look_again(2 * self._pause_s if is_asleep else self._end_cpu_s - now_cpu_s)
            return
        # Again, but not at once: the first is on its way to where it is caught, and a second must not overtake it.
        self._end_cpu_s, self._end_s = now_cpu_s + _INSIST_S, math.inf
        self.num_interruptions += 1
        self._look_again(_INSIST_S)
        raise Interrupted


def _num_sleeps() -> int:
    """How often this process has given up its processor."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw

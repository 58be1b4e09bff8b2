"""The alarm: says once, in one line, that a number of health has left its limits and what to do about it.

Each limit (common/limits.py) is held against the median of the last `alarm.window` policy steps that have the metric,
so that single outliers do not count. A limit that is relative is a multiple of the median of the run's first so many.
A limit that was crossed is over when the median has been inside for as many steps: then it can be crossed again.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median

from common.config import AlarmConfig
from common.limits import LIMITS, Limit
from common.metrics import Value
from common.types import JSON


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """A metric that has just left its limit, as RUN/events.jsonl has it."""

    name: str
    value: float  # the median
    limit: float
    text: str  # the line


@dataclass
class _Watch:
    """One limit. `reference` holds the first measured values, up to a window of them, `recent` the last."""

    reference: list[float] = field(default_factory=list)
    recent: deque[float] = field(default_factory=deque)
    is_crossed: bool = False
    calm: int = 0  # steps in a row inside since it was crossed


class Alarm:
    """Judges the metrics of every policy step; the same on all ranks. A checkpoint keeps what it has seen."""

    def __init__(self, config: AlarmConfig) -> None:
        self._config = config
        self._watches = {limit.setting: _Watch() for limit in LIMITS}

    def observe(self, step: int, values: dict[str, Value]) -> tuple[dict[str, float], list[Crossing]]:
        """(metrics, what was crossed in this step). `values` are those of `step`, which trained the policy."""
        if not self._config.enabled:
            return {}, []
        crossings = [crossing for limit in LIMITS if (crossing := self._judge(limit, step, values)) is not None]
        return {"alarm/active": float(sum(watch.is_crossed for watch in self._watches.values()))}, crossings

    def state_dict(self) -> list[JSON]:
        """A list, because which limits there are may change between two releases. A copy: it may be written later."""
        return [
            [setting, list(watch.reference), list(watch.recent), watch.is_crossed, watch.calm]
            for setting, watch in self._watches.items()
        ]

    def load_state_dict(self, state: list[JSON]) -> None:
        for setting, reference, recent, is_crossed, calm in state:
            if setting in self._watches:
                self._watches[setting] = _Watch(list(reference), deque(recent), is_crossed, calm)

    def _judge(self, limit: Limit, step: int, values: dict[str, Value]) -> Crossing | None:
        """Takes the step's value in; the crossing when this is the step that crosses the limit."""
        watch, window, value = self._watches[limit.setting], self._config.window, values.get(limit.metric)
        setting: float | None = getattr(self._config, limit.setting)
        if setting is None or not isinstance(value, float):
            return None
        if not math.isfinite(value):  # as bad as can be
            value = -math.inf if limit.is_lowest else math.inf
        if len(watch.reference) < window:
            watch.reference.append(value)
        watch.recent.append(value)
        while len(watch.recent) > window:
            watch.recent.popleft()
        if len(watch.recent) < window:
            return None
        now, bound = median(watch.recent), setting * (median(watch.reference) if limit.is_relative else 1.0)
        is_outside = now < bound if limit.is_lowest else now > bound
        watch.calm = 0 if is_outside else watch.calm + 1
        was_crossed = watch.is_crossed
        watch.is_crossed = is_outside or (was_crossed and watch.calm < window)
        if was_crossed or not is_outside:
            return None
        return Crossing(name=limit.metric, value=now, limit=bound, text=self._say(limit, step, now, bound))

    def _say(self, limit: Limit, step: int, value: float, bound: float) -> str:
        side = "below" if limit.is_lowest else "above"
        origin = f"{getattr(self._config, limit.setting):g} times its first steps" if limit.is_relative else "the limit"
        return (
            f"ALARM after step {step}: {limit.metric} is {value:.3g} (median of {self._config.window} steps), {side} "
            f"{bound:.3g}, {origin} (alarm.{limit.setting}): {limit.meaning}; {limit.remedy}"
        )

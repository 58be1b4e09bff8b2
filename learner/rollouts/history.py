"""What the lines of metrics.jsonl say of a run's course, for those who watch it (learner/rollouts/observers.py)."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from common.metrics import Value, read_jsonl
from common.types import JSON, Float32Array, Int32Array

MAX_EVALUATIONS = 512  # the newest
MAX_STEPS = 128  # the newest
MAX_ALARMS = 5  # the newest
PACE_STEPS = 10  # newest steps of which the median says how long one takes


def _no_ints() -> Int32Array:
    return np.empty(0, np.int32)


def _no_floats() -> Float32Array:
    return np.empty(0, np.float32)


@dataclass(frozen=True, kw_only=True)
class Course:
    """How a run has gone so far; the fields are those of RunStatus."""

    metrics: dict[str, float] = field(default_factory=dict)
    step_s: float | None = None  # what a step takes, None before the first
    done_s: float | None = None  # monotonic, when the last was done; None: by a learner before
    evaluated_steps: Int32Array = field(default_factory=_no_ints)
    accuracies: Float32Array = field(default_factory=_no_floats)
    rewards: Float32Array = field(default_factory=_no_floats)
    response_lengths: Float32Array = field(default_factory=_no_floats)
    alarms: tuple[str, ...] = ()


class History:
    """The run so far, from its files to begin with, then as each line is added."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._metrics: dict[str, float] = {}
        self._step_s: deque[float] = deque(maxlen=PACE_STEPS)
        self._evaluations: deque[tuple[int, float]] = deque(maxlen=MAX_EVALUATIONS)
        self._steps: deque[tuple[float, float]] = deque(maxlen=MAX_STEPS)  # mean reward, mean length
        self._done_s: float | None = None
        metrics = run_dir / "metrics.jsonl"
        for row in read_jsonl(metrics) if metrics.is_file() else ():
            self._take(row["step"], row)  # RunLog has left out those without one

    def add(self, step: int, values: Mapping[str, Value], now: float) -> None:
        """The line of `step`, which was done or evaluated at `now` (monotonic)."""
        self._done_s = now
        self._take(step, values)

    def course(self) -> Course:
        """Where that leaves the run."""
        evaluated, steps = list(self._evaluations), list(self._steps)
        return Course(
            metrics=dict(self._metrics),
            step_s=median(self._step_s) if self._step_s else None,
            done_s=self._done_s,
            evaluated_steps=np.array([step for step, _ in evaluated], np.int32),
            accuracies=np.array([accuracy for _, accuracy in evaluated], np.float32),
            rewards=np.array([reward for reward, _ in steps], np.float32),
            response_lengths=np.array([length for _, length in steps], np.float32),
            alarms=self._alarms(),
        )

    def _take(self, step: int, values: Mapping[str, JSON]) -> None:
        numbers = {name: float(value) for name, value in values.items() if _is_number(value)}
        if "accuracy/heldout" in numbers:
            self._evaluations.append((step, numbers["accuracy/heldout"]))
        if "time/step_s" not in numbers:  # the line of an evaluation alone
            self._metrics |= numbers
            return
        self._metrics = numbers
        self._step_s.append(numbers["time/step_s"])
        if "reward/mean" in numbers and "length/mean" in numbers:
            self._steps.append((numbers["reward/mean"], numbers["length/mean"]))

    def _alarms(self) -> tuple[str, ...]:
        events = self._run_dir / "events.jsonl"
        rows = read_jsonl(events) if events.is_file() else ()
        alarms = (str(row.get("text")) for row in rows if row.get("kind") == "alarm")
        return tuple(deque(alarms, maxlen=MAX_ALARMS))


def _is_number(value: JSON) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

"""The files of a run, read once: configuration, metrics, ledger, events. Every number of a report comes from here.

Reading is strict where a file is damaged, and lenient where a number is absent: an earlier release did not write it,
or the step could not measure it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TypeGuard

from common.config import Config, ConfigError
from common.loading import read_config
from common.metrics import read_jsonl
from common.types import JSON

Row = dict[str, JSON]
Point = tuple[float, float]  # (step, value)

RECENT = 3  # what a run does now is the mean over the last of so many parts of its policy steps
FEWEST_RECENT = 5  # but over so many steps at least, if there are as many
GAP = re.compile(r"offpolicy/gap_([0-9]{1,6})/|critic/gap_([0-9]{1,6})/")  # no run has versions a million old
LARGEST = 1e100  # number of a metric that counts as one: sums and squares of larger ones have no end
LAST = {"step": 1e9, "time": 253402300799.0}  # what these are at most; the time is the end of the year 9999


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as its files tell it. `rows` has a line or more a step, in the order in which they were written."""

    folder: Path
    config: Config
    rows: tuple[Row, ...]
    ledger: tuple[Row, ...] = ()
    events: tuple[Row, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)  # reason -> rows of the data

    @cached_property
    def steps(self) -> tuple[Row, ...]:
        """The rows that end a step of the learner; the others bring an evaluation."""
        return tuple(row for row in self.rows if number(row, "time/step_s") is not None)

    @cached_property
    def num_warmup_steps(self) -> int:
        """Steps before the first one that trained the policy, which is the first with a histogram of staleness."""
        before = next((index for index, row in enumerate(self.steps) if "staleness/hist" in row), None)
        if before is None:
            return min(self.config.algorithm.critic_warmup_steps, len(self.steps))
        return before

    @property
    def policy_steps(self) -> tuple[Row, ...]:
        return self.steps[self.num_warmup_steps :]

    @cached_property
    def recent(self) -> tuple[Row, ...]:
        """The last third of the policy's steps, which is what advice is about.

        Without the end of a complete run: there everything is sampled, and actors wait for the run to be over.
        """
        steps = self.policy_steps
        end = self.config.staleness.max_staleness * self.config.weights.publish_every
        if len(steps) >= self.config.learner.steps and len(steps) > RECENT * end:
            steps = steps[: len(steps) - end]
        kept = max(len(steps) // RECENT, min(FEWEST_RECENT, len(steps)))
        return steps[len(steps) - kept :]

    @cached_property
    def names(self) -> frozenset[str]:
        """Of all metrics that were ever measured."""
        return frozenset(name for row in self.rows for name, value in row.items() if _is_measured(value))

    @cached_property
    def policy_names(self) -> frozenset[str]:
        """Of those that were measured since the policy is trained; the warm-up's first step measures some too."""
        later = (row for row in self.rows if row["step"] > self.num_warmup_steps)
        return frozenset(name for row in later for name, value in row.items() if _is_measured(value))

    @cached_property
    def gaps(self) -> tuple[int, ...]:
        """The version gaps that have metrics of their own, ascending."""
        found = {int(match[1] or match[2]) for name in self.names if (match := GAP.match(name))}
        return tuple(sorted(found))

    @property
    def alarms(self) -> tuple[Row, ...]:
        return tuple(event for event in self.events if event.get("kind") == "alarm")

    def series(self, name: str) -> list[Point]:
        """(step, value) of a metric over the run, where it was measured."""
        return [(float(row["step"]), value) for row in self.rows if (value := number(row, name)) is not None]

    def policy_series(self, name: str) -> list[Point]:
        """The same of the policy's steps alone."""
        return [point for point in self.series(name) if point[0] > self.num_warmup_steps]

    def now(self, name: str) -> float | None:
        """The mean of a metric over `recent`; None where it was not measured there."""
        return mean(values(self.recent, name))

    def last(self, name: str) -> float | None:
        found = values(self.rows, name)
        return found[-1] if found else None


def read_run(run_dir: str | Path) -> Run:
    """Reads the files of a finished, running or interrupted run.

    Raises:
        ConfigError: `run_dir` is not a run directory, has no metrics yet, or one of its files is damaged.
    """
    folder = Path(run_dir)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is not a run directory: it has no config.yaml")
    rows = _read(folder / "metrics.jsonl", ("step", "time"))
    if not rows:
        logs = f"its logs are in {folder / 'logs'}"
        raise ConfigError(f"{folder} has no metrics.jsonl yet: no step has ended; {logs}")
    _check_histograms(folder / "metrics.jsonl", rows)
    return Run(
        folder=folder,
        config=read_config(folder / "config.yaml"),
        rows=rows,
        ledger=_read(folder / "ledger.jsonl", ("step",)),
        events=_read(folder / "events.jsonl", ("step", "time")),
        left_out=_left_out(folder / "data" / "dropped.jsonl"),
    )


def alarm_text(event: Row) -> str:
    """The line that was printed when the alarm was given."""
    text = str(event.get("text")).removeprefix("ALARM ")
    return f"{text[:1].upper()}{text[1:]}"


def number(row: Row, name: str) -> float | None:
    """None when it is absent, or no number that can be of a run."""
    value = row.get(name)
    return float(value) if is_number(value) else None


def is_number(value: JSON) -> TypeGuard[float]:
    """Whether it is one, finite and at most LARGEST in magnitude."""
    return isinstance(value, int | float) and abs(value) <= LARGEST


def _is_measured(value: JSON) -> bool:
    """A number, or a histogram."""
    return isinstance(value, dict) or is_number(value)


def values(rows: Iterable[Row], name: str) -> list[float]:
    return [value for row in rows if (value := number(row, name)) is not None]


def mean(numbers: Sequence[float]) -> float | None:
    return fmean(numbers) if numbers else None


def time_mean(rows: Iterable[Row], name: str) -> float | None:
    """The mean of a share of time, each step by its duration."""
    pairs = [(value, row["time/step_s"]) for row in rows if (value := number(row, name)) is not None]
    weight = sum(seconds for _, seconds in pairs)
    return sum(value * seconds for value, seconds in pairs) / weight if weight else None


def counts(run: Run, prefix: str) -> dict[str, int]:
    """The last value of each metric under `prefix`."""
    names = sorted(name for name in run.names if name.startswith(prefix))
    return {name.removeprefix(prefix): int(run.last(name) or 0) for name in names}


def histogram(rows: Iterable[Row]) -> dict[int, float]:
    """Version gap -> trained tokens, over `rows`."""
    total: dict[int, float] = {}
    for row in rows:
        for gap, count in (row.get("staleness/hist") or {}).items():
            total[int(gap)] = total.get(int(gap), 0.0) + count
    return dict(sorted(total.items()))


def _read(path: Path, numbers: Sequence[str]) -> tuple[Row, ...]:
    """The rows of a file, which all have `numbers`; none when there is no file."""
    if not path.is_file():
        return ()
    rows = tuple(read_jsonl(path))
    for line, row in enumerate(rows, start=1):
        for name in numbers:
            value = number(row, name)
            if value is None or not 0 <= value <= LAST[name]:
                raise ConfigError(f"{path} line {line} has no {name}: it is damaged, or not of a run; remove the line")
    return rows


def _check_histograms(path: Path, rows: Sequence[Row]) -> None:
    for line, row in enumerate(rows, start=1):
        found = row.get("staleness/hist")
        is_right = found is None or (
            isinstance(found, dict)
            and all(re.fullmatch("[0-9]{1,6}", gap) and is_number(count) and count >= 0 for gap, count in found.items())
        )
        if not is_right:
            raise ConfigError(
                f"{path} line {line} has a staleness/hist that is not tokens by version gap: {found!r:.80}"
            )


def _left_out(path: Path) -> dict[str, int]:
    return dict(Counter(str(row.get("reason")) for row in _read(path, ())).most_common())

"""Several runs beside each other: what differs in their configurations, and what came of it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from common.config import Config, ConfigError
from common.report.reading import Run, read_run
from common.report.scales import percent, short
from common.report.summary import Summary, duration, summarise
from common.types import JSON

MOST_RUNS = 14  # as many curves can be told apart
LABEL_SETTINGS = 3  # a label names no more; with more it is the run's folder
_PLACE = ("name", "runs_dir")  # where a run is, not what it does


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`labels` are unique, one a run; `differences` maps a setting to its value in each run."""

    runs: tuple[Run, ...]
    labels: tuple[str, ...]
    differences: dict[str, tuple[str, ...]]
    facts: dict[str, tuple[str, ...]]  # what came of it


def compare(run_dirs: Sequence[str | Path]) -> Comparison:
    """Reads the runs. Raises ConfigError as `read_run`, for a run that is given twice, and for more than MOST_RUNS."""
    seen: dict[Path, str | Path] = {}
    for run_dir in run_dirs:
        if (place := Path(run_dir).resolve()) in seen:
            raise ConfigError(f"{run_dir} and {seen[place]} are the same run: give each once")
        seen[place] = run_dir
    if len(seen) > MOST_RUNS:
        raise ConfigError(f"{len(seen)} runs cannot be told apart in one plot: give at most {MOST_RUNS}")
    runs = tuple(read_run(run_dir) for run_dir in run_dirs)
    found = differences([run.config for run in runs])
    summaries = [summarise(run) for run in runs]
    return Comparison(
        runs=runs,
        labels=_labels(runs, found),
        differences=found,
        facts={name: tuple(map(say, summaries)) for name, say in _FACTS.items()},
    )


def differences(configs: Sequence[Config]) -> dict[str, tuple[str, ...]]:
    """Setting -> its value in each, for all settings that are not the same in all, by name; not where the runs are."""
    flat = [_flat(asdict(config)) for config in configs]
    names = sorted({name for settings in flat for name in settings})
    rows = {name: tuple(settings.get(name, "-") for settings in flat) for name in names}
    return {name: row for name, row in rows.items() if len(set(row)) > 1 and name not in _PLACE}


def _flat(node: JSON, prefix: str = "") -> dict[str, str]:
    """ "section.key" -> its value as in YAML."""
    if not isinstance(node, dict):
        return {prefix: "null" if node is None else str(node).lower() if isinstance(node, bool) else str(node)}
    merged: dict[str, str] = {}
    for key, value in node.items():
        merged |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return merged


def _labels(runs: Sequence[Run], found: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """What differs, as "max_staleness=4, seed=1"; the folder's name where that is much, nothing, or not unique."""
    leaves = Counter(name.rpartition(".")[2] for name in found)
    short_names = {name: leaf if leaves[leaf := name.rpartition(".")[2]] == 1 else name for name in found}
    labels = [
        ", ".join(f"{short_names[name]}={row[index]}" for name, row in found.items()) for index in range(len(runs))
    ]
    folders = [run.folder.resolve().name for run in runs]
    if len(set(folders)) < len(folders):
        folders = [str(run.folder) for run in runs]
    if not 0 < len(found) <= LABEL_SETTINGS:
        return tuple(folders)
    return tuple(
        label if labels.count(label) == 1 else f"{label} ({folder})"
        for label, folder in zip(labels, folders, strict=True)
    )


def _accuracy(summary: Summary) -> str:
    points = summary.evaluations
    if not points:
        return "not evaluated"
    last = points[-1]
    interval = "" if last.low is None or last.high is None else f" ({percent(last.low)} to {percent(last.high)})"
    first = f"{percent(points[0].accuracy)} -> " if len(points) > 1 else ""
    return f"{first}{percent(last.accuracy)}{interval}"


def _best(summary: Summary) -> str:
    if not summary.evaluations:
        return "-"
    best = max(summary.evaluations, key=lambda point: point.accuracy)
    return f"{percent(best.accuracy)} at version {best.version}, {duration(best.wall_s)}"


def _age(summary: Summary) -> str:
    if summary.staleness_mean is None or summary.staleness_max is None:
        return "-"
    return f"{summary.staleness_mean:.2f}, {summary.staleness_max:.0f}"


def _waste(summary: Summary) -> str:
    dropped = sum(summary.dropped_tokens.values())
    return percent(dropped / summary.generated_tokens, 0.001) if summary.generated_tokens else "-"


def _share(value: float | None) -> str:
    return "-" if value is None else percent(value)


_FACTS = {
    "accuracy, first -> last (95%)": _accuracy,
    "best accuracy": _best,
    "steps": lambda summary: f"{summary.num_steps} of {summary.num_planned_steps}",
    "training time": lambda summary: duration(summary.wall_s),
    "generated tokens": lambda summary: "-" if summary.generated_tokens is None else short(summary.generated_tokens),
    "trained tokens a second": lambda summary: "-" if summary.trained_per_s is None else short(summary.trained_per_s),
    "age of tokens: mean, oldest": _age,
    "learner waited": lambda summary: _share(summary.learner_idle),
    "actors waited": lambda summary: _share(summary.actors_idle),
    "generated tokens dropped": _waste,
}


def render(comparison: Comparison) -> str:
    """A line a run, then its facts and what differs, one a line with a column a run."""
    letters = [chr(ord("A") + index) for index in range(len(comparison.runs))]
    lines = [
        f"{letter}  {run.folder}: {label}"
        for letter, run, label in zip(letters, comparison.runs, comparison.labels, strict=True)
    ]
    tables = [("", comparison.facts), ("what differs", comparison.differences)]
    for title, rows in tables:
        lines += ["", *_table(title, letters, rows)]
    if not comparison.differences:
        lines += ["nothing but where they are"]
    return "\n".join(lines)


def _table(title: str, letters: Sequence[str], rows: dict[str, tuple[str, ...]]) -> list[str]:
    cells = [(title, *letters), *((name, *row) for name, row in rows.items())]
    widths = [max(len(row[column]) for row in cells) for column in range(len(letters) + 1)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def to_json(comparison: Comparison) -> dict[str, JSON]:
    return {
        "runs": [
            {"run_dir": str(run.folder), "label": label, "summary": _plain(summarise(run))}
            for run, label in zip(comparison.runs, comparison.labels, strict=True)
        ],
        "differences": {name: list(row) for name, row in comparison.differences.items()},
    }


def _plain(summary: Summary) -> dict[str, JSON]:
    return asdict(summary) | {"run_dir": str(summary.run_dir), "config": asdict(summary.config)}

"""The closing summary of a run, from its files alone: `train` ends with it, `inspect` prints it again."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.config import Config, ConfigError, OverAge
from common.loading import read_config
from common.metrics import read_jsonl
from common.types import JSON

Row = dict[str, JSON]
BAR_WIDTH = 40


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out accuracy (avg@k) of policy `version`, logged at `step`, which may be a few steps later."""

    step: int
    version: int
    accuracy: float
    low: float | None  # of its 95% interval over prompts, as the next two None in the files of an earlier release
    high: float | None
    newest_version: int | None  # that tokens were drawn with; another one than `version` where a publication came in
    num_prompts: int | None  # None in the files of an earlier release
    num_failed: int  # prompts that could not be sampled; they count as wrong, as do the next
    num_errors: int  # responses on which the verifier failed


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run did. None means that its files do not say."""

    run_dir: Path
    config: Config
    evaluations: tuple[Evaluation, ...]
    num_steps: int  # learner steps with a metrics line, critic warm-up included
    num_warmup_steps: int  # of them; a gate may have ended the warm-up early
    num_versions: int  # published weight updates
    num_groups: int  # lines of the ledger
    wall_s: float  # sum of time/step_s
    generated_tokens: float | None
    trained_tokens: float | None
    generated_per_s: float | None
    trained_per_s: float | None
    actors_idle: float | None  # fraction of time
    learner_idle: float | None
    staleness_mean: float | None  # versions, per trained token
    staleness_max: float | None
    staleness_hist: dict[int, float]  # version gap -> trained tokens
    drops: dict[str, int]  # reason -> groups
    left_out: dict[str, int]  # reason -> rows of the data
    verdicts: dict[str, int]  # verdict -> training responses


def summary(run_dir: str | Path) -> Summary:
    """Reads RUN/config.yaml, metrics.jsonl and ledger.jsonl of a finished, running or interrupted run.

    Raises:
        ConfigError: `run_dir` is not a run directory, or has no metrics yet.
    """
    folder = Path(run_dir)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is not a run directory: it has no config.yaml")
    if not (folder / "metrics.jsonl").is_file():
        raise ConfigError(f"{folder} has no metrics.jsonl yet: no step has ended; its logs are in {folder / 'logs'}")
    rows = list(read_jsonl(folder / "metrics.jsonl"))
    ledger = folder / "ledger.jsonl"
    steps = [row for row in rows if _number(row, "time/step_s") is not None]
    wall_s = sum(row["time/step_s"] for row in steps)
    histogram = _histogram(rows)
    generated, trained = _last(rows, "tokens/generated"), _last(rows, "tokens/trained")
    config = read_config(folder / "config.yaml")
    return Summary(
        run_dir=folder,
        config=config,
        evaluations=_evaluations(rows),
        num_steps=len(steps),
        num_warmup_steps=_num_warmup_steps(config, steps),
        num_versions=int(_last(rows, "version") or 0),
        num_groups=sum(1 for _ in read_jsonl(ledger)) if ledger.is_file() else 0,
        wall_s=wall_s,
        generated_tokens=generated,
        trained_tokens=trained,
        generated_per_s=_rate(generated, wall_s, steps, "throughput/generated_tokens_per_s"),
        trained_per_s=_rate(trained, wall_s, steps, "throughput/trained_tokens_per_s"),
        actors_idle=_time_mean(steps, "actors/idle_fraction"),
        learner_idle=_time_mean(steps, "learner/idle_fraction"),
        staleness_mean=_mean_gap(histogram, steps),
        staleness_max=max(_values(rows, "staleness/token_max"), default=None),
        staleness_hist=histogram,
        drops=_counts(rows, "drops/"),
        left_out=_left_out(folder / "data" / "dropped.jsonl"),
        verdicts=_counts(rows, "verdicts/"),
    )


def render(summary: Summary) -> str:
    """The summary as text, one fact a line."""
    config = summary.config
    lines = [
        (
            "run",
            f"{config.name}: {config.task.name}, {config.algorithm.advantage} advantages, seed {config.seed}",
        ),
        ("accuracy", _accuracy_text(summary)),
        ("steps", _steps_text(summary)),
        ("generated", _tokens_text(summary.generated_tokens, summary.generated_per_s)),
        (
            "trained",
            _tokens_text(summary.trained_tokens, summary.trained_per_s) + f" in {summary.num_groups} groups",
        ),
        ("verdicts", _verdicts_text(summary.verdicts)),
        ("idle", f"actors {_share(summary.actors_idle)}, learner {_share(summary.learner_idle)}"),
        ("staleness", _staleness_text(summary)),
        *(("", line) for line in _bars(summary.staleness_hist)),
        ("dropped", _drops_text(summary.drops)),
        *([("left out", _left_out_text(summary))] if summary.left_out else []),
        ("files", f"{summary.run_dir / 'metrics.jsonl'}, {summary.run_dir / 'ledger.jsonl'}"),
        ("curves", f"tensorboard --logdir {summary.run_dir / 'tensorboard'}"),
    ]
    return "\n".join(f"{label:<11}{text}".rstrip() for label, text in lines)


def _accuracy_text(summary: Summary) -> str:
    points = summary.evaluations
    if not points:
        replayed = summary.config.learner.replay
        return "not evaluated yet" if replayed is None else f"not evaluated: it trains on the record of {replayed}"
    settings = summary.config.eval
    k = f"avg@{settings.samples_per_prompt}" if settings.temperature > 0 else "greedy"
    of = f", {points[-1].num_prompts} prompts" if points[-1].num_prompts is not None else ""
    about = f"held out, {k}{of}"
    if len(points) == 1:
        return f"{_with_interval(points[0])} for version {points[0].version} ({about}){_marks(points)}"
    between = ", ".join(f"{point.accuracy:.3f} for version {point.version}" for point in points[1:-1])
    text = f"{_with_interval(points[0])} -> {_with_interval(points[-1])} ({about})"
    return (f"{text}; during: {between}" if between else text) + _marks(points)


def _with_interval(point: Evaluation) -> str:
    known = point.low is not None and point.high is not None
    return f"{point.accuracy:.3f} [{point.low:.3f}, {point.high:.3f}]" if known else f"{point.accuracy:.3f}"


def _marks(points: Sequence[Evaluation]) -> str:
    """Which evaluations are of more than one version, and which are not of everything that they should be of."""
    spanned = [p for p in points if p.newest_version is not None and p.newest_version > p.version]
    versions = ", ".join(f"{point.version} to {point.newest_version}" for point in spanned)
    return (f"; across publications: versions {versions}" if spanned else "") + "".join(
        f"; INCOMPLETE for version {point.version}: {point.num_failed} prompts were not sampled and the verifier "
        f"failed on {point.num_errors} responses, which count as wrong"
        for point in points
        if point.num_failed or point.num_errors
    )


def _steps_text(summary: Summary) -> str:
    warmup, config = summary.num_warmup_steps, summary.config
    is_over = summary.num_steps > warmup
    planned = config.learner.steps + (warmup if is_over else config.algorithm.critic_warmup_steps)
    text = f"{summary.num_steps} of {planned} ({warmup} of critic warm-up) in {_duration(summary.wall_s)}"
    return f"{text}; {summary.num_versions} versions published"


def _num_warmup_steps(config: Config, steps: Sequence[Row]) -> int:
    """Steps before the first one that trained the policy, which is the first with a histogram of staleness."""
    before = next((number for number, row in enumerate(steps) if "staleness/hist" in row), None)
    return min(config.algorithm.critic_warmup_steps, len(steps)) if before is None else before


def _staleness_text(summary: Summary) -> str:
    if summary.staleness_mean is None or summary.staleness_max is None:
        return "not measured yet"
    staleness = summary.config.staleness
    ages = f"mean {summary.staleness_mean:.2f}, max {summary.staleness_max:.0f}"
    if staleness.over_age is OverAge.mask:
        return f"{ages} versions; tokens older than {staleness.max_staleness} were masked"
    return f"{ages} of at most {staleness.max_staleness} versions"


def _bars(histogram: dict[int, float]) -> list[str]:
    total = sum(histogram.values())
    if not total:
        return []
    shares = {gap: count / total for gap, count in sorted(histogram.items())}
    return [f"{gap:>3} old {share:>6.1%} {'#' * round(BAR_WIDTH * share)}".rstrip() for gap, share in shares.items()]


def _drops_text(drops: dict[str, int]) -> str:
    total = sum(drops.values())
    if not total:
        return "no group"
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(drops.items()) if count)
    return f"{total} groups: {reasons}"


def _left_out_text(summary: Summary) -> str:
    reasons = ", ".join(f"{reason} {count}" for reason, count in summary.left_out.items())
    total = sum(summary.left_out.values())
    return f"{total} rows of the data: {reasons} ({summary.run_dir / 'data' / 'dropped.jsonl'})"


def _verdicts_text(verdicts: dict[str, int]) -> str:
    total = sum(verdicts.values())
    if not total:
        return "none yet"
    shown = ", ".join(f"{verdict} {count}" for verdict, count in sorted(verdicts.items()) if count)
    return f"{total} responses: {shown}"


def _tokens_text(tokens: float | None, per_s: float | None) -> str:
    count = "tokens not counted" if tokens is None else f"{tokens:,.0f} tokens"
    return count if per_s is None else f"{count}, {per_s:,.0f} a second"


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.0%}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _evaluations(rows: Sequence[Row]) -> tuple[Evaluation, ...]:
    points = []
    for row in rows:
        accuracy, version = _number(row, "accuracy/heldout"), _number(row, "accuracy/version")
        if accuracy is not None and version is not None:
            num_prompts, newest = _number(row, "eval/num_prompts"), _number(row, "accuracy/version_newest")
            points.append(
                Evaluation(
                    step=row["step"],
                    version=int(version),
                    accuracy=accuracy,
                    low=_number(row, "accuracy/heldout_low"),
                    high=_number(row, "accuracy/heldout_high"),
                    newest_version=None if newest is None else int(newest),
                    num_prompts=None if num_prompts is None else int(num_prompts),
                    num_failed=int(_number(row, "eval/num_failed") or 0),
                    num_errors=int(_number(row, "eval/num_errors") or 0),
                )
            )
    return tuple(points)


def _histogram(rows: Sequence[Row]) -> dict[int, float]:
    total: dict[int, float] = {}
    for row in rows:
        for gap, count in (row.get("staleness/hist") or {}).items():
            total[int(gap)] = total.get(int(gap), 0.0) + count
    return dict(sorted(total.items()))


def _counts(rows: Sequence[Row], prefix: str) -> dict[str, int]:
    """The last value of each metric under `prefix`."""
    names = sorted({name for row in rows for name in row if name.startswith(prefix)})
    return {name.removeprefix(prefix): int(_last(rows, name) or 0) for name in names}


def _left_out(path: Path) -> dict[str, int]:
    return dict(Counter(row["reason"] for row in read_jsonl(path)).most_common()) if path.is_file() else {}


def _mean_gap(histogram: dict[int, float], steps: Sequence[Row]) -> float | None:
    if total := sum(histogram.values()):
        return sum(gap * count for gap, count in histogram.items()) / total
    means = _values(steps, "staleness/token_mean")
    return sum(means) / len(means) if means else None


def _rate(total: float | None, wall_s: float, steps: Sequence[Row], name: str) -> float | None:
    return total / wall_s if total is not None and wall_s > 0 else _time_mean(steps, name)


def _time_mean(steps: Sequence[Row], name: str) -> float | None:
    pairs = [(value, row["time/step_s"]) for row in steps if (value := _number(row, name)) is not None]
    weight = sum(seconds for _, seconds in pairs)
    return sum(value * seconds for value, seconds in pairs) / weight if weight else None


def _last(rows: Sequence[Row], name: str) -> float | None:
    values = _values(rows, name)
    return values[-1] if values else None


def _values(rows: Sequence[Row], name: str) -> list[float]:
    return [value for row in rows if (value := _number(row, name)) is not None]


def _number(row: Row, name: str) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else None

"""The closing summary of a run: one record, which text, JSON and page show."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.config import Config
from common.report.reading import Row, Run, counts, histogram, is_number, mean, number, read_run, time_mean, values


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out accuracy (avg@k) of policy `version`, logged at `step`, which may be a few steps later."""

    step: int
    version: int
    newest_version: int  # that a response of it was sampled with; above `version` if it spanned a publication
    accuracy: float
    low: float | None  # 95% interval over prompts; None in the files of an earlier release
    high: float | None
    num_prompts: int | None  # None in the files of an earlier release
    num_failed: int  # prompts that could not be sampled; they count as wrong, as do the next
    num_errors: int  # responses on which the verifier failed
    wall_s: float  # training time until the version was published
    generated_tokens: float | None  # until then

    @property
    def is_complete(self) -> bool:
        return not self.num_failed and not self.num_errors


@dataclass(frozen=True, kw_only=True)
class Member:
    """What one actor brought that was trained on."""

    name: str
    num_groups: int
    num_tokens: int
    reward_mean: float  # over responses
    last_step: int


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
    dropped_tokens: dict[str, int]  # reason -> tokens
    left_out: dict[str, int]  # reason -> rows of the data
    verdicts: dict[str, int]  # verdict -> training responses
    members: tuple[Member, ...]
    num_alarms: int  # lines of events.jsonl

    @property
    def num_planned_steps(self) -> int:
        """Warm-up that a gate ended early is over: then it is as long as it was."""
        is_over = self.num_steps > self.num_warmup_steps
        warmup = self.num_warmup_steps if is_over else self.config.algorithm.critic_warmup_steps
        return self.config.learner.steps + warmup


def summary(run_dir: str | Path) -> Summary:
    """Of a finished, running or interrupted run. Raises ConfigError as `read_run`."""
    return summarise(read_run(run_dir))


def summarise(run: Run) -> Summary:
    steps = run.steps
    wall_s = sum(values(steps, "time/step_s"))
    gaps = histogram(run.rows)
    generated, trained = run.last("tokens/generated"), run.last("tokens/trained")
    return Summary(
        run_dir=run.folder,
        config=run.config,
        evaluations=_evaluations(run),
        num_steps=len(steps),
        num_warmup_steps=run.num_warmup_steps,
        num_versions=int(run.last("version") or 0),
        num_groups=len(run.ledger),
        wall_s=wall_s,
        generated_tokens=generated,
        trained_tokens=trained,
        generated_per_s=_rate(generated, wall_s, steps, "throughput/generated_tokens_per_s"),
        trained_per_s=_rate(trained, wall_s, steps, "throughput/trained_tokens_per_s"),
        actors_idle=time_mean(steps, "actors/idle_fraction"),
        learner_idle=time_mean(steps, "learner/idle_fraction"),
        staleness_mean=_mean_gap(gaps, steps),
        staleness_max=max(values(run.rows, "staleness/token_max"), default=None),
        staleness_hist=gaps,
        drops=counts(run, "drops/"),
        dropped_tokens=counts(run, "dropped_tokens/"),
        left_out=run.left_out,
        verdicts=counts(run, "verdicts/"),
        members=_members(run.ledger),
        num_alarms=len(run.alarms),
    )


def _evaluations(run: Run) -> tuple[Evaluation, ...]:
    """Version v was published at the end of the first step whose row says `version` v; version 0 was there at first."""
    published: dict[int, tuple[float, float | None]] = {0: (0.0, 0.0)}
    wall_s = 0.0
    for row in run.rows:
        wall_s += number(row, "time/step_s") or 0.0
        published.setdefault(int(number(row, "version") or 0), (wall_s, number(row, "tokens/generated")))
    points = []
    for row in run.rows:
        accuracy, version = number(row, "accuracy/heldout"), number(row, "accuracy/version")
        if accuracy is not None and version is not None:
            points.append(_evaluation(row, accuracy, int(version), published.get(int(version), (wall_s, None))))
    return tuple(points)


def _evaluation(row: Row, accuracy: float, version: int, published: tuple[float, float | None]) -> Evaluation:
    num_prompts, newest = number(row, "eval/num_prompts"), number(row, "accuracy/version_newest")
    return Evaluation(
        step=int(row["step"]),
        version=version,
        newest_version=version if newest is None else int(newest),
        accuracy=accuracy,
        low=number(row, "accuracy/heldout_low"),
        high=number(row, "accuracy/heldout_high"),
        num_prompts=None if num_prompts is None else int(num_prompts),
        num_failed=int(number(row, "eval/num_failed") or 0),
        num_errors=int(number(row, "eval/num_errors") or 0),
        wall_s=published[0],
        generated_tokens=published[1],
    )


def _members(ledger: Sequence[Row]) -> tuple[Member, ...]:
    """Those with most groups first."""
    lines: dict[str, list[Row]] = {}
    for row in ledger:
        lines.setdefault(str(row.get("actor")), []).append(row)
    members = [
        Member(
            name=name,
            num_groups=len(rows),
            num_tokens=int(sum(number for row in rows for number in _numbers(row, "lengths"))),
            reward_mean=mean([reward for row in rows for reward in _numbers(row, "rewards")]) or 0.0,
            last_step=max(int(row["step"]) for row in rows),
        )
        for name, rows in lines.items()
    ]
    return tuple(sorted(members, key=lambda member: (-member.num_groups, member.name)))


def _numbers(row: Row, name: str) -> list[float]:
    found = row.get(name)
    return [value for value in found if is_number(value)] if isinstance(found, list) else []


def _mean_gap(gaps: dict[int, float], steps: Sequence[Row]) -> float | None:
    if total := sum(gaps.values()):
        return sum(gap * count for gap, count in gaps.items()) / total
    return mean(values(steps, "staleness/token_mean"))


def _rate(total: float | None, wall_s: float, steps: Sequence[Row], name: str) -> float | None:
    return total / wall_s if total is not None and wall_s > 0 else time_mean(steps, name)


def duration(seconds: float) -> str:
    """ "1 h 5 min", "5 min 3 s" or "3 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

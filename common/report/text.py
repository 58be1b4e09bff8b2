"""The closing summary of a run as text: `train` ends with it, `inspect` prints it again."""

from collections.abc import Sequence

from common.config import OverAge
from common.report.advice import GOOD_NEWS, SHOWN, advise
from common.report.reading import Run, alarm_text
from common.report.summary import Evaluation, Summary, duration, summarise

BAR_WIDTH = 40
LABEL = 11  # columns
MEMBERS = 8  # shown by name
ALARMS = 3  # the last ones are shown


def render(run: Run) -> str:
    """One fact a line, and at the end what should be done."""
    summary = summarise(run)
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
        *([("members", _members_text(summary))] if len(summary.members) > 1 else []),
        ("verdicts", _verdicts_text(summary.verdicts)),
        ("idle", f"actors {_share(summary.actors_idle)}, learner {_share(summary.learner_idle)}"),
        ("staleness", _staleness_text(summary)),
        *(("", line) for line in _bars(summary.staleness_hist)),
        ("dropped", _drops_text(summary)),
        *([("left out", _left_out_text(summary))] if summary.left_out else []),
        *(("alarm", alarm_text(event)) for event in run.alarms[-ALARMS:]),
        ("files", f"{summary.run_dir / 'metrics.jsonl'}, {summary.run_dir / 'ledger.jsonl'}"),
        ("curves", f"tensorboard --logdir {summary.run_dir / 'tensorboard'}"),
        *(("advice", advice.text) for advice in advise(run)[:SHOWN] if advice.priority >= GOOD_NEWS),
    ]
    return "\n".join(f"{label:<{LABEL}}{text}".rstrip() for label, text in lines)


def _accuracy_text(summary: Summary) -> str:
    points = summary.evaluations
    if not points:
        replayed = summary.config.learner.replay
        return "not evaluated yet" if replayed is None else f"not evaluated: it trains on the record of {replayed}"
    settings = summary.config.eval
    k = f"avg@{settings.samples_per_prompt}" if settings.temperature > 0 else "greedy"
    of = f", {points[-1].num_prompts} prompts" if points[-1].num_prompts is not None else ""
    interval = ", 95% interval" if points[-1].low is not None else ""
    about = f"held out, {k}{of}{interval}"
    if len(points) == 1:
        return f"{_point(points[0])} for version {points[0].version} ({about}){_marks(points)}"
    between = ", ".join(f"{point.accuracy:.3f} for version {point.version}" for point in points[1:-1])
    text = f"{_point(points[0])} -> {_point(points[-1])} ({about})"
    return (f"{text}; during: {between}" if between else text) + _marks(points)


def _point(point: Evaluation) -> str:
    if point.low is None or point.high is None:
        return f"{point.accuracy:.3f}"
    return f"{point.accuracy:.3f} [{point.low:.3f}, {point.high:.3f}]"


def _marks(points: Sequence[Evaluation]) -> str:
    """Which evaluations are of more than one version, and which are not of everything that they should be of."""
    spanned = [f"{point.version} to {point.newest_version}" for point in points if point.newest_version > point.version]
    across = f"; across publications: versions {', '.join(spanned)}" if spanned else ""
    return across + "".join(
        f"; INCOMPLETE for version {point.version}: {point.num_failed} prompts were not sampled and the verifier "
        f"failed on {point.num_errors} responses, which count as wrong"
        for point in points
        if point.num_failed or point.num_errors
    )


def _steps_text(summary: Summary) -> str:
    done = f"{summary.num_steps} of {summary.num_planned_steps} ({summary.num_warmup_steps} of critic warm-up)"
    return f"{done} in {duration(summary.wall_s)}; {summary.num_versions} versions published"


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


def _drops_text(summary: Summary) -> str:
    total = sum(summary.drops.values())
    if not total:
        return "no group"
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(summary.drops.items()) if count)
    tokens = sum(summary.dropped_tokens.values())
    waste = f"; {tokens / summary.generated_tokens:.1%} of the generated tokens" if summary.generated_tokens else ""
    return f"{total} groups: {reasons}{waste if tokens else ''}"


def _members_text(summary: Summary) -> str:
    shown = [f"{member.name} {member.num_groups}" for member in summary.members[:MEMBERS]]
    more = f", {len(summary.members) - MEMBERS} more" if len(summary.members) > MEMBERS else ""
    return f"{len(summary.members)} sampled what was trained, in groups: {', '.join(shown)}{more}"


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

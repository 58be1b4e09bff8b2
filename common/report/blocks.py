"""The parts of a page that are words and tables: head, facts, advice, alarms, members, samples, configuration."""

import re
import time
from collections.abc import Mapping, Sequence
from html import escape

from common.config import Config, OverAge
from common.report.advice import SHOWN, advise
from common.report.compare import differences
from common.report.reading import Run, alarm_text, histogram
from common.report.scales import percent, short
from common.report.summary import Evaluation, Summary, duration, summarise
from common.report.views.correction import LOSSES
from common.report.views.view import now_by_gap, recent_text

ALARMS = 8  # the last ones are shown
MEMBERS = 12
ABSENT = "-"


_CODE = re.compile(r"`([^`]+)`|\b[a-z]+(?:[._][a-z0-9_]+)+(?:=[\w.]+\w|=\w)?|\b[a-z]+(?:/[a-z0-9_*]+)+")


def prose(text: str) -> str:
    """Escaped; settings, metrics and files look like code, in backticks or not."""
    return _CODE.sub(lambda found: f"<code>{found[1] or found[0]}</code>", escape(text))


def head(run: Run) -> str:
    config, algorithm = run.config, run.config.algorithm
    about = [
        config.task.name,
        f"{algorithm.advantage} advantages",
        f"correction {algorithm.correction}",
        f"bound {config.staleness.max_staleness}",
        f"seed {config.seed}",
        f"last step ended {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(run.rows[-1]['time']))}",
    ]
    return f'<header><h1>{escape(config.name)}</h1><p class="about">{escape(" · ".join(about))}</p></header>'


def facts(run: Run) -> str:
    """What a run did in six numbers."""
    summary = summarise(run)
    tiles = [
        ("held-out accuracy", *_accuracy(summary)),
        (
            "training time",
            duration(summary.wall_s),
            f"{summary.num_steps} of {summary.num_planned_steps} steps, {summary.num_versions} versions",
        ),
        ("generated", *_tokens(summary.generated_tokens, summary.generated_per_s)),
        ("trained", *_tokens(summary.trained_tokens, summary.trained_per_s)),
        ("age of trained tokens", *_age(summary)),
        ("waiting, whole run", _share(summary.learner_idle), f"learner; actors {_share(summary.actors_idle)}"),
    ]
    items = "".join(
        f"<li><span>{escape(label)}</span><b>{escape(value)}</b><span>{escape(more)}</span></li>"
        for label, value, more in tiles
    )
    return f'<ul class="facts">{items}</ul>'


def _accuracy(summary: Summary) -> tuple[str, str]:
    if not summary.evaluations:
        return "not evaluated", ""
    last = summary.evaluations[-1]
    first = f"from {percent(summary.evaluations[0].accuracy)}" if len(summary.evaluations) > 1 else "the only one"
    settings = summary.config.eval
    k = f"avg@{settings.samples_per_prompt}" if settings.temperature > 0 else "greedy"
    interval = "" if last.low is None or last.high is None else f", 95%: {percent(last.low)} to {percent(last.high)}"
    return percent(last.accuracy), f"{first}{interval}, {k}"


def _tokens(count: float | None, per_s: float | None) -> tuple[str, str]:
    shown = "not counted" if count is None else f"{short(count)} tokens"
    return shown, "" if per_s is None else f"{short(per_s)} a second"


def _age(summary: Summary) -> tuple[str, str]:
    if summary.staleness_mean is None or summary.staleness_max is None:
        return "not measured", ""
    bound = summary.config.staleness.max_staleness
    is_masking = summary.config.staleness.over_age is OverAge.mask
    of = (
        f"oldest {summary.staleness_max:.0f}, masked above {bound}"
        if is_masking
        else f"oldest {summary.staleness_max:.0f} of at most {bound}"
    )
    return f"{summary.staleness_mean:.2f} versions", of


def _share(value: float | None) -> str:
    return "not measured" if value is None else percent(value)


def advice(run: Run) -> str:
    said = advise(run)[:SHOWN]
    items = "".join(f"<li>{prose(found.text)}</li>" for found in said)
    if not said:
        items = "<li>Nothing is advised before five steps of the policy.</li>"
    about = (
        f"Shares and weights are means over {recent_text(run)}, the last third of the policy's but five at least. "
        "docs/inspect.md has the rules."
    )
    return (
        f'<section class="advice" id="advice"><h2>What the numbers advise</h2><ol>{items}</ol>'
        f'<p class="small">{escape(about)}</p></section>'
    )


def alarms(run: Run) -> str:
    if not run.alarms:
        return ""
    shown = run.alarms[-ALARMS:]
    items = "".join(f"<li>{prose(alarm_text(event))}</li>" for event in shown)
    more = f", the last {ALARMS} of {len(run.alarms)}" if len(run.alarms) > ALARMS else ""
    return f'<section class="alarms"><h2>Alarms{more}</h2><ul>{items}</ul></section>'


def evaluations(run: Run) -> str:
    """A row a version that was evaluated."""
    points = summarise(run).evaluations
    rows = [
        (
            f"{point.version}"
            if point.newest_version == point.version
            else f"{point.version} to {point.newest_version}",
            percent(point.accuracy, 0.001),
            ABSENT if point.low is None or point.high is None else f"{percent(point.low)} to {percent(point.high)}",
            _prompts(point),
        )
        for point in points
    ]
    table = _table(("version", "accuracy", "95% interval", "prompts"), rows) if rows else ""
    spans = any(point.newest_version > point.version for point in points)
    note = "From ... to: weights were published while it was sampled." if spans else ""
    return _card("Evaluations", table, note if rows else "No evaluation has ended yet.")


def _prompts(point: Evaluation) -> str:
    count = ABSENT if point.num_prompts is None else str(point.num_prompts)
    return count if point.is_complete else f"{count}, FAILED: {point.num_failed} prompts, {point.num_errors} verdicts"


def members(run: Run) -> str:
    """Who sampled, what the verifier said, and what was dropped."""
    summary = summarise(run)
    rows = [
        (
            member.name,
            f"{member.num_groups:,}",
            short(member.num_tokens),
            f"{member.reward_mean:+.2f}",
            str(member.last_step),
        )
        for member in summary.members[:MEMBERS]
    ]
    more = f"{len(summary.members) - MEMBERS} more actors. " if len(summary.members) > MEMBERS else ""
    left = [
        f"{count:.0f} {what}"
        for what in ("dismissed", "forgotten", "too_slow")
        if (count := run.last(f"actors/{what}"))
    ]
    note = more + (f"Actors: {', '.join(left)}.".replace("_", " ") if left else "")
    counted = [("verdict", summary.verdicts), ("dropped groups", summary.drops)]
    tables = [_table(("actor", "groups", "tokens", "reward", "last step"), rows)] if rows else []
    tables += [_counts(title, found) for title, found in counted if any(found.values())]
    return _card("Actors, verdicts, drops", "".join(tables), note)


def _counts(title: str, found: Mapping[str, int]) -> str:
    total = sum(found.values())
    rows = [
        (name.replace("_", " "), f"{count:,}", percent(count / total, 0.001)) for name, count in found.items() if count
    ]
    return _table((title, "count", "share"), rows)


def ages(run: Run) -> str:
    """What the views say of each age, as numbers."""
    tokens = histogram(run.recent)
    total = sum(tokens.values())
    token_ess, sequence_ess = (now_by_gap(run, f"offpolicy/gap_{{}}/{name}") for name in ("ess", "sequence_ess"))
    lost = {
        sign: [now_by_gap(run, f"offpolicy/gap_{{}}/lost_{loss}_{sign}") for loss in LOSSES]
        for sign in ("positive", "negative")
    }
    rows = []
    for gap in sorted({*tokens, *token_ess}):
        losses = [sum(part.get(gap, 0.0) for part in parts) for parts in lost.values()]
        is_measured = any(gap in part for parts in lost.values() for part in parts)
        rows.append(
            (
                str(gap),
                percent(tokens.get(gap, 0.0) / total) if total else ABSENT,
                _two(token_ess.get(gap)),
                _two(sequence_ess.get(gap)),
                f"{percent(losses[0])} / {percent(losses[1])}" if is_measured else ABSENT,
            )
        )
    if not rows:
        return _card("Ages in numbers", "", "Not measured because the policy has not been trained yet.")
    table = _table(("versions old", "tokens", "ESS", "seq. ESS", "lost A + / -"), rows)
    return _card("Ages in numbers", table, f"Means over {recent_text(run)}.")


def _two(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}"


WORDS = (
    ("version", "A published weight update. A token's version is that of the weights that drew it."),
    ("age", "The learner's version when it trains on a token, less the token's version."),
    ("ESS", "Effective sample size: the share of n samples that are left when each counts by its importance ratio."),
    ("sequence ESS", "The same with one ratio a response, the product over its tokens."),
    (
        "nats",
        "The unit of log-probabilities and of KL; probabilities whose logarithms differ by 0.01 nats differ by 1%.",
    ),
    ("window", "The groups that may be under way at once; the staleness bound sets it."),
)


def words() -> str:
    items = "".join(f"<dt>{escape(word)}</dt><dd>{escape(meaning)}</dd>" for word, meaning in WORDS)
    return _card("Words", f"<dl>{items}</dl>", "")


def configuration(run: Run) -> str:
    """What is not as it is by default."""
    found = differences([Config(), run.config])
    rows = [(name, value, default.replace("???", ABSENT)) for name, (default, value) in found.items()]
    table = _table(("setting", "here", "by default"), rows, numbers=False)
    where = breakable(str(run.folder / "config.yaml"))
    return (
        '<section id="configuration"><h2>Configuration</h2><div class="card">'
        f'<p class="decision">Settings that are not the default; {where} has all.</p>'
        f'<div class="wide">{table}</div></div></section>'
    )


def names(runs: Sequence[tuple[str, Run]]) -> str:
    """Where each run is."""
    items = "".join(f"<dt>{escape(label)}</dt><dd>{breakable(str(run.folder))}</dd>" for label, run in runs)
    return _card("Runs", f"<dl>{items}</dl>", "A run is called by the settings that differ, or by its folder.")


def breakable(text: str) -> str:
    """Escaped; names may be broken where they are put together, which is better than anywhere."""
    return re.sub(r"([._/=])(?=[A-Za-z])", r"\1<wbr>", escape(text))


def columns(labels: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A column a run."""
    if not rows:
        return '<div class="card span-3"><p class="missing">Nothing but where they are.</p></div>'
    table = _table(("", *labels), [(name, *row) for name, row in rows.items()], numbers=False)
    return f'<div class="card span-3 wide">{table}</div>'


def _card(title: str, content: str, note: str) -> str:
    said = f'<p class="small">{escape(note)}</p>' if note else ""
    return f'<article class="card"><h3>{escape(title)}</h3><div class="wide">{content}</div>{said}</article>'


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """All but the first column are right-aligned if they are `numbers`."""
    style = ["", *([' class="n"'] * (len(titles) - 1) if numbers else [""] * (len(titles) - 1))]
    heads = "".join(f"<th{kind}>{escape(title)}</th>" for kind, title in zip(style, titles, strict=True))
    lines = (
        "".join(f"<td{kind}>{breakable(text)}</td>" for kind, text in zip(style, row, strict=True)) for row in rows
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    words = "" if numbers else ' class="words"'
    return f"<table{words}><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"

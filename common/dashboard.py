"""How a run stands, as wide as a terminal: what `train` shows while it runs, and `run.py top`."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from common.metrics import CONSOLE_ALARMS
from common.types import DropReason, RunStatus

WIDE = 120  # columns from which on the actors stand beside the numbers
LEFT = 74  # columns of the numbers then
LABEL = 11  # columns of the names of rows
MIN_ACTORS = 3  # lines for them, however low the terminal is
MAX_ALARMS = 2  # the newest; those before them have scrolled by
SILENT_S = 5.0  # of the learner or an actor: then it is marked
BARS = "▁▂▃▄▅▆▇█"

_GOOD = ("sampling", "idle")
_LABEL, _STRONG, _ODD, _BAD = "dim", "bold", "yellow", "bold red"


def dashboard(status: RunStatus, width: int, height: int, silent_s: float = 0.0) -> RenderableType:
    """`silent_s`: since the status came. Takes at most `height` lines if that is enough for MIN_ACTORS."""
    head, warnings = _head(status, width), list(_warnings(status, silent_s, width))
    if width >= WIDE:
        numbers = _numbers(status, LEFT)
        beside = Table.grid(padding=(0, 3, 0, 0))
        beside.add_column(width=LEFT)
        beside.add_row(numbers, _actors(status, height - len(warnings) - 2, width - LEFT - 3))
        return Group(head, beside, *warnings)
    numbers = _numbers(status, width)
    return Group(head, numbers, _actors(status, height - len(warnings) - numbers.row_count - 2, width), *warnings)


def sparkline(values: Sequence[float], width: int) -> str:
    """At most `width` bars, each the mean of the values that fall to it, from the smallest mean to the largest."""
    num_bars = min(width, len(values))
    if num_bars < 1:
        return ""
    edges = [round(i * len(values) / num_bars) for i in range(num_bars + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return BARS[0] * num_bars
    return "".join(BARS[min(len(BARS) - 1, int((mean - low) / (high - low) * len(BARS)))] for mean in means)


def clock(seconds: float) -> str:
    """ "4:05", or "1:04:05"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _head(status: RunStatus, width: int) -> Table:
    """The run, its stage and step, a bar over all steps, and times."""
    is_warmup = status.step < status.warmup_steps
    start, end = (0, status.warmup_steps) if is_warmup else (status.warmup_steps, status.num_steps)
    stage = "critic warm-up" if is_warmup else "step"
    where = Text.assemble((status.run, _STRONG), f"  {stage} ", (f"{status.step - start}/{end - start} ", _STRONG))
    times = clock(status.uptime_s)
    if status.step >= status.num_steps:
        times += ", last evaluation"
    elif status.remaining_s is not None:
        times += f", about {clock(max(0.0, status.remaining_s - status.step_age_s))} left"
    bar = ProgressBar(
        total=max(1, status.num_steps),
        completed=status.step,
        width=max(8, min(60, width - where.cell_len - len(times) - 2)),
    )
    row = Table.grid()
    for _ in range(3):
        row.add_column(no_wrap=True, overflow="ellipsis")
    row.add_row(where, bar, Text(f" {times}"))
    return row


def _numbers(status: RunStatus, width: int) -> Table:
    """A row a subject: its name, and what is to be said of it."""
    rows, room = Table.grid(), width - LABEL
    rows.add_column(width=LABEL, style=_LABEL)
    rows.add_column(no_wrap=True, width=room, overflow="ellipsis")
    rows.add_row("accuracy", _accuracy(status, room))
    rows.add_row("reward", _curve(status.rewards.tolist(), "+z.2f", room))
    rows.add_row("length", _curve(status.response_lengths.tolist(), ",.0f", room))
    rows.add_row("staleness", _staleness(status))
    rows.add_row("tokens/s", _speed(status))
    rows.add_row("idle", _idle(status))
    rows.add_row("next step", _groups(status))
    rows.add_row("drops", _drops(status))
    return rows


def _curve(values: Sequence[float], spec: str, room: int) -> Text:
    """Where it is, and how it got there."""
    if not values:
        return _text("-")
    now, ends = f"{values[-1]:{spec}}", f"{min(values):{spec}} to {max(values):{spec}}"
    return _text((f"{now:<8}", _STRONG), sparkline(values, room - 9 - len(ends) - 1), f" {ends}" if values[1:] else "")


def _accuracy(status: RunStatus, room: int) -> Text:
    if not len(status.accuracies):
        is_under_way = status.counters.get("in_flight_eval_groups", 0) > 0
        return _text("held-out, being measured" if is_under_way else "-")
    return _curve(status.accuracies.tolist(), ".3f", room)


def _staleness(status: RunStatus) -> Text:
    """Of the last step's tokens, against the bound."""
    metrics, bound = status.metrics, status.max_staleness
    if (mean := metrics.get("staleness/token_mean")) is None:
        return _text(f"version {status.version}, at most {bound} behind")
    largest = metrics.get("staleness/token_max", 0.0)
    ess = metrics.get("offpolicy/ess")
    return _text(
        (f"{mean:<8.2f}", _STRONG),
        "largest ",
        (f"{largest:.0f}", _BAD if largest > bound else ""),
        f" of at most {bound}, version {status.version}",
        "" if ess is None else f", ess {ess:.2f}",
    )


def _speed(status: RunStatus) -> Text:
    generated = status.metrics.get("throughput/generated_tokens_per_s")
    trained = status.metrics.get("throughput/trained_tokens_per_s")
    step_s = status.metrics.get("time/step_s")
    if generated is None or step_s is None:
        return _text((f"{status.member_tokens_per_s.sum():,.0f}", _STRONG), " sampled")
    return _text(
        (f"{generated:,.0f}", _STRONG),
        " sampled",
        *(() if trained is None else (", ", (f"{trained:,.0f}", _STRONG), " trained")),
        f", {step_s:.1f} s a step",
    )


def _idle(status: RunStatus) -> Text:
    """Shares of time in which a side has nothing to do."""
    shares = [
        f"{name} {status.metrics[key]:z.0%}"
        for name, key in (("actors", "actors/idle_fraction"), ("learner", "learner/idle_fraction"))
        if key in status.metrics
    ]
    return _text(", ".join(shares) or "-")


def _groups(status: RunStatus) -> Text:
    counters = status.counters
    evaluated = counters.get("in_flight_eval_groups", 0.0)
    return _text(
        f"{min(counters.get('buffered_groups', 0.0), status.group_target):.0f} of {status.group_target} groups are "
        f"there, {counters.get('in_flight_groups', 0.0):.0f} are being sampled",
        f", {evaluated:.0f} in evaluation" if evaluated else "",
    )


def _drops(status: RunStatus) -> Text:
    drops = [(reason, status.counters.get(f"dropped/{reason}", 0.0)) for reason in DropReason]
    return _text(", ".join(f"{reason} {count:,.0f}" for reason, count in drops if count) or "none")


def _actors(status: RunStatus, room: int, width: int) -> RenderableType:
    """A line each; where there are too many those first with which something is the matter."""
    if not status.member_names:
        return _text(("no actor takes part", _ODD))
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=max(8, width - 50))
    table.add_column(no_wrap=True)
    for _ in range(4):
        table.add_column(no_wrap=True, justify="right")
    table.add_row("actor", "state", "version", "tokens/s", "leases", "heard", style=_LABEL)
    rows = list(range(len(status.member_names)))
    if (num_shown := max(MIN_ACTORS, room - 1)) < status.num_members:
        rows = sorted(rows, key=lambda i: status.member_states[i] in _GOOD)[: max(MIN_ACTORS, num_shown) - 1]
    for i in rows:
        state, version, silent_s = status.member_states[i], status.member_versions[i], status.member_silences_s[i]
        table.add_row(
            status.member_names[i],
            _text((state, "" if state in _GOOD else _ODD)),
            "-" if version is None else f"{version}",
            f"{status.member_tokens_per_s[i]:,.0f}",
            f"{status.member_leases[i]}",
            _text((f"{silent_s:.1f} s", _ODD if silent_s > SILENT_S else "")),
        )
    if len(rows) == status.num_members:
        return table
    return Group(table, _text((f"and {status.num_members - len(rows)} more", _LABEL)))


def _warnings(status: RunStatus, silent_s: float, width: int) -> Iterator[Text]:
    """What somebody has to look at, a line each; the whole of an alarm is in RUN/events.jsonl."""
    wrong = [
        f"{label} {status.metrics[name]:{spec}}" for name, label, spec in CONSOLE_ALARMS if status.metrics.get(name)
    ]
    lines = [", ".join(wrong)] if wrong else []
    for line in (*status.alarms[-MAX_ALARMS:], *lines):
        text = _text((line, _BAD))
        text.truncate(width, overflow="ellipsis")
        yield text
    if silent_s > SILENT_S:
        yield _text((f"the learner has not answered for {clock(silent_s)}: this is how the run stood then", _ODD))


def _text(*parts: str | tuple[str, str]) -> Text:
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")

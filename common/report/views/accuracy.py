"""Does it learn, and how fast? View 15, of one run or of several."""

from collections.abc import Callable, Sequence

from common.report.marks import Line, Mark, Range, Ranges
from common.report.reading import Run
from common.report.scales import linear, percent, span
from common.report.summary import Evaluation, summarise
from common.report.svg import KINDS, Plot, kind
from common.report.views.view import Panel, View

HOUR_S, MINUTE_S = 3600.0, 60.0


def accuracy(runs: Sequence[tuple[str, Run]]) -> View:
    """`runs` are pairs of a label, "" for a single run, and a run."""
    evaluated = [(label, summarise(run).evaluations) for label, run in runs]
    return View(
        number=15,
        name="held-out accuracy" if len(runs) == 1 else "",
        panels=(_against_time(evaluated, runs), _against_tokens(evaluated, runs)),
    )


Evaluated = Sequence[tuple[str, tuple[Evaluation, ...]]]


def _against_time(evaluated: Evaluated, runs: Sequence[tuple[str, Run]]) -> Panel:
    longest = max((point.wall_s for _, points in evaluated for point in points), default=0.0)
    unit_s, unit = (HOUR_S, "hours") if longest >= 2 * HOUR_S else (MINUTE_S, "minutes")
    return _panel(
        evaluated, runs, "against training time", unit, lambda point: point.wall_s / unit_s, _change(evaluated)
    )


def _against_tokens(evaluated: Evaluated, runs: Sequence[tuple[str, Run]]) -> Panel:
    return _panel(
        evaluated, runs, "against generated tokens", "tokens", lambda point: point.generated_tokens, _marks(evaluated)
    )


def _panel(
    evaluated: Evaluated,
    runs: Sequence[tuple[str, Run]],
    title: str,
    unit: str,
    position: Callable[[Evaluation], float | None],
    reading: str,
) -> Panel:
    marks: list[Mark] = []
    places: list[float] = []
    for index, (label, points) in enumerate(evaluated):
        placed = [(x, point) for point in points if (x := position(point)) is not None]
        places += [x for x, _ in placed]
        marks += _curve(placed, label, kind(index), index >= KINDS)
    if not places:
        return Panel(title=title, missing=_why_not(runs, evaluated))
    plot = Plot(
        x=span(unit, [0.0, *places]), y=linear("accuracy, share of responses", [0.0, 1.0], unit="%"), marks=marks
    )
    return Panel(title=title, plot=plot, reading=reading)


def _curve(placed: Sequence[tuple[float, Evaluation]], label: str, style: str, is_dashed: bool) -> list[Mark]:
    """A curve, and the interval of each point that has one. Rings are of evaluations that spanned a publication."""
    spans = [
        Range(x=x, low=point.low, middle=point.accuracy, high=point.high, told=f"{point.low:.3f} to {point.high:.3f}")
        for x, point in placed
        if point.low is not None and point.high is not None
    ]
    rings = frozenset(index for index, (_, point) in enumerate(placed) if point.newest_version > point.version)
    line = Line(
        points=[(x, point.accuracy) for x, point in placed], style=style, name=label, is_dashed=is_dashed, rings=rings
    )
    return [
        *([Ranges(ranges=spans, style=f"{style} thin", name="" if label else "95% interval")] if spans else []),
        line,
    ]


def _why_not(runs: Sequence[tuple[str, Run]], evaluated: Evaluated) -> str:
    if any(points for _, points in evaluated):
        return "Not measured because no line of metrics.jsonl has tokens/generated."
    replayed = next((run.config.learner.replay for _, run in runs if run.config.learner.replay is not None), None)
    if replayed is not None:
        return f"Not measured because the run trains on the record of {replayed}, without actors."
    return "Not measured because no evaluation has ended yet."


def _change(evaluated: Evaluated) -> str:
    if len(evaluated) > 1 or not evaluated[0][1]:
        return ""
    first, last = evaluated[0][1][0], evaluated[0][1][-1]
    if first is last:
        return f"{percent(last.accuracy)} for version {last.version}."
    return (
        f"{percent(first.accuracy)} for version {first.version}, {percent(last.accuracy)} for version {last.version}."
    )


def _marks(evaluated: Evaluated) -> str:
    spans = any(point.newest_version > point.version for _, points in evaluated for point in points)
    rings = " Rings: weights were published during the evaluation." if spans else ""
    return f"A point stands where its version was published.{rings}"

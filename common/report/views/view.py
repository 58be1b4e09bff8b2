"""What a view is, and what the views share: curves over steps, values by version gap, reasons why there are none."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from common.catalogue.views import VIEWS
from common.report.marks import Limit, Line
from common.report.reading import Point, Run
from common.report.scales import Axis, linear, logarithmic, span
from common.report.svg import Plot, age

MOST_POINTS = 120  # of a curve; more steps than that are averaged
MOST_AGES = 6  # curves by age in one plot
MOST_GAP_TICKS = 60
OF_POLICY = ("offpolicy/", "staleness/", "policy/")  # metrics that say something once the policy is trained
STEP = "step (critic warm-up included)"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A plot, or the sentence why there is none. `reading` says in words what it shows now."""

    title: str = ""
    plot: Plot | None = None
    missing: str = ""
    reading: str = ""

    @property
    def sentence(self) -> str:
        """In place of the plot; "" where there is one."""
        return "" if self.plot is not None else self.missing or "Not measured because no step had a number for it."


@dataclass(frozen=True, kw_only=True)
class View:
    """`number` is that of common/catalogue/views.py, which has its name and the decision that it serves."""

    number: int
    panels: tuple[Panel, ...]
    name: str = ""  # another one than the catalogue's

    @property
    def title(self) -> str:
        name = self.name or VIEWS[self.number].name
        return f"{name[0].upper()}{name[1:]}"

    @property
    def decision(self) -> str:
        return VIEWS[self.number].decision

    @property
    def is_measured(self) -> bool:
        return any(panel.plot is not None for panel in self.panels)


def absent(run: Run, names: Sequence[str], because: str = "") -> Panel | None:
    """The panel in place of a plot that needs one of `names`; None when one was measured.

    `because` is a reason that the configuration or the run gives for their absence.
    """
    measured = run.policy_names if names[0].startswith(OF_POLICY) else run.names
    if any(name in measured for name in names):
        return None
    return Panel(missing=f"Not measured because {_reason(run, names[0], because)}.")


def _reason(run: Run, name: str, because: str) -> str:
    if not run.policy_steps and name.startswith(OF_POLICY):
        return "the policy has not been trained yet: the run is in the critic's warm-up"
    if because:
        return because
    return f"no line of metrics.jsonl has {name}: the release that wrote it did not measure that"


def binned(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS points: means over equal numbers of steps."""
    if len(points) <= MOST_POINTS:
        return list(points)
    parts = np.array_split(np.array(points), MOST_POINTS)
    return [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in parts]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """(step, value) over the run, and how a plot shows it."""

    points: Sequence[Point]
    name: str
    style: str
    is_dashed: bool = False


def over_steps(
    run: Run,
    curves: Sequence[Curve],
    y_axis: Callable[[Iterable[float]], Axis],
    limits: Sequence[Limit] = (),
    legend: str = "",
) -> Plot | None:
    """The curves that were measured, `limits` inside the axis; None when none was.

    The axis has all steps, or all of the policy's where nothing was measured before.
    """
    found = [(curve, binned(curve.points)) for curve in curves]
    shown = [value for _, points in found for _, value in points]
    y = y_axis([*shown, *(limit.y for limit in limits if limit.y is not None)])
    if y.is_log:  # 0 has no place there
        found = [(curve, [point for point in points if point[1] > 0.0]) for curve, points in found]
    lines = [
        Line(points=points, style=curve.style, name=curve.name, is_dashed=curve.is_dashed)
        for curve, points in found
        if points
    ]
    if not lines:
        return None
    steps = [step for line in lines for step, _ in line.points]
    first, last = (float(run.rows[index]["step"]) for index in (0, -1))
    begin = first if min(steps) <= run.num_warmup_steps else run.num_warmup_steps + 1.0
    is_both = run.policy_steps and first < run.num_warmup_steps and begin == first
    begins = [Limit(name="policy training begins", x=run.num_warmup_steps + 0.5, style="soft")] if is_both else []
    return Plot(x=span(STEP, [begin, *steps, last]), y=y, marks=[*lines, *limits, *begins], legend=legend)


def by_age(run: Run, pattern: str, everything: str) -> list[Curve]:
    """A curve for each version gap that has the metric `pattern`, which has {} for the gap; of many gaps some.

    `everything` is the metric over all gaps, drawn dashed.
    """
    gaps = some([gap for gap in run.gaps if pattern.format(gap) in run.names])
    curves = [
        Curve(points=run.policy_series(pattern.format(gap)), name=str(gap), style=age(index, len(gaps)))
        for index, gap in enumerate(gaps)
    ]
    return [*curves, Curve(points=run.policy_series(everything), name="all", style="ink", is_dashed=True)]


def some(gaps: Sequence[int]) -> list[int]:
    """At most MOST_AGES of them, first and last included."""
    if len(gaps) <= MOST_AGES:
        return list(gaps)
    at = np.linspace(0, len(gaps) - 1, MOST_AGES).round().astype(int)
    return [gaps[index] for index in at]


def now_by_gap(run: Run, pattern: str) -> dict[int, float]:
    """Version gap -> the mean of its metric over the last third of the policy's steps, where it was measured there."""
    found = {gap: run.now(pattern.format(gap)) for gap in run.gaps}
    return {gap: value for gap, value in found.items() if value is not None}


def recent_text(run: Run) -> str:
    """Which steps `now` is about."""
    if not run.recent:
        return "no policy step"
    first, last = run.recent[0]["step"], run.recent[-1]["step"]
    return f"steps {first} to {last}" if first != last else f"step {first}"


def gap_axis(run: Run) -> Axis:
    """A place for every version gap from 0 to the oldest that has metrics, and to the bound if that is near."""
    oldest = max(run.gaps, default=0)
    bound = run.config.staleness.max_staleness
    top = bound if oldest <= bound <= oldest + 3 else oldest
    ages = range(0, top + 1, 1 + top // MOST_GAP_TICKS)
    return Axis(label="age: versions old", low=-0.6, high=top + 0.6, ticks=tuple((age, str(age)) for age in ages))


def bound_at_gap(run: Run) -> list[Limit]:
    """The staleness bound on `gap_axis`."""
    bound = run.config.staleness.max_staleness
    return [Limit(name=bound_name(run), x=bound + 0.5)] if bound <= gap_axis(run).high else []


def bound_name(run: Run) -> str:
    return f"bound: max_staleness={run.config.staleness.max_staleness}"


def as_share(label: str) -> Callable[[Iterable[float]], Axis]:
    """An axis of percent that holds 0."""
    return lambda shown: linear(label, [0.0, *shown], unit="%")


def from_zero(label: str) -> Callable[[Iterable[float]], Axis]:
    return lambda shown: linear(label, [0.0, *shown])


def unit_interval(label: str) -> Callable[[Iterable[float]], Axis]:
    """0 to 1, whatever is shown."""
    return lambda shown: linear(label, [0.0, 1.0])


def as_powers(label: str) -> Callable[[Iterable[float]], Axis]:
    return lambda shown: logarithmic(label, shown)


def ends(found: dict[int, float]) -> Sequence[tuple[int, float]]:
    """The youngest and the oldest."""
    items = sorted(found.items())
    return items if len(items) <= 2 else (items[0], items[-1])

"""How old are the tokens that are trained, and what is a version worth? Views 1, 2, 9 and 10."""

import numpy as np

from common.report.marks import Bar, Bars, Limit
from common.report.reading import Row, Run, histogram, number
from common.report.scales import Axis, linear, percent, short
from common.report.svg import Plot
from common.report.views.view import (
    STEP,
    Curve,
    Panel,
    View,
    absent,
    as_powers,
    bound_name,
    from_zero,
    over_steps,
)

SHARES = (0.01, 0.1, 0.25, 0.5, 1.0)  # upper ends of the heat map's colours
SHARE_NAMES = ("1%", "10%", "25%", "50%", "100%")
MOST_COLUMNS = 90
MOST_ROWS = 24
OVERLAP = 0.1  # steps; or hairlines of the ground show between two cells
LOW_ESS = 0.5  # below it more than half of a batch's weight is lost


def age_map(run: Run) -> View:
    return View(
        number=1,
        panels=(_age_map(run),),
    )


def _age_map(run: Run) -> Panel:
    if (panel := absent(run, ["staleness/hist"])) is not None:
        return panel
    rows = [row for row in run.rows if sum(histogram([row]).values())]
    if not rows:
        return Panel(missing="Not measured because no step has trained on a token.")
    total = histogram(rows)
    bound = run.config.staleness.max_staleness
    top = max(*total, min(bound, max(total) + 3))
    height = max(1, -(-(top + 1) // MOST_ROWS))  # gaps in one row of the map
    bars: dict[int, list[Bar]] = {index: [] for index in range(len(SHARES))}
    for column in np.array_split(np.arange(len(rows)), min(len(rows), MOST_COLUMNS)):
        part = [rows[index] for index in column]
        for colour, bar in _cells(part, height):
            bars[colour].append(bar)
    marks = [Bars(bars=bars[index], style=f"h{index}", name=SHARE_NAMES[index]) for index in bars]
    limits = [Limit(name=bound_name(run), y=bound + 0.5)] if bound <= top else []
    steps = [float(row["step"]) for row in rows]
    ticks = linear("", steps, whole=True).ticks
    x = Axis(
        label=STEP,
        low=steps[0] - 0.5,
        high=steps[-1] + 0.5,
        ticks=tuple(tick for tick in ticks if steps[0] <= tick[0] <= steps[-1]),
    )
    stride = max(1, (top + 1) // 6)
    y = Axis(
        label="age: versions old; colour: share of the step's tokens",
        low=-0.5,
        high=top + 0.8,
        ticks=tuple((gap, str(gap)) for gap in range(0, top + 1, stride)),
    )
    return Panel(
        plot=Plot(x=x, y=y, marks=[*marks, *limits], legend="up to"),
        reading=_age_reading(run, total),
    )


def _cells(part: list[Row], height: int) -> list[tuple[int, Bar]]:
    """(number of its colour, cell) for each age that the steps of one column of the map have."""
    found = histogram(part)
    total = sum(found.values())
    first, last = int(part[0]["step"]), int(part[-1]["step"])
    rows: dict[int, float] = {}
    for gap, count in found.items():
        rows[gap // height] = rows.get(gap // height, 0.0) + count / total if total else 0.0
    cells = []
    for row, share in rows.items():
        if share > 0:
            colour = next(index for index, most in enumerate(SHARES) if share <= most + 1e-9)
            ages = str(row) if height == 1 else f"{row * height} to {(row + 1) * height - 1}"
            steps = f"step {first}" if first == last else f"steps {first} to {last}"
            told = f"{steps}: {percent(share, 0.001)} of the tokens are {ages} versions old"
            low, high = row * height - 0.5, (row + 1) * height - 0.5
            cells.append((colour, Bar(x0=first - 0.5, x1=last + 0.5 + OVERLAP, y0=low, y1=high, told=told)))
    return cells


def _age_reading(run: Run, total: dict[int, float]) -> str:
    tokens = sum(total.values())
    mean = sum(gap * count for gap, count in total.items()) / tokens if tokens else 0.0
    bound = run.config.staleness.max_staleness
    at_bound = sum(count for gap, count in total.items() if gap >= bound) / tokens if tokens else 0.0
    return f"Mean age {mean:.2f} versions; {percent(at_bound, 0.01)} of the tokens are {bound} or more versions old."


def age_budget(run: Run) -> View:
    return View(
        number=2,
        panels=(_versions(run), _updates(run)),
    )


def _versions(run: Run) -> Panel:
    title = "versions, mean over responses"
    if (panel := absent(run, ["staleness/flight_mean", "staleness/queue_mean"])) is not None:
        return Panel(title=title, missing=panel.missing)
    curves = (
        Curve(points=run.policy_series("staleness/queue_mean"), name="queue: waited after sampling", style="c0"),
        Curve(
            points=run.policy_series("staleness/flight_mean"), name="flight: while sampling", style="c1", is_dashed=True
        ),
    )
    limits = [Limit(name=bound_name(run), y=float(run.config.staleness.max_staleness))]
    return Panel(
        title=title,
        plot=over_steps(run, curves, from_zero("versions"), limits),
        reading=_both(run, "Queue", "staleness/queue_mean", "flight", "staleness/flight_mean", "versions"),
    )


def _updates(run: Run) -> Panel:
    title = "updates already taken on the same batch"
    if (panel := absent(run, ["staleness/updates_mean"])) is not None:
        return Panel(title=title, missing=panel.missing)
    curves = [Curve(points=run.policy_series("staleness/updates_mean"), name="", style="c2")]
    now = run.now("staleness/updates_mean")
    batches = run.config.learner.mini_batches
    return Panel(
        title=title,
        plot=over_steps(run, curves, from_zero("optimizer steps, mean over tokens")),
        reading=f"{short(now)} steps with learner.mini_batches={batches}." if now is not None else "",
    )


def nats(run: Run) -> View:
    return View(
        number=9,
        panels=(_nats(run),),
    )


def _nats(run: Run) -> Panel:
    names = ["staleness/nats_mean", "policy/kl_version"]
    if (panel := absent(run, names)) is not None:
        return panel
    curves = (
        Curve(points=run.policy_series("staleness/nats_max"), name="oldest token", style="c1", is_dashed=True),
        Curve(points=run.policy_series("staleness/nats_mean"), name="mean token", style="c0"),
        Curve(points=run.policy_series("policy/kl_version"), name="one version", style="c2"),
    )
    cost = run.now("policy/kl_version")
    return Panel(
        plot=over_steps(run, curves, as_powers("KL divergence, nats a token")),
        reading=f"One version moves the policy by {short(cost)} nats a token." if cost is not None else "",
    )


def lr_gauge(run: Run) -> View:
    return View(
        number=10,
        panels=(_lr_gauge(run),),
    )


def _lr_gauge(run: Run) -> Panel:
    name = "staleness/lr_gauge"
    if (panel := absent(run, [name])) is not None:
        return panel
    boundary = gauge_boundary(run)
    limits = [] if boundary is None else [Limit(name=f"lowest with a token ESS below {LOW_ESS:g}", y=boundary)]
    largest = max(value for _, value in run.policy_series(name))
    said = (
        f"Up to {short(largest)} the token ESS stayed above {LOW_ESS:g}: no boundary was met."
        if boundary is None
        else f"The token ESS fell below {LOW_ESS:g} at {short(boundary)}: stay under it."
    )
    curves = [Curve(points=run.policy_series(name), name="", style="c0")]
    return Panel(plot=over_steps(run, curves, from_zero("oldest age x learning rate"), limits), reading=said)


def gauge_boundary(run: Run) -> float | None:
    """The smallest gauge of a step whose oldest tokens kept less than LOW_ESS; None when none did."""
    found = []
    for row in run.policy_steps:
        gauge = number(row, "staleness/lr_gauge")
        kept = [ess for gap in run.gaps if (ess := number(row, f"offpolicy/gap_{gap}/ess")) is not None]
        if gauge is not None and kept and min(kept) < LOW_ESS:
            found.append(gauge)
    return min(found, default=None)


def _both(run: Run, one: str, first: str, other: str, second: str, unit: str) -> str:
    a, b = run.now(first), run.now(second)
    parts = [f"{name} {short(value)}" for name, value in ((one, a), (other, b)) if value is not None]
    return f"{', '.join(parts)} {unit}." if parts else ""

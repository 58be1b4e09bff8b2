"""What the tables and drawings of several benchmarks have in common."""

import statistics
from collections.abc import Sequence

from benchmarks.picture import picture
from common.report.marks import Line, Mark
from common.report.scales import Axis, span
from common.report.svg import KINDS, Plot, draw, kind


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def mean_sd(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation; one value as it is, "-" for none."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def curves(title: str, x: str, y: Axis, lines: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> str:
    """An SVG of one curve a name; from the eighth on they are dashed."""
    marks: list[Mark] = [
        Line(points=points, style=kind(number), name=name, is_dashed=number >= KINDS)
        for number, (name, points) in enumerate(lines)
    ]
    places = [place for _, points in lines for place, _ in points]
    return picture(draw(Plot(x=span(x, [0.0, *places]), y=y, marks=marks), title))

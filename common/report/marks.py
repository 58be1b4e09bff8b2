"""What is drawn between the axes of a plot: curves, areas, bars, spans, limits. Each draws itself and its key."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Protocol

from common.report.scales import Axis

KEY = 16.0  # width of a legend's key
FEW_POINTS = 12  # of a curve that has no more, the points are drawn too


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The rectangle between the axes, in the drawing's units, y downwards."""

    left: float
    right: float
    top: float
    bottom: float
    x_axis: Axis
    y_axis: Axis

    def x(self, value: float) -> float:
        return self.left + self.x_axis.share(value) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - self.y_axis.share(value) * (self.bottom - self.top)


class Mark(Protocol):
    """`name` is the entry in the legend, "" for none. `key` is drawn with its left end at x, its middle at y."""

    @property
    def name(self) -> str: ...

    def draw(self, frame: Frame) -> str: ...

    def key(self, x: float, y: float) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve through `points`. `rings` are the numbers of points that are hollow."""

    points: Sequence[tuple[float, float]]
    style: str
    name: str = ""
    is_dashed: bool = False
    rings: frozenset[int] = frozenset()

    def draw(self, frame: Frame) -> str:
        at = [(frame.x(x), frame.y(y)) for x, y in self.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        drawn = f'<polyline class="{self._line}" points="{path}"/>' if len(at) > 1 else ""
        if len(at) > FEW_POINTS:
            return drawn
        return drawn + "".join(
            _dot(x, y, f"{'ring' if index in self.rings else 'dot'} {self.style}") for index, (x, y) in enumerate(at)
        )

    def key(self, x: float, y: float) -> str:
        return _straight(self._line, x, y, x + KEY, y)

    @property
    def _line(self) -> str:
        return f"line {self.style}{' dashed' if self.is_dashed else ''}"


@dataclass(frozen=True, kw_only=True)
class Band:
    """The area between two curves: (x, low, high)."""

    points: Sequence[tuple[float, float, float]]
    style: str
    name: str = ""

    def draw(self, frame: Frame) -> str:
        above = [f"{frame.x(x):.1f},{frame.y(high):.1f}" for x, _, high in self.points]
        below = [f"{frame.x(x):.1f},{frame.y(low):.1f}" for x, low, _ in reversed(self.points)]
        return f'<polygon class="fill {self.style}" points="{" ".join(above + below)}"/>'

    def key(self, x: float, y: float) -> str:
        return f'<rect class="fill {self.style}" x="{x:.1f}" y="{y - 5:.1f}" width="{KEY}" height="10"/>'


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A rectangle in the units of the axes; `told` is what a pointer over it is told."""

    x0: float
    x1: float
    y0: float
    y1: float
    told: str = ""


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Rectangles of one colour: bars, the parts of stacks, or cells of a heat map."""

    bars: Sequence[Bar]
    style: str
    name: str = ""

    def draw(self, frame: Frame) -> str:
        return "".join(self._draw(frame, bar) for bar in self.bars)

    def _draw(self, frame: Frame, bar: Bar) -> str:
        left, right = sorted((frame.x(bar.x0), frame.x(bar.x1)))
        top, bottom = sorted((frame.y(bar.y0), frame.y(bar.y1)))
        size = f'width="{max(right - left, 0.8):.1f}" height="{max(bottom - top, 0.8):.1f}"'
        return f'<rect class="fill {self.style}" x="{left:.1f}" y="{top:.1f}" {size}>{_told(bar.told)}</rect>'

    def key(self, x: float, y: float) -> str:
        return f'<rect class="fill {self.style}" x="{x + 3:.1f}" y="{y - 5:.1f}" width="10" height="10"/>'


@dataclass(frozen=True, kw_only=True)
class Range:
    """A span from `low` to `high` at `x`, with a dot at `middle`."""

    x: float
    low: float
    middle: float
    high: float
    told: str = ""


@dataclass(frozen=True, kw_only=True)
class Ranges:
    ranges: Sequence[Range]
    style: str
    name: str = ""

    def draw(self, frame: Frame) -> str:
        return "".join(
            f"<g>{_told(part.told)}"
            + _straight(f"range {self.style}", frame.x(part.x), frame.y(part.low), frame.x(part.x), frame.y(part.high))
            + f"{_dot(frame.x(part.x), frame.y(part.middle), f'dot {self.style}')}</g>"
            for part in self.ranges
        )

    def key(self, x: float, y: float) -> str:
        middle = x + KEY / 2
        return _straight(f"range {self.style}", middle, y - 6, middle, y + 6) + _dot(middle, y, f"dot {self.style}")


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A dashed straight line across the plot, at a value of one axis."""

    name: str
    x: float | None = None
    y: float | None = None
    style: str = "ink"

    def draw(self, frame: Frame) -> str:
        if self.x is not None:
            return _straight(self._line, frame.x(self.x), frame.top, frame.x(self.x), frame.bottom)
        assert self.y is not None, f"{self.name} is a limit of neither axis"
        return _straight(self._line, frame.left, frame.y(self.y), frame.right, frame.y(self.y))

    def key(self, x: float, y: float) -> str:
        if self.x is not None:
            return _straight(self._line, x + KEY / 2, y - 7, x + KEY / 2, y + 7)
        return _straight(self._line, x, y, x + KEY, y)

    @property
    def _line(self) -> str:
        return f"limit {self.style}"


def _straight(style: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _dot(x: float, y: float, style: str) -> str:
    return f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="2.8"/>'


def _told(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""

"""A plot as SVG: axes, grid, legend, marks. Text only: no script, no font, nothing to fetch.

Colours are classes (c0 to c6 for kinds, a0 to a5 for ages from young to old, h0 to h4 for shares, ink, soft) that the
page's style sheet gives a value for a light and for a dark ground. A drawing is as wide as a phone, so that its text is
read there at the size in which it was set; on wide screens several stand side by side.

Where text stands is decided here, from the widths of a wide face, so that what a browser draws is narrower.
`Drawing.boxes` are the places of all texts: a test holds every plot to it that none covers another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from common.report.marks import KEY, Frame, Mark
from common.report.scales import Axis

WIDTH = 360.0
HEIGHT = 150.0  # between the axes
FONT = 12.0  # size of text, as the page sets it
LINE = 17.0
SPACE = 6.0  # between a tick's label and its axis
RIGHT = 14.0
KEY_SPACE = 12.0  # between two entries of a legend
KINDS = 7  # colours of kinds
AGES = 6  # colours of ages

# Widths of DejaVu Sans, the widest of the faces that pages fall back to, in 1/100 of the size, rounded up to 5.
_WIDTHS = {
    sign: width / 100
    for width, signs in (
        (30, "'IJijl"),
        (35, " ,./:;\\|"),
        (40, "()-[]ft"),
        (45, "!r"),
        (50, '"*_`'),
        (55, "?csz"),
        (60, "FLkvxy"),
        (65, "$0123456789EPSTYabdeghnopqu{}"),
        (70, "ABCKRVXZ"),
        (75, "NU"),
        (80, "&DGHOQ"),
        (85, "#+<=>^w~"),
        (90, "M"),
    )
    for sign in signs
}


@dataclass(frozen=True)
class Box:
    """The place of one text, in the drawing's units."""

    left: float
    top: float
    right: float
    bottom: float
    text: str

    def covers(self, other: "Box") -> bool:
        is_beside = self.right <= other.left or other.right <= self.left
        return not is_beside and self.top < other.bottom and other.top < self.bottom


@dataclass(frozen=True, kw_only=True)
class Plot:
    """What is drawn: marks in the order in which they cover each other, between two axes."""

    x: Axis
    y: Axis
    marks: Sequence[Mark]
    legend: str = ""  # what the entries of the legend have in common, before them
    height: float = HEIGHT


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """An SVG element, and where its texts stand."""

    svg: str
    width: float
    height: float
    boxes: tuple[Box, ...]


def draw(plot: Plot, title: str) -> Drawing:
    """`title` is for who cannot see it."""
    texts = _Texts()
    keys, top = _legend(plot, texts)
    texts.put(0.0, top + FONT, plot.y.label, style="label")
    left = max(text_width(text) for _, text in plot.y.ticks) + SPACE
    frame = Frame(
        left=left,
        right=WIDTH - RIGHT,
        top=top + LINE + 6,
        bottom=top + LINE + 6 + plot.height,
        x_axis=plot.x,
        y_axis=plot.y,
    )
    grid = _y_axis(frame, texts) + _x_axis(frame, texts)
    height = frame.bottom + 2 * LINE + SPACE
    texts.put(WIDTH - RIGHT, height - 5, plot.x.label, anchor="end", style="label")
    marks = "".join(mark.draw(frame) for mark in plot.marks)
    svg = (
        f'<svg class="plot" viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escape(title)}">'
        f'<g class="grid">{grid}</g><g class="marks">{marks}</g>{keys}{texts.svg()}</svg>'
    )
    return Drawing(svg=svg, width=WIDTH, height=height, boxes=tuple(texts.boxes))


def text_width(text: str) -> float:
    """An upper estimate, at size FONT. A sign that is not in the table counts as the widest."""
    return sum(_WIDTHS.get(sign, 1.0) for sign in text) * FONT


def shortened(text: str, width: float) -> str:
    """`text`, or its beginning and an ellipsis if it is wider than `width`."""
    if text_width(text) <= width:
        return text
    while text and text_width(f"{text}...") > width:
        text = text[:-1]
    return f"{text.rstrip()}..."


class _Texts:
    """The texts of a drawing, with their places."""

    def __init__(self) -> None:
        self.boxes: list[Box] = []
        self._parts: list[str] = []

    def put(self, x: float, y: float, text: str, anchor: str = "start", style: str = "tick") -> None:
        """`y` is the line on which the text stands."""
        width = text_width(text)
        left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        self.boxes.append(Box(left, y - 0.8 * FONT, left + width, y + 0.25 * FONT, text))
        at = f'x="{x:.1f}" y="{y:.1f}"'
        self._parts.append(f'<text class="{style}" text-anchor="{anchor}" {at}>{escape(text)}</text>')

    def svg(self) -> str:
        return "".join(self._parts)


def _legend_places(plot: Plot) -> list[tuple[float, float, Mark, str]]:
    """(x, y of its text, mark, text) of each entry, in as many lines as they need."""
    x, y = (text_width(plot.legend) + KEY_SPACE if plot.legend else 0.0), FONT
    places = []
    for name, mark in {mark.name: mark for mark in plot.marks if mark.name}.items():
        text = shortened(name, WIDTH - KEY - SPACE)
        width = KEY + SPACE + text_width(text)
        if x > 0 and x + width > WIDTH:
            x, y = 0.0, y + LINE
        places.append((x, y, mark, text))
        x += width + KEY_SPACE
    return places


def _legend(plot: Plot, texts: _Texts) -> tuple[str, float]:
    """The keys of all marks with a name, whose texts go to `texts`; and how high they are together."""
    places = _legend_places(plot)
    if not places:
        return "", 0.0
    if plot.legend:
        texts.put(0.0, FONT, plot.legend, style="legend")
    for x, y, _, text in places:
        texts.put(x + KEY + SPACE, y, text, style="legend")
    keys = "".join(mark.key(x, y - 0.35 * FONT) for x, y, mark, _ in places)
    return keys, places[-1][1] + LINE - 7


def _y_axis(frame: Frame, texts: _Texts) -> str:
    lines = []
    for value, text in frame.y_axis.ticks:
        y = frame.y(value)
        lines.append(f'<line x1="{frame.left:.1f}" x2="{frame.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        texts.put(frame.left - SPACE, y + 0.35 * FONT, text, anchor="end")
    return "".join(lines)


def _x_axis(frame: Frame, texts: _Texts) -> str:
    """As many of the ticks as have room; a label at an end stays inside the drawing."""
    ticks = frame.x_axis.ticks
    stride = next(stride for stride in range(1, len(ticks) + 2) if _has_room(frame, ticks[::stride]))
    lines = []
    for value, text in ticks[::stride]:
        x = frame.x(value)
        lines.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{frame.bottom:.1f}" y2="{frame.bottom + 4:.1f}"/>')
        texts.put(_centre(x, text), frame.bottom + LINE, text, anchor="middle")
    return "".join(lines)


def _centre(x: float, text: str) -> float:
    return min(max(x, text_width(text) / 2), WIDTH - text_width(text) / 2)


def _has_room(frame: Frame, ticks: Sequence[tuple[float, str]]) -> bool:
    ends = [
        (_centre(frame.x(value), text) - text_width(text) / 2, _centre(frame.x(value), text) + text_width(text) / 2)
        for value, text in ticks
    ]
    return all(right + SPACE <= left for (_, right), (left, _) in pairwise(ends))


def kind(number: int) -> str:
    """The class of the colour of the `number`th kind."""
    return f"c{number % KINDS}"


def age(number: int, of: int) -> str:
    """The class of the colour of the `number`th of `of` ages, the youngest first, spread over what there is."""
    return f"a{round(number * (AGES - 1) / max(of - 1, 1))}"

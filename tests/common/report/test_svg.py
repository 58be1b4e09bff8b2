"""Plots: axes that hold what is shown, and texts none of which covers another, whatever the numbers and names are."""

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.report.marks import Bar, Bars, Limit, Line, Mark, Range, Ranges
from common.report.scales import categories, linear, logarithmic, percent, short, span
from common.report.svg import WIDTH, Drawing, Plot, age, draw, shortened, text_width

NUMBERS = st.floats(-1e12, 1e12, allow_nan=False).map(lambda value: float(f"{value:.6g}"))
POSITIVE = st.floats(1e-12, 1e12)


def misplaced(drawing: Drawing) -> list[str]:
    """Texts that cover each other or leave the drawing."""
    found = [
        f"{box.text!r} is outside"
        for box in drawing.boxes
        if box.left < -0.5 or box.right > drawing.width + 0.5 or box.top < 0 or box.bottom > drawing.height
    ]
    for index, box in enumerate(drawing.boxes):
        found += [f"{box.text!r} covers {other.text!r}" for other in drawing.boxes[:index] if box.covers(other)]
    return found


@given(st.lists(NUMBERS, min_size=1, max_size=5), st.sampled_from(["", "%"]), st.booleans())
def test_a_linear_axis_holds_what_is_shown_and_has_few_ticks_that_differ(
    values: list[float], unit: str, whole: bool
) -> None:
    axis = linear("x", values, unit, whole)
    slack = 1e-9 * max(abs(axis.low), abs(axis.high))
    assert axis.low - slack <= min(values) and max(values) <= axis.high + slack
    texts = [text for _, text in axis.ticks]
    assert 2 <= len(texts) <= 8 and len(set(texts)) == len(texts)


def test_numbers_that_differ_by_rounding_only_are_one_number() -> None:
    assert linear("x", [0.5, 0.5 + 1e-15]) == linear("x", [0.5])
    assert linear("x", [5e-324]) == linear("x", [0.0])


@given(st.lists(POSITIVE, min_size=1, max_size=5))
def test_a_logarithmic_axis_holds_what_is_shown_or_says_that_it_is_cut(values: list[float]) -> None:
    axis = logarithmic("x", values)
    assert axis.low <= min(values) * 1.01 or axis.ticks[0][1].startswith("≤ ")
    assert max(values) <= axis.high * 1.01 and axis.high / axis.low < 1e9
    assert 2 <= len(axis.ticks) <= 8 and len({text for _, text in axis.ticks}) == len(axis.ticks)


def test_what_is_not_above_zero_is_at_the_lower_end_of_a_logarithmic_axis() -> None:
    axis = logarithmic("x", [0.0, -1.0, 0.01, 10.0])
    assert (axis.low, axis.high, axis.share(0.0), axis.share(-1.0)) == (0.01, 10.0, 0.0, 0.0)
    assert axis.share(math.sqrt(0.1)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.00102, "0.00102"), (5e-7, "5e-7"), (0.98372, "0.984"), (12.34, "12.3"), (1120.4, "1,120"),
     (9999, "9,999"), (483840, "484k"), (2.5e6, "2.5M"), (3.2e9, "3.2G"), (-1500.0, "-1,500")],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_percent_has_the_decimals_that_the_step_needs() -> None:
    assert [percent(0.5), percent(0.123, 0.001), percent(0.0), percent(0.002, 0.005)] == ["50%", "12.3%", "0%", "0.2%"]


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=60)


@given(
    st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=30),
    st.lists(NAMES, min_size=1, max_size=8, unique=True),
    st.sampled_from(["", "age"]),
)
def test_no_text_of_a_plot_covers_another_or_leaves_the_drawing(
    points: list[tuple[float, float]], names: list[str], legend: str
) -> None:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    marks: list[Mark] = [Line(points=points, style="c0", name=name) for name in names]
    plot = Plot(
        x=span("step", xs), y=linear("value", ys), marks=[*marks, Limit(name="a limit", y=ys[0])], legend=legend
    )
    drawing = draw(plot, "a plot")
    assert misplaced(drawing) == []
    ElementTree.fromstring(drawing.svg)
    assert "nan" not in drawing.svg


@given(st.integers(1, 200))
def test_labels_of_many_categories_are_thinned(count: int) -> None:
    axis = categories("age: versions old", [str(number) for number in range(count)])
    bars = Bars(bars=[Bar(x0=index - 0.3, x1=index + 0.3, y0=0, y1=1) for index in range(count)], style="c0")
    assert misplaced(draw(Plot(x=axis, y=linear("share", [0, 1], "%"), marks=[bars]), "bars")) == []


def test_every_mark_is_drawn_inside_the_axes() -> None:
    x, y = linear("x", [0, 10]), linear("y", [0, 100])
    marks = [
        Line(points=[(0, -50), (10, 500)], style="c0", name="line"),
        Bars(bars=[Bar(x0=2, x1=4, y0=0, y1=50, told="two <to> four")], style="c1", name="bar"),
        Ranges(ranges=[Range(x=5, low=10, middle=20, high=90)], style="c2", name="range"),
        Limit(name="limit", x=8),
    ]
    root = ElementTree.fromstring(draw(Plot(x=x, y=y, marks=marks), "marks").svg)
    line = next(node for node in root.iter() if node.tag.endswith("polyline")).attrib["points"]
    assert line.split() == ["29.4,195.0", "346.0,45.0"], "what is outside the axis ends at its ends"
    rectangle = next(node for node in root.iter() if node.tag.endswith("rect"))
    assert float(rectangle.attrib["height"]) == 75.0 and rectangle[0].text == "two <to> four"


def test_a_single_point_is_a_dot_and_an_evaluation_that_spanned_versions_a_ring() -> None:
    plot = Plot(
        x=linear("x", [0, 1]),
        y=linear("y", [0, 1]),
        marks=[Line(points=[(0, 0), (1, 1)], style="c0", rings=frozenset([1]))],
    )
    assert draw(plot, "").svg.count('class="dot c0"') == draw(plot, "").svg.count('class="ring c0"') == 1
    one = Plot(x=plot.x, y=plot.y, marks=[Line(points=[(0, 0)], style="c0")])
    assert "<polyline" not in draw(one, "").svg and 'class="dot c0"' in draw(one, "").svg


def test_a_name_that_is_too_wide_is_cut_off() -> None:
    text = shortened("m" * 100, WIDTH)
    assert text.endswith("...") and text_width(text) <= WIDTH
    assert shortened("short", WIDTH) == "short"


def test_ages_are_spread_over_the_colours() -> None:
    assert [age(number, 3) for number in range(3)] == ["a0", "a2", "a5"]
    assert [age(number, 6) for number in range(6)] == [f"a{number}" for number in range(6)]
    assert age(0, 1) == "a0"

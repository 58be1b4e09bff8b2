"""What a terminal is told of a sample: its words, shades of its numbers, and nothing that the model has written as a
command."""

import re
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from common.samples import Sample
from common.transcript import NOT_FINITE, Color, legend, numbers, response, scale, shade, transcript
from tests.common.test_samples import HOSTILE, make_sample

SGR = re.compile(r"\x1b\[[0-9;]*m")  # sets colours and nothing else


def printed(sample: Sample, color: Color = Color.ADVANTAGE, *, is_terminal: bool = True) -> str:
    colors = "truecolor" if is_terminal else None
    console = Console(file=StringIO(), force_terminal=is_terminal, color_system=colors, width=60)
    console.print(transcript(sample, "1 of 1", color, scale([sample], color)))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("field", ["prompt", "reference", "actor", "prompt_uid"])
def test_no_text_of_others_reaches_the_terminal_raw(field: str) -> None:
    for sample in (make_sample((HOSTILE, "b"), **{field: HOSTILE}), make_sample(tuple(HOSTILE))):
        text = SGR.sub("", printed(sample))
        assert all(c == "\n" or c.isprintable() for c in text)
        assert "\\x1b[2J" in text.replace("\n", "") and "[bold red]x[/]" in text.replace("\n", "")


@given(st.lists(st.text(min_size=1), min_size=1), st.text())
def test_whatever_a_model_writes_only_shades_are_sent(tokens: list[str], prompt: str) -> None:
    left = SGR.sub("", printed(make_sample(tuple(tokens), prompt=prompt)))
    assert all(c == "\n" or c.isprintable() for c in left)


def test_where_there_is_no_terminal_there_are_no_colours() -> None:
    text = printed(make_sample(("one", " two")), is_terminal=False)
    assert "\x1b" not in text and text.endswith("one two\n")


def test_every_token_has_the_shade_of_its_number() -> None:
    sample = make_sample(("ab", "c", "\n"), values=(-2.0, 0.0, 1.0))
    ends = (-2.0, 2.0)
    text = response(sample, Color.ADVANTAGE, ends)
    assert text.plain == "abc↵\n"
    assert [(span.start, span.end, span.style) for span in text.spans] == [
        (0, 2, shade(Color.ADVANTAGE, -2.0, ends)),
        (2, 3, shade(Color.ADVANTAGE, 0.0, ends)),
        (3, 5, shade(Color.ADVANTAGE, 1.0, ends)),
    ]


def test_one_advantage_in_twenty_is_beyond_the_darkest_shade() -> None:
    sample = make_sample(("a",) * 20, values=(-1.0,) * 9 + (2.0,) * 10 + (90.0,))
    assert scale([sample], Color.ADVANTAGE) == (-2.0, 2.0)
    assert shade(Color.ADVANTAGE, 90.0, (-2.0, 2.0)) == shade(Color.ADVANTAGE, 2.0, (-2.0, 2.0))
    assert scale([make_sample(("a",) * 40, values=(0.0,) * 39 + (-1.0,))], Color.ADVANTAGE) == (-1.0, 1.0)


def test_advantages_are_red_or_blue_by_their_sign_and_grey_at_zero() -> None:
    worst, none, best = (shade(Color.ADVANTAGE, x, (-3.0, 3.0)).bgcolor.triplet for x in (-3.0, 0.0, 3.0))  # type: ignore[union-attr]
    assert worst is not None and none is not None and best is not None
    assert worst.red > 2 * worst.blue and best.blue > 2 * best.red
    assert none.red == none.green == none.blue


@pytest.mark.parametrize("color", Color)
def test_equal_numbers_have_a_shade_too(color: Color) -> None:
    sample = make_sample(("a", "b"), values=(0.0, 0.0), versions=(5, 5))
    assert len(response(sample, color, scale([sample], color)).spans) == 2


def test_versions_are_shaded_by_age_and_values_from_lowest_to_highest() -> None:
    sample = make_sample(("a", "b"), values=(0.25, -0.5), versions=(3, 5))
    assert list(numbers(sample, Color.VERSION)) == [2, 0]
    assert scale([sample], Color.VERSION) == (0, 2)
    assert scale([sample], Color.VALUE) == (-0.5, 0.25)


def test_numbers_that_are_not_finite_stand_out_and_spoil_no_scale() -> None:
    sample = make_sample(("a", "b", "c"), values=(float("nan"), 2.0, -float("inf")))
    assert scale([sample], Color.ADVANTAGE) == (-2.0, 2.0)
    styles = [span.style for span in response(sample, Color.ADVANTAGE, (-2.0, 2.0)).spans]
    assert styles == [NOT_FINITE, shade(Color.ADVANTAGE, 2.0, (-2.0, 2.0)), NOT_FINITE]
    assert "nan" in printed(sample)


@pytest.mark.parametrize(("oldest", "labels"), [(5, "0 old"), (4, "0 old 1 old"), (1, "0 old 1 old 2 old 3 old 4 old")])
def test_the_legend_has_whole_versions(oldest: int, labels: str) -> None:
    sample = make_sample(("a", "b"), versions=(oldest, 5))
    assert legend(Color.VERSION, scale([sample], Color.VERSION)).plain.split() == ["version", *labels.split()]


def test_what_was_not_computed_is_said_and_not_shaded() -> None:
    sample = make_sample(values=(), old_logprobs=())
    text = printed(sample, is_terminal=False)
    assert "not shaded by advantage: there are none in the critic's warm-up" in " ".join(text.split())
    assert response(sample, Color.ADVANTAGE, (-1.0, 1.0)).spans == []


def test_the_header_says_what_became_of_the_response() -> None:
    sample = make_sample(("a", "b"), versions=(3, 4), old_logprobs=(-0.5, -0.25), behavior_logprobs=(-0.5, -0.75))
    words = " ".join(printed(sample, is_terminal=False).split())
    assert "correct reward +1.00, 2 tokens, ended by stop" in words
    assert "by actor-0 with versions 3 to 4, trained at 5" in words
    assert "advantages +0.00 to +1.00, values +0.00 to +1.00" in words
    assert "engine 0.2500 nats a token from the learner" in words

"""Colours of the page: they stand out from both grounds, ages are ordered in lightness, every class has its colour."""

import re

import pytest

from common.report.style import STYLE
from common.report.svg import AGES, KINDS

LIGHT, DARK = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in STYLE.split("@media", 2)[:2])


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, WCAG 2.1."""
    parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_marks_stand_out_by_3_to_1_and_texts_by_4_5_to_1(theme: dict[str, str]) -> None:
    marks = [*(f"c{number}" for number in range(KINDS)), *(f"a{number}" for number in range(AGES)), "h3", "h4"]
    assert {
        name: contrast(theme[name], theme["card"]) for name in marks if contrast(theme[name], theme["card"]) < 3
    } == {}
    texts = [("ink", "card"), ("ink", "ground"), ("muted", "card"), ("muted", "ground"), ("accent", "ground")]
    assert [(text, ground) for text, ground in texts if contrast(theme[text], theme[ground]) < 4.5] == []
    assert contrast(theme["ink"], theme["warn-ground"]) >= 4.5


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_ages_and_shares_are_ordered_in_lightness(theme: dict[str, str]) -> None:
    for letter, count in (("a", AGES), ("h", 5)):
        order = [contrast(theme[f"{letter}{number}"], theme["card"]) for number in range(count)]
        assert order == sorted(order)


def test_both_themes_name_the_same_colours_and_every_one_has_its_class() -> None:
    assert LIGHT.keys() == DARK.keys()
    classes = set(re.findall(r"\.([ach]\d) \{ --c: var\(--\1\); \}", STYLE))
    assert classes == {name for name in LIGHT if re.fullmatch(r"[ach]\d", name)}

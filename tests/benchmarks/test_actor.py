"""The comparison of an actor with plain generation: turns, and what its table says of them."""

from xml.etree import ElementTree

import pytest

from benchmarks.actor import drawing, render, summarised, take_turns
from benchmarks.engines import PARTS, Round


def done(seconds: float, tokens: int = 1000, cpu_s: float = 0.5) -> Round:
    return Round(seconds=seconds, tokens=tokens, cpu_s=dict.fromkeys(PARTS, cpu_s))


def test_sides_take_turns_in_both_directions_and_the_first_round_does_not_count() -> None:
    order: list[str] = []

    def side(name: str) -> Round:
        order.append(name)
        return done(float(len(order)))

    rounds = take_turns({name: lambda name=name: side(name) for name in ("a", "b")}, 2)  # type: ignore[misc]
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert [each.seconds for each in rounds["a"]] == [3.0, 6.0]
    assert [each.seconds for each in rounds["b"]] == [4.0, 5.0]


def test_a_side_is_compared_with_plain_generation_of_its_own_round() -> None:
    plain = [done(1.0), done(2.0), done(4.0)]
    row = summarised("demo", "actor", [done(1.25), done(2.0), done(8.0)], plain)
    assert row.tokens_per_s == 500.0 and row.tokens_per_s_range == (125.0, 800.0)
    assert row.of_plain == pytest.approx(0.8) and row.of_plain_range == (0.5, 1.0)
    assert row.tokens == 1000 and row.cpu_ms["worker"] == pytest.approx(500.0)


def test_rates_are_of_the_tokens_that_a_round_has_drawn() -> None:
    row = summarised("demo", "actor", [done(1.0, tokens=900)], [done(1.0, tokens=1000)])
    assert row.of_plain == pytest.approx(0.9)


def test_table_and_picture_show_every_side() -> None:
    plain = [done(1.0), done(1.0)]
    rows = [summarised("demo", side, [done(1.0), done(1.1)], plain) for side in ("plain", "actor", "actor + core")]
    assert "| demo | actor | 955 | 909 to 1,000 | 0.955 | 0.909 to 1.000 | 500.0 |" in render(rows[1])
    picture = ElementTree.fromstring(drawing(rows))
    texts = " ".join(part.text or "" for part in picture.iter())
    assert "actor + core" in texts and "target 0.95" in texts

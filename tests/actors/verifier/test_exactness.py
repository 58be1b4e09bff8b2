"""Exact values and what an approximation hides, against slow references."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.verifier.exact import MAX_BITS, rational, same_ratio
from actors.verifier.numeric import TooLarge, Undefined, approximate
from actors.verifier.parse import parse
from actors.verifier.probing import ratio_sign
from actors.verifier.tree import Apply, Node, Number, Symbol

integers = st.integers(-9, 9).map(lambda value: Number(Fraction(value)))
ratios = st.recursive(
    integers,
    lambda inner: st.one_of(
        st.tuples(st.sampled_from("+*/"), inner, inner).map(lambda p: Apply(p[0], (p[1], p[2]))),
        inner.map(lambda n: Apply("neg", (n,))),
        st.tuples(inner, st.integers(-3, 3)).map(lambda p: Apply("^", (p[0], Number(Fraction(p[1]))))),
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(ratios, ratios)
def test_unreduced_ratios_are_equal_exactly_where_the_fractions_are(a: Node, b: Node) -> None:
    x, y = rational(a), rational(b)
    is_same = same_ratio(a, b)
    if x is not None and y is not None and is_same is not None:
        assert is_same == (x == y)


def test_a_tree_is_exact_at_a_point_and_none_without_one() -> None:
    node = parse(r"\frac{x^2+1}{2}")
    assert rational(node) is None
    assert rational(node, {"x": Fraction(3, 2)}) == Fraction(13, 8)
    assert rational(parse("1/(x-1)"), {"x": Fraction(1)}) is None


def test_numbers_beyond_the_limit_have_no_fraction_but_are_compared_as_ratios() -> None:
    huge, same, more = (parse(text) for text in ("2^{1000000}", "4^{500000}", "2^{1000000}+1"))
    assert MAX_BITS < 1_000_000
    assert rational(huge) is None
    assert same_ratio(huge, same) is True
    assert same_ratio(huge, more) is False
    assert same_ratio(huge, parse(r"\sqrt{2}")) is None
    assert same_ratio(huge, parse("10^{100000000}")) is None


@pytest.mark.parametrize(("text", "value"), [("7!!", 105), ("8!!", 384), ("0!!", 1), ("(3!)!", 720)])
def test_factorials(text: str, value: int) -> None:
    assert rational(parse(text)) == value


def test_drowned_digits_are_those_between_the_terms_of_each_sum() -> None:
    found = approximate(parse(r"(\sqrt{2} \cdot 10^{100}+1)(\sqrt{3}+10^{50})"), 30)
    assert found.drowned == pytest.approx(150, abs=2)
    assert found.cancelled == 0


def test_a_sum_of_which_nothing_is_left_says_so_unless_it_is_exactly_zero() -> None:
    hidden = approximate(parse(r"\sqrt{2}+10^{100}-10^{100}"), 30)
    assert hidden.value == 0
    assert hidden.cancelled == math.inf
    assert hidden.scale >= 10**99
    exact = approximate(parse("1+(-1)^n"), 30, {"n": Fraction(3)})
    assert (exact.value, exact.cancelled) == (0, 0)


def test_what_is_too_large_to_be_computed_is_not_what_has_no_value() -> None:
    with pytest.raises(TooLarge):
        approximate(parse("(x+1)^{2222222222222222222222}"), 30, {"x": Fraction(1)})


def test_functions_that_are_only_named_differ_wherever_their_names_do() -> None:
    values = {
        float(approximate(Apply(f"call:f_{k}{'x' * 40}", (Symbol("x"),)), 30, {"x": Fraction(1, 3)}).value)
        for k in range(500)
    }
    assert len(values) == 500


def test_a_ratio_keeps_its_sign_whatever_hides_in_its_sums() -> None:
    one, other = parse(r"y-\sin x-10^{60}"), parse(r"2\sin x+2\cdot10^{60}-2y")
    assert ratio_sign(one, other) == -1
    assert ratio_sign(one, parse(r"y-\sin x-10^{60}-1")) is None


@pytest.mark.parametrize(
    "text",
    [r"\gcd(i,2)", r"\max(i,2)", r"i \bmod 2", r"\lfloor i \rfloor", r"\sum_{k=i}^{3}k", r"\prod_{k=1}^{i}k", "i!"],
)
def test_complex_numbers_have_no_order_and_functions_that_need_one_no_value(text: str) -> None:
    with pytest.raises(Undefined):
        approximate(parse(text), 30)

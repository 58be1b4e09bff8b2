"""Properties of the verifier over random expressions, random notation and random garbage."""

from fractions import Fraction

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from actors.verifier.extract import Extraction, extract
from actors.verifier.math import answers_equal, verify, verify_anywhere
from actors.verifier.numeric import Undefined, evaluate
from actors.verifier.tree import Apply, Node, Number, Symbol, replace, symbols, walk
from common.types import AnswerForm

pytestmark = pytest.mark.timeout(120)
slow_is_fine = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)

numbers = st.integers(1, 12).map(lambda value: Number(Fraction(value)))
letters = st.sampled_from("abxyz").map(Symbol)


def _extend(inner: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    pair = st.tuples(inner, inner)
    return st.one_of(
        pair.map(lambda p: Apply("+", p)),
        pair.map(lambda p: Apply("*", p)),
        pair.map(lambda p: Apply("/", p)),
        inner.map(lambda n: Apply("neg", (n,))),
        st.tuples(inner, st.integers(2, 3)).map(lambda p: Apply("^", (p[0], Number(Fraction(p[1]))))),
        inner.map(lambda n: Apply("root", (n, Number(Fraction(2))))),
        inner.map(lambda n: Apply("sin", (n,))),
    )


constants = st.recursive(numbers, _extend, max_leaves=6)
expressions = st.recursive(st.one_of(numbers, letters), _extend, max_leaves=6)


def as_latex(node: Node) -> str:
    match node:
        case Number():
            return str(node.value)
        case Symbol():
            return node.name
        case Apply(function=function, arguments=arguments):
            parts = [as_latex(argument) for argument in arguments]
            match function:
                case "+":
                    return r"\left(" + " + ".join(parts) + r"\right)"
                case "*":
                    return r" \cdot ".join(f"({part})" for part in parts)
                case "/":
                    return rf"\dfrac{{{parts[0]}}}{{{parts[1]}}}"
                case "neg":
                    return f"(-({parts[0]}))"
                case "^":
                    return f"({parts[0]})^{{{parts[1]}}}"
                case "root":
                    return rf"\sqrt[{parts[1]}]{{{parts[0]}}}"
                case "sin":
                    return rf"\sin\left({parts[0]}\right)"
    raise AssertionError(node)


def as_plain(node: Node) -> str:
    match node:
        case Number():
            return f"{node.value}.0"
        case Symbol():
            return node.name
        case Apply(function=function, arguments=arguments):
            parts = [f"({as_plain(argument)})" for argument in reversed(arguments)]
            match function:
                case "+" | "*":
                    return f" {function} ".join(parts)
                case "/":
                    return f"{parts[1]}/{parts[0]}"
                case "neg":
                    return f"0-{parts[0]}"
                case "^":
                    return f"{parts[1]}**{parts[0]}"
                case "root":
                    return f"sqrt{parts[1]}" if arguments[1] == Number(Fraction(2)) else f"{parts[1]}^(1/{parts[0]})"
                case "sin":
                    return f"sin{parts[0]}"
    raise AssertionError(node)


POINTS = [{name: Fraction(17 + 5 * k, 7 + shift) for k, name in enumerate("abxyz")} for shift in (0, 4, 12)] + [
    {name: Fraction(-13 - 3 * k, 11) for k, name in enumerate("abxyz")}
]


def values(node: Node) -> list[object]:
    """The value at some points; only expressions with a value at all of them are examples here."""
    found = []
    for point in POINTS:
        try:
            found.append(evaluate(node, 30, point if symbols(node) else None))
        except Undefined:
            continue
    return found


@slow_is_fine
@given(expressions)
def test_an_expression_equals_itself_in_other_notation(node: Node) -> None:
    assume(len(values(node)) >= 3)
    assert answers_equal(as_latex(node), as_plain(node))
    assert answers_equal(as_plain(node), as_latex(node))


@slow_is_fine
@given(constants)
def test_a_constant_equals_itself_in_other_notation(node: Node) -> None:
    assume(values(node))
    assert answers_equal(as_latex(node), as_plain(node))


@slow_is_fine
@given(st.one_of(constants, expressions), st.data())
def test_a_changed_leaf_makes_another_answer(node: Node, data: st.DataObject) -> None:
    leaves = [n for n in walk(node) if isinstance(n, Number | Symbol)]
    leaf = data.draw(st.sampled_from(leaves))
    other = Number(leaf.value + 1) if isinstance(leaf, Number) else Symbol(leaf.name + "_0")
    changed = replace(node, leaf, other)
    before, after = (
        values(node),
        values(replace(changed, Symbol(getattr(leaf, "name", "") + "_0"), Number(Fraction(9, 7)))),
    )
    assume(before and len(before) == len(after))
    assume(any(abs(x - y) > abs(x) * 1e-12 for x, y in zip(before, after, strict=True)))  # type: ignore[operator]
    assert not answers_equal(as_latex(node), as_latex(changed))
    assert not answers_equal(as_plain(changed), as_latex(node))


@slow_is_fine
@given(st.integers(-(10**30), 10**30), st.integers(-(10**30), 10**30))
def test_integers_are_equal_when_they_are_the_same(a: int, b: int) -> None:
    assert answers_equal(str(a), f"{a:,}")
    assert answers_equal(str(a), str(b)) == (a == b)
    assert answers_equal(rf"\frac{{{a}}}{{7}}", f"{b}/7") == (a == b)


MACROS = r"""
\frac \sqrt \left( \right) \text \begin{pmatrix} \end{pmatrix} \boxed \\ \{ \} \pm \cup \in \pi \sin \log \sum \prod
\sum_{k=1}^{n} \int_0^1 \lim \binom \overline \max \det \angle \Delta \infty \mathbb{R} \pmod{5} \bmod \approx \equiv
\subset \odot \foo \textcircled{3} \dot ^\circ \operatorname \lfloor \rfloor \mid \begin{cases} \end{cases} \over \exp
"""
SIGNS = """
{ } ( ) [ ] , ; = < | ^ _ ! !! ' + - * / : . % $ & 1 2 10 0.5 x y f n e i or and for if cm 50% ② 个 10^{9} 2^{1000}
1e999 0.333... 0.(3) f(x) a_n 5! 1/0 0^0 three A (A) **
"""
FRAGMENTS = [*MACROS.split(), *SIGNS.split()]
latex_soup = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map(" ".join)
any_text = st.text(st.characters(), max_size=60)  # surrogates and controls included


@settings(slow_is_fine, max_examples=250)
@given(st.one_of(latex_soup, any_text), st.one_of(latex_soup, any_text))
def test_equality_is_symmetric_and_never_raises(a: str, b: str) -> None:
    assert answers_equal(a, b) == answers_equal(b, a)


@settings(slow_is_fine, max_examples=250)
@given(latex_soup, latex_soup)
def test_an_answer_in_the_form_of_its_reference_also_has_its_value(a: str, b: str) -> None:
    assert answers_equal(a, b, AnswerForm.ANY) or not answers_equal(a, b, AnswerForm.EXACT)


@slow_is_fine
@given(constants, st.integers(0, 400))
def test_one_more_is_another_number_however_large(node: Node, exponent: int) -> None:
    assume(values(node))
    text = rf"10^{{{exponent}}} \cdot ({as_latex(node)})^2"
    assert not answers_equal(text, f"{text} + 1")
    assert answers_equal(f"1 + {text}", f"{text} + 1")


@settings(slow_is_fine, max_examples=150)
@given(latex_soup)
def test_an_answer_with_content_equals_itself(text: str) -> None:
    assume(any(c.isalnum() for c in text) and "boxed" not in text)
    assume(any(c in "0123456789xyf" for c in text.replace("approx", "")))  # the word only introduces an answer
    assert answers_equal(text, text)


@settings(slow_is_fine, max_examples=150)
@given(
    st.one_of(any_text, st.binary(max_size=80).map(lambda data: data.decode("utf-8", "surrogateescape")), latex_soup)
)
def test_any_response_gets_a_verdict(text: str) -> None:
    for mode in Extraction:
        extract(text, mode)
    verify("\\boxed{" + text + "}", "42", {})
    verify_anywhere(text, "x+1", {})

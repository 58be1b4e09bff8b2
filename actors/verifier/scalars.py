"""Equality of scalar expressions: exact for rationals and for algebraic constants, by probing for the rest.

* Two rationals are compared as fractions.
* Two constants a, b: the difference is evaluated at two precisions. A difference that both show is not zero. For
  expressions out of integers, + - * / and roots, the precision is chosen from a separation bound (below), so that
  a difference of zero at that precision is a proof (up to 5000 digits; further is not looked). Constants with pi, e,
  logarithms and the like have no known bound: they must agree to 250 digits. Both numbers are of digits beyond those by
  which the terms of a sum differ in size: 10^5000 + 1 is not 10^5000. Where that is more than can be computed, the two
  are not taken to be equal.
* Expressions with variables: see the module probing.
"""

import math
from fractions import Fraction
from math import log10

from actors.verifier.exact import rational, same_ratio
from actors.verifier.heavy import load
from actors.verifier.numeric import Undefined, approximate, evaluate
from actors.verifier.probing import DIGITS, ratio_sign
from actors.verifier.tree import INFINITY, Apply, Constant, Node, Number, key, subtract, symbols, walk

TRANSCENDENTAL_DIGITS = 250
_FIRST_DIGITS = 30
_ALGEBRAIC_DIGITS = 5_000
_MAX_DIGITS = {True: 40_000, False: 3_000}  # by whether the constant is algebraic
_MAX_DEGREE = 10**6
# A decimal with fewer digits than these is that decimal and not an approximation of something else.
_MIN_DIGITS_OF_APPROXIMATION = 10


def scalars_equal(a: Node, b: Node) -> bool:
    """Whether two scalar trees denote the same number or function."""
    if key(a) == key(b):
        return True
    x, y = rational(a), rational(b)
    if x is not None and y is not None:
        return x == y or _is_rounding(a, x, y) or _is_rounding(b, y, x)
    if INFINITY in walk(a) or INFINITY in walk(b):  # no number, and equal to what is spelled so
        return False
    if symbols(a) | symbols(b):
        return ratio_sign(a, b, must_be_one=True) is not None
    return _constants_equal(a, b)


def _is_rounding(decimal: Node, value: Fraction, exact: Fraction) -> bool:
    """Whether `decimal` is `exact` written out to many digits, like 0.0833333333333333 for 1/12."""
    if isinstance(decimal, Apply) and decimal.function == "neg":
        decimal = decimal.arguments[0]
    if not isinstance(decimal, Number) or (decimal.digits or 0) < _MIN_DIGITS_OF_APPROXIMATION:
        return False
    denominator = exact.denominator
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    if denominator == 1:  # it could have been written exactly
        return False
    places = int(value.denominator.bit_length() * log10(2)) if value.denominator > 1 else 0
    return abs(value - exact) <= Fraction(1, 10**places) and abs(value - exact) * 10**8 < abs(exact)


def _constants_equal(a: Node, b: Node) -> bool:
    if (is_same := same_ratio(a, b)) is not None:
        return is_same
    difference = subtract(a, b)
    bound = _proof_digits(difference)
    most = _MAX_DIGITS[bound is not None]
    try:
        first = approximate(difference, _FIRST_DIGITS)
        if first.value != 0 and first.cancelled == 0:  # no sum has lost a digit: it is not 0
            return False
        drowned = _drowned_digits(difference, most)
        if not _vanishes(difference, _FIRST_DIGITS + drowned):
            return False
        needed = TRANSCENDENTAL_DIGITS + drowned if bound is None else min(bound, _ALGEBRAIC_DIGITS + drowned)
        return needed <= most and _vanishes(difference, max(DIGITS, needed))
    except Undefined:
        return False


def _drowned_digits(node: Node, most: int) -> int:
    """By how many digits the terms of sums differ in size, which a precision has to show. Raises Undefined beyond
    `most`."""
    drowned = 0
    while (found := math.ceil(approximate(node, _FIRST_DIGITS + drowned).drowned)) > drowned:
        drowned = found
        if _FIRST_DIGITS + drowned > most:
            raise Undefined("terms of too different size")
    return drowned


def _vanishes(node: Node, digits: int) -> bool:
    """Whether the value has no digit that `digits` and 2 * `digits` agree on.

    What is below the noise of its terms is 0 already (see numeric), and needs no second look.
    """
    mpmath = load("mpmath")
    coarse = evaluate(node, digits)
    if coarse == 0:
        return True
    fine = evaluate(node, 2 * digits)
    with mpmath.workdps(15):
        return bool(fine == 0 or abs(coarse - fine) > abs(fine) * mpmath.mpf("1e-6"))


def is_positive(node: Node) -> bool:
    """Whether a constant is a positive real number. Raises Undefined."""
    mpmath = load("mpmath")
    value = evaluate(node, DIGITS)
    return not isinstance(value, mpmath.mpc) and value > 0


def _proof_digits(node: Node) -> int | None:
    """Digits after which an algebraic expression that shows no digit is zero; None for other expressions.

    Burnikel, Fleischer, Mehlhorn and Schirra (2000): an expression E = U/L out of integers by + - * / and k-th roots,
    with D the product of the k, is zero or |E| >= 1 / (l(E) u(E)^(D^2 - 1)). Here log10 of u and l.
    """
    if any(isinstance(n, Constant) and n.name in ("pi", "e") for n in walk(node)):
        return None
    degree = 1
    for radical in {key(n): n for n in walk(node)}.values():
        degree = min(degree * _root_index(radical), _MAX_DEGREE)
    bound = _bound(node)
    if bound is None:
        return None
    upper, lower = bound
    digits = lower + upper * (degree**2 - 1)
    return math.ceil(min(digits, 10.0**9)) + DIGITS


def _root_index(node: Node) -> int:
    match node:
        case Constant(name="i"):
            return 2
        case Apply(function="root", arguments=(_, Number(value=index))) if index.denominator == 1:
            return max(1, int(index))
        case Apply(function="^", arguments=(_, exponent)):
            exact = rational(exponent)
            return exact.denominator if exact is not None else 1
    return 1


def _bound(node: Node) -> tuple[float, float] | None:
    """log10 of the bounds (u, l) of numerator and denominator; None when the expression is not algebraic."""
    match node:
        case Number():
            return _log10(abs(node.value.numerator)), _log10(node.value.denominator)
        case Constant(name="i"):
            return 0.0, 0.0
        case Apply(function="neg" | "abs"):
            return _bound(node.arguments[0])
        case Apply(function="+" | "*" | "/"):
            parts = [_bound(argument) for argument in node.arguments]
            known = [part for part in parts if part is not None]
            return _combine(node.function, known) if len(known) == len(parts) else None
        case Apply(function="root" | "^"):
            base, exponent = _bound(node.arguments[0]), rational(node.arguments[1])
            if base is None or exponent is None:
                return None
            power = 1 / exponent if node.function == "root" and exponent else exponent
            upper, lower = base if power >= 0 else (base[1], base[0])
            size = float(min(abs(power), Fraction(10**9)))
            return (size * (upper + lower), lower * size) if size < 1 else (size * upper, size * lower)
    return None


def _combine(function: str, parts: list[tuple[float, float]]) -> tuple[float, float]:
    upper, lower = parts[0]
    for next_upper, next_lower in parts[1:]:
        if function == "+":
            upper, lower = max(upper + next_lower, lower + next_upper) + log10(2), lower + next_lower
        elif function == "*":
            upper, lower = upper + next_upper, lower + next_lower
        else:
            upper, lower = upper + next_lower, lower + next_upper
    return upper, lower


def _log10(value: int) -> float:
    return value.bit_length() * log10(2)

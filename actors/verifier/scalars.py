"""Equality of scalar expressions: exact for rationals and for algebraic constants, by probing for the rest.

* Two rationals are compared as fractions.
* Two constants a, b: the difference is evaluated at two precisions. A difference that both show is not zero. For
  expressions out of integers, + - * / and roots, the precision is chosen from a separation bound (below), so that
  a difference of zero at that precision is a proof (up to 5000 digits; further is not looked). Constants with pi, e,
  logarithms and the like have no known bound: they must agree to 250 digits.
* Expressions with variables must agree at NUM_POINTS random real points at 50 digits, over positive, negative and
  integer values; one point of disagreement rejects. Points at which either side is undefined do not count. Where too
  few points are left, only a proof by sympy accepts.

The points are drawn from a fixed seed: the same question always gets the same answer.
"""

import random
from collections.abc import Iterator
from fractions import Fraction
from math import log10

from actors.verifier.heavy import load
from actors.verifier.numeric import TooMuchWork, Undefined, Value, evaluate, rational
from actors.verifier.symbolic import proves_zero
from actors.verifier.tree import Apply, Constant, Node, Number, key, subtract, symbols, walk

NUM_POINTS = 10
DIGITS = 50
TRANSCENDENTAL_DIGITS = 250
_MAX_ATTEMPTS = 60
_MAX_DIGITS = 5_000
# A decimal with fewer digits than these is that decimal and not an approximation of something else.
_MIN_DIGITS_OF_APPROXIMATION = 10
_INTEGER_NAMES = frozenset({"k", "m", "n"})
_LARGE = 5  # from here on differences of exponentials may have lost most of their digits
_FUNCTIONS_OF_INTEGERS = frozenset({"sum", "product", "!", "binomial", "mod", "gcd", "lcm", "floor", "ceil"})


def scalars_equal(a: Node, b: Node) -> bool:
    """Whether two scalar trees denote the same number or function."""
    if key(a) == key(b):
        return True
    x, y = rational(a), rational(b)
    if x is not None and y is not None:
        return x == y or _is_rounding(a, x, y) or _is_rounding(b, y, x)
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
    difference = subtract(a, b)
    try:
        if not _vanishes(difference, 30):
            return False
        return _vanishes(difference, max(DIGITS, min(_proof_digits(difference), _MAX_DIGITS)))
    except Undefined:
        return False


def _vanishes(node: Node, digits: int) -> bool:
    """Whether the value has no digit that `digits` and 2 * `digits` agree on."""
    mpmath = load("mpmath")
    coarse, fine = evaluate(node, digits), evaluate(node, 2 * digits)
    with mpmath.workdps(15):
        return bool(fine == 0 or abs(coarse - fine) > abs(fine) * mpmath.mpf("1e-6"))


def is_positive(node: Node) -> bool:
    """Whether a constant is a positive real number. Raises Undefined."""
    mpmath = load("mpmath")
    value = evaluate(node, DIGITS)
    return not isinstance(value, mpmath.mpc) and value > 0


def _proof_digits(node: Node) -> int:
    """Digits after which an algebraic expression that shows no digit is zero, else TRANSCENDENTAL_DIGITS.

    Burnikel, Fleischer, Mehlhorn and Schirra (2000): an expression E = U/L out of integers by + - * / and k-th roots,
    with D the product of the k, is zero or |E| >= 1 / (l(E) u(E)^(D^2 - 1)). Here log10 of u and l.
    """
    if any(isinstance(n, Constant) and n.name in ("pi", "e") for n in walk(node)):
        return TRANSCENDENTAL_DIGITS
    degree = 1
    for radical in {key(n): n for n in walk(node)}.values():
        degree *= _root_index(radical)
    bound = _bound(node)
    if bound is None:
        return TRANSCENDENTAL_DIGITS
    upper, lower = bound
    return int(lower + upper * (degree**2 - 1)) + DIGITS


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
            size = abs(float(power))
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


def ratio_sign(a: Node, b: Node, must_be_one: bool = False) -> int | None:
    """The sign (1 or -1) of the constant c with a = c b at all points probed; None where there is no such c != 0."""
    names = sorted(symbols(a) | symbols(b))
    agreeing, ratio = 0, None
    largest = 20 if _grows_with_size(a) or _grows_with_size(b) else 10**6
    for point in _points(names, _needs_integers(a) or _needs_integers(b), largest):
        try:
            x, y = evaluate(a, DIGITS, point), evaluate(b, DIGITS, point)
        except TooMuchWork:
            return None
        except Undefined:
            continue
        if must_be_one:
            is_same = _close(x, y)
        else:
            if x == 0 and y == 0:
                continue
            ratio = x / y if ratio is None and x != 0 and y != 0 else ratio
            is_same = x != 0 and y != 0 and _close(x / y, ratio)
        if not is_same:
            if _cancels(a, point) or _cancels(b, point):
                continue
            return None
        agreeing += 1
        if agreeing == NUM_POINTS:
            return 1 if ratio is None or ratio.real > 0 else -1
    return 1 if must_be_one and proves_zero(subtract(a, b)) else None


def _close(x: Value, y: Value) -> bool:
    return bool(abs(x - y) <= max(abs(x), abs(y)) * load("mpmath").mpf("1e-35") or x == y)


def _cancels(node: Node, point: dict[str, Fraction]) -> bool:
    """Whether variables are so large that few digits of a sum are left, as of cosh x - sinh x."""
    if all(abs(value) < _LARGE for value in point.values()):
        return False
    for part in walk(node):
        if not isinstance(part, Apply) or part.function != "+":
            continue
        try:
            largest = max(abs(evaluate(term, DIGITS, point)) for term in part.arguments)
            if abs(evaluate(part, DIGITS, point)) < largest * 1e-15:
                return True
        except Undefined:  # a term with the variable of a sum
            continue
    return False


def _needs_integers(node: Node) -> bool:
    return any(isinstance(n, Apply) and (n.function in _FUNCTIONS_OF_INTEGERS or _alternates(n)) for n in walk(node))


def _grows_with_size(node: Node) -> bool:
    """Whether large integers cost many terms, or all the digits that a remainder is left of."""
    return any(isinstance(n, Apply) and n.function in ("sum", "product", "mod") for n in walk(node))


def _alternates(node: Apply) -> bool:
    """(-1)^n, which has a real value at integers alone."""
    if node.function != "^" or not symbols(node.arguments[1]):
        return False
    base = rational(node.arguments[0])
    return base is not None and base < 0


def _points(names: list[str], with_integers: bool, largest: int) -> Iterator[dict[str, Fraction]]:
    """Probe points: all variables in (0, 1), above 1, negative, of mixed sign, and integers where it matters.

    There k, m and n are integers at all points, of up to `largest` where others are negative or large.
    """
    generator = random.Random(20250407)
    ranges = [(0.2, 0.95), (1.1, 4.0), (-3.0, -0.2), (-2.5, 2.5), (5.0, 20.0), (100.0, 2000.0)]
    for attempt in range(_MAX_ATTEMPTS):
        if with_integers and attempt % 2:
            yield {name: Fraction(generator.randint(2 if attempt % 4 == 1 else 6, 15)) for name in names}
            continue
        low, high = ranges[(attempt // 2 if with_integers else attempt) % len(ranges)]
        point = {name: Fraction(round(generator.uniform(low, high) * 2**40) * 2 + 1, 2**41) for name in names}
        if with_integers:
            first, last = (largest // 10, largest) if low > 50 or high < 0 else (2, 15)
            point |= {name: Fraction(generator.randint(first, last)) for name in names if name in _INTEGER_NAMES}
        yield point

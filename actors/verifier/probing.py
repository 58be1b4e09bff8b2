"""Equality of expressions with variables, by probing.

They must agree at NUM_POINTS random real points, over positive, negative and integer values; one point of disagreement
rejects. Points at which either side is undefined do not count. What is rational there is compared exactly; other values
with 50 digits, or with more where a sum has terms so different in size, or cancels so far, that 50 do not show them
all: where 2500 do not, the point does not count. Where too few points are left, only a proof by sympy accepts.

The points are drawn from a fixed seed: the same question always gets the same answer.
"""

import math
import random
from collections.abc import Iterator, Mapping
from enum import Enum
from fractions import Fraction

from actors.verifier.exact import rational
from actors.verifier.heavy import load
from actors.verifier.numeric import MAX_STEPS, Approximation, TooLarge, TooMuchWork, Undefined, approximate
from actors.verifier.symbolic import proves_zero
from actors.verifier.tree import Apply, Node, subtract, symbols, walk

NUM_POINTS = 10
DIGITS = 50
_MORE_DIGITS = (DIGITS, 250, 1000, 2500)
_VISIBLE_DIGITS = 38  # of the precision: what the terms of a sum may differ by in size
_TOLERANCE_DIGITS = 15  # of the precision: what rounding may take
_MAX_BITS = 20_000  # of an exact value
_MAX_STEPS_IN_ALL = 10 * MAX_STEPS
_MAX_ATTEMPTS = 60
_INTEGER_NAMES = frozenset({"k", "m", "n"})
_FUNCTIONS_OF_INTEGERS = frozenset({"sum", "product", "!", "!!", "binomial", "mod", "gcd", "lcm", "floor", "ceil"})

Point = Mapping[str, Fraction]


class _Outcome(Enum):
    AGREE = "agree"
    DIFFER = "differ"
    OPEN = "open"


def ratio_sign(a: Node, b: Node, must_be_one: bool = False) -> int | None:
    """The sign (1 or -1) of the constant c with a = c b at all points probed; None where there is no such c != 0."""
    pair = _Pair(a, b)
    agreeing, is_hidden = 0, False  # hidden: there are values that could not be compared
    base: Point | None = None  # where c is taken from
    sign = 1
    largest = 20 if _grows_with_size(a) or _grows_with_size(b) else 10**6
    for point in _points(sorted(symbols(a) | symbols(b)), _needs_integers(a) or _needs_integers(b), largest):
        try:
            if not must_be_one and base is None:
                found = pair.sign_at(point)
                if found == 0:
                    return None
                base, sign = (point, found) if found is not None else (None, sign)
                outcome = _Outcome.OPEN if found is None else _Outcome.AGREE
            else:
                outcome = pair.compare_at(point, base)
        except TooMuchWork:
            return None
        except TooLarge:
            is_hidden = True
            continue
        except Undefined:
            continue
        if outcome is _Outcome.DIFFER:
            return None
        is_hidden = is_hidden or outcome is _Outcome.OPEN
        agreeing += outcome is _Outcome.AGREE
        if agreeing == NUM_POINTS:
            return sign
    may_be_proven = must_be_one and not is_hidden and symbols(a) == symbols(b)
    return 1 if may_be_proven and proves_zero(subtract(a, b)) else None


class _Pair:
    """Two expressions whose values are compared at points; `base` is a point where both have a value that is not 0."""

    def __init__(self, a: Node, b: Node) -> None:
        self._sides = a, b
        self._steps = _MAX_STEPS_IN_ALL
        self._at_base: dict[int, tuple[Approximation, Approximation]] = {}

    def sign_at(self, point: Point) -> int | None:
        """The sign of a/b; 0 where one of them is 0 and the other is not, None where both are or it is not clear."""
        if (exact := self._exact(point)) is not None:
            x, y = exact
            return None if x == y == 0 else (x * y > 0) - (x * y < 0)
        for digits in _MORE_DIGITS:
            one, other = self._approximate(point, digits)
            lost = max(one.drowned, one.cancelled, other.drowned, other.cancelled)
            if lost <= digits - _VISIBLE_DIGITS:
                if one.value == 0 or other.value == 0:
                    return None if one.value == other.value else 0
                return 1 if (one.value / other.value).real > 0 else -1
        return None

    def compare_at(self, point: Point, base: Point | None) -> _Outcome:
        """Whether a/b is the same at both points, or 1 without a base. Raises Undefined."""
        if (exact := self._exact(point)) is not None:
            scale = (Fraction(1), Fraction(1)) if base is None else self._exact(base)
            if scale is not None:
                return _Outcome.AGREE if exact[0] * scale[1] == exact[1] * scale[0] else _Outcome.DIFFER
        for digits in _MORE_DIGITS:
            outcome = self._compare_with(point, base, digits)
            if outcome is not None:
                return outcome
        return _Outcome.OPEN

    def _compare_with(self, point: Point, base: Point | None, digits: int) -> _Outcome | None:
        """None where more digits may tell."""
        mpmath = load("mpmath")
        x, y = self._approximate(point, digits)
        if base is None:
            x0 = y0 = Approximation(mpmath.mpf(1), 0.0, 0.0, mpmath.mpf(0), 0)
        else:
            if digits not in self._at_base:
                self._at_base[digits] = self._approximate(base, digits)
            x0, y0 = self._at_base[digits]
        with mpmath.workdps(digits):
            tolerance = mpmath.mpf(10) ** (_TOLERANCE_DIGITS - digits)
            left, right = x.value * y0.value, y.value * x0.value
            difference = abs(left - right)
            lost = max(max(v.drowned, v.cancelled) for v in (x, y, x0, y0))
            if difference <= max(abs(left), abs(right)) * tolerance:
                if lost <= digits - _VISIBLE_DIGITS:
                    return _Outcome.AGREE
            else:
                noise = max(abs(x.value), x.scale) * abs(y0.value) + max(abs(y.value), y.scale) * abs(x0.value)
                if difference > noise * tolerance:
                    return _Outcome.DIFFER
        is_zero = lost == math.inf and digits > DIGITS  # as far as can be seen
        is_beyond = _MORE_DIGITS[-1] - _VISIBLE_DIGITS < lost < math.inf
        return _Outcome.OPEN if is_zero or is_beyond else None

    def _exact(self, point: Point) -> tuple[Fraction, Fraction] | None:
        x = rational(self._sides[0], point, _MAX_BITS)
        y = None if x is None else rational(self._sides[1], point, _MAX_BITS)
        return None if x is None or y is None else (x, y)

    def _approximate(self, point: Point, digits: int) -> tuple[Approximation, Approximation]:
        found = []
        for side in self._sides:
            found.append(approximate(side, digits, point))
            self._steps -= found[-1].steps
            if self._steps < 0:
                raise TooMuchWork("too many steps")
        return found[0], found[1]


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

"""Exact values: trees that are rational by rational operations, as fractions, and very large ones as two integers."""

import math
from collections.abc import Mapping
from fractions import Fraction

from actors.verifier.tree import Apply, Node, Number, Symbol

MAX_BITS = 200_000  # of an exact integer; larger powers and factorials are evaluated approximately
MAX_FACTORIAL = 10_000
_MAX_BITS_OF_RATIO = 3_000_000
_MAX_FACTORIAL_OF_RATIO = 50_000


def rational(node: Node, bindings: Mapping[str, Fraction] | None = None, max_bits: int = MAX_BITS) -> Fraction | None:
    """The exact value of a tree that is rational by rational operations, else None.

    Also None where a number on the way has far more than `max_bits` bits.
    """
    try:
        return _rational(node, bindings or {}, max_bits)
    except (ZeroDivisionError, OverflowError):
        return None


def _rational(node: Node, bindings: Mapping[str, Fraction], max_bits: int) -> Fraction | None:
    if isinstance(node, Number):
        return node.value
    if isinstance(node, Symbol):
        return bindings.get(node.name)
    if not isinstance(node, Apply):
        return None
    values = []
    for argument in node.arguments:
        value = _rational(argument, bindings, max_bits)
        if value is None:
            return None
        values.append(value)
    return _rational_apply(node.function, values, max_bits)


def _rational_apply(function: str, x: list[Fraction], max_bits: int) -> Fraction | None:
    if sum(v.numerator.bit_length() + v.denominator.bit_length() for v in x) > 4 * max_bits:
        return None
    match function:
        case "+":
            return sum(x, Fraction(0))
        case "*":
            return math.prod(x, start=Fraction(1))
        case "/":
            return x[0] / x[1]
        case "neg":
            return -x[0]
        case "abs":
            return abs(x[0])
        case "percent":
            return x[0] / 100
        case "numeral":  # its base is notation
            return x[0]
        case "floor":
            return Fraction(math.floor(x[0]))
        case "ceil":
            return Fraction(math.ceil(x[0]))
        case "^":
            return _rational_power(x[0], x[1], max_bits)
        case "root":
            return _rational_root(x[0], x[1])
        case "mod" if x[1] != 0:
            return x[0] % x[1]
        case "min" | "max":
            return (min if function == "min" else max)(x)
    if all(value.denominator == 1 for value in x):
        return _integer_apply(function, [int(value) for value in x])
    return None


def _integer_apply(function: str, x: list[int]) -> Fraction | None:
    match function:
        case "!" if 0 <= x[0] <= MAX_FACTORIAL:
            return Fraction(math.factorial(x[0]))
        case "!!" if 0 <= x[0] <= MAX_FACTORIAL:
            return Fraction(math.prod(range(x[0], 0, -2)))
        case "binomial" if 0 <= x[0] <= MAX_FACTORIAL and x[1] >= 0:
            return Fraction(math.comb(x[0], x[1]))
        case "gcd":
            return Fraction(math.gcd(*x))
        case "lcm":
            return Fraction(math.lcm(*x))
    return None


def _rational_power(base: Fraction, exponent: Fraction, max_bits: int) -> Fraction | None:
    if exponent.denominator != 1:
        if exponent.denominator > 64:
            return None
        root = _rational_root(base, Fraction(exponent.denominator))
        return None if root is None else _rational_power(root, Fraction(exponent.numerator), max_bits)
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(base) != 1 and size * abs(exponent.numerator) > max_bits:
        return None
    if base == 0 and exponent == 0:
        return None
    return base ** (exponent.numerator % 2 if abs(base) == 1 else exponent.numerator)


def _rational_root(base: Fraction, index: Fraction) -> Fraction | None:
    if index.denominator != 1 or not 2 <= index <= 64:
        return None
    n = int(index)
    if base < 0 and n % 2 == 0:
        return None
    numerator, denominator = _integer_root(abs(base.numerator), n), _integer_root(base.denominator, n)
    if numerator is None or denominator is None:
        return None
    return Fraction(numerator, denominator) * (-1 if base < 0 else 1)


def _integer_root(value: int, n: int) -> int | None:
    if n == 2:
        root = math.isqrt(value)
        return root if root * root == value else None
    if value < 2:
        return value
    root = 1 << -(-value.bit_length() // n)  # Newton's method from above
    while (better := ((n - 1) * root + value // root ** (n - 1)) // n) < root:
        root = better
    return root if root**n == value else None


def same_ratio(a: Node, b: Node) -> bool | None:
    """Whether two rational constants are equal, for those too large for `rational`; None where they are larger still.

    Fractions are not reduced here, which is what takes the time with numbers of a million bits.
    """
    budget = _Budget()
    x, y = _ratio(a, budget), _ratio(b, budget)
    if x is None or y is None or x[1] == 0 or y[1] == 0:
        return None
    return x[0] * y[1] == y[0] * x[1]


class _Budget:
    """Bits that the numbers of one comparison may still have, all together."""

    def __init__(self) -> None:
        self.bits = 8 * _MAX_BITS_OF_RATIO

    def affords(self, bits: int) -> bool:
        self.bits -= bits
        return bits <= _MAX_BITS_OF_RATIO and self.bits >= 0


def _ratio(node: Node, budget: _Budget) -> tuple[int, int] | None:
    """(numerator, denominator), not reduced; None when a part is not rational or the budget is used up."""
    match node:
        case Number():
            return node.value.numerator, node.value.denominator
        case Apply(function="neg" | "+" | "*" | "/" | "percent" | "!"):
            parts = []
            for argument in node.arguments:
                if (part := _ratio(argument, budget)) is None:
                    return None
                parts.append(part)
            return _combine_ratios(node.function, parts, budget)
        case Apply(function="^", arguments=(base_node, exponent_node)):
            base, exponent = _ratio(base_node, budget), rational(exponent_node)
            if base is None or base[0] == 0 or exponent is None or exponent.denominator != 1:
                return None
            n = abs(exponent.numerator)
            if not budget.affords(n * max(base[0].bit_length(), base[1].bit_length())):
                return None
            top, bottom = base[0] ** n, base[1] ** n
            return (top, bottom) if exponent >= 0 else (bottom, top)
    return None


def _combine_ratios(function: str, parts: list[tuple[int, int]], budget: _Budget) -> tuple[int, int] | None:
    top, bottom = parts[0]
    if function == "neg":
        return -top, bottom
    if function == "percent":
        return top, 100 * bottom
    if function == "!":
        if bottom != 1 or not 0 <= top <= _MAX_FACTORIAL_OF_RATIO or not budget.affords(top * top.bit_length()):
            return None
        return math.factorial(top), 1
    for next_top, next_bottom in parts[1:]:
        if not budget.affords(sum(map(int.bit_length, (top, bottom, next_top, next_bottom)))):
            return None
        if function == "+":
            top, bottom = top * next_bottom + next_top * bottom, bottom * next_bottom
        elif function == "*":
            top, bottom = top * next_top, bottom * next_bottom
        else:
            top, bottom = top * next_bottom, bottom * next_top
    return top, bottom

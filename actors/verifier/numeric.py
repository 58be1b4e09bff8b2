"""The value of a scalar tree: exactly as a rational where that is possible, else with mpmath at any precision."""

import math
from fractions import Fraction
from types import ModuleType
from typing import Any, TypeAlias

from actors.verifier.heavy import load
from actors.verifier.tree import Apply, Constant, Node, Number, Symbol, names_terms, walk

Value: TypeAlias = Any  # mpmath's mpf or mpc, which carry no type stubs

MAX_BITS = 200_000  # of an exact integer; larger powers and factorials are evaluated approximately
MAX_FACTORIAL = 10_000
MAX_STEPS = 20_000  # nodes visited in one evaluation; sums visit their term again and again
MAX_ARGUMENT_BITS = 1000  # of an argument of sin and the like
MAX_MAGNITUDE = 1 << 40  # bits of the exponent of an approximate value; beyond: Undefined


class Undefined(Exception):
    """The expression has no value at this point, or one that is too large to be computed."""


class TooMuchWork(Undefined):
    """The evaluation would take too long, here as at any other point."""


def rational(node: Node) -> Fraction | None:
    """The exact value of a tree that is rational by rational operations, else None."""
    try:
        return _rational(node)
    except (ZeroDivisionError, OverflowError):
        return None


def _rational(node: Node) -> Fraction | None:
    if isinstance(node, Number):
        return node.value
    if not isinstance(node, Apply):
        return None
    arguments = [_rational(argument) for argument in node.arguments]
    values = [value for value in arguments if value is not None]
    return _rational_apply(node.function, values) if len(values) == len(arguments) else None


def _rational_apply(function: str, x: list[Fraction]) -> Fraction | None:
    if sum(v.numerator.bit_length() + v.denominator.bit_length() for v in x) > 4 * MAX_BITS:
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
        case "floor":
            return Fraction(math.floor(x[0]))
        case "ceil":
            return Fraction(math.ceil(x[0]))
        case "^":
            return _rational_power(x[0], x[1])
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
        case "binomial" if 0 <= x[0] <= MAX_FACTORIAL and x[1] >= 0:
            return Fraction(math.comb(x[0], x[1]))
        case "gcd":
            return Fraction(math.gcd(*x))
        case "lcm":
            return Fraction(math.lcm(*x))
    return None


def _rational_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        if exponent.denominator > 64:
            return None
        root = _rational_root(base, Fraction(exponent.denominator))
        return None if root is None else _rational_power(root, Fraction(exponent.numerator))
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(base) != 1 and size * abs(exponent.numerator) > MAX_BITS:
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


def evaluate(node: Node, digits: int, bindings: dict[str, Fraction] | None = None) -> Value:
    """The approximate value with `digits` significant digits in every operation.

    Without bindings the tree is a constant and complex arithmetic is used (principal values, but real odd roots of
    negative reals). With bindings the variables are real and so is everything else unless the tree contains i: an
    even root or logarithm of a negative number is then Undefined. Raises Undefined.
    """
    mpmath = load("mpmath")
    is_complex = bindings is None or any(isinstance(n, Constant) and n.name == "i" for n in walk(node))
    with mpmath.workdps(digits + 5):
        try:
            value = _Evaluator(mpmath, bindings or {}, is_complex).value(node)
        except (ZeroDivisionError, ValueError, OverflowError, MemoryError, mpmath.mp.NoConvergence) as error:
            raise Undefined(str(error)) from error
        if not mpmath.isfinite(value):
            raise Undefined("infinite")
        return value


class _Evaluator:
    """Evaluates one tree within mpmath's current precision."""

    def __init__(self, mpmath: ModuleType, bindings: dict[str, Fraction], is_complex: bool) -> None:
        self._mp, self._bindings, self._is_complex = mpmath, bindings, is_complex
        self._steps = MAX_STEPS

    def value(self, node: Node) -> Value:
        mp = self._mp
        self._steps -= 1
        if self._steps < 0:
            raise TooMuchWork("too many steps")
        match node:
            case Number():
                return self._fraction(node.value)
            case Symbol():
                if node.name not in self._bindings:
                    raise Undefined(f"no value for {node.name}")
                return self._fraction(self._bindings[node.name])
            case Constant():
                if node.name == "oo":
                    raise Undefined("infinity")
                return {"pi": mp.pi, "e": mp.e, "i": mp.j}[node.name] * 1
            case Apply(function="sum" | "product"):
                return self._series(node)
            case Apply(function="^"):
                return self._power(node.arguments[0], node.arguments[1])
            case Apply():
                result = self._apply(node.function, [self.value(argument) for argument in node.arguments])
                if isinstance(result, mp.mpc) and not self._is_complex:
                    raise Undefined("not real")
                return result
        raise Undefined(type(node).__name__)

    def _fraction(self, value: Fraction) -> Value:
        numerator = self._mp.mpf(value.numerator)
        return numerator if value.denominator == 1 else numerator / value.denominator

    def _apply(self, function: str, x: list[Value]) -> Value:
        mp = self._mp
        match function:
            case "+":
                return mp.fsum(x)
            case "*":
                return mp.fprod(x)
            case "/":
                return x[0] / x[1]
            case "neg":
                return -x[0]
            case "percent":
                return x[0] / 100
            case "degree":
                return x[0] * mp.pi / 180
            case "root":
                return self._root(x[0], x[1])
            case "ln":
                return mp.log(x[0])
            case "log":
                return mp.log(x[1]) / mp.log(x[0])
            case "!":
                return self._factorial(x[0])
            case "abs":
                return abs(x[0])
            case "ceil" | "floor" | "exp" | "binomial" | "mod" | "min" | "max" | "gcd" | "lcm":
                return self._real_function(function, x)
        if function.startswith("call:") or function in ("overline", "det"):
            return self._unknown(function, x)
        if abs(x[0]) >= mp.ldexp(1, MAX_ARGUMENT_BITS):
            raise Undefined("argument too large")
        operation = getattr(mp, _MPMATH_NAMES.get(function, function), None)
        if operation is None:  # a ratio, a union: not a number
            raise Undefined(function)
        return operation(*x)

    def _real_function(self, function: str, x: list[Value]) -> Value:
        mp = self._mp
        self._check_size(abs(x[0]))
        match function:
            case "exp":
                return mp.exp(x[0])
            case "binomial":
                return mp.binomial(*x)
            case "mod":
                return x[0] - x[1] * mp.floor(x[0] / x[1])
            case "gcd" | "lcm":
                if any(value != int(value) for value in x):
                    raise Undefined("gcd of a fraction")
                return mp.mpf((math.gcd if function == "gcd" else math.lcm)(*map(int, x)))
            case "min" | "max":
                return (min if function == "min" else max)(x)
        # Rounding noise must not decide on which side of an integer the argument lies.
        nearest = mp.nint(x[0])
        if x[0] != nearest and abs(x[0] - nearest) < mp.mpf(10) ** (8 - mp.mp.dps):
            return nearest
        return mp.floor(x[0]) if function == "floor" else mp.ceil(x[0])

    def _power(self, base_node: Node, exponent_node: Node) -> Value:
        """base^exponent; a rational exponent with odd denominator takes the real root of a negative base."""
        mp = self._mp
        base, exponent = self.value(base_node), self.value(exponent_node)
        if base == 0 and exponent == 0:
            raise Undefined("0^0")
        if abs(exponent) > mp.ldexp(1, MAX_ARGUMENT_BITS):
            raise Undefined("exponent too large")
        if base != 0 and abs(exponent) * max(1, abs(mp.mag(base))) > MAX_MAGNITUDE:  # |log2| is at most that
            self._check_size(exponent * mp.log(abs(base), 2))
        exact = exponent_node.value if isinstance(exponent_node, Number) else rational(exponent_node)
        if exact is not None and 1 < exact.denominator <= 64:
            return self._root(base, mp.mpf(exact.denominator)) ** exact.numerator
        is_negative = not isinstance(base, mp.mpc) and base < 0
        if not is_negative or (exact is not None and exact.denominator == 1):
            return base ** (exact.numerator if exact is not None and exact.denominator == 1 else exponent)
        if not self._is_complex and exponent != mp.nint(exponent):
            raise Undefined("power of a negative number")
        return base**exponent

    def _root(self, base: Value, index: Value) -> Value:
        mp = self._mp
        is_small = not isinstance(index, mp.mpc) and abs(index) <= 10_000
        n = int(mp.nint(index)) if is_small else 0
        if n != index or n == 0:
            return base ** (1 / index)
        if isinstance(base, mp.mpc) or base >= 0:
            return mp.root(base, n) if n > 0 else 1 / mp.root(base, -n)
        if n % 2:
            return -mp.root(-base, n) if n > 0 else -1 / mp.root(-base, -n)
        if not self._is_complex:
            raise Undefined("even root of a negative number")
        return mp.root(mp.mpc(base), n)

    def _factorial(self, x: Value) -> Value:
        if isinstance(x, self._mp.mpc) or abs(x) > 1e6:
            raise Undefined("factorial")
        return self._mp.factorial(x)

    def _series(self, node: Apply) -> Value:
        variable, first_node, last_node, term = node.arguments
        if isinstance(variable, Symbol) and names_terms(term, variable.name.removeprefix("index ")):
            raise Undefined("terms of a sequence")
        first, last = self.value(first_node), self.value(last_node)
        if abs(first) > 1e6 or abs(last) > 1e6:
            raise Undefined("series")
        if not isinstance(variable, Symbol) or first != int(first) or last != int(last) or last - first > 1000:
            raise Undefined("series")
        terms = []
        for k in range(int(first), int(last) + 1):
            inner = _Evaluator(self._mp, {**self._bindings, variable.name: Fraction(k)}, self._is_complex)
            inner._steps = self._steps
            terms.append(inner.value(term))
            self._steps = inner._steps
        return self._mp.fsum(terms) if node.function == "sum" else self._mp.fprod(terms)

    def _unknown(self, function: str, x: list[Value]) -> Value:
        """A fixed generic function for each name, so that f(x) equals f(y) only where x equals y."""
        mp = self._mp
        seed = int.from_bytes(function.encode()[-8:], "big") % 1_000_003
        total = mp.mpf(seed) / 1009
        for position, argument in enumerate(x):
            total += argument * mp.sqrt(position + 2) + argument**2 / (position + 7)
        return mp.cos(total) + mp.mpf(3) / 2

    def _check_size(self, log2: Value) -> None:
        if abs(log2) > MAX_MAGNITUDE:
            raise Undefined("too large")


_MPMATH_NAMES = {
    **{f"arc{name}": f"a{name}" for name in ("sin", "cos", "tan", "cot", "sinh", "cosh", "tanh")},
}

"""The value of a scalar tree: exactly as a rational where that is possible, else with mpmath at any precision."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import ModuleType
from typing import Any, TypeAlias

from actors.verifier.exact import rational
from actors.verifier.heavy import load
from actors.verifier.tree import Apply, Constant, Node, Number, Symbol, names_terms, walk

Value: TypeAlias = Any  # mpmath's mpf or mpc, which carry no type stubs

MAX_STEPS = 20_000  # nodes visited in one evaluation at 50 digits; sums visit their term again and again
_MIN_STEPS = 500  # the same at any precision
_GUARD_DIGITS = 15  # beyond those asked for: what operations lose
_BITS_OF_DIGIT = math.log2(10)
_MAX_BITS_OF_SUM = 20_000
_LOSS_WATCHED = 40  # bits that a sum loses before its exact value is looked for
MAX_ARGUMENT_BITS = 1000  # of an argument of sin and the like
MAX_MAGNITUDE = 1 << 40  # bits of the exponent of an approximate value; beyond: Undefined


class Undefined(Exception):
    """The expression has no value at this point."""


class TooLarge(Undefined):
    """The expression may have a value here, which is too large or too small to be computed."""


class TooMuchWork(TooLarge):
    """The evaluation would take too long, here as at any other point."""


@dataclass(frozen=True, slots=True)
class Approximation:
    """A value, with how well its precision shows what the sums in it add.

    `drowned`: decimal digits between the largest and the smallest term of each sum, added up over all sums, and those
    of very long numbers; with fewer digits of precision a term may be invisible. `cancelled`: the most digits that one
    sum lost because its terms cancel, infinite where nothing is left of it; sums that are rational are exact and lose
    none. `scale`: the largest term of a sum that lost digits so, 0 where there is none. `steps`: the work, in nodes
    visited at 50 digits.
    """

    value: Value
    drowned: float
    cancelled: float
    scale: Value
    steps: int


def evaluate(node: Node, digits: int, bindings: Mapping[str, Fraction] | None = None) -> Value:
    """The approximate value with `digits` significant digits in every operation; see `approximate`."""
    return approximate(node, digits, bindings).value


def approximate(node: Node, digits: int, bindings: Mapping[str, Fraction] | None = None) -> Approximation:
    """The value with `digits` significant digits in every operation.

    Without bindings the tree is a constant and complex arithmetic is used (principal values, but real odd roots of
    negative reals). With bindings the variables are real and so is everything else unless the tree contains i: an
    even root or logarithm of a negative number is then Undefined. Raises Undefined.
    """
    mpmath = load("mpmath")
    is_complex = bindings is None or any(isinstance(n, Constant) and n.name == "i" for n in walk(node))
    with mpmath.workdps(digits + _GUARD_DIGITS):
        evaluator = _Evaluator(mpmath, bindings or {}, is_complex, digits)
        try:
            value = evaluator.value(node)
        except (ValueError, ZeroDivisionError, mpmath.mp.NoConvergence) as error:
            raise Undefined(str(error)) from error
        except (OverflowError, MemoryError) as error:
            raise TooLarge(str(error)) from error
        if not mpmath.isfinite(value):
            raise Undefined("infinite")
        steps = evaluator.num_steps * max(digits, 50) // 50
        return Approximation(value, evaluator.drowned, evaluator.cancelled, evaluator.scale, steps)


class _Evaluator:
    """Evaluates one tree within mpmath's current precision."""

    def __init__(self, mpmath: ModuleType, bindings: Mapping[str, Fraction], is_complex: bool, digits: int) -> None:
        self._mp, self._bindings, self._is_complex, self._digits = mpmath, bindings, is_complex, digits
        self._max_steps = max(_MIN_STEPS, MAX_STEPS * 50 // max(digits, 50))
        self.num_steps = 0
        self.drowned = self.cancelled = 0.0
        self.scale: Value = mpmath.mpf(0)

    def value(self, node: Node) -> Value:
        mp = self._mp
        self.num_steps += 1
        if self.num_steps > self._max_steps:
            raise TooMuchWork("too many steps")
        match node:
            case Number():
                bits = max(node.value.numerator.bit_length(), node.value.denominator.bit_length())
                if bits > _LOSS_WATCHED:
                    self.drowned += bits / _BITS_OF_DIGIT
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
            case Apply(function="+"):
                return self._sum(node)
            case Apply(function="^"):
                return self._power(node.arguments[0], node.arguments[1])
            case Apply():
                result = self._apply(node.function, [self.value(argument) for argument in node.arguments])
                if isinstance(result, mp.mpc) and not self._is_complex:
                    raise Undefined("not real")
                return result
        raise Undefined(type(node).__name__)

    def _sum(self, node: Apply) -> Value:
        """A sum; what of it is below the noise of its terms is 0. Keeps account of the digits that it loses."""
        terms = [self.value(argument) for argument in node.arguments]
        return self._add(terms, node)

    def _add(self, terms: list[Value], node: Node) -> Value:
        mp = self._mp
        total = mp.fsum(terms)
        if not mp.isfinite(total):
            raise Undefined("infinite")
        sizes = [mp.mag(term) for term in terms if term != 0]
        if not sizes:
            return total
        largest = max(sizes)
        noise = largest - (self._digits + 3) * _BITS_OF_DIGIT
        if total != 0 and mp.mag(total) < noise:
            total = mp.mpf(0)
        cancelled = math.inf if total == 0 else largest - mp.mag(total)
        self.drowned += (largest - min(sizes)) / _BITS_OF_DIGIT
        if cancelled > _LOSS_WATCHED:
            if (exact := rational(node, self._bindings, _MAX_BITS_OF_SUM)) is not None:
                return self._fraction(exact)
            self.cancelled = max(self.cancelled, cancelled / _BITS_OF_DIGIT)
            self.scale = max(self.scale, mp.ldexp(1, largest))
        return total

    def _fraction(self, value: Fraction) -> Value:
        numerator = self._mp.mpf(value.numerator)
        return numerator if value.denominator == 1 else numerator / value.denominator

    def _apply(self, function: str, x: list[Value]) -> Value:
        mp = self._mp
        match function:
            case "*":
                return mp.fprod(x)
            case "/":
                return x[0] / x[1]
            case "neg":
                return -x[0]
            case "percent":
                return x[0] / 100
            case "numeral":
                return x[0]
            case "degree":
                return x[0] * mp.pi / 180
            case "root":
                return self._root(x[0], x[1])
            case "ln":
                return mp.log(x[0])
            case "log":
                return mp.log(x[1]) / mp.log(x[0])
            case "!" | "!!":
                return self._factorial(function, x[0])
            case "abs":
                return abs(x[0])
            case "ceil" | "floor" | "exp" | "binomial" | "mod" | "min" | "max" | "gcd" | "lcm":
                return self._real_function(function, x)
        if function.startswith("call:") or function in ("overline", "det"):
            return self._unknown(function, x)
        if abs(x[0]) >= mp.ldexp(1, MAX_ARGUMENT_BITS):
            raise TooLarge("argument too large")
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
        x = [self._real(value) for value in x]
        match function:
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

    def _real(self, value: Value) -> Value:
        """The value if it is real; complex numbers have no order. Raises Undefined."""
        if not isinstance(value, self._mp.mpc):
            return value
        if value.imag != 0:
            raise Undefined("not real")
        return value.real

    def _power(self, base_node: Node, exponent_node: Node) -> Value:
        """base^exponent; a rational exponent with odd denominator takes the real root of a negative base."""
        mp = self._mp
        base, exponent = self.value(base_node), self.value(exponent_node)
        if base == 0 and exponent == 0:
            raise Undefined("0^0")
        if abs(exponent) > mp.ldexp(1, MAX_ARGUMENT_BITS):
            raise TooLarge("exponent too large")
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
            if n == 2:
                return mp.sqrt(base)
            return mp.root(base, n) if n > 0 else 1 / mp.root(base, -n)
        if n % 2:
            return -mp.root(-base, n) if n > 0 else -1 / mp.root(-base, -n)
        if not self._is_complex:
            raise Undefined("even root of a negative number")
        return mp.root(mp.mpc(base), n)

    def _factorial(self, function: str, x: Value) -> Value:
        if isinstance(x, self._mp.mpc) or abs(x) > 1e6:
            raise Undefined("factorial")
        return self._mp.factorial(x) if function == "!" else self._mp.fac2(x)

    def _series(self, node: Apply) -> Value:
        variable, first_node, last_node, term = node.arguments
        if isinstance(variable, Symbol) and names_terms(term, variable.name.removeprefix("index ")):
            raise Undefined("terms of a sequence")
        first, last = self._real(self.value(first_node)), self._real(self.value(last_node))
        if abs(first) > 1e6 or abs(last) > 1e6:
            raise Undefined("series")
        if not isinstance(variable, Symbol) or first != int(first) or last != int(last) or last - first > 1000:
            raise Undefined("series")
        terms = []
        for k in range(int(first), int(last) + 1):
            outer, self._bindings = self._bindings, {**self._bindings, variable.name: Fraction(k)}
            terms.append(self.value(term))
            self._bindings = outer
        return self._add(terms, node) if node.function == "sum" else self._mp.fprod(terms)

    def _unknown(self, function: str, x: list[Value]) -> Value:
        """A fixed generic function for each name, so that f(x) equals f(y) only where x equals y.

        The name of an integral or a limit holds all of it, so it counts to its last letter.
        """
        mp = self._mp
        name = function.encode("utf-8", "surrogatepass")
        seed = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "big")
        total = mp.ldexp(seed, -124)
        for position, argument in enumerate(x):
            total += argument * mp.sqrt(position + 2) + argument**2 / (position + 7)
        return mp.cos(total) + mp.mpf(3) / 2

    def _check_size(self, log2: Value) -> None:
        if abs(log2) > MAX_MAGNITUDE:
            raise TooLarge("too large")


_MPMATH_NAMES = {
    **{f"arc{name}": f"a{name}" for name in ("sin", "cos", "tan", "cot", "sinh", "cosh", "tanh")},
}

"""Conversion to sympy, for proofs where probing finds too few points. Only nodes are converted, never text."""

from typing import Any

from actors.verifier.exact import MAX_BITS, MAX_FACTORIAL
from actors.verifier.heavy import load
from actors.verifier.limits import take_time
from actors.verifier.tree import Apply, Constant, Node, Number, Symbol, walk

# sympy objects are not typed here: sympy's annotations are partial.
_SYMPY_NAMES = {
    **{name: name for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "exp", "floor")},
    **{f"arc{name}": f"a{name}" for name in ("sin", "cos", "tan", "cot", "sinh", "cosh", "tanh")},
    **{"abs": "Abs", "ceil": "ceiling", "ln": "log", "!": "factorial", "!!": "factorial2", "min": "Min", "max": "Max"},
    **{"binomial": "binomial", "gcd": "gcd", "lcm": "lcm"},
}
_MAX_EXPONENT = 6400  # 64 (see _bits) times the largest power of an expression, which sympy may multiply out
_CONVERTED = frozenset({"+", "*", "/", "neg", "^", "root", "log", "percent", "degree", "mod", *_SYMPY_NAMES})


def proves_zero(node: Node) -> bool:
    """Whether sympy's simplification of the expression is exactly zero; variables are real.

    May take arbitrarily long: callers outside the pool have no time limit.
    """
    if not _has_counterpart(node):
        return False
    take_time()
    sympy = load("sympy")
    try:
        return bool(sympy.simplify(to_sympy(node)) == 0)
    except (NotImplementedError, ValueError, TypeError, ZeroDivisionError, RecursionError, OverflowError):
        return False  # outside what sympy can simplify: not proven


def _has_counterpart(node: Node) -> bool:
    """Whether all functions in the tree have one in sympy; without loading it."""
    return all(n.function in _CONVERTED or n.function.startswith("call:") for n in walk(node) if isinstance(n, Apply))


def to_sympy(node: Node) -> Any:
    """The sympy expression of a scalar tree. Raises NotImplementedError for what sympy has no counterpart of."""
    sympy = load("sympy")
    match node:
        case Number():
            return sympy.Rational(node.value.numerator, node.value.denominator)
        case Symbol():
            return sympy.Symbol(node.name, real=True)
        case Constant():
            return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "oo": sympy.oo}[node.name]
        case Apply():
            return _apply(sympy, node.function, [to_sympy(argument) for argument in node.arguments])
    raise NotImplementedError(type(node).__name__)


def _apply(sympy: Any, function: str, x: list[Any]) -> Any:
    match function:
        case "+":
            return sympy.Add(*x)
        case "*":
            return sympy.Mul(*x)
        case "/":
            return x[0] / x[1]
        case "neg":
            return -x[0]
        case "^":
            limit = MAX_BITS if x[0].is_number else _MAX_EXPONENT
            if x[1].is_number and abs(x[1]) * _bits(x[0]) > limit:
                raise NotImplementedError("power too large")
            return sympy.Pow(*x)
        case "root":
            return sympy.real_root(*x) if x[1].is_odd and x[0].is_negative else sympy.Pow(x[0], 1 / x[1])
        case "log":
            return sympy.log(x[1], x[0])
        case "percent":
            return x[0] / 100
        case "degree":
            return x[0] * sympy.pi / 180
        case "mod":
            return sympy.Mod(*x)
    if function in ("!", "!!", "binomial") and any(v.is_number and abs(v) > MAX_FACTORIAL for v in x):
        raise NotImplementedError("factorial too large")
    if function.startswith("call:"):
        return sympy.Function(function.removeprefix("call:"))(*x)
    if function not in _SYMPY_NAMES:
        raise NotImplementedError(function)
    return getattr(sympy, _SYMPY_NAMES[function])(*x)


def _bits(number: Any) -> int:
    """The size of an exact number; 64 for one that is not rational."""
    return int(number.p).bit_length() + int(number.q).bit_length() if number.is_Rational else 64

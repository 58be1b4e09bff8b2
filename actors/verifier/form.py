"""Whether an answer has the form that its reference asks for: a number where that is a number, worked out.

Copying a formula of the question is no answer to it. What counts as worked out depends on the reference:

* All its parts are numbers or names, as 42, x = -1/2, (1, 2), x < 3: the parts of the answer are numbers as well (an
  integer, a decimal, a fraction of integers, a mixed number, a power of ten with its factor, a percentage, a numeral of
  its base, a + bi of such numbers) or names, with a sign at most.
* It holds a formula of constants, as 2 sqrt(3) or ln 2: those of the answer use nothing but arithmetic, powers, roots
  and functions of the kinds that the reference uses, so no cos 15° for (sqrt(6) + sqrt(2))/4.
* It holds any formula: the answer leaves no numbers to be added or multiplied, as 19x + 1 - 4x - 81 does.
* max, min, gcd, lcm, mod, sums, products, determinants, limits and integrals are only where the reference has them.
"""

from collections.abc import Iterator

from actors.verifier.naming import value_of
from actors.verifier.scalars import scalars_equal
from actors.verifier.tree import (
    INFINITY,
    Apply,
    Constant,
    Matrix,
    Node,
    Number,
    Quantity,
    Relation,
    Sequence,
    Symbol,
    children,
    is_constant,
    is_scalar,
    operands,
    walk,
)

_ARITHMETIC = frozenset({"+", "*", "/", "neg", "pm", "mp", "^", "root", "exp", "percent", "degree", "numeral"})
_UNEVALUATED = frozenset({"sum", "product", "max", "min", "gcd", "lcm", "mod", "det"})
_SIGNS = frozenset({"neg", "pm", "mp", "percent", "degree", "numeral"})
_OPAQUE = ("call:lim", "call:int", "call:iint", "call:iiint", "call:oint", "call:sum ", "call:product ")
# Functions that may stand for each other.
_KINDS = (
    frozenset({"sin", "cos", "tan", "cot", "sec", "csc"}),
    frozenset({"arcsin", "arccos", "arctan", "arccot"}),
    frozenset({"sinh", "cosh", "tanh"}),
    frozenset({"arcsinh", "arccosh", "arctanh"}),
    frozenset({"ln", "log"}),
    frozenset({"!", "!!", "binomial"}),
)


def has_form(answer: Node, reference: Node) -> bool:
    """Whether an answer that equals its reference is worked out as far as that is."""
    wanted, given = list(_parts(reference)), list(_parts(answer))
    if all(map(_is_plain, wanted)):
        return all(map(_is_plain, given))
    known = {kind for part in wanted for kind in _functions(part)}
    for part in given:
        used = set(_functions(part)) - known
        if used & _UNEVALUATED or (is_constant(part) and not used <= _ARITHMETIC):
            return False
    return not any(map(_leaves_arithmetic, given)) or any(map(_leaves_arithmetic, wanted))


def _parts(node: Node) -> Iterator[Node]:
    """The scalars that an answer gives; of an equation that names a value, only those of the value."""
    match node:
        case Relation() if (value := value_of(node)) is not None:
            yield from _parts(_worked_out_side(node, value))
        case Apply(function="^", arguments=(Matrix() | Sequence() as rows, Symbol(name="T"))):
            yield from _parts(rows)
        case Apply(function="*" | "/" | "neg", arguments=arguments) if sum(map(_is_matrix, arguments)) == 1:
            for argument in arguments:  # 1/2 of a matrix
                yield from _parts(argument)
        case Apply(function=function) if is_scalar(node) or function in _ARITHMETIC:
            yield node
        case Number() | Symbol() | Constant():
            yield node
        case Apply() | Relation() | Sequence() | Matrix() | Quantity():
            for child in children(node):
                yield from _parts(child)


def _is_matrix(node: Node) -> bool:
    return isinstance(node, Matrix)


def _worked_out_side(relation: Relation, value: Node) -> Node:
    """Of 1024 = 2^{10} and 2^{10} = 1024 the number."""
    if _is_plain(value) or not is_constant(value):
        return value
    others = [side for side in relation.sides if is_constant(side) and _is_plain(side) and scalars_equal(side, value)]
    return others[0] if others else value


def _is_plain(node: Node) -> bool:
    """Whether a part is a number as it is written down, or a name with a sign at most: x, -x, |z|, f(2)."""
    match node:
        case Symbol():
            return True
        case Apply(function="neg" | "abs", arguments=(Symbol(),)):
            return True
        case Apply(function=function) if function.startswith("call:"):
            return not function.startswith(_OPAQUE)
    return is_literal(node)


def is_literal(node: Node) -> bool:
    """Whether a tree is a number as it is written down, real or complex."""
    match node:
        case Number():
            return True
        case Constant():
            return node in (INFINITY, Constant("i"))
        case Apply(function=function, arguments=(inner, *_)) if function in _SIGNS:
            return is_literal(inner)
        case Apply(function="/", arguments=(above, below)):
            return _is_integer(below) and (_is_integer(above) or _is_imaginary(above) or _is_complex_sum(above))
        case Apply(function="^", arguments=(Number() as base, exponent)):
            return base.value == 10 and _is_integer(exponent)
        case Apply(function="*", arguments=(Number(), Apply(function="^") as power)):  # 6.02 * 10^23
            return is_literal(power)
    return _is_imaginary(node) or _is_complex_sum(node)


def _is_integer(node: Node) -> bool:
    match node:
        case Number(value=value):
            return value.denominator == 1
        case Apply(function="neg", arguments=(inner,)):
            return _is_integer(inner)
    return False


def _is_imaginary(node: Node) -> bool:
    """i, 3i or -i/2."""
    match node:
        case Constant(name="i"):
            return True
        case Apply(function="neg" | "pm" | "mp", arguments=(inner,)):
            return _is_imaginary(inner)
        case Apply(function="/", arguments=(above, below)):
            return _is_imaginary(above) and _is_integer(below)
        case Apply(function="*", arguments=(factor, Constant(name="i"))):
            return is_literal(factor)
    return False


def _is_complex_sum(node: Node) -> bool:
    match node:
        case Apply(function="+", arguments=(a, b)):
            return (is_literal(a) and _is_imaginary(b) and not _is_complex_sum(a)) or (
                _is_imaginary(a) and is_literal(b) and not _is_imaginary(b) and not _is_complex_sum(b)
            )
    return False


def _leaves_arithmetic(node: Node) -> bool:
    """Whether two numbers are terms of one sum or factors of one product."""
    return any(
        sum(map(_is_integer_or_decimal, operands(part))) > 1
        for part in walk(node)
        if isinstance(part, Apply) and part.function in ("+", "*")
    )


def _is_integer_or_decimal(node: Node) -> bool:
    match node:
        case Apply(function="neg", arguments=(inner,)):
            return isinstance(inner, Number)
    return isinstance(node, Number)


def _functions(node: Node) -> Iterator[str]:
    """The functions in a tree; of those that may stand for each other all."""
    for part in walk(node):
        if isinstance(part, Apply):
            function = part.function
            if function.startswith(_OPAQUE):
                yield "sum"
            yield from next((kind for kind in _KINDS if function in kind), (function,))

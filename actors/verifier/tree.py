"""The verifier's own expression tree: the only thing that the text of an answer can turn into.

Functions are names from a fixed list (FUNCTIONS) or `call:f`, an unknown function applied to arguments. Nothing in a
tree is ever executed as code.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

# name: number of arguments; None: one or more. The tree is closed over these.
FUNCTIONS: dict[str, int | None] = {
    **dict.fromkeys(("+", "*", "gcd", "lcm", "min", "max", "ratio", "union", "intersection", "conditions"), None),
    **dict.fromkeys(("/", "^", "root", "log", "binomial", "mod", "residue", "setminus", "in", "where", "numeral"), 2),
    **dict.fromkeys(
        ("neg", "pm", "mp", "!", "!!", "percent", "degree", "abs", "floor", "ceil", "ln", "exp", "described"), 1
    ),
    **dict.fromkeys(("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh"), 1),
    **dict.fromkeys(("arcsin", "arccos", "arctan", "arccot", "arcsinh", "arccosh", "arctanh"), 1),
    **dict.fromkeys(("overline", "det"), 1),
    "sum": 4,  # variable, first, last, term
    "product": 4,
}
COMMUTATIVE = frozenset({"+", "*", "gcd", "lcm", "min", "max", "union", "intersection", "conditions"})
_NOT_SCALAR = frozenset(
    {"union", "intersection", "conditions", "setminus", "in", "ratio", "residue", "described", "where"}
)


@dataclass(frozen=True, slots=True)
class Number:
    """An exact rational. `digits`: significant digits when it was written as a decimal, else None."""

    value: Fraction
    digits: int | None = None


@dataclass(frozen=True, slots=True)
class Symbol:
    name: str


@dataclass(frozen=True, slots=True)
class Constant:
    """`pi`, `e`, `i` or `oo` (infinity)."""

    name: str


@dataclass(frozen=True, slots=True)
class Apply:
    function: str
    arguments: tuple["Node", ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """A chain: sides[0] operators[0] sides[1] ... with operators out of = ≈ ≠ < ≤ > ≥."""

    operators: tuple[str, ...]
    sides: tuple["Node", ...]


@dataclass(frozen=True, slots=True)
class Sequence:
    """Items with their brackets: "()" tuple or open interval, "[]", "[)", "(]", "{}" set, "" list without brackets."""

    brackets: str
    items: tuple["Node", ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    rows: tuple[tuple["Node", ...], ...]


@dataclass(frozen=True, slots=True)
class Quantity:
    """A value with a unit in normal form, for example 5 and "cm^2". `is_known`: no other word after a number."""

    value: "Node"
    unit: str
    is_known: bool = True


@dataclass(frozen=True, slots=True)
class Text:
    """Words, in lower case with single spaces; or what could not be read as mathematics."""

    words: str


Node: TypeAlias = Number | Symbol | Constant | Apply | Relation | Sequence | Matrix | Quantity | Text

ZERO, ONE, TWO = Number(Fraction(0)), Number(Fraction(1)), Number(Fraction(2))
INFINITY = Constant("oo")
REALS = Sequence("()", (Apply("neg", (INFINITY,)), INFINITY))


def children(node: Node) -> tuple[Node, ...]:
    match node:
        case Apply():
            return node.arguments
        case Relation():
            return node.sides
        case Sequence():
            return node.items
        case Matrix():
            return tuple(item for row in node.rows for item in row)
        case Quantity():
            return (node.value,)
    return ()


def walk(node: Node) -> Iterator[Node]:
    """The node and all below it."""
    stack = [node]
    while stack:
        top = stack.pop()
        yield top
        stack.extend(children(top))


def depth(node: Node) -> int:
    """The number of nodes on the longest path down."""
    level, found = [node], 0
    while level:
        found += 1
        level = [child for parent in level for child in children(parent)]
    return found


def symbols(node: Node) -> set[str]:
    """Names of the free variables; the variable of a sum is bound."""
    if isinstance(node, Symbol):
        return {node.name}
    found = {name for child in children(node) for name in symbols(child)}
    if isinstance(node, Apply) and node.function in ("sum", "product"):
        variable, first, last, term = node.arguments
        return (symbols(term) - symbols(variable)) | symbols(first) | symbols(last)
    return found


def names_terms(node: Node, index: str) -> bool:
    """Whether the tree holds terms of a sequence such as a_k or f_k(x), of which only the name is known."""
    names = symbols(node) | {n.function for n in walk(node) if isinstance(n, Apply) and n.function.startswith("call:")}
    return any(index in name.partition("_")[2] for name in names)


def variables(node: Node) -> set[str]:
    """Names of the free variables, without those of sets of numbers."""
    return {name for name in symbols(node) if not name.startswith("set ")}


def is_number_set(node: Node) -> bool:
    """Whether a node is Z, Q or the like, which no interval describes."""
    return isinstance(node, Symbol) and node.name.startswith("set ")


def is_scalar(node: Node) -> bool:
    """Whether the tree is one number-valued expression."""
    return all(
        isinstance(n, Number | Symbol | Constant) or (isinstance(n, Apply) and n.function not in _NOT_SCALAR)
        for n in walk(node)
    )


def base_of(node: Node) -> int:
    """The base of a numeral; 10 for everything else."""
    match node:
        case Apply(function="numeral", arguments=(_, Number(value=base))):
            return int(base)
    return 10


def is_constant(node: Node) -> bool:
    """Whether the tree is one number."""
    return is_scalar(node) and not symbols(node)


def negate(node: Node) -> Node:
    if isinstance(node, Number):
        return Number(-node.value, node.digits)
    return node.arguments[0] if isinstance(node, Apply) and node.function == "neg" else Apply("neg", (node,))


def subtract(left: Node, right: Node) -> Node:
    return Apply("+", (left, negate(right)))


def replace(node: Node, old: Node, new: Node) -> Node:
    """The tree with every occurrence of `old` replaced."""
    if node == old:
        return new
    match node:
        case Apply():
            return Apply(node.function, tuple(replace(a, old, new) for a in node.arguments))
        case Relation():
            return Relation(node.operators, tuple(replace(s, old, new) for s in node.sides))
        case Sequence():
            return Sequence(node.brackets, tuple(replace(i, old, new) for i in node.items))
        case Matrix():
            return Matrix(tuple(tuple(replace(i, old, new) for i in row) for row in node.rows))
        case Quantity():
            return Quantity(replace(node.value, old, new), node.unit, node.is_known)
    return node


def key(node: Node) -> str:
    """A string that is the same for trees that differ only in the order of sums and products."""
    match node:
        case Number():
            return f"{node.value.numerator:x}/{node.value.denominator:x}"
        case Symbol() | Constant():
            return f"{type(node).__name__[0]}:{node.name}"
        case Apply():
            parts = [key(part) for part in operands(node)]
            if node.function in COMMUTATIVE:
                parts.sort()
            return f"{node.function}({','.join(parts)})"
        case Relation():
            return f"rel{''.join(node.operators)}({','.join(map(key, node.sides))})"
        case Sequence():
            return f"seq{node.brackets}({','.join(map(key, node.items))})"
        case Matrix():
            return f"matrix({';'.join(','.join(map(key, row)) for row in node.rows)})"
        case Quantity():
            return f"unit({key(node.value)},{node.unit})"
    return f"text({node.words})"


def operands(node: Apply) -> Iterator[Node]:
    """The arguments of a function; of a sum or product also those of the sums or products among them."""
    for argument in node.arguments:
        if isinstance(argument, Apply) and argument.function == node.function and node.function in ("+", "*"):
            yield from operands(argument)
        else:
            yield argument

"""Sets of real numbers: intervals, points and their unions, and the inequalities in one variable that describe them."""

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cmp_to_key

from actors.verifier.numeric import Undefined
from actors.verifier.scalars import is_positive, scalars_equal
from actors.verifier.tree import (
    INFINITY,
    ONE,
    ZERO,
    Apply,
    Constant,
    Node,
    Number,
    Relation,
    Sequence,
    Symbol,
    is_constant,
    is_scalar,
    negate,
    subtract,
    symbols,
    variables,
    walk,
)
from actors.verifier.tree import replace as substitute

_FLIPPED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤", "=": "=", "≠": "≠", "≈": "≈", "≡": "≡"}
_MINUS_INFINITY = Apply("neg", (INFINITY,))
_BRACKETS = {"()": (False, False), "[]": (True, True), "[)": (True, False), "(]": (False, True)}


@dataclass(frozen=True)
class Interval:
    """The reals between two constants; a point is [a, a]."""

    low: Node
    high: Node
    has_low: bool
    has_high: bool


def flip(operator: str) -> str:
    """The relation read from right to left."""
    return _FLIPPED[operator]


def sets_equal(a: list[Interval], b: list[Interval]) -> bool:
    """Whether two sets are the same; not where an end has no value."""
    try:
        a, b = _merge(a), _merge(b)
        return len(a) == len(b) and all(_intervals_equal(x, y) for x, y in zip(a, b, strict=True))
    except Undefined:
        return False


def _intervals_equal(a: Interval, b: Interval) -> bool:
    return (
        (a.has_low, a.has_high) == (b.has_low, b.has_high)
        and _compare(a.low, b.low) == 0
        and _compare(a.high, b.high) == 0
    )


def as_set(node: Node) -> list[Interval] | None:
    """The set of reals that a node denotes, or None. An inequality denotes the values of its variable."""
    try:
        return _as_set(node)
    except Undefined:
        return None


def _as_set(node: Node) -> list[Interval] | None:
    match node:
        case Sequence(brackets="{}"):
            if not all(is_scalar(item) and not symbols(item) for item in node.items):
                return None
            return [Interval(item, item, True, True) for item in node.items]
        case Sequence(items=(low, high)) if node.brackets in _BRACKETS:
            if not is_constant(low) or not is_constant(high) or not _is_interval(low, high, node.brackets):
                return None
            return [Interval(low, high, *_BRACKETS[node.brackets])]
        case Apply(function="in"):
            return _as_set(node.arguments[1])
        case Apply(function="described"):
            return _as_set(node.arguments[0])
        case Apply(function="union"):
            parts = [_as_set(argument) for argument in node.arguments]
            return None if any(part is None for part in parts) else [i for part in parts if part for i in part]
        case Apply(function="intersection"):
            return _as_intersection([_as_set(argument) for argument in node.arguments])
        case Apply(function="conditions"):
            both = _as_intersection([_as_set(argument) for argument in node.arguments])
            return both or _disjoint_union(node.arguments)
        case Sequence(brackets="") if _is_union(node.items):
            return _disjoint_union(node.items)  # (-oo, 1) and (3, oo), as a list
        case Apply(function="setminus"):
            whole, removed = (_as_set(argument) for argument in node.arguments)
            return None if whole is None or removed is None else _remove(whole, removed)
        case Relation(operators=("=",), sides=(Symbol(), value)) if is_constant(value):
            return [Interval(value, value, True, True)]
        case Relation():
            return _solve(node)
    return None


def _disjoint_union(nodes: tuple[Node, ...]) -> list[Interval] | None:
    """The union of sets that are listed. Where they overlap, as a domain and a range may, no union is meant."""
    union = _as_set(Apply("union", nodes))
    return union if union is not None and len(_merge(union)) == len(union) else None


def is_clearly_a_set(node: Node) -> bool:
    """Whether a node is a set of numbers and nothing else; (1, 2) may also be a point."""
    match node:
        case Apply(function="union" | "intersection" | "conditions" | "setminus" | "in" | "described"):
            return True
        case Relation():
            return not set(node.operators) & set("=≈≡")
        case Sequence(brackets="[)" | "(]" | "{}"):
            return True
        case Sequence(brackets="()" | "[]"):
            return any(isinstance(n, Constant) and n.name == "oo" for n in walk(node))
        case Sequence(brackets=""):
            return _is_union(node.items)
    return False


def _is_union(items: tuple[Node, ...]) -> bool:
    """Whether a list is one set of numbers: not that of x > 1, y > 2, nor that of the finite sets {1, 2}, {3}."""
    is_finite = any(isinstance(item, Sequence) and item.brackets == "{}" for item in items)
    names = {frozenset(variables(item)) for item in items if variables(item)}
    return not is_finite and len(names) < 2 and all(map(is_clearly_a_set, items))


def _as_intersection(parts: list[list[Interval] | None]) -> list[Interval] | None:
    result: list[Interval] | None = None
    for part in parts:
        if part is None:
            return None
        result = part if result is None else _intersect(result, part)
    return result


def _is_interval(low: Node, high: Node, brackets: str) -> bool:
    """Whether the ends enclose something: (5, 3) is a point of the plane, and no spelling of the empty set."""
    order = _compare(low, high)
    return order < 0 or (order == 0 and brackets == "[]")


def _is_infinite(node: Node) -> int:
    """1 for infinity, -1 for minus infinity, else 0."""
    if node == INFINITY:
        return 1
    if node == _MINUS_INFINITY:
        return -1
    if any(isinstance(n, Constant) and n.name == "oo" for n in walk(node)):
        plain = isinstance(node, Apply) and node.function == "+" and len(node.arguments) == 1
        return _is_infinite(node.arguments[0]) if plain and isinstance(node, Apply) else 0
    return 0


def _compare(a: Node, b: Node) -> int:
    """-1, 0, 1 as a < b, a = b, a > b. Raises Undefined."""
    infinite_a, infinite_b = _is_infinite(a), _is_infinite(b)
    if infinite_a or infinite_b:
        return (infinite_a > infinite_b) - (infinite_a < infinite_b)
    if scalars_equal(a, b):
        return 0
    return 1 if is_positive(subtract(a, b)) else -1


def _merge(intervals: list[Interval]) -> list[Interval]:
    """Sorted, without empty ones, and with those that overlap or touch made one. Raises Undefined."""
    proper = []
    for interval in intervals:
        order = _compare(interval.low, interval.high)
        if order < 0 or (order == 0 and interval.has_low and interval.has_high):
            proper.append(interval)
    proper.sort(key=cmp_to_key(lambda x, y: _compare(x.low, y.low) or y.has_low - x.has_low))
    merged: list[Interval] = []
    for interval in proper:
        if merged:
            last = merged[-1]
            gap = _compare(interval.low, last.high)
            if gap < 0 or (gap == 0 and (interval.has_low or last.has_high)):
                order = _compare(interval.high, last.high)
                if order > 0:
                    last = replace(last, high=interval.high, has_high=interval.has_high)
                elif order == 0:
                    last = replace(last, has_high=last.has_high or interval.has_high)
                merged[-1] = last
                continue
        merged.append(interval)
    return merged


def _remove(whole: list[Interval], removed: list[Interval]) -> list[Interval]:
    """What of `whole` is in none of the intervals removed."""
    for interval in removed:
        below = Interval(_MINUS_INFINITY, interval.low, False, not interval.has_low)
        above = Interval(interval.high, INFINITY, not interval.has_high, False)
        whole = _intersect(whole, [below, above])
    return whole


def _solve(relation: Relation) -> list[Interval] | None:
    """The values of v for v < b, a <= v < b, v != b and the like, v a variable, f(...) or |v|; linear in v."""
    atoms = {n for side in relation.sides for n in walk(side) if isinstance(n, Symbol)}
    calls = {
        n
        for side in relation.sides
        for n in walk(side)
        if isinstance(n, Apply) and (n.function.startswith("call:") or n.function == "abs") and symbols(n)
    }
    candidates = calls or atoms
    if len(candidates) != 1 or "=" in relation.operators or "≈" in relation.operators:
        return None
    (atom,) = candidates
    result: list[Interval] | None = None
    for operator, left, right in zip(relation.operators, relation.sides, relation.sides[1:], strict=False):
        is_bound = _is_infinite(left) or _is_infinite(right)
        part = _bounded_by_infinity(left, operator, right) if is_bound else _solve_linear(left, operator, right, atom)
        if part is None:
            return None
        result = part if result is None else _intersect(result, part)
    if result is not None and isinstance(atom, Apply) and atom.function == "abs":
        return _preimage(_without_absolute(result), atom.arguments[0])
    return result


def _bounded_by_infinity(left: Node, operator: str, right: Node) -> list[Interval] | None:
    """-oo < x and x < oo hold for all reals."""
    low, high = (left, right) if operator in "<≤" else (right, left)
    is_true = operator in "<≤>≥" and (_is_infinite(low) < 0 or _is_infinite(high) > 0)
    return [Interval(_MINUS_INFINITY, INFINITY, False, False)] if is_true else None


def _line(node: Node, atom: Node) -> tuple[Node, Node] | None:
    """(slope, value at 0) of what is linear in `atom` with constant coefficients, and not constant."""
    at = [substitute(node, atom, Number(Fraction(k))) for k in range(4)]
    if any(symbols(value) for value in at):
        return None
    slope = subtract(at[1], at[0])
    if not scalars_equal(subtract(at[2], at[1]), slope) or not scalars_equal(subtract(at[3], at[2]), slope):
        return None
    return None if scalars_equal(slope, ZERO) else (slope, at[0])


def _preimage(values: list[Interval], line: Node) -> list[Interval] | None:
    """The x for which a x + b is in `values`."""
    names = [n for n in walk(line) if isinstance(n, Symbol)]
    found = _line(line, names[0]) if is_scalar(line) and len(set(names)) == 1 else None
    if found is None:
        return None
    slope, offset = found
    is_rising = is_positive(slope)
    parts = []
    for interval in values:
        low, high = (_root_at(end, slope, offset, is_rising) for end in (interval.low, interval.high))
        rising = Interval(low, high, interval.has_low, interval.has_high)
        parts.append(rising if is_rising else Interval(high, low, interval.has_high, interval.has_low))
    return parts


def _root_at(value: Node, slope: Node, offset: Node, is_rising: bool) -> Node:
    """The x with slope x + offset = value."""
    if _is_infinite(value):
        return value if is_rising else _minus(value)
    return Apply("/", (subtract(value, offset), slope))


def _solve_linear(left: Node, operator: str, right: Node, atom: Node) -> list[Interval] | None:
    """Solves left <operator> right, where the difference is linear in `atom` with constant coefficients."""
    found = _line(subtract(left, right), atom)
    if found is None or operator not in _FLIPPED:
        return None
    slope, offset = found
    root = Apply("/", (negate(offset), slope))
    if not is_positive(slope):
        operator = _FLIPPED[operator]
    below = Interval(_MINUS_INFINITY, root, False, operator == "≤")
    above = Interval(root, INFINITY, operator == "≥", False)
    return {"<": [below], "≤": [below], ">": [above], "≥": [above], "≠": [below, above]}.get(operator)


def _intersect(a: list[Interval], b: list[Interval]) -> list[Interval]:
    parts = []
    for x in a:
        for y in b:
            low = x if _compare(x.low, y.low) > 0 or (_compare(x.low, y.low) == 0 and not x.has_low) else y
            high = x if _compare(x.high, y.high) < 0 or (_compare(x.high, y.high) == 0 and not x.has_high) else y
            parts.append(Interval(low.low, high.high, low.has_low, high.has_high))
    return _merge(parts)


def _without_absolute(values: list[Interval]) -> list[Interval]:
    """{x : |x| in values}."""
    parts = []
    for interval in _intersect(values, [Interval(ZERO, INFINITY, True, False)]):
        parts.append(interval)
        parts.append(Interval(_minus(interval.high), _minus(interval.low), interval.has_high, interval.has_low))
    return _merge(parts)


def _minus(node: Node) -> Node:
    return negate(node) if node != ONE else Number(Fraction(-1))

"""What an equation says: the value that it states, and the names that stand for one."""

from fractions import Fraction

from actors.verifier.numeric import Undefined, evaluate
from actors.verifier.scalars import scalars_equal
from actors.verifier.tree import Apply, Matrix, Node, Number, Relation, Sequence, Symbol, is_constant, symbols


def value_of(relation: Relation) -> Node | None:
    """What `x = 5`, `f(x) = ... = x^2` or `2 + 3 = 5` states as its value; None where it is a true equation.

    In a chain the last side before an approximation counts.
    """
    if not set(relation.operators) <= {"=", "≈"}:
        return None
    sides = list(relation.sides)
    if "≈" in relation.operators:
        position = relation.operators.index("≈")
        is_only_named = position == 0 and is_name(sides[0])
        if not is_only_named and not _approximates(sides[position + 1], sides[position]):
            return None if not is_name(sides[0]) else sides[position]
        sides = sides[:2] if is_only_named else sides[: position + 1]
    if len(sides) == 1:
        return sides[0] if is_constant(sides[0]) else None
    first, last = sides[0], sides[-1]
    if isinstance(last, Matrix) and isinstance(first, Apply) and first.function == "^":  # A^{-1} = ..., A^T = ...
        return last if isinstance(first.arguments[0], Symbol) else None
    if is_name(first):
        own = symbols(first) if isinstance(first, Symbol) else set()
        return last if not own & symbols(last) else None
    if is_name(last) and len(sides) == 2 and not symbols(first):
        return first
    if not all(map(is_constant, sides)):
        return None
    return last if all(scalars_equal(side, last) for side in sides[:-1]) else None  # 41 = 42 states nothing


def _approximates(rounded: Node, value: Node) -> bool:
    """Whether a number is another one rounded to its last place, or up to a hundredth; true where that is not known."""
    if not (is_constant(rounded) and is_constant(value)):
        return True
    try:
        exact, near = evaluate(value, 30), evaluate(rounded, 30)
    except Undefined:
        return False
    places = Fraction(1)
    if isinstance(rounded, Number):
        while (rounded.value / places).denominator > 1 and places > Fraction(1, 10**12):
            places /= 10
    distance = abs(exact - near)
    if distance * 100 <= abs(exact):
        return True
    is_cut = places < 1 and abs(near) < abs(exact)  # 0.66 for 2/3
    return bool(2 * distance * places.denominator <= (2 if is_cut else 1))


def is_name(node: Node) -> bool:
    """Whether a side of an equation names something: x, f(x), |AB|, a:b, (x, y), without arithmetic."""
    match node:
        case Symbol():
            return True
        case Relation():  # within P(X = 2)
            return True
        case Matrix():
            return all(is_name(entry) for row in node.rows for entry in row)
        case Apply(function="sin" | "cos" | "tan" | "cot", arguments=(angle,)):
            return isinstance(angle, Symbol)
        case Apply(function="*" | "ratio" | "abs" | "/" | "overline" | "union" | "intersection"):
            return all(is_name(argument) for argument in node.arguments)
        case Apply():
            return node.function.startswith("call:")
        case Sequence(brackets="()"):
            return all(is_name(item) for item in node.items)
    return False

"""Whether two answers say the same: dispatch on what they are (number, tuple, set, equation, matrix, words).

Symmetric by construction: each rule for a pair of different kinds is tried in both orders.
"""

from itertools import combinations

from actors.verifier.naming import is_name, value_of
from actors.verifier.prepare import prepare, without_degrees
from actors.verifier.scalars import ratio_sign, scalars_equal
from actors.verifier.sets import as_set, flip, is_clearly_a_set, sets_equal
from actors.verifier.tree import (
    Apply,
    Matrix,
    Node,
    Number,
    Quantity,
    Relation,
    Sequence,
    Symbol,
    Text,
    base_of,
    is_scalar,
    key,
    replace,
    subtract,
    symbols,
    variables,
)

MAX_ITEMS = 100


def nodes_equal(a: Node, b: Node) -> bool:
    """Whether two trees are the same answer."""
    a, b = prepare(a), prepare(b)
    if key(a) == key(b):
        return True
    return _one_way(a, b) or _one_way(b, a) or _same_kind(a, b)


def _one_way(a: Node, b: Node) -> bool:
    """Rules where only `a` is reduced to something simpler."""
    match a:
        case Quantity() if not isinstance(b, Quantity):
            return a.is_known and _quantity_matches(a, b)
        case Relation(operators=("≡",), sides=(name, Apply(function="residue") as residue)) if is_name(name):
            return isinstance(b, Apply) and b.function == "residue" and nodes_equal(residue, b)
        case Relation() if not isinstance(b, Relation):
            stated = value_of(a)
            return stated is not None and nodes_equal(stated, b)
        case Sequence(brackets="{}", items=(item,)) if not isinstance(b, Sequence) or b.brackets == "()":
            return nodes_equal(item, b)
        case Apply(function="residue", arguments=(value, _)) if is_scalar(b):
            return nodes_equal(value, b)
        case Apply(function="in") if not (isinstance(b, Apply) and b.function == "in"):
            return nodes_equal(a.arguments[1], b)
        case Apply(function="described", arguments=(condition,)):
            return not (isinstance(b, Sequence) and b.brackets == "") and nodes_equal(condition, b)
        case Matrix() if isinstance(b, Sequence) and (rows := _rows(b)) is not None:
            return _same_kind(a, Matrix(rows))
        case Matrix() if isinstance(b, Sequence) and b.brackets == "()" and len(a.rows[0]) == 1:
            return _items_equal([row[0] for row in a.rows], list(b.items), is_ordered=True)
    return False


def _rows(sequence: Sequence) -> tuple[tuple[Node, ...], ...] | None:
    """The rows of a matrix that is written [[1, 2], [3, 4]]."""
    rows = [item.items for item in sequence.items if isinstance(item, Sequence) and item.brackets == "[]"]
    is_matrix = sequence.brackets == "[]" and len(rows) == len(sequence.items) and len(set(map(len, rows))) == 1
    return tuple(rows) if is_matrix else None


def _quantity_matches(quantity: Quantity, bare: Node) -> bool:
    """A unit that only one side gives is dropped; degrees also equal their value in radians."""
    if nodes_equal(quantity.value, bare):
        return True
    in_radians = quantity.unit == "degree" and is_scalar(bare) and is_scalar(quantity.value)
    return in_radians and scalars_equal(Apply("degree", (quantity.value,)), bare)


def _same_kind(a: Node, b: Node) -> bool:
    match a, b:
        case Text(), _:
            return False
        case Quantity(), Quantity():
            return a.unit == b.unit and nodes_equal(a.value, b.value)
        case Matrix(), Matrix():
            rows = list(zip(a.rows, b.rows, strict=False))
            same_shape = len(a.rows) == len(b.rows) and len(a.rows[0]) == len(b.rows[0])
            return same_shape and all(_items_equal(list(x), list(y), is_ordered=True) for x, y in rows)
        case Sequence(), Sequence() if _sequences_equal(a, b):
            return True
        case Relation(), Relation() if _relations_equal(a, b):
            return True
        case Apply(function="ratio"), Apply(function="ratio"):
            return _ratios_equal(a, b)
        case Apply(function="residue"), Apply(function="residue"):
            return _residues_equal(a, b)
        case Apply(function="in" | "where" as f), Apply(function=g) if f == g:
            return nodes_equal(a.arguments[0], b.arguments[0]) and nodes_equal(a.arguments[1], b.arguments[1])
    if is_scalar(a) and is_scalar(b):
        if base_of(a) != base_of(b):  # 1011_2 asks for base two, and is no way to write 11
            return False
        return scalars_equal(a, b) or _equal_in_degrees(a, b)
    if variables(a) and variables(b) and variables(a) != variables(b):
        return False
    if is_clearly_a_set(a) or is_clearly_a_set(b):
        set_a, set_b = as_set(a), as_set(b)
        return set_a is not None and set_b is not None and sets_equal(set_a, set_b)
    return False


def _equal_in_degrees(a: Node, b: Node) -> bool:
    """180° - 2x and 180 - 2x: where one side writes no degrees, or leaves open what an unknown angle is measured in."""
    plain_a, plain_b = without_degrees(a), without_degrees(b)
    if plain_a == a and plain_b == b:
        return False
    is_open = plain_a == a or plain_b == b or bool(symbols(a))
    return is_open and scalars_equal(plain_a, plain_b)


def _residues_equal(a: Apply, b: Apply) -> bool:
    """3 (mod 5) and 8 (mod 5) are the same class."""
    (x, modulus), (y, other) = a.arguments, b.arguments
    if not nodes_equal(modulus, other):
        return False
    return nodes_equal(x, y) or nodes_equal(Apply("mod", (x, modulus)), Apply("mod", (y, modulus)))


def _ratios_equal(a: Apply, b: Apply) -> bool:
    """a:b:c as proportions, unless it may be a time of day such as 10:30, which is no proportion."""
    x, y = a.arguments, b.arguments
    if len(x) != len(y):
        return False
    if _items_equal(list(x), list(y), is_ordered=True):
        return True
    return not (_is_time(a) or _is_time(b)) and all(
        nodes_equal(Apply("*", (x[i], y[j])), Apply("*", (x[j], y[i]))) for i, j in combinations(range(len(x)), 2)
    )


def _is_time(ratio: Apply) -> bool:
    match ratio.arguments:
        case (Number(value=hours), Number(value=minutes)):
            return hours <= 24 and (minutes == 0 or 10 <= minutes < 60)
    return False


def _sequences_equal(a: Sequence, b: Sequence) -> bool:
    kinds = {a.brackets, b.brackets}
    left, right = _values(a), _values(b)
    if kinds <= {"", "{}"}:
        names = _names_given(a), _names_given(b)
        if all(names) and names[0].isdisjoint(names[1]):  # x = 2k, k in Z is not y = 2k, k in Z
            return False
        if _is_assignments(a) and _is_assignments(b) and not _name_one_unknown(a, b):
            return _items_equal(list(a.items), list(b.items), is_ordered=False)
        is_ordered = "{}" not in kinds and _is_ordered_list(a, b)
        as_sets = "{}" in kinds or any(isinstance(item, Sequence) for item in (*left, *right))
        return _items_equal(left, right, is_ordered=is_ordered, drop_repeated=as_sets and not is_ordered)
    is_list_in_brackets = kinds == {"", "[]"} and len(left) != 2  # [1, 2] is an interval
    if kinds == {"", "()"} and (_gives_roots(a) or _gives_roots(b)):
        return False
    if len(kinds) == 1 or kinds == {"", "()"} or is_list_in_brackets:
        return _items_equal(left, right, is_ordered=True)
    return False


def _names_given(sequence: Sequence) -> set[str]:
    """The names on the left of the items' equations, without their indices."""
    equations = [item for item in sequence.items if isinstance(item, Relation) and item.operators[0] == "="]
    return {e.sides[0].name.partition("_")[0] for e in equations if isinstance(e.sides[0], Symbol)}


def _is_ordered_list(a: Sequence, b: Sequence) -> bool:
    """`AB = 4, CD = 5` against `4, 5`, and lists that go on with dots, are compared item by item."""
    if any(isinstance(n, Symbol) and n.name == "..." for n in (*a.items, *b.items)):
        return True
    return _is_assignments(a) != _is_assignments(b) and (_names_differ(a) or _names_differ(b))


def _gives_roots(sequence: Sequence) -> bool:
    """Whether a list gives the values of one unknown, x = 1, x = 2 or x = 1, 2, and therefore no point."""
    equations = [item for item in sequence.items if isinstance(item, Relation) and value_of(item) is not None]
    names = {key(equation.sides[0]) for equation in equations}
    return sequence.brackets == "" and len(names) == 1 and (len(equations) > 1 or sequence.items[0] == equations[0])


def _is_assignments(sequence: Sequence) -> bool:
    return len(sequence.items) > 1 and all(
        isinstance(item, Relation) and value_of(item) is not None for item in sequence.items
    )


def _names_differ(sequence: Sequence) -> bool:
    """Whether a list of assignments names different quantities; x_1 = 2, x_2 = 3 are the values of one unknown."""
    if not _is_assignments(sequence):
        return False
    names = [item.sides[0] for item in sequence.items if isinstance(item, Relation)]
    plain = [n.name for n in names if isinstance(n, Symbol)]
    heads = {name.partition("_")[0] for name in plain}
    indices = [name.partition("_")[2] for name in plain]
    is_numbered = len(heads) == 1 and indices == [str(k + 1) for k in range(len(names))]
    return len({key(n) for n in names}) > 1 and not is_numbered


def _name_one_unknown(a: Sequence, b: Sequence) -> bool:
    """x = 1, x = 3 against x_1 = 1, x_2 = 3."""
    is_repeated = [len({key(item.sides[0]) for item in s.items if isinstance(item, Relation)}) == 1 for s in (a, b)]
    return is_repeated[0] != is_repeated[1] and not _names_differ(a) and not _names_differ(b)


def _values(sequence: Sequence) -> list[Node]:
    """The items with `x = 5` read as 5 and with lists of assignments read as tuples."""
    values: list[Node] = []
    for item in sequence.items:
        value = value_of(item) if isinstance(item, Relation) else None
        if isinstance(item, Sequence) and _is_assignments(item):
            value = Sequence("()", tuple(_values(item)))
        values.append(value if value is not None else item)
    return values


def _items_equal(a: list[Node], b: list[Node], is_ordered: bool, drop_repeated: bool = False) -> bool:
    if len(a) > MAX_ITEMS or len(b) > MAX_ITEMS:
        return False
    if drop_repeated:
        a, b = _distinct(a), _distinct(b)
    if len(a) != len(b):
        return False
    if is_ordered:
        return all(nodes_equal(x, y) for x, y in zip(a, b, strict=True))
    rest = list(b)
    for item in a:
        match = next((k for k, other in enumerate(rest) if nodes_equal(item, other)), None)
        if match is None:
            return False
        rest.pop(match)
    return True


def _distinct(items: list[Node]) -> list[Node]:
    kept: list[Node] = []
    for item in items:
        if not any(nodes_equal(item, other) for other in kept):
            kept.append(item)
    return kept


def _relations_equal(a: Relation, b: Relation) -> bool:
    b = _with_variable_of(a, b)
    value_a, value_b = value_of(a), value_of(b)
    if value_a is not None and value_b is not None:
        names = a.sides[0], b.sides[0]
        if (
            key(names[0]) == key(names[1])
            or _name_one_function(*names)
            or not any(is_name(name) or symbols(name) for name in names)
        ):
            return nodes_equal(value_a, value_b)
    left, right = _links(a), _links(b)
    if len(left) != len(right):
        return False
    rest = list(right)
    for link in left:
        match = next((k for k, other in enumerate(rest) if _links_equal(link, other)), None)
        if match is None:
            return False
        rest.pop(match)
    return True


def _name_one_function(a: Node, b: Node) -> bool:
    """`y = ...` and `f(x) = ...` give the same function of x."""
    for name, call in ((a, b), (b, a)):
        match name, call:
            case Symbol(name="y"), Apply(function=function, arguments=(Symbol(name=variable),)):
                return function.startswith("call:") and variable != "y"
    return False


def _with_variable_of(a: Relation, b: Relation) -> Relation:
    """`b`, with f(t) = t^2 written in the variable of `a`, which is f(x) = ...: the name does not matter."""
    match a.sides[0], b.sides[0]:
        case (
            Apply(function=f, arguments=(Symbol() as new,)),
            Apply(function=g, arguments=(Symbol() as old,)),
        ) if f == g and f.startswith("call:") and new.name not in symbols(b) and _is_variable(old, new, b):
            renamed = replace(b, old, new)
            return renamed if isinstance(renamed, Relation) else b
    return b


def _is_variable(old: Symbol, new: Symbol, relation: Relation) -> bool:
    """Whether a name in brackets is a variable and no thing of its own, as A and B are in P(A) = 1/2 and P(B) = 1/2."""
    return (old.name.islower() and new.name.islower()) or any(old.name in symbols(s) for s in relation.sides[1:])


def _links(relation: Relation) -> list[tuple[str, Node, Node]]:
    return list(zip(relation.operators, relation.sides, relation.sides[1:], strict=False))


def _links_equal(a: tuple[str, Node, Node], b: tuple[str, Node, Node]) -> bool:
    """Whether two relations differ by rearrangement: left - right is a constant times the other's."""
    (operator_a, *sides_a), (operator_b, *sides_b) = a, b
    if operator_b not in (operator_a, flip(operator_a)):
        return False
    if not all(is_scalar(side) for side in (*sides_a, *sides_b)):
        return operator_a == operator_b and all(nodes_equal(x, y) for x, y in zip(sides_a, sides_b, strict=True))
    difference_a, difference_b = subtract(*sides_a), subtract(*sides_b)
    if not symbols(difference_a) or not symbols(difference_b):  # f(1) < f(2)
        if operator_a == operator_b and all(nodes_equal(x, y) for x, y in zip(sides_a, sides_b, strict=True)):
            return True
        return operator_b == flip(operator_a) and all(
            nodes_equal(x, y) for x, y in zip(sides_a, reversed(sides_b), strict=True)
        )
    sign = ratio_sign(difference_a, difference_b)
    if sign is None:
        return False
    return operator_b == (operator_a if sign > 0 else flip(operator_a))

"""Whether two answers say the same: dispatch on what they are (number, tuple, set, equation, matrix, words).

Symmetric by construction: each rule for a pair of different kinds is tried in both orders.
"""

from itertools import combinations

from actors.verifier.matrices import simplify_matrices
from actors.verifier.scalars import ratio_sign, scalars_equal
from actors.verifier.sets import as_set, flip, is_clearly_a_set, sets_equal
from actors.verifier.tree import (
    REALS,
    Apply,
    Matrix,
    Node,
    Number,
    Quantity,
    Relation,
    Sequence,
    Symbol,
    Text,
    is_number_set,
    is_scalar,
    key,
    negate,
    replace,
    subtract,
    symbols,
    variables,
    walk,
)

MAX_ITEMS = 100


def nodes_equal(a: Node, b: Node) -> bool:
    """Whether two trees are the same answer."""
    a, b = _prepare(a), _prepare(b)
    if key(a) == key(b):
        return True
    return _one_way(a, b) or _one_way(b, a) or _same_kind(a, b)


def _prepare(node: Node) -> Node:
    """Matrix arithmetic carried out, ± written as the list of its two values, and the k of "k in Z" under one name."""
    node = _expand_signs(simplify_matrices(node))
    match node:
        case Sequence(brackets="", items=(*_, Apply(function="in", arguments=(Symbol() as name, domain)))):
            return replace(node, name, Symbol("parameter")) if domain == REALS or is_number_set(domain) else node
        case Apply(function="percent", arguments=(value,)):
            return Quantity(value, "%")
        case Apply(function="degree", arguments=(value,)):
            return Quantity(value, "degree")
        case Apply(function="neg", arguments=(Apply(function="percent" | "degree" as unit, arguments=(value,)),)):
            return Quantity(negate(value), "%" if unit == "percent" else unit)
    return node


def _expand_signs(node: Node) -> Node:
    if isinstance(node, Sequence):
        items: list[Node] = []
        for item in node.items:
            expanded = _expand_signs(item)
            is_pair = isinstance(expanded, Sequence) and expanded.brackets == "" and _has_sign(item)
            items.extend(expanded.items if is_pair and isinstance(expanded, Sequence) else [item])
        if node.brackets == "()" and _is_one_choice(node):
            return Sequence("", (_choose_sign(node, True), _choose_sign(node, False)))
        return Sequence(node.brackets, tuple(items)) if node.brackets in ("", "{}") else node
    if not _has_sign(node):
        return node
    if isinstance(node, Apply) and node.function in ("union", "intersection", "setminus", "in"):
        return Apply(node.function, tuple(map(_expand_signs, node.arguments)))
    both = _choose_sign(node, True), _choose_sign(node, False)
    if isinstance(node, Relation) and node.operators == ("≠",):
        return Apply("intersection", both)
    return Sequence("", both)


def _has_sign(node: Node) -> bool:
    return any(isinstance(n, Apply) and n.function in ("pm", "mp") for n in walk(node))


def _is_one_choice(point: Sequence) -> bool:
    """Whether (±1, 0) or (±1, ∓2) stands for two points; (±1, ±2) may be two or four."""
    signs = [n.function for n in walk(point) if isinstance(n, Apply) and n.function in ("pm", "mp")]
    return len(signs) == 1 or set(signs) == {"pm", "mp"}


def _choose_sign(node: Node, is_upper: bool) -> Node:
    for found in [n for n in walk(node) if isinstance(n, Apply) and n.function in ("pm", "mp")]:
        is_plus = (found.function == "pm") == is_upper
        node = replace(node, found, found.arguments[0] if is_plus else negate(found.arguments[0]))
    return node


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
        return scalars_equal(a, b)
    if variables(a) and variables(b) and variables(a) != variables(b):
        return False
    if is_clearly_a_set(a) or is_clearly_a_set(b):
        set_a, set_b = as_set(a), as_set(b)
        return set_a is not None and set_b is not None and sets_equal(set_a, set_b)
    return False


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


def value_of(relation: Relation) -> Node | None:
    """What `x = 5`, `f(x) = ... = x^2` or `2 + 3 = 5` states as its value; None where it is a true equation.

    In a chain the last side before an approximation counts.
    """
    if not set(relation.operators) <= {"=", "≈"}:
        return None
    sides = list(relation.sides)
    if "≈" in relation.operators:
        is_only_named = relation.operators[0] == "≈" and is_name(sides[0])
        sides = sides[:2] if is_only_named else sides[: relation.operators.index("≈") + 1]
    if len(sides) == 1:
        return sides[0] if is_scalar(sides[0]) and not symbols(sides[0]) else None
    first, last = sides[0], sides[-1]
    if isinstance(last, Matrix) and isinstance(first, Apply) and first.function == "^":  # A^{-1} = ..., A^T = ...
        return last if isinstance(first.arguments[0], Symbol) else None
    if is_name(first):
        own = symbols(first) if isinstance(first, Symbol) else set()
        return last if not own & symbols(last) else None
    if is_name(last) and len(sides) == 2 and not symbols(first):
        return first
    is_constant = all(is_scalar(side) and not symbols(side) for side in sides)
    return last if is_constant else None


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


def _relations_equal(a: Relation, b: Relation) -> bool:
    b = _with_variable_of(a, b)
    value_a, value_b = value_of(a), value_of(b)
    if value_a is not None and value_b is not None:
        names = a.sides[0], b.sides[0]
        if (
            key(names[0]) == key(names[1])
            or _name_one_function(*names)
            or (not is_name(names[0]) and not is_name(names[1]))
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
        ) if f == g and f.startswith("call:") and new.name not in symbols(b):
            renamed = replace(b, old, new)
            return renamed if isinstance(renamed, Relation) else b
    return b


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

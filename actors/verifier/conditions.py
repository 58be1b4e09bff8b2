"""What several conditions on one variable say together: "x < 1 or x > 3", "x > 1, x < 3", {x | x > 1}."""

from actors.verifier.tree import Apply, Node, Relation, Sequence, Symbol, is_constant, is_scalar, variables


def _is_condition(node: Node) -> bool:
    """Whether an item restricts one variable: inequalities, or membership of a set."""
    if isinstance(node, Relation):
        return not set(node.operators) & set("=≈≡")
    return isinstance(node, Apply) and node.function in ("in", "union", "intersection", "conditions")


def joined(items: list[Node], connectors: set[str]) -> list[Node]:
    """x < 1 or x > 3 is one set of numbers, x > 1 and x < 3 another; commas leave open which of the two is meant.

    x != 1, 2 excludes both.
    """
    match items:
        case [Relation(operators=("≠",), sides=(Symbol(), _)) as first, *points] if points and all(
            map(is_constant, points)
        ):
            others = (Relation(first.operators, (first.sides[0], point)) for point in points)
            return [Apply("intersection", (first, *others))]
    name = variables(items[0])
    is_of_one = len(name) == 1 and all(variables(item) == name for item in items)
    if not is_of_one or connectors == {"and", "or"}:
        return items
    is_point = [isinstance(item, Relation) and item.operators == ("=",) and is_scalar(item.sides[-1]) for item in items]
    conditions = [_is_condition(item) for item in items]
    if not any(conditions) or not all(a or b for a, b in zip(is_point, conditions, strict=True)):
        return items
    function = {"and": "intersection", "or": "union"}.get("".join(connectors), "conditions")
    return [Apply(function, tuple(items))]


def described(items: list[Node], conditions: list[Node]) -> Node:
    """{x | x > 3} is the set of x > 3, {x in S | x > 3} also that of x in S; {2k | k in S} lists 2k and k in S."""
    head = items[0]
    if isinstance(head, Apply) and head.function == "in":
        head, conditions = head.arguments[0], [head, *conditions]
    if len(items) == 1 and isinstance(head, Symbol) and all(map(_is_condition, conditions)):
        return Apply(
            "described", (conditions[0] if len(conditions) == 1 else Apply("intersection", tuple(conditions)),)
        )
    return Sequence("", (*items, *conditions))

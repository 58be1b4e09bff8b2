"""The form in which a tree is compared: matrices worked out, ± as two values, degrees and percent as units."""

from actors.verifier.matrices import simplify_matrices
from actors.verifier.tree import (
    REALS,
    Apply,
    Node,
    Quantity,
    Relation,
    Sequence,
    Symbol,
    is_number_set,
    negate,
    replace,
    walk,
)


def prepare(node: Node) -> Node:
    """Matrix arithmetic carried out, ± written as the list of its two values, and the k of "k in Z" under one name."""
    node = _expand_signs(simplify_matrices(node))
    match node:
        case Sequence(brackets="", items=(*_, Apply(function="in", arguments=(Symbol() as name, domain)))):
            return replace(node, name, Symbol("parameter")) if domain == REALS or is_number_set(domain) else node
        case Apply(function="percent", arguments=(value,)):
            return Quantity(value, "%")
        case Apply(function="degree", arguments=(value,)):
            return Quantity(value, "degree")
        case Apply(function="neg", arguments=(Apply(function="numeral", arguments=(value, base)),)):
            return Apply("numeral", (negate(value), base))
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
    if isinstance(node, Apply) and node.function in ("union", "intersection", "setminus", "in", "described"):
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


def without_degrees(node: Node) -> Node:
    """The tree with degree signs left away from its terms, but not from arguments of functions."""
    match node:
        case Apply(function="degree", arguments=(value,)):
            return value
        case Apply(function="+" | "*" | "/" | "neg" as function, arguments=arguments):
            return Apply(function, tuple(map(without_degrees, arguments)))
    return node

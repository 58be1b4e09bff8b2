"""Builds tree nodes from the pieces that the parser has read: functions, numerals in a base, units."""

from collections.abc import Callable
from fractions import Fraction

from actors.verifier.matrices import determinant
from actors.verifier.tokens import ParseError, Token
from actors.verifier.tree import ONE, REALS, TWO, Apply, Matrix, Node, Number, Relation, Sequence, Symbol

# Functions that are 1 over another one, and those that are another one of 1/x.
_RECIPROCALS = {"coth": "tanh", "sech": "cosh", "csch": "sinh"}
_AT_RECIPROCALS = {
    **{"arcsec": "arccos", "arccsc": "arcsin"},
    **{"arccoth": "arctanh", "arcsech": "arccosh", "arccsch": "arcsinh"},
}
INVERTIBLE = frozenset({"sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", *_RECIPROCALS})


def flat(tokens: tuple[Token, ...]) -> str:
    """The tokens of a subscript as one string; different structures give different strings."""
    return "".join(
        flat(token.parts[0]) if token.kind == "group" else token.text + _flat_parts(token) for token in tokens
    )


def _flat_parts(token: Token) -> str:
    return f"{token.kind}[{'|'.join(flat(part) for part in token.parts)}]" if token.parts else ""


def canonical(tokens: tuple[Token, ...]) -> str:
    """The tokens as one string, the same for two lists only if they differ in nothing but signs of multiplication and
    braces around one token."""
    pieces = []
    for token in tokens:
        if token.kind == "group":
            inside = canonical(token.parts[0])
            pieces.append(inside if len(token.parts[0]) == 1 else f"{{{inside}}}")
        elif token != Token("op", "*"):
            parts = "|".join(canonical(part) for part in token.parts)
            pieces.append(f"{token.kind} {token.text}[{parts}]" if token.parts else token.text)
    return " ".join(pieces)


def product(left: Node, right: Node) -> Node:
    return Apply("*", (*left.arguments, right) if isinstance(left, Apply) and left.function == "*" else (left, right))


def named_point(node: Node) -> Node:
    """A(1, 2) names the point (1, 2)."""
    match node:
        case Apply(function="*", arguments=(Symbol(name=name) as point, Sequence(brackets="()") as place)):
            return Relation(("=",), (point, place)) if name[0].isupper() else node
    return node


def apply_function(name: str, base: Node | None, arguments: list[Node]) -> Node:
    match name, arguments:
        case "log", [x] if base is not None:
            return Apply("log", (base, x))
        case "log" | "ln", [x] if base is None:
            return Apply("ln", (x,))
        case "lg", [x]:
            return Apply("log", (Number(Fraction(10)), x))
        case "sqrt" | "cbrt", [x]:
            return Apply("root", (x, base or Number(Fraction(2 if name == "sqrt" else 3))))
        case "factorial", [x]:
            return Apply("!", (x,))
        case _, [x] if name in _RECIPROCALS:
            return Apply("/", (ONE, Apply(_RECIPROCALS[name], (x,))))
        case _, [x] if name in _AT_RECIPROCALS:
            return Apply(_AT_RECIPROCALS[name], (Apply("/", (ONE, x)),))
        case "det", [Matrix() as matrix]:
            return determinant(matrix)
        case "det", [Symbol() as matrix]:
            return Apply("call:det", (matrix,))
        case (("max" | "min" | "gcd" | "lcm"), [_, *_]):
            return Apply(name, tuple(arguments))
        case "binomial", [n, k]:
            return Apply("binomial", (n, k))
        case _, [x] if base is None and name not in ("binomial", "log", "det"):
            return Apply(name, (x,))
    raise ParseError(f"arguments of {name}")


def in_base(numeral: str, subscript: str) -> Node:
    names = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
    base = int(subscript) if subscript.isdigit() and len(subscript) < 3 else names.get(subscript.lower(), 0)
    if not 2 <= base <= 36:
        raise ParseError("base")
    try:
        value = Number(Fraction(int(numeral, base)))
    except ValueError as error:
        raise ParseError("digit beyond the base") from error
    return value if base == 10 else Apply("numeral", (value, Number(Fraction(base))))


def structured(token: Token, parse: Callable[[tuple[Token, ...]], Node]) -> Node:
    """The node of a token that carries its arguments, each of which `parse` reads."""
    parts = token.parts
    match token.kind:
        case "frac":
            return Apply("/", (parse(parts[0]), parse(parts[1])))
        case "binom":
            return Apply("binomial", (parse(parts[0]), parse(parts[1])))
        case "root":
            return Apply("root", (parse(parts[0]), parse(parts[1]) if len(parts) > 1 else TWO))
        case "overline":
            return Apply("overline", (parse(parts[0]),))
        case "numbers":
            return REALS if token.text == "R" else Symbol(f"set {token.text}")
        case "empty":
            return Sequence("{}", ())
        case "matrix":
            rows = tuple(tuple(parse(cell) for cell in row.parts) for row in parts[0])
            if not rows or len({len(row) for row in rows}) != 1:
                raise ParseError("ragged matrix")
            matrix = Matrix(rows)
            return determinant(matrix) if token.text == "vmatrix" else matrix
    raise ParseError(f"unexpected {token.kind} {token.text}")

"""The part of the parser that reads one expression: sums, products, powers, functions, and what stands in brackets."""

from abc import abstractmethod
from fractions import Fraction

from actors.verifier.build import flat, in_base, product, structured
from actors.verifier.conditions import described
from actors.verifier.functions import ARGUMENT, FunctionParser
from actors.verifier.matrices import determinant
from actors.verifier.tokens import ParseError, Token, repeating_decimal
from actors.verifier.tree import (
    Apply,
    Constant,
    Matrix,
    Node,
    Number,
    Sequence,
    Symbol,
    negate,
    symbols,
)
from actors.verifier.vocabulary import CONSTANT_NAMES, UNIT_LETTERS_OF_TEXT

_CALLABLE = frozenset("fghFGH")  # f(x+1) is a call; a(x+1) is a product
_PRIMARY = ARGUMENT - {"num"} | {"letter", "func", "matrix", "series", "numbers", "mark", "lim", "opaque", "empty"}
_CONDITIONAL = ["open", "sym", "bar", "sym", "close"]  # (A | B)


def _signed(sign: str, node: Node) -> Node:
    match sign:
        case "-":
            return negate(node)
        case "±":
            return Apply("pm", (node,))
        case "∓":
            return Apply("mp", (node,))
    return node


class ExpressionParser(FunctionParser):
    """A cursor over one token list that reads expressions; what lists and sides are, a subclass says."""

    def __init__(self, tokens: tuple[Token, ...]) -> None:
        super().__init__(tokens)
        self._open_bars = 0
        self._is_describing = False

    @abstractmethod
    def items(self) -> list[Node]:
        """The items of a list up to what ends it; one item is a list as well."""

    @abstractmethod
    def side(self) -> Node:
        """One side of a relation."""

    def at_membership(self) -> bool:
        """Whether (k in Z) follows, which is no factor."""
        if not self.at("open", "("):
            return False
        name, relation = self.peek(1), self.peek(2)
        return name is not None and name.kind == "sym" and relation == Token("rel", "∈")

    def ratio(self) -> Node:
        parts = [self._sum()]
        while not self._is_describing and self.accept("op", ":"):
            parts.append(self._sum())
        return parts[0] if len(parts) == 1 else Apply("ratio", tuple(parts))

    def _sum(self) -> Node:
        terms: list[Node] = []
        while True:
            if terms and not self.at("op", "+", "-", "±", "∓"):
                break
            signs: list[str] = []
            while (sign := self.accept("op", "+", "-", "±", "∓")) is not None:
                signs.append(sign.text)
            node = self.term()
            if terms and signs == ["-"] and isinstance(node, Sequence) and node.brackets == "{}":
                terms = [Apply("setminus", (terms[0] if len(terms) == 1 else Apply("+", tuple(terms)), node))]
                continue
            for text in reversed(signs):
                node = _signed(text, node)
            terms.append(node)
        return terms[0] if len(terms) == 1 else Apply("+", tuple(terms))

    def term(self) -> Node:
        node = self.factor()
        while True:
            if self.accept("op", "*"):
                node = product(node, self._signed_factor())
            elif self.at("op", "/") and not self._is_unit(self.peek(1)):
                self.take()
                node = Apply("/", (node, self._signed_factor()))
            elif self.accept("op", "mod"):
                node = Apply("mod", (node, self._signed_factor()))
            elif self.accept("op", "°"):  # f \circ g
                node = Apply("call:compose", (node, self.factor()))
            elif self.accept("op", "choose"):
                node = Apply("binomial", (node, self.factor()))
            elif self._starts_factor(node):
                node = product(node, self.factor())
            else:
                return node

    @staticmethod
    def _is_unit(token: Token | None) -> bool:
        return token is not None and token.kind in ("word", "letter")

    def _starts_factor(self, left: Node) -> bool:
        """Whether the next token continues a product without a sign."""
        token = self.peek()
        if token is None:
            return False
        if token.kind == "open":
            return token.text in "([⌊⌈|" and not isinstance(left, Sequence) and not self.at_membership()
        if token.kind == "bar":
            return self._open_bars == 0
        if token.kind == "letter" and not isinstance(left, Sequence):  # after a number a letter of a text is its unit
            return token.text in CONSTANT_NAMES or token.text not in UNIT_LETTERS_OF_TEXT or bool(symbols(left))
        if token.kind == "letter" or (token.kind == "sym" and token.text == "U"):
            return not isinstance(left, Number | Sequence)
        if token.kind == "num" and not isinstance(left, Number | Sequence):  # n2^{n-1}, 2!3!; x2 is open to doubt
            is_factorial = isinstance(left, Apply) and left.function in ("!", "!!")
            return is_factorial or self.peek(1) in (Token("op", "^"), Token("op", "!"))
        return token.kind in _PRIMARY

    def _signed_factor(self) -> Node:
        if self.accept("op", "-"):
            return negate(self._signed_factor())
        self.accept("op", "+")
        return self.factor()

    def factor(self) -> Node:
        node = self.primary()
        while True:
            if self.accept("op", "!"):
                function = "!!" if self.accept("op", "!") else "!"
                if self.at("op", "!"):
                    raise ParseError("more than a double factorial")
                node = Apply(function, (node,))
            elif self.accept("op", "%"):
                node = Apply("percent", (node,))
            elif self.accept("degree"):
                node = Apply("degree", (node,))
            elif self.at("op", "'") and isinstance(node, Symbol):
                node = Symbol(node.name + self.take().text)
            elif self.accept("op", "_"):
                node = self._subscripted(node)
            elif self.accept("op", "^"):
                node = self.raised(node)
            else:
                return self._called(node)

    def _subscripted(self, node: Node) -> Node:
        subscript = flat((self.take(),)).strip("()")
        match node:
            case Symbol(name=name) | Constant(name="pi" | "e" | "i" as name):
                return Symbol(f"{name}_{subscript}")
            case Apply(function="^" | "overline" as function, arguments=(Symbol(name=name), *others)):  # v^2_0 is v_0^2
                return Apply(function, (Symbol(f"{name}_{subscript}"), *others))
        before = self.tokens[self.position - 3]
        if isinstance(node, Number) and before.kind == "num" and before.text.isdigit():
            return in_base(before.text, subscript.removeprefix("base"))
        raise ParseError("subscript")

    def raised(self, node: Node) -> Node:
        token = self.take()
        if token.kind == "group":
            inside = token.parts[0]
            if inside and all(t.kind == "op" and t.text == "'" for t in inside) and isinstance(node, Symbol):
                return Symbol(node.name + "'" * len(inside))
            if isinstance(node, Symbol) and node.name in _CALLABLE and flat(inside) == "-1" and self.at("open", "("):
                return Symbol(node.name + "^-1")
            if len(inside) == 1 and inside[0] == Token("op", "°"):
                return Apply("degree", (node,))
            return Apply("^", (node, self.nested(inside)))
        if token == Token("op", "°"):
            return Apply("degree", (node,))
        if token.kind == "op" and token.text in "+-":
            exponent = self._signed_factor()
            return Apply("^", (node, negate(exponent) if token.text == "-" else exponent))
        if token.kind == "op" and token.text == "*" and isinstance(node, Symbol):
            return Symbol(node.name + "*")
        self.position -= 1
        exponent = self.primary()
        if self.accept("op", "^"):
            exponent = self.raised(exponent)
        return Apply("^", (node, exponent))

    def _called(self, node: Node) -> Node:
        """f(x+1), and y(t) for any letter before a single letter in brackets."""
        if not isinstance(node, Symbol) or not self.at("open", "("):
            return node
        inner, after = self.peek(1), self.peek(2)
        if node.name == "P" and [t.kind for t in self.tokens[self.position :][:5]] == _CONDITIONAL:
            inside = [self.take().text for _ in _CONDITIONAL]
            return Symbol(node.name + "".join(inside))
        is_single = inner is not None and inner.kind == "sym" and after == Token("close", ")")
        if node.name[0] not in _CALLABLE and not is_single and not self._definesfunction():
            return node
        self.take()
        arguments = self.items()
        if not self.accept("close", ")"):
            raise ParseError("unclosed call")
        return Apply(f"call:{node.name}", tuple(arguments))

    def _definesfunction(self) -> bool:
        """Whether (x, t) = or (100) = follows, as in u(x, t) = 2xt, where A(1, 2) alone names a point."""
        ahead = 1
        while (token := self.peek(ahead)) is not None and token.kind in ("sym", "num", "comma"):
            ahead += 1
        return ahead > 1 and self.peek(ahead) == Token("close", ")") and self.peek(ahead + 1) == Token("rel", "=")

    def primary(self) -> Node:
        token = self.take()
        match token.kind:
            case "num":
                return self._number(token)
            case "sym":
                return self.difference() if token.text == "Delta" else Symbol(token.text)
            case "letter":
                name = token.text
                return Constant(CONSTANT_NAMES[name]) if name in CONSTANT_NAMES else Symbol(name)
            case "const":
                return Constant(token.text)
            case "func":
                return self.function(token.text, self.nested(token.parts[0]) if token.parts else None)
            case "group":
                return self.nested(token.parts[0])
            case "open":
                return self._bracketed(token.text)
            case "bar":
                return self._absolute()
            case "series":
                return self.series(token.text)
            case "lim":
                return self.limit()
            case "opaque":
                return self.opaque(token.text)
            case "mark":
                return self.marked(token.text)
        return structured(token, self.nested)

    def _number(self, token: Token) -> Node:
        assert token.value is not None
        after = self.peek()
        is_integer = token.text.isdigit()
        if after is not None and after.kind == "overline" and "." in token.text:
            period = flat(after.parts[0])
            if not period.isdigit():
                raise ParseError("repeating digits")
            self.take()
            return Number(repeating_decimal(token.text, period))
        if is_integer and after is not None and after.kind == "frac":
            top, bottom = (flat(part) for part in after.parts)
            if top.isdigit() and bottom.isdigit() and int(top) < int(bottom):
                self.take()
                return Number(token.value + Fraction(int(top), int(bottom)))
        return Number(token.value, token.digits)

    def _bracketed(self, opening: str) -> Node:
        if opening == "|":
            return self._absolute()
        if opening == "{" and self.accept("close", "}"):
            return Sequence("{}", ())
        # Within \\{x | x > 0\\} a bar is no absolute value, and within \\{x : x > 0\\} a colon no ratio.
        saved = self._open_bars, self._is_describing
        self._open_bars = int(opening == "{")
        self._is_describing = opening == "{" and any(token.kind == "rel" for token in self.tokens[self.position :])
        groups = [self.items()]
        while self.accept("semi"):
            groups.append(self.items())
        if len(groups) > 1 and any(len(group) > 1 for group in groups):
            raise ParseError("commas and semicolons")
        items = [item for group in groups for item in group]
        is_described = opening == "{" and (self.accept("bar") or self.accept("op", ":")) is not None
        conditions = self.items() if is_described else []
        self._open_bars, self._is_describing = saved
        closing = self.take()
        if closing.kind != "close":
            raise ParseError(f"{closing.text} within {opening}")
        if conditions:
            return described(items, conditions)
        pair = opening + closing.text
        if len(items) == 1 and pair in ("()", "[]"):
            return items[0]
        match pair:
            case "⌊⌋" | "⌈⌉" if len(items) == 1:
                return Apply("floor" if opening == "⌊" else "ceil", (items[0],))
            case "<>":
                return Sequence("()", tuple(items))
            case "()" | "[]" | "{}":
                return Sequence(pair, tuple(items))
            case "[)" | "(]" if len(items) == 2:
                return Sequence(pair, tuple(items))
        raise ParseError(f"brackets {pair} around {len(items)} items")

    def _absolute(self) -> Node:
        self._open_bars += 1
        node = self.side()
        self._open_bars -= 1
        if not self.accept("bar") and not self.accept("close", "|"):
            raise ParseError("unclosed |")
        return determinant(node) if isinstance(node, Matrix) else Apply("abs", (node,))

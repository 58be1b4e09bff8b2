"""The part of the parser that reads what a name or a sign applies to: functions, sums, limits, integrals, angles."""

from abc import ABC, abstractmethod
from fractions import Fraction

from actors.verifier.build import INVERTIBLE, apply_function, canonical, product
from actors.verifier.cursor import Cursor
from actors.verifier.tokens import ParseError, Token
from actors.verifier.tree import (
    ZERO,
    Apply,
    Constant,
    Node,
    Number,
    Relation,
    Sequence,
    Symbol,
    names_terms,
    negate,
    replace,
    walk,
)

SEPARATORS = frozenset({"comma", "and"})
ARGUMENT = frozenset({"num", "sym", "const", "frac", "root", "group", "binom", "overline"})
_EXPONENTIAL = (Token("const", "e"), Token("op", "^"))


class FunctionParser(Cursor, ABC):
    """A cursor that reads applications; what terms, factors and so on are, a subclass says."""

    @abstractmethod
    def term(self) -> Node:
        """A product."""

    @abstractmethod
    def factor(self) -> Node:
        """A factor of a product, with its powers."""

    @abstractmethod
    def primary(self) -> Node:
        """What a power or a subscript applies to."""

    @abstractmethod
    def raised(self, node: Node) -> Node:
        """`node` to the power that follows the sign ^."""

    @abstractmethod
    def nested(self, tokens: tuple[Token, ...]) -> Node:
        """The tree of a whole token list, such as an argument of \\frac. Raises ParseError."""

    def difference(self) -> Node:
        """\\Delta x is one name: in \\Delta x / \\Delta t nothing cancels."""
        after = self.peek()
        named = after.parts[0] if after is not None and after.kind == "group" else (after,)
        if len(named) != 1 or named[0] is None or named[0].kind != "sym":
            return Symbol("Delta")
        self.take()
        return Symbol(f"Delta {named[0].text}")

    def marked(self, mark: str) -> Node:
        """An angle or a triangle; of an angle the middle letter counts, not the direction."""
        named = self.term()
        if mark == "angle" and isinstance(named, Symbol):
            named = Symbol(min(named.name, named.name[::-1]))
        return Apply(f"call:{mark}", (named,))

    def opaque(self, name: str) -> Node:
        """An integral: not worked out, but equal to itself and the name of its value in an equation."""
        consumed = []
        while (token := self.peek()) is not None and token.kind not in ("rel", "semi", "close", *SEPARATORS):
            consumed.append(self.take())
        return Apply(f"call:{name} {canonical(tuple(consumed))}", (ZERO,))

    def limit(self) -> Node:
        """A limit: only a name for its value, but of what it is taken is read."""
        place = canonical((self.take(),)) if self.accept("op", "_") else ""
        return Apply(f"call:lim {place}", (self.term(),))

    def series(self, function: str) -> Node:
        """A sum or product over an index from one bound to another; over anything else it is only a name."""
        if not self.accept("op", "_"):
            raise ParseError("series without bounds")
        below = self.take()
        start = self.nested(below.parts[0] if below.kind == "group" else (below,))
        if not isinstance(start, Relation) or start.operators != ("=",) or not self.accept("op", "^"):
            above = f" ^ {canonical((self.take(),))}" if self.accept("op", "^") else ""
            return Apply(f"call:{function} {canonical((below,))}{above}", (self.term(),))
        end = self.primary()
        variable, term = start.sides[0], self.term()
        if isinstance(variable, Symbol | Constant):  # its name does not matter; and i is not the imaginary unit here
            depth = sum(isinstance(n, Apply) and n.function in ("sum", "product") for n in walk(term))
            index = Symbol(f"index {variable.name if names_terms(term, variable.name) else f'#{depth}'}")
            variable, term = index, replace(term, variable, index)
        return Apply(function, (variable, start.sides[1], end, term))

    def function(self, name: str, base: Node | None) -> Node:
        """`base`: the index of a root, which stands before its argument as the base of a logarithm does."""
        if name in ("max", "min") and self.at("rel"):
            return Symbol(name)
        power: Node | None = None
        while self.at("op", "^", "_"):
            if self.take().text == "_":
                base = self.primary()
            else:
                power = self._power()
        arguments = self._arguments()
        if power == Number(Fraction(-1)) and name in INVERTIBLE:
            name, power = f"arc{name}", None
        node = apply_function(name, base, arguments)
        return Apply("^", (node, power)) if power is not None else node

    def _power(self) -> Node:
        """The exponent of \\sin^2."""
        raised = self.raised(Symbol(""))
        if not isinstance(raised, Apply) or raised.function != "^":
            raise ParseError("a function to the power of a sign")
        return raised.arguments[1]

    def _arguments(self) -> list[Node]:
        if self.at("open", "("):
            node = self.primary()
            return list(node.items) if isinstance(node, Sequence) and node.brackets == "()" else [node]
        if self.at("open"):
            node = self.primary()
            return list(node.items) if isinstance(node, Sequence) else [node]
        node = negate(self.factor()) if self.accept("op", "-") else self.factor()
        while (token := self.peek()) is not None and token.kind in ARGUMENT and token.kind != "num":
            if not isinstance(node, Number) and (token, self.peek(1)) == _EXPONENTIAL:  # sin x e^t is sin(x) e^t
                break
            node = product(node, self.factor())
        return [node]

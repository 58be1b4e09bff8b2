# ruff: noqa: RUF001, RUF002  the signs of mathematics are meant as they stand
"""From tokens to the expression tree: a recursive descent parser for the notation of mathematical answers.

    answer  list ((";") list)*                       several items are a list, see Sequence
    list    item (("," | "and" | "or") item)* (("where" | "for" | "if" ...) list)?
    item    side (relation side)*                    with a unit after a number
    side    ratio (("∪" | "∩" | "∖") ratio)*         with \\pmod{n} after it
    ratio   sum (":" sum)*
    sum     sign? term (("+" | "-" | "±" | "∓") term)*
    term    factor (("*" | "/" | "mod" | nothing) factor)*
    factor  primary ("^" exponent | "!" | "%" | degree | prime | subscript)*

From `ratio` on the module terms reads, and functions what a function applies to. Whatever is not in this grammar raises
ParseError; the caller then compares it as text.
"""

from actors.verifier.build import flat, named_point, product, structured
from actors.verifier.conditions import joined
from actors.verifier.functions import SEPARATORS
from actors.verifier.latex import tokenize
from actors.verifier.terms import ExpressionParser
from actors.verifier.tokens import ParseError, Token
from actors.verifier.tree import (
    Apply,
    Node,
    Number,
    Quantity,
    Relation,
    Sequence,
    Symbol,
    Text,
    depth,
    is_constant,
    symbols,
)
from actors.verifier.units import magnitude_and_unit
from actors.verifier.vocabulary import CONDITION_WORDS, NUMBER_SETS

MAX_DEPTH = 100  # of the tree
_CONNECTIVES = {"∪": "or", "∨": "or", "∧": "and"}


def parse(latex: str) -> Node:
    """The tree of one answer in normal notation (see notation.normalize). Raises ParseError."""
    try:
        node = _parse_all(tokenize(latex))
    except RecursionError as error:
        raise ParseError("too deep") from error
    if depth(node) > MAX_DEPTH:
        raise ParseError("too deep")
    return node


def _parse_all(tokens: tuple[Token, ...]) -> Node:
    parser = _Parser(tokens)
    node = parser.answer()
    if parser.peek() is not None:
        raise ParseError(f"unexpected {parser.peek()}")
    return node


def _number_set(node: Node) -> Node:
    """After "in" a plain R or Z is the set of numbers."""
    if isinstance(node, Symbol) and node.name in NUMBER_SETS:
        return structured(Token("numbers", node.name), _parse_all)
    return node


class _Parser(ExpressionParser):
    """Reads lists, relations and units; nested lists (arguments, groups) get a parser of their own."""

    def nested(self, tokens: tuple[Token, ...]) -> Node:
        return _parse_all(tokens)

    def answer(self) -> Node:
        groups = [self.items()]
        while self.accept("semi"):
            if self.peek() is not None:
                groups.append(self.items())
        if len(groups) == 1:
            items = groups[0]
            return items[0] if len(items) == 1 else Sequence("", tuple(items))
        return Sequence("", tuple(g[0] if len(g) == 1 else Sequence("", tuple(g)) for g in groups))

    def items(self) -> list[Node]:
        items, connectors, is_formula = [self._item()], set[str](), False
        while self.at("comma") or self.at("and") or self.at("op", "∪") or self.at_membership():
            if self.at("and", *CONDITION_WORDS):
                return self._with_condition(items, connectors)
            while (token := self.accept("comma") or self.accept("and") or self.accept("op", "∪")) is not None:
                connectors.add(_CONNECTIVES.get(token.text, token.text))
                is_formula = is_formula or token.text in "∧∨"
            if self.peek() is None or self.at("close") or self.at("semi"):
                if connectors & {"and", "or"}:
                    raise ParseError("nothing after a connector")
                break
            items.append(self._item())
        if is_formula and any(isinstance(item, Symbol) for item in items):
            raise ParseError("a formula of logic")
        return joined(items, connectors) if len(items) > 1 else items

    def _with_condition(self, items: list[Node], connectors: set[str]) -> list[Node]:
        """What is said where something holds; "2k for k in Z" is a family like "2k, k in Z"."""
        self.take()
        conditions = self.items()
        if any(isinstance(condition, Apply) and condition.function == "where" for condition in conditions):
            raise ParseError("a condition on a condition")
        if len(conditions) == 1 and isinstance(conditions[0], Apply) and conditions[0].function == "in":
            return [*items, *conditions]
        joint = joined(items, connectors) if len(items) > 1 else items
        parts = (part[0] if len(part) == 1 else Sequence("", tuple(part)) for part in (joint, conditions))
        return [Apply("where", tuple(parts))]

    def _item(self) -> Node:
        if self.at("word"):
            return self._worded_item()
        sides, operators = [self.side()], []
        while self.at("rel") or (self.at("word", "in") and self._is_bracket(self.peek(1))):
            token = self.take()
            operators.append("∈" if token.kind == "word" else token.text)
            sides.append(self.side())
        if not operators:
            return named_point(sides[0])
        match sides[-1]:
            case Apply(function="residue") if set(operators) == {"="}:
                operators = ["≡"] * len(operators)
            case Apply(function="mod", arguments=arguments) if set(operators) == {"≡"}:
                sides[-1] = Apply("residue", arguments)
        if operators == ["∈"]:
            return Apply("in", (sides[0], _number_set(sides[1])))
        if not set(operators) <= set("=≈≠<≤>≥≡"):
            raise ParseError(f"relations {operators}")
        return Relation(tuple(operators), tuple(sides))

    @staticmethod
    def _is_bracket(token: Token | None) -> bool:
        return token is not None and token.kind in ("open", "numbers")

    def _worded_item(self) -> Node:
        """`area = 5` and `Var(X) = 5` name a value; other items that begin with words are text."""
        words = []
        while (token := self.accept("word")) is not None:
            words.append(token.text)
        if self.at("open", "("):
            words.append(self._argument_of_name())
        if self.at("rel", "=", "≈") or self.at("op", ":"):
            self.take()
            return Relation(("=",), (Symbol(" ".join(words)), self.side()))
        while (token := self.peek()) is not None and token.kind not in (*SEPARATORS, "semi", "close"):
            if token.kind not in ("word", "letter", "num", "sym", "const"):
                raise ParseError("a formula among words")
            words.append(self.take().text)
        return Text(" ".join(words))

    def _argument_of_name(self) -> str:
        """(X) before an equals sign."""
        argument: list[Token] = []
        while not argument or argument[-1] != Token("close", ")"):
            argument.append(self.take())
        if not self.at("rel", "="):
            raise ParseError("words before brackets")
        return flat(tuple(argument))

    def side(self) -> Node:
        node = self.ratio()
        if self.at("op", "∪") and is_constant(node):  # between x < 1 and x > 3: "or"
            return node
        while self.at("op", "∪", "∩", "∖") or (isinstance(node, Sequence) and self.at("sym", "U")):
            sign = self.take().text
            function = {"∩": "intersection", "∖": "setminus"}.get(sign, "union")
            node = Apply(function, (node, self.ratio()))
        if self.at("word") or self.at("letter") or self.at("degree"):
            node = self._with_unit(node)
        modulus = self.accept("pmod")
        return Apply("residue", (node, _parse_all(modulus.parts[0]))) if modulus is not None else node

    def _with_unit(self, node: Node) -> Node:
        if symbols(node) or (self.at("word", "in") and self._is_bracket(self.peek(1))):
            if self.at("word", "in"):
                return node
            raise ParseError("words after an expression")
        pieces: list[str] = []
        while (token := self.peek()) is not None and (
            token.kind in ("word", "letter", "op", "group", "num")
            or (token.kind == "sym" and pieces[-1:] in (["/"], ["*"]))
        ):
            if token.kind in ("op", "num") and (token.text == ":" or (token.kind == "num" and pieces[-1] != "^")):
                raise ParseError("a number after a unit")
            pieces.append(flat((self.take(),)))
        factor, unit, is_known = magnitude_and_unit(pieces)
        if factor != 1:
            is_plain = isinstance(node, Number)
            node = Number(node.value * factor, node.digits) if is_plain else product(Number(factor), node)
        return Quantity(node, unit, is_known) if unit else node

"""From LaTeX to tokens: walks pylatexenc's node tree and cuts its characters into numbers, names and signs."""

import re
from dataclasses import dataclass
from fractions import Fraction

from pylatexenc import macrospec
from pylatexenc.latexwalker import (
    LatexCharsNode,
    LatexCommentNode,
    LatexEnvironmentNode,
    LatexGroupNode,
    LatexMacroNode,
    LatexMathNode,
    LatexNode,
    LatexWalker,
    LatexWalkerParseError,
)

from actors.verifier import vocabulary as words

MAX_LENGTH = 2000  # characters of an answer that is parsed; longer ones are compared as text
MAX_NESTING = 40
MAX_TOKENS = 1500


class ParseError(ValueError):
    """The text is not an expression of the accepted notation."""


@dataclass(frozen=True, slots=True)
class Token:
    """`kind` says how to read `text`; the token lists of the arguments of \\frac and the like are in `parts`."""

    kind: str
    text: str = ""
    parts: tuple[tuple["Token", ...], ...] = ()
    value: Fraction | None = None  # of a number
    digits: int | None = None  # significant digits of a decimal


def _latex_context() -> macrospec.LatexContextDb:
    context = macrospec.LatexContextDb()
    arguments = {**dict.fromkeys(words.FRACTIONS | words.BINOMIALS, "{{"), "sqrt": "[{"}
    arguments |= dict.fromkeys(words.TEXTS | words.WRAPPERS | words.OVERLINES, "{")
    arguments |= dict.fromkeys({"operatorname", "pmod"} | words.IGNORED_WITH_ARGUMENT, "{")
    context.add_context_category(
        "answers",
        macros=[macrospec.MacroSpec(name, macrospec.MacroStandardArgsParser(s)) for name, s in arguments.items()],
        environments=[macrospec.EnvironmentSpec("array", macrospec.MacroStandardArgsParser("{"))],
    )
    context.set_unknown_macro_spec(macrospec.MacroSpec(""))
    context.set_unknown_environment_spec(macrospec.EnvironmentSpec(""))
    return context


_CONTEXT = _latex_context()
_BRACKET = re.compile(r"\\.|[{}()\[\]]", re.DOTALL)
_CHARS = re.compile(
    r"(?P<space>[\s~&]+)"
    r"|(?P<repeating>\d*\.\d*\(\d+\)(?=\s*$))"
    r"|(?P<dotted>\d*\.\d+\.\.\.)"
    r"|(?P<num>(?:\d+(?:\.(?!\.)\d*)?|\.\d+)(?:[eE][+-]?\d+(?![\d.]))?)"
    r"|(?P<letters>[A-Za-z]+)"
    r"|(?P<rel><=|>=|!=|==|=<|<|>|=)"
    r"|(?P<dots>\.\.\.)"
    r"|(?P<open>[(\[])|(?P<close>[)\]])|(?P<bar>\|)|(?P<comma>,)|(?P<semi>;)"
    r"|(?P<op>[-+*/^_!':])"
)


def tokenize(latex: str) -> tuple[Token, ...]:
    """Tokens of one answer in normal notation. Raises ParseError."""
    if len(latex) > MAX_LENGTH or _nesting(latex) > MAX_NESTING:
        raise ParseError("too long or too deep")
    try:
        nodes, _, _ = LatexWalker(latex, latex_context=_CONTEXT, tolerant_parsing=False).get_latex_nodes()
    except (LatexWalkerParseError, RecursionError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise ParseError(str(error)) from error
    tokens = _from_nodes(nodes)
    if sum(map(_count, tokens)) > MAX_TOKENS:
        raise ParseError("too many tokens")
    return tokens


def _nesting(latex: str) -> int:
    depth = deepest = 0
    for found in _BRACKET.finditer(latex):
        if found.group() in "{([":
            depth += 1
            deepest = max(deepest, depth)
        elif found.group() in "})]":
            depth -= 1
    return deepest


def _count(token: Token) -> int:
    return 1 + sum(_count(inner) for part in token.parts for inner in part)


def _from_nodes(nodes: list[LatexNode]) -> tuple[Token, ...]:
    tokens: list[Token] = []
    position = 0
    while position < len(nodes):
        node = nodes[position]
        position += 1
        if isinstance(node, LatexMacroNode) and node.macroname in words.FRACTIONS:
            tail = node.nodeargd.argnlist[-1] if node.nodeargd and node.nodeargd.argnlist else None
            if _lacks_argument(tail) and position < len(nodes):  # \frac x\sqrt{y}: the group after it is sqrt's
                root = Token("root", parts=(_from_nodes([nodes[position]]),))
                tokens.append(Token("frac", parts=(_from_nodes([node.nodeargd.argnlist[0]]), (root,))))
                position += 1
                continue
        tokens.extend(_from_node(node))
    return tuple(tokens)


def _lacks_argument(node: LatexNode | None) -> bool:
    return isinstance(node, LatexMacroNode) and node.macroname == "sqrt" and node.nodeargd is None


def _from_node(node: LatexNode) -> tuple[Token, ...]:
    match node:
        case LatexCharsNode():
            return _from_chars(node.chars)
        case LatexGroupNode(delimiters=("{", "}")):
            return (Token("group", parts=(_from_nodes(node.nodelist),)),)
        case LatexGroupNode() | LatexMathNode():
            return _from_nodes(node.nodelist)
        case LatexMacroNode():
            return _from_macro(node)
        case LatexEnvironmentNode():
            return _from_environment(node)
        case LatexCommentNode():
            raise ParseError("comment")
    raise ParseError(type(node).__name__)


def _from_macro(node: LatexMacroNode) -> tuple[Token, ...]:
    name = node.macroname
    if name in words.IGNORED:
        return ()
    if name in words.MACROS:
        return (Token(*words.MACROS[name]),)
    if name in words.IGNORED_WITH_ARGUMENT:
        return ()
    if name in words.FUNCTION_NAMES:
        return (Token("func", words.FUNCTION_NAMES[name]),)
    if name in words.GREEK:
        return (Token("sym", name),)
    arguments = node.nodeargd.argnlist if node.nodeargd else []
    if not arguments or arguments[-1] is None:
        raise ParseError(f"\\{name}")
    if name in words.TEXTS or name == "operatorname":
        content = _plain(arguments[0]).strip()
        if content in words.PLAIN_FUNCTIONS and content not in words.UNITS:
            return (Token("func", words.PLAIN_FUNCTIONS[content]),)
        return _from_text(content)
    if name in words.WRAPPERS:
        return _from_wrapper(name, arguments[0])
    if name == "sqrt":
        if isinstance(arguments[1], LatexCharsNode) and arguments[1].chars == "(":  # \sqrt(2): a function's brackets
            index = () if arguments[0] is None else (_from_nodes([arguments[0]]),)
            return (Token("func", "sqrt", parts=index), Token("open", "("))
        parts = [_from_nodes([argument]) for argument in reversed(arguments) if argument is not None]
        return (Token("root", parts=tuple(parts)),)
    kind = "frac" if name in words.FRACTIONS else "binom" if name in words.BINOMIALS else name
    if name in words.OVERLINES:
        kind = "overline"
    return (Token(kind, parts=tuple(_from_nodes([argument]) for argument in arguments)),)


def _from_wrapper(name: str, argument: LatexNode) -> tuple[Token, ...]:
    """\\mathbf{5}, \\mathrm{e}, \\mathbb{R}: the content as it is, except that words stay whole."""
    plain = _plain(argument).replace("~", " ")
    if re.fullmatch(r"\s+[A-Za-z]", plain) or (name == "mathrm" and plain in words.UNIT_LETTERS):  # 5\mathrm{~m}
        return (Token("letter", plain.strip()),)
    if name == "mathbb" and plain.strip() in words.NUMBER_SETS:
        return (Token("numbers", plain.strip()),)
    if plain in words.PLAIN_FUNCTIONS and plain not in words.UNITS:
        return (Token("func", words.PLAIN_FUNCTIONS[plain]),)
    if re.fullmatch(r"[A-Za-z\s]{2,}|\s*[A-Za-z]+/[A-Za-z]+(?:\^\d)?\s*", plain):  # words, and m/s^2
        return _from_text(plain)
    return _from_nodes(argument.nodelist if isinstance(argument, LatexGroupNode) else [argument])


def _plain(node: LatexNode) -> str:
    """The source of a text argument without its braces."""
    source = str(node.chars if isinstance(node, LatexCharsNode) else node.latex_verbatim())
    return source[1:-1] if source.startswith("{") and source.endswith("}") else source


def _from_text(content: str) -> tuple[Token, ...]:
    """The content of \\text{}: connectors, words, or mathematics in text mode such as \\text{13} or \\text{(C)}."""
    stripped = content.strip().strip(",.").strip()
    if not stripped:
        return (Token("comma", ","),) if "," in content else ()
    if re.fullmatch(r"[A-Za-z]+(?:/[A-Za-z]+)+(?:\^?\d)?", stripped):  # \text{m/s}
        return (Token("word", stripped.lower()),)
    if re.fullmatch(r"[A-J](?:\s*(?:,|,?\s*\band\b|,?\s*\bor\b)\s*[A-J])+", stripped):  # \text{A, B and D}
        return _from_chars(stripped)
    if re.fullmatch(r"[A-Za-z](?:\s+[A-Za-z])+", stripped):  # \text{ N m}
        return tuple(Token("letter", letter) for letter in stripped.split())
    if re.search("[A-Za-z]{2}", stripped) is None and re.search(r"\d|[A-Za-z]", stripped):
        return _from_chars(stripped) if not re.fullmatch("[A-Za-z]", stripped) else (Token("letter", stripped),)
    tokens: list[Token] = []
    for word in stripped.replace("\\", " ").split():
        clean = lower_word(word.strip(",.;:()"))
        if clean in words.CONNECTORS:
            tokens.append(Token("and", clean))
        elif re.fullmatch(r"[\d.]+", clean):
            tokens.extend(_from_chars(clean))
        elif clean:
            tokens.append(Token("word", clean))
            if word.endswith(","):
                tokens.append(Token("comma", ","))
            elif word.endswith(":"):
                tokens.append(Token("op", ":"))
    return tuple(tokens)


def lower_word(word: str) -> str:
    """The word in lower case, except units that would be others then."""
    return word if word in words.MEGA_UNITS else word.lower()


def _from_environment(node: LatexEnvironmentNode) -> tuple[Token, ...]:
    if node.environmentname not in words.MATRICES | words.SYSTEMS:
        raise ParseError(node.environmentname)
    rows: list[Token] = []
    cells: list[list[LatexNode]] = [[]]

    def end_row() -> None:
        if any(cells) and not (len(cells) == 1 and all(_is_blank(n) for n in cells[0])):
            rows.append(Token("row", parts=tuple(_from_nodes(cell) for cell in cells)))
        cells[:] = [[]]

    for child in node.nodelist:
        if isinstance(child, LatexMacroNode) and child.macroname == "\\":
            end_row()
        elif isinstance(child, LatexCharsNode):
            first, *others = child.chars.split("&")
            cells[-1].append(_chars_node(child, first))
            for other in others:
                cells.append([_chars_node(child, other)])
        else:
            cells[-1].append(child)
    end_row()
    if node.environmentname in words.SYSTEMS:
        return _from_system(node.environmentname, rows)
    return (Token("matrix", node.environmentname, parts=(tuple(rows),)),)


def _from_system(environment: str, rows: list[Token]) -> tuple[Token, ...]:
    """The equations of a system as items of a list; what \\begin{cases} splits with & is a function in pieces."""
    tokens: list[Token] = []
    for row in rows:
        if environment not in words.ALIGNED and len(row.parts) > 1:
            raise ParseError("piecewise function")
        if tokens and tokens[-1].kind not in ("comma", "and", "semi"):
            tokens.append(Token("comma", ","))
        tokens.extend(token for part in row.parts for token in part)
    return tuple(tokens)


def _chars_node(node: LatexCharsNode, chars: str) -> LatexCharsNode:
    return LatexCharsNode(chars=chars, parsing_state=node.parsing_state, pos=node.pos, len=len(chars))


def _is_blank(node: LatexNode) -> bool:
    return isinstance(node, LatexCharsNode) and not node.chars.strip()


def _from_chars(chars: str) -> tuple[Token, ...]:
    tokens: list[Token] = []
    position = 0
    while position < len(chars):
        found = _CHARS.match(chars, position)
        if found is None:
            raise ParseError(f"character {chars[position]!r}")
        position = found.end()
        kind, text = str(found.lastgroup), found.group()
        match kind:
            case "space":
                continue
            case "num":
                tokens.append(_number(text))
            case "repeating" | "dotted":
                tokens.append(_repeating(text))
            case "letters":
                tokens.extend(_from_letters(text))
            case "rel":
                tokens.append(Token("rel", words.RELATIONS[text]))
            case "dots":
                tokens.append(Token("sym", "..."))
            case _:
                tokens.append(Token(kind, text))
    return tuple(tokens)


def _number(text: str) -> Token:
    mantissa, _, exponent = text.lower().partition("e")
    if len(exponent) > 4:
        raise ParseError("exponent")
    is_decimal = "." in mantissa.rstrip(".")
    value = Fraction(mantissa.rstrip(".") or "0") * Fraction(10) ** int(exponent or 0)
    digits = len(mantissa.replace(".", "").lstrip("0")) if is_decimal else None
    return Token("num", text, value=value, digits=digits)


def _repeating(text: str) -> Token:
    """0.1(6), and 0.1666... where the last digits repeat visibly."""
    if text.endswith(")"):
        head, _, period = text[:-1].partition("(")
    else:
        digits = text.removesuffix("...")
        found = re.search(r"(\d{2,6}?)\1$|(\d)\2\2$", digits.partition(".")[2])
        if found is None:
            raise ParseError("unknown continuation")
        period = found.group(1) or found.group(2)
        head = digits
    return Token("num", text, value=repeating_decimal(head, period))


def repeating_decimal(head: str, period: str) -> Fraction:
    """The rational of `head` ("0.1") followed by `period` ("6") without end."""
    places = len(head.partition(".")[2])
    return Fraction(head.rstrip(".") or "0") + Fraction(int(period), 10**places * (10 ** len(period) - 1))


def _from_letters(run: str) -> list[Token]:
    lower = run.lower()
    if run in words.CONSTANT_NAMES or (len(run) > 1 and lower in words.CONSTANT_NAMES):
        return [Token("const", words.CONSTANT_NAMES.get(run) or words.CONSTANT_NAMES[lower])]
    if lower in words.PLAIN_FUNCTIONS and (lower != "lg" or run == lower):  # Lg is L times g
        return [Token("func", words.PLAIN_FUNCTIONS[lower])]
    if lower in words.CONNECTORS:
        return [Token("and", lower)]
    if re.fullmatch("[IVX]{2,}", run):  # a Roman numeral is no product: IV is not VI
        return [Token("word", lower)]
    if lower == "mod":
        return [Token("op", "mod")]
    is_spelled_so = run in words.UNITS or len(run) > 3  # but Mg is no mg
    is_unit = len(run) > 1 and lower in words.UNITS and is_spelled_so
    if is_unit or lower in words.SHORT_WORDS:
        return [Token("word", lower)]
    if run.isupper() and 3 <= len(run) <= 6:  # points, or an order: ABC is not ACB
        return [Token("sym", run)]
    if len(run) <= 3:
        return [_letter(letter) for letter in run]
    pieces = re.findall(words.SEGMENTS + "|[A-Za-z]", run)
    if sum(len(piece) == 1 for piece in pieces) <= 2:
        return [token for piece in pieces for token in _from_letters(piece)]
    return [Token("word", lower)]


def _letter(letter: str) -> Token:
    return Token("const", words.CONSTANT_NAMES[letter]) if letter in words.CONSTANT_NAMES else Token("sym", letter)

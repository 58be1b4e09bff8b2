"""From LaTeX to tokens: walks pylatexenc's node tree; characters and words are left to the module tokens."""

import re

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
from actors.verifier.tokens import ParseError, Token, from_chars, from_text

MAX_LENGTH = 2000  # characters of an answer that is parsed; longer ones are compared as text
MAX_NESTING = 40
MAX_TOKENS = 1500


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
        following = nodes[position] if position < len(nodes) else None
        if isinstance(node, LatexMacroNode) and _is_unknown(node) and isinstance(following, LatexGroupNode):
            raise ParseError(f"\\{node.macroname} with an argument")
        if isinstance(node, LatexMacroNode) and node.macroname in words.FRACTIONS:
            tail = node.nodeargd.argnlist[-1] if node.nodeargd and node.nodeargd.argnlist else None
            if _lacks_argument(tail) and position < len(nodes):  # \frac x\sqrt{y}: the group after it is sqrt's
                root = Token("root", parts=(_from_nodes([nodes[position]]),))
                tokens.append(Token("frac", parts=(_from_nodes([node.nodeargd.argnlist[0]]), (root,))))
                position += 1
                continue
        tokens.extend(_from_node(node))
    return tuple(tokens)


def _is_unknown(node: LatexMacroNode) -> bool:
    """Whether only the name of a macro is known: a sign, or if a group follows, anything."""
    known = (words.IGNORED, words.MACROS, words.FUNCTION_NAMES, words.GREEK)
    has_arguments = node.nodeargd is not None and bool(node.nodeargd.argnlist)
    return not has_arguments and not any(node.macroname in names for names in known)


def _lacks_argument(node: LatexNode | None) -> bool:
    return isinstance(node, LatexMacroNode) and node.macroname == "sqrt" and node.nodeargd is None


def _from_node(node: LatexNode) -> tuple[Token, ...]:
    match node:
        case LatexCharsNode():
            return from_chars(node.chars)
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
    if not arguments:
        return (Token("sign" if name in words.OPERATORS else "sym", f"\\{name}"),)
    if arguments[-1] is None:
        raise ParseError(f"\\{name}")
    if name in words.TEXTS or name == "operatorname":
        content = _plain(arguments[0]).strip()
        if content in words.PLAIN_FUNCTIONS and content not in words.UNITS:
            return (Token("func", words.PLAIN_FUNCTIONS[content]),)
        return _from_mixed(arguments[0]) if "\\" in content else from_text(content)
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


def _from_mixed(argument: LatexNode) -> tuple[Token, ...]:
    """The content of \\text{} with macros in it, such as \\text{2\\pi cm}."""
    nodes = argument.nodelist if isinstance(argument, LatexGroupNode) else [argument]
    tokens: list[Token] = []
    for node in nodes:
        tokens.extend(from_text(node.chars) if isinstance(node, LatexCharsNode) else _from_node(node))
    return tuple(tokens)


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
        return from_text(plain)
    return _from_nodes(argument.nodelist if isinstance(argument, LatexGroupNode) else [argument])


def _plain(node: LatexNode) -> str:
    """The source of a text argument without its braces."""
    source = str(node.chars if isinstance(node, LatexCharsNode) else node.latex_verbatim())
    return source[1:-1] if source.startswith("{") and source.endswith("}") else source


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

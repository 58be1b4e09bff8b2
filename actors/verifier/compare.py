"""Equality of two answers as texts: what they can be read as, and whether any reading of one is one of the other."""

import re
from functools import lru_cache

from actors.verifier.equal import nodes_equal
from actors.verifier.notation import join_comma_groups, normalize
from actors.verifier.parse import parse
from actors.verifier.tokens import ParseError
from actors.verifier.tree import Node, Symbol, Text

_PREFIX = re.compile(r"^(?:the\s+)?(?:final\s+)?answer\s*(?:is|:|=)?\s*(?=\S)", re.IGNORECASE)
_CHOICE = re.compile(r"^\(?\s*([A-J])\s*\)?\s*[.):]\s*\S|^\(\s*([A-J])\s*\)\s*\S")
_TEXT_MACRO = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)(?![a-z])\s*")
_ELLIPSIS = re.compile(r"\s+")
_LAST_CLAUSE = re.compile(r"^[A-Za-z' ,]*[A-Za-z][^$\\]*\b(?:is|it's|equals)\s+([^\sA-Za-z][^\s]*)$")


def texts_equal(a: str, b: str) -> bool:
    """Whether two answers are equal as text or in one of their readings as mathematics."""
    a, b = _clean(a), _clean(b)
    if not _has_content(a) or not _has_content(b):
        return False
    if _literal(a) == _literal(b):
        return True
    if (choice := _choice_equal(a, b)) is not None:
        return choice
    return any(nodes_equal(x, y) for x in _readings(a) for y in _readings(b))


def _clean(text: str) -> str:
    normal = normalize(_PREFIX.sub("", normalize(text)))
    clause = _LAST_CLAUSE.match(normal)
    return clause.group(1) if clause else normal


def _has_content(text: str) -> bool:
    return any(c.isalnum() for c in text) or "emptyset" in text or "varnothing" in text


def _literal(text: str) -> str:
    """The text without spaces and text macros; words compare without case, symbols with."""
    plain = _ELLIPSIS.sub("", _TEXT_MACRO.sub("", text)).strip("{}.")
    return plain.lower() if re.fullmatch(r"[A-Za-z']{3,}|(?:[A-Za-z]{2,}[,.;{} ]*){3,}", plain) else plain


def _choice_equal(a: str, b: str) -> bool | None:
    """A letter of a multiple-choice question against "C. x = 42" or "(C) 42"; None: not such a question."""
    for letter, other in ((a, b), (b, a)):
        plain = _literal(letter).strip("(){}")
        found = _CHOICE.match(_TEXT_MACRO.sub("", other).replace("{", "").replace("}", ""))
        if re.fullmatch("[A-J]", plain) and found:
            return plain == (found.group(1) or found.group(2))
    return None


@lru_cache(maxsize=256)
def _readings(text: str) -> tuple[Node, ...]:
    """The trees that a text can stand for: with commas as digit separators first, then as list separators."""
    spellings = dict.fromkeys((join_comma_groups(text), text))
    trees = []
    for spelling in spellings:
        try:
            trees.append(parse(spelling))
        except (ParseError, ValueError, RecursionError):
            continue
    return tuple(tree for tree in trees if not isinstance(tree, Text | Symbol) or len(trees) >= 1)

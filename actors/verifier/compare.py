"""Equality of two answers as texts: what they can be read as, and whether any reading of one is one of the other."""

import re
from functools import lru_cache

from actors.verifier.build import in_base
from actors.verifier.equal import nodes_equal
from actors.verifier.form import has_form
from actors.verifier.latex import MAX_LENGTH
from actors.verifier.notation import join_comma_groups, normalize
from actors.verifier.numerals import number_in_words
from actors.verifier.parse import parse
from actors.verifier.tokens import ParseError
from actors.verifier.tree import Node

# "The answer is", "Therefore,": what comes before the answer itself.
_PREFIX = re.compile(
    r"^[\s*_#>]*(?:\\text\{\s*)?(?:(?:the\s+)?(?:final\s+)?(?:answer|ans\.?)(?![a-z])[\s*_]*(?:is|:|=)?[*_]*"
    r"|(?:for\s+)?all(?=[\s}~]*[a-z]\s*(?:[<>]|\\(?:[gl]eq?|neq?|[gl]t)(?![a-z])))"  # "all x > 3"
    r"|(?:therefore|thus|hence|so)(?:,|\b(?=\s))|\\(?:therefore|implies|Rightarrow|Longrightarrow)(?![a-z]))"
    r"\s*(?:\}\s*)?(?=[^\s}])",
    re.IGNORECASE,
)
_CHOICE_NAME = re.compile(
    r"^(\\text\{)?\s*(?:option|choice)\s+(?=\(?[A-J]\b)|^\\text\{\s*(?:option|choice)\s*\}\s*(?=\(?[A-J]\b)",
    re.IGNORECASE,
)
_CHOICE = re.compile(r"^\(?\s*([A-J])\s*\)?\s*(?:[.)]|:(?![A-Z]))\s*(\S.*)$|^\(([A-J])\)\s*(\S.*)$", re.DOTALL)
# A label alone in braces, as \text{(B) } 12 leaves it once the macro is gone.
_BRACED_LABEL = re.compile(r"^\{\s*(\(?[A-J]\)?[.):]?)\s*\}")
# What makes of "(A) or (C)" and of "A. 3 B. 4" more than one choice, and of "(A) + 1" a formula.
_MORE_CHOICES = re.compile(
    r"(?:and|or)\b|[,;&/!+*^=<>_|]|\\(?:cup|cap|cdot|times|to)\b|\W*$|\(?[A-J]\)?$|.*(?:(?<!\w)\([A-J]\)|(?<![\w(])[A-J][.):](?=\s|$))"
    r"|.*\b(?i:maybe|perhaps|possibly|guess|wrong)\b",
    re.DOTALL,
)
_TEXT_MACRO = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)(?![a-z])\s*")
_ARTICLE = re.compile(
    r"^(\{?)\s*(?:an?|the)\s+(?!sin|cos|tan|cot|sec|csc|arc|ln|log|exp|abs|sqrt)(?=[a-z]{4})", re.IGNORECASE
)
_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")
_GROUPED = re.compile(r"\{([^{}]*)\}")
_WORDY = re.compile(r"[A-Za-z',.;-]*[A-Za-z]{3}[A-Za-z',.;-]*")
_HEX = re.compile(r"([0-9A-F]+)_\{?(1[1-6])\}?", re.IGNORECASE)
_DATE = re.compile(r"\d{4}-\d\d-\d\d|\d{1,2}([/-])\d{1,2}\1\d{4}")
_ZERO_GROUP = re.compile(r"\d,0\d\d(?!\d)")  # 1,000 is no list of 1 and 0
# Runs like mg that are products of variables where no number stands before them, or more of a formula after them.
_LETTERS_OF_UNIT = re.compile(
    r"(?<![A-Za-z\\])(?<!\\text\{)(?<!\\mathrm\{)(?:(?<!\d)(?<!\d\s)|(?!..$))"
    r"(?:[mkc]m|[mk]g|ml|hr|ft|lb|yr)(?![A-Za-z])",
    re.IGNORECASE,
)
_CAPITALS_OF_NAME = re.compile(r"(?<![A-Za-z\\])[A-Z]{3,6}(?![A-Za-z])")
_NAMES = re.compile(r"\\(?:angle|triangle|text|overline)(?![a-z])|[(,;]")
_LOG = re.compile(r"\\?log(?!\s*_)(?![a-z])")
_LAST_CLAUSE = re.compile(r"([A-Za-z',\s\d.]*)\b(?:is|it's|equals)\s+([^\sA-Za-z]\S*)")
_DENIED_NUMBER = re.compile(r"\bnot\s+(?:it's\s+not\s+)?-?[\d.]+")
_DOUBT = re.compile(
    r"\b(?:or|maybe|perhaps|possibly|either|unless|guess|not\s+\d|never|wrong|false|if)\b", re.IGNORECASE
)
_SAYINGS = {
    **dict.fromkeys(("allrealnumbers", "allreals", "therealnumbers", "allrealvalues"), r"\mathbb{R}"),
    **dict.fromkeys(("theemptyset", "emptyset"), r"\emptyset"),
    **dict.fromkeys(("dne", "itdoesnotexist"), r"\text{doesnotexist}"),
}
_NO_SOLUTION = re.compile(r"(?:there(?:is|are|exists?))?no(?:real)?solutions?(?:exists?)?")
_ALL_REALS_BUT = re.compile(
    r"\s*all\s+real(?:s|\s+numbers|\s+values|(?=\s+[a-z]\b))\s*(?:of\s+)?(?:[a-z]\b)?\s*,?\s*"
    r"(?:(?:except|other\s+than|but|excluding)(?:\s+for)?\b|\\neq?\b)\s*(\S.*)",
    re.IGNORECASE,
)
_BETWEEN_POINTS = re.compile(r",?\s*\b(?:and|or)\b\s*")
_NAMING = re.compile(r"\b[a-z]\s*=\s*")


def texts_equal(answer: str, reference: str, is_exact: bool) -> bool:
    """Whether two answers are equal as text or in one of their readings as mathematics.

    Where `is_exact`, the reading of the answer must have the form of that of the reference.
    """
    if max(len(answer), len(reference)) > 2 * MAX_LENGTH:
        return answer.strip() == reference.strip() and _has_content(answer)
    a, b = _clean(answer), _clean(reference)
    if not _has_content(a) or not _has_content(b):
        return False
    if _literal(a) == _literal(b):
        return True
    if (choice := _choice_equal(a, b, is_exact)) is not None:
        return choice
    return any(nodes_equal(x, y) and (not is_exact or has_form(x, y)) for x in _readings(a) for y in _readings(b))


@lru_cache(maxsize=256)
def _clean(text: str) -> str:
    """The text in normal notation, without what only introduces it. A reference comes again with every sample of it."""
    normal = normalize(_without_prefix(text))
    if _PREFIX.match(normal):
        normal = normalize(_without_prefix(_without_prefix(normal)))
    normal = _CHOICE_NAME.sub(lambda found: found[1] or "", normal)
    clause = _LAST_CLAUSE.fullmatch(normal)
    is_only_number = clause and not re.search(r"\d", _DENIED_NUMBER.sub("", clause[1]))
    if clause and is_only_number and not _DOUBT.search(_DENIED_NUMBER.sub("", normal)):
        normal = normalize(clause[2])
    return _said(normal) or normal


def _without_prefix(text: str) -> str:
    """Without what introduces an answer, and without the brace that closes a \\text{} begun there."""
    rest = _PREFIX.sub("", text)
    is_open = len(rest) < len(text) and rest.endswith("}") and rest.count("}") > rest.count("{")
    return rest[:-1] if is_open else rest


def _said(text: str) -> str | None:
    """The formula for what a text says in words."""
    words = _TEXT_MACRO.sub("", text).replace("{", "").replace("}", "")
    if not re.match(r"\s*[A-Za-z]{2}", words):
        return None
    literal = _literal(text)
    if literal in _SAYINGS:
        return _SAYINGS[literal]
    if _NO_SOLUTION.fullmatch(literal):
        return r"\emptyset"
    if excluded := _ALL_REALS_BUT.fullmatch(words):
        points = _BETWEEN_POINTS.sub(",", _NAMING.sub("", excluded[1]))
        return rf"\mathbb{{R}}\setminus\{{{points}\}}"
    number = number_in_words(words.strip())
    return None if number is None else f"{number.numerator}/{number.denominator}"


def _has_content(text: str) -> bool:
    return any(c.isalnum() for c in text) or text.replace(" ", "") == r"\{\}"


def _literal(text: str) -> str:
    """The text without text macros and without spaces, except between digits; words in lower case."""
    plain = _SPACE.sub("", _ARTICLE.sub(r"\1", _TEXT_MACRO.sub("", text)))
    if grouped := _GROUPED.fullmatch(plain):
        plain = grouped.group(1)
    bare = plain.replace("{", "").replace("}", "")
    return bare.lower() if _WORDY.fullmatch(bare) or bare.lower() == "no" else plain


def _choice_equal(a: str, b: str, is_exact: bool) -> bool | None:
    """A letter of a multiple-choice question against "C. x = 42" or "(C) 42"; None: not such a question."""
    for letter, other in ((a, b), (b, a)):
        plain = _literal(letter).strip("(){}")
        label = _split_label(other)
        if re.fullmatch("[A-J]", plain) and label:
            return plain == label[0]
        if re.fullmatch(r"\(?[A-J]\)?", _literal(other)) and re.fullmatch("[A-J]", plain):
            return plain == _literal(other).strip("()")
    labels = _split_label(a), _split_label(b)
    if labels[0] and labels[1]:
        return labels[0][0] == labels[1][0] and texts_equal(labels[0][1], labels[1][1], is_exact)
    return None


def _split_label(text: str) -> tuple[str, str] | None:
    """(letter, content) of one choice that is given with its content."""
    plain = _BRACED_LABEL.sub(r"\1 ", _TEXT_MACRO.sub("", text))
    plain = plain.replace("{(", "(").replace(")}", ")")
    grouped = _GROUPED.fullmatch(plain)
    found = _CHOICE.match(grouped.group(1) if grouped else plain)
    if found is None:
        return None
    letter, content = found[1] or found[3], found[2] or found[4]
    return None if _MORE_CHOICES.match(content) else (letter, content)


@lru_cache(maxsize=256)
def _readings(text: str) -> tuple[Node, ...]:
    """The trees that a text can stand for.

    More than one where notation is ambiguous: commas separate digits or items; log is natural or decimal; mg is a
    unit or m times g; BIL is a name or, in fractions, a product; (A) 5 is a choice with its label.
    """
    if _DATE.fullmatch(_TEXT_MACRO.sub("", text).strip("{} ")):  # no difference or quotient
        return ()
    if "_" in text and (found := _HEX.fullmatch(_TEXT_MACRO.sub("", text).replace("{", "").replace("}", ""))):
        try:
            return (in_base(found[1], found[2]),)
        except ParseError:  # a digit beyond the base
            return ()
    joined = join_comma_groups(text)
    spellings = dict.fromkeys((joined, joined if _ZERO_GROUP.search(text) else text))
    if _LOG.search(text):
        spellings |= dict.fromkeys(_LOG.sub(r"\\log_{10}", spelling) for spelling in list(spellings))
    if _LETTERS_OF_UNIT.search(joined):
        spellings[_LETTERS_OF_UNIT.sub(lambda run: " ".join(run.group()), joined)] = None
    if "\\frac" in joined and _CAPITALS_OF_NAME.search(joined) and not _NAMES.search(joined):
        spellings[_CAPITALS_OF_NAME.sub(lambda run: " ".join(run.group()), joined)] = None
    if label := _split_label(text):
        spellings[label[1]] = None
    trees = [tree for spelling in spellings if (tree := _try_parse(spelling)) is not None]
    return tuple(dict.fromkeys(trees))


def _try_parse(spelling: str) -> Node | None:
    try:
        return parse(spelling)
    except (ParseError, ValueError):
        return None

# ruff: noqa: RUF001  the signs of text are meant as they stand
"""The answer that a text states in words: after "the answer is", on an answer line, or as its last formula."""

import re

_NOISE = r"(?:[ \t*_`>#]|</?(?:b|i|em|strong|p|h\d)>)*"
_ANSWER_LINE = re.compile(
    rf"^(?:{_NOISE}|-[ \t]+|\d+[.)][ \t]+)(?:\\text(?:bf)?\{{[ \t]*)?(?:the[ \t]+)?(?:final[ \t]+|correct[ \t]+)?"
    rf"(?:answers?|ans\.?|(?:最终|最后)?答案|答)(?:[ \t]+is)?"
    rf"{_NOISE}\}}?{_NOISE}[:=：]{_NOISE}\}}?{_NOISE}(?P<rest>.*)$"
    # or a heading: ### Answer
    rf"|^[ \t]*(?:#+|\*\*)[ \t*]*(?:final[ \t]+)?answer{_NOISE}$(?P<heading>)",
    re.IGNORECASE | re.MULTILINE,
)
_NEXT_LINE = re.compile(r"\s*((?:\$\$|\\\[)\s*.+?\s*(?:\$\$|\\\])|[^\n]+)", re.DOTALL)
_HASHES = re.compile(r"####[ \t]*(.*)")
_PHRASE = re.compile(
    r"\b(?:final\s+answer|answer|correct\s+(?:option|choice))[*_]*\s*(?:(?:is|are|equals|:|：|=)[*_]*\s*)+"
    r"(?:indeed|thus|therefore|simply)?\s*"
    r"|\banswer\s+(?=\$|\\\(|\\\[)|\bfinal:\s*"
    r"|(?:答案|结果)(?:应[该当])?(?:是|为|选|等于|[：:=])+\s*|答\s*[：:]\s*|(?:[故应]选|选(?=\s*[A-J]\b))\s*[：:]?\s*",
    re.IGNORECASE,
)
_MATH = re.compile(
    r"\$\$(?P<a>.+?)\$\$|\\\[(?P<b>.+?)\\\]|\\\((?P<c>.+?)\\\)|(?<![\\$])\$(?P<d>[^$\n]{1,1000}?)(?<!\\)\$(?!\d)",
    re.DOTALL,
)
_SENTENCE_END = re.compile(r"\.(?=[*_]*(?:\s+[A-Z]|\s*$|\s*\n|\s*\\n))|[!?](?=[*_]*(?:\s|$))|[。！？]|\n\s*\n")
# What only comments on the answer before it: 72, which is the total.
_CLAUSE = re.compile(
    r"(?:\s*[,;—–(]\s*|\s+)(?:which|because|since|hence|therefore|as\s+(?:required|desired|shown|stated|claimed|expected|needed))\b"
    r"|\s*[,;—–]\s*(?:so|as|thus|making|giving|meaning|i\.e\.|in\s+(?:total|all)|altogether|overall|using|rounded)\b",
    re.IGNORECASE,
)
CHINESE = re.compile("[\u4e00-\u9fff]")
_CHINESE_SIGNS = str.maketrans({"，": ", ", "、": ", ", "；": "; ", "或": " or ", "和": " and ", "与": " and "})
_NUMBER = re.compile(
    r"(?<![\w.,/^_{\\])-?(?:[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:,\d+)+|\d+/\d+|\d+(?:\.\d+)?|\.\d+)(?![\w]*\d)"
    r"(?:\s*(?:\\?%|m²|m³|°))?",
    re.ASCII,
)
# What makes a number of a sentence a part of a list, a point or a formula: 3, 4 and 5; 2 hours and 15; (3, 5);
# 2*5; 5!; 5 million
_BEFORE = re.compile(
    r"(?:\d[\d.]*[)\]]?\s*(?:,|and\b|or\b)\s*|\d[\d.]*\s+[a-z]+\s+and\s+|(?:\d[\d.]*|\b[a-zA-Z]|[)\]])\s*[-+*/^]\s*|\d+:|\d+\s+(?=$)|sqrt|[(\[])*$"
)
_AFTER = re.compile(r"(?:[)\]!]|\s*[-+*/^]\s*(?:\d[\w.]*|[a-zA-Z]\b|[(])|\s+(?:hundred|thousand|million|billion)\b)*")
_AND_OR, _LISTING = re.compile(r",?\s*(?:and|or)\s*"), re.compile(r"\s*(?:,|and|or|,\s*and|,\s*or)\s*")
_DENIED = re.compile(
    r"\b(?:not|never|cannot|can't|isn't|except|without|minus|negative|over|under|(?:more|less|greater|fewer|larger|smaller)"
    r"\s+than|at\s+(?:least|most)|up\s+to)(?:\s+be)?\s+$"
)
_COMMA_DECIMAL = re.compile(r"(?<![\w.,])(\d+),(\d{2})(?=\s*[$€£])")
_HEDGE = re.compile(
    r"\b(?:or|maybe|perhaps|possibly|either|not|isn't|unless|guess|but|could|might|alternatively|between|from|to)\b",
    re.IGNORECASE,
)
_SQUARE = re.compile(r"(?<![\w\\\]])\[([^\[\]\n]{1,200})\](?!\()")


def last_hashes(text: str) -> str | None:
    """What follows the last ####."""
    found = _last(_HASHES, text)
    return found.group(1).strip() or None if found else None


def last_answer_line(text: str) -> str | None:
    """What the last line "Answer: ..." says, or the line after it where nothing follows."""
    found = _last(_ANSWER_LINE, text)
    if found is None:
        return None
    content = found["rest"] or ""
    if not content.strip(" \t*_`"):
        following = _NEXT_LINE.match(text, found.end())
        content = following.group(1) if following else ""
    return _only_statement(content)


def last_answer_tag(text: str) -> str | None:
    """What the last complete <answer>...</answer> holds."""
    lower = text.lower()
    end = lower.rfind("</answer>")
    start = lower.rfind("<answer>", 0, max(0, end))
    if end < 0 or start < 0:
        return None
    content = _only_statement(text[start + len("<answer>") : end])
    return None if content is None else _statement(content)


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    found = None
    for found in pattern.finditer(text):  # noqa: B007 (the last one is wanted)
        pass
    return found


def _only_statement(text: str) -> str | None:
    """The first sentence without emphasis around it and without a clause that only comments on it."""
    text = text.strip().removeprefix("}")  # of \\textbf{Answer:} 42
    formula = _MATH.match(text)
    end = _SENTENCE_END.search(text, formula.end() if formula else 0)
    text = _without_emphasis(text[: end.start()] if end else text)
    clause = _CLAUSE.search(text)
    if clause and re.search(r"[\w]", text[: clause.start()]):
        text = text[: clause.start()]
    return text.strip() or None


def _without_emphasis(text: str) -> str:
    """Without the ** of markdown that begin or end within the text; those around all of it go as well."""
    text = text.strip()
    for mark in ("**", "__", "*", "`"):
        while text.endswith(mark) and (len(mark) > 1 or text.count(mark) % 2 or text.startswith(mark)):
            text = text[: -len(mark)].rstrip()
        while text.startswith(mark):
            text = text[len(mark) :].lstrip()
    return text


def from_phrase(text: str) -> str | None:
    """What the last "answer is" or "Final answer:" states: its formula or number, up to the end of the sentence."""
    found = _last(_PHRASE, text)
    content = _only_statement(text[found.end() :]) if found else None
    return None if content is None else _statement(content)


def _statement(sentence: str) -> str | None:
    """The answer within a sentence such as "The volume of $ABCD$ is 120"."""
    sentence = sentence.replace('\\"', " ").translate(_CHINESE_SIGNS).strip(' \t\n"“”')
    if CHINESE.search(_MATH.sub(" ", sentence)):
        return from_prose(sentence) or sentence
    if re.search(r"[A-Za-z]{3,}.*\s(?:is|are|equals)\s", sentence):
        sentence = re.split(r"\s(?:is|are|equals)\s", sentence)[-1]
    if not re.search(r"[A-Za-z]{3,}\s+[A-Za-z]{2,}", _MATH.sub(" ", sentence)):
        return sentence
    return from_prose(sentence) or sentence


def from_prose(text: str) -> str | None:
    """The last formula of a text, else its last number in square brackets, else its last number."""
    text = _COMMA_DECIMAL.sub(r"\1.\2", text)
    formulas = [found for found in _MATH.finditer(text) if re.search(r"[\w]", found.group())]
    numbers = list(_NUMBER.finditer(text))
    if formulas and (not numbers or numbers[-1].start() < formulas[-1].end() + 200):
        last = formulas[-1]
        later = [n for n in numbers if n.start() >= last.end()]
        if not later:
            unit = re.match(r"\s*(%|\\%|percent|degrees)", text[last.end() :])
            return _joined_formulas(text, formulas) + (unit.group() if unit else "")
    brackets = list(_SQUARE.finditer(text))
    if brackets and (not numbers or brackets[-1].end() >= numbers[-1].end()):
        return brackets[-1].group(1)
    if not numbers:
        return None
    if len(numbers) > 1 and _HEDGE.search(text, numbers[-2].start(), numbers[-1].end()):
        return text[numbers[-2].start() : numbers[-1].end()]
    last_number = numbers[-1]
    if _DENIED.search(text, max(0, last_number.start() - 30), last_number.start()):
        return None
    return _whole_formula(text, last_number)


def _joined_formulas(text: str, formulas: list[re.Match[str]]) -> str:
    """The last formula, with those that "and" or "or" join to it: $1$, $2$ and $3$."""
    contents: list[str] = []
    start = 0
    for formula in reversed(formulas):
        gap = text[formula.end() : start] if contents else ""
        if contents and not (_AND_OR if len(contents) == 1 else _LISTING).fullmatch(gap):
            break
        contents.append(next(group for group in formula.groups() if group is not None))
        start = formula.start()
    return ", ".join(reversed(contents))


def _whole_formula(text: str, number: re.Match[str]) -> str:
    """The number with what belongs to it: the list, point or term that it is part of."""
    before = _BEFORE.search(text, max(0, number.start() - 80), number.start())
    after = _AFTER.match(text, number.end())
    formula = text[before.start() if before else number.start() : after.end() if after else number.end()].strip()
    is_balanced = formula.count("(") == formula.count(")") and formula.count("[") == formula.count("]")
    return formula if is_balanced else number.group()

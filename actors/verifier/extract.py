"""Finds the final answer in a response. Linear in the length of the response, whatever it contains."""

import re
from enum import StrEnum

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\[dtc]?frac\s*(?:\d\d|\{[^{}]*\}\s*\{[^{}]*\})|\\[a-zA-Z]+|-?[\w.]+")
_GAP_NOISE = re.compile(r"\\q?quad(?![a-z])|\\[,;:! ()\[\]]|[$~{}]|\\(?:text|textrm|mbox|mathrm)(?![a-z])")
_CONNECTING_GAP = re.compile(
    r"\s*(?:[,;&]|(?:[,;]\s*)?(?:\(?\w+\)?\s+){0,6}(?:and|or))\s*(?:\(\w\)\s*)?(?:[A-Za-z](?:_\w+)?\s*=\s*)?\s*",
    re.IGNORECASE,
)
_ANSWER_LINE = re.compile(r"^[ \t*#>_]*(?:final[ \t]+)?answer[ \t*_]*[:=][ \t*_]*(.*)$", re.IGNORECASE | re.MULTILINE)
_HASHES = re.compile(r"####[ \t]*(.*)")
_PHRASE = re.compile(
    r"\b(?:final\s+answer|answer|correct\s+(?:option|choice))\**\s*(?:(?:is|are|equals|:|=)\s*)+(?:indeed|thus|therefore|simply)?\s*"
    r"|\banswer\s+(?=\$|\\\(|\\\[)|\bfinal:\s*",
    re.IGNORECASE,
)
_MATH = re.compile(
    r"\$\$(?P<a>.+?)\$\$|\\\[(?P<b>.+?)\\\]|\\\((?P<c>.+?)\\\)|(?<![\\$])\$(?P<d>[^$\n]{1,1000}?)(?<!\\)\$(?!\d)",
    re.DOTALL,
)
_SENTENCE_END = re.compile(r"\.(?=\s+[A-Z]|\s*$|\s*\n|\s*\\n)|[!?](?=\s|$)|\n\s*\n")
_NUMBER = re.compile(
    r"(?<![\w.,/^_{\\])-?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+/\d+|\d+(?:\.\d+)?|\.\d+)(?![\w]*\d)"
    r"(?:\s*(?:\\?%|m²|m³|°))?"
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
_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"
_CHAT = re.compile(r"<\|[^|<>]{1,40}\|>")
_TAIL_CHARS = 4000  # the part of a response that is searched for an answer without a box


class Extraction(StrEnum):
    """Where the final answer is looked for, first to last; each mode includes the ones before its own."""

    BOXED = "boxed"  # the last \\boxed{} or \\fbox{}
    ANSWER_LINE = "answer_line"  # else the last line "Answer: ..."
    HASHES = "hashes"  # else the text after the last ####
    ANYWHERE = "anywhere"  # else "the answer is ...", else the last formula or number


def extract(response: str, mode: Extraction) -> str | None:
    """The text of the final answer, or None when there is none.

    With a closing think tag only what follows it counts; a response that never closed its think tag has no answer.
    """
    _, closed, final = response.rpartition(_THINK_CLOSE)
    if not closed and _THINK_OPEN in response:
        return None
    box = last_box(final)
    if mode is Extraction.ANYWHERE:
        return _extract_anywhere(final, box)
    if box is not None:
        return box[1]
    if mode is Extraction.ANSWER_LINE:
        return _last_group(_ANSWER_LINE, final)
    return _last_group(_HASHES, final) if mode is Extraction.HASHES else None


def stated_answer(text: str) -> str:
    """The answer that a reference, or an answer given with its explanation, states: its box, or what follows ####,
    or what a long text says the answer is; else the text as it stands."""
    if "boxed" in text or "fbox" in text:
        box = last_box(text)
        return box[1] if box is not None else _BOX.sub("", text.replace("\\\\", "\\")).lstrip("{")
    if "####" in text and (marked := _last_group(_HASHES, text)) is not None:
        return marked
    if len(text) > 200:
        return _from_phrase(text[-_TAIL_CHARS:]) or text
    return text


def _last_group(pattern: re.Pattern[str], text: str) -> str | None:
    found = None
    for found in pattern.finditer(text):  # noqa: B007 (the last one is wanted)
        pass
    return found.group(1).strip() or None if found else None


def last_box(text: str) -> tuple[int, str] | None:
    """(end, content) of the last balanced box; boxes joined by commas or "and" give a list of their contents."""
    boxes = _boxes(text)
    if not boxes:
        return None
    start, end, content = boxes[-1]
    contents = [content]
    for previous_start, previous_end, previous in reversed(boxes[:-1]):
        if previous_end > start:  # a box within the box before
            continue
        gap = _GAP_NOISE.sub("", text[previous_end:start]) if start - previous_end <= 80 else "."
        if gap.strip() and not _CONNECTING_GAP.fullmatch(gap):
            break
        contents.append(previous)
        start = previous_start
    if len(set(contents)) == 1:
        return end, content
    return end, ", ".join(reversed(contents))


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of all complete boxes, by start."""
    openings = list(_BOX.finditer(text))
    if not openings:
        return []
    closes = _matching_braces(text, openings[0].start())
    boxes = []
    for found in openings:
        inner = found.end()
        if inner < len(text) and text[inner] == "{":
            if inner in closes:
                boxes.append((found.start(), closes[inner] + 1, text[inner + 1 : closes[inner]]))
        elif bare := _BARE_BOX.match(text, inner):
            boxes.append((found.start(), bare.end(), bare.group()))
    return boxes


def _matching_braces(text: str, start: int) -> dict[int, int]:
    """Position of each `{` from `start` on -> position of its `}`; escaped braces do not count."""
    stack: list[int] = []
    closes: dict[int, int] = {}
    for found in _BRACE.finditer(text, start):
        if found.group() == "{":
            stack.append(found.start())
        elif found.group() == "}" and stack:
            closes[stack.pop()] = found.start()
    return closes


def _extract_anywhere(text: str, box: tuple[int, str] | None) -> str | None:
    offset = max(0, len(text) - _TAIL_CHARS)
    tail = _CHAT.split(text[offset:])
    visible = next((part for part in reversed(tail) if len(part.strip()) > 10), text[offset:])
    if box is not None:
        offset_of_visible = text.rfind(visible)
        after = _PHRASE.search(visible, max(0, box[0] - offset_of_visible))
        if after is None:
            return box[1]
        stated = _from_phrase(visible)
        return stated if stated is not None else box[1]
    if len(visible) < 200 and not re.search(r"(?<![A-Za-z\\])[A-Za-z]{3,}", visible):
        return visible.strip() or None  # nothing but a formula
    return _from_phrase(visible) or _from_prose(visible)


def _from_phrase(text: str) -> str | None:
    """What the last "answer is" or "Final answer:" states: its formula or number, up to the end of the sentence."""
    found = None
    for found in _PHRASE.finditer(text):  # noqa: B007 (the last one is wanted)
        pass
    if found is None:
        return None
    rest = text[found.end() :]
    formula = _MATH.match(rest)
    end = _SENTENCE_END.search(rest, formula.end() if formula else 0)
    sentence = rest[: end.start()] if end else rest
    return _statement(sentence.strip()) if sentence.strip() else None


def _statement(sentence: str) -> str | None:
    """The answer within a sentence such as "The volume of $ABCD$ is 120"."""
    sentence = sentence.replace('\\"', " ").strip(' \t\n"“”')
    if re.search(r"[A-Za-z]{3,}.*\s(?:is|are|equals)\s", sentence):
        sentence = re.split(r"\s(?:is|are|equals)\s", sentence)[-1]
    if not re.search(r"[A-Za-z]{3,}\s+[A-Za-z]{2,}", _MATH.sub(" ", sentence)):
        return sentence
    return _from_prose(sentence) or sentence


def _from_prose(text: str) -> str | None:
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

"""Finds the final answer in a response. Linear in the length of the response, whatever it contains."""

import re
from enum import StrEnum

from actors.verifier.prose import CHINESE, from_phrase, from_prose, last_answer_line, last_answer_tag, last_hashes

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BOX_OPENING = re.compile(_BOX.pattern + r"\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\[dtc]?frac\s*(?:\d\d|\{[^{}]*\}\s*\{[^{}]*\})|\\[a-zA-Z]+|-?[\w.]+")
_GAP_NOISE = re.compile(r"\\q?quad(?![a-z])|\\[,;:! ()\[\]]|[$~{}]|\\(?:text|textrm|mbox|mathrm)(?![a-z])")
_CONNECTING_GAP = re.compile(
    r"\s*(?:[,;&]|\+{3,}|(?:[,;]\s*)?(?:\(?\w+\)?\s+){0,6}(?:and|or))\s*(?:\(\w\)\s*)?(?:[A-Za-z](?:_\w+)?\s*=\s*)?\s*",
    re.IGNORECASE,
)
_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"
_CHAT = re.compile(r"<\|[^|<>]{1,40}\|>")
_TAIL_CHARS = 4000  # the part of a response that is searched for an answer without a box


class Extraction(StrEnum):
    """Where the final answer is looked for."""

    BOXED = "boxed"  # the last \\boxed{} or \\fbox{}
    ANSWER_LINE = "answer_line"  # the same, else the last <answer> element, else the last line "Answer: ..."
    HASHES = "hashes"  # as BOXED, else the text after the last ####
    ANYWHERE = "anywhere"  # any of these, else "the answer is ...", else the last formula or number


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
        return last_answer_tag(final) or last_answer_line(final)
    return last_hashes(final) if mode is Extraction.HASHES else None


def unboxed(answer: str) -> str:
    """What the box in an answer holds; an answer without a complete box as it stands."""
    box = last_box(answer) if "boxed" in answer or "fbox" in answer else None
    return answer if box is None else box[1]


def stated_reference(text: str) -> str:
    """What a reference states, which may be a worked solution: its box, or what follows ####, or what a long text says
    the answer is; else the text as it stands."""
    if "boxed" in text or "fbox" in text:
        box = last_box(text)
        return box[1] if box is not None else _BOX.sub("", text.replace("\\\\", "\\")).lstrip("{")
    if "####" in text and (marked := last_hashes(text)) is not None:
        return marked
    if len(text) > 200:
        return from_phrase(text[-_TAIL_CHARS:]) or text
    return text


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
        gap = _GAP_NOISE.sub("", text[previous_end:start].rstrip("\\")) if start - previous_end <= 80 else "."
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
        stated = from_phrase(visible[max(0, box[0] - offset_of_visible) :])
        return stated if stated is not None else box[1]
    if _BOX_OPENING.search(text):  # of an answer that was cut off
        return None
    if (marked := last_answer_tag(visible) or last_hashes(visible)) is not None:
        return marked
    if len(visible) < 200 and not re.search(r"(?<![A-Za-z\\])[A-Za-z]{3,}", visible) and not CHINESE.search(visible):
        return visible.strip() or None  # nothing but a formula
    return from_phrase(visible) or last_answer_line(visible) or from_prose(visible)

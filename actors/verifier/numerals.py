"""Numbers spelled out in English: "twenty-one", "three hundred and five", "two thirds"."""

import re
from fractions import Fraction

from actors.verifier.vocabulary import MAGNITUDES, NUMBER_WORDS, ORDINAL_WORDS, TENS

_WORDS = re.compile(r"[a-z]+(?:[\s-]+[a-z]+)*", re.IGNORECASE)
_MAX_CHARS = 100


def number_in_words(text: str) -> Fraction | None:
    """The number that the text spells, and nothing else; None for other texts, and for a bare "third" or "hundred"."""
    if len(text) > _MAX_CHARS or not _WORDS.fullmatch(text):
        return None
    *words, last = re.split(r"[\s-]+", text.lower())
    denominator = ORDINAL_WORDS.get(last) or ORDINAL_WORDS.get(last.removesuffix("s"))
    if denominator is None:
        return _cardinal([*words, last])
    numerator = _cardinal(words)
    return None if numerator is None else numerator / denominator


def _cardinal(words: list[str]) -> Fraction | None:
    """Twelve thousand three hundred and forty-five: each place at most once, in falling order."""
    total, group, room = 0, 0, 10**15
    for position, word in enumerate(words):
        magnitude = MAGNITUDES.get(word)
        if word == "and" and 0 < position < len(words) - 1 and words[position - 1] in MAGNITUDES:
            continue
        if word == "hundred" and 0 < group < 10:
            group, room = group * 100, 100
        elif magnitude is not None and magnitude > 100 and group > 0 and magnitude < (total or 10**15):
            total, group, room = total + group * magnitude, 0, 1000
        else:
            value = int(NUMBER_WORDS.get(word) or TENS.get(word) or -1)
            if not 0 <= value < room or (value == 0 and len(words) > 1):
                return None
            group, room = group + value, 10 if value >= 20 and value % 10 == 0 else 1
    return Fraction(total + group) if words and words[-1] != "and" else None

"""Units: what may stand after a number without being part of its value, and one spelling for each.

A unit of the table, or things that are counted: "12 red apples". Only such may be left away. Another word after a
number may say anything ("42 excluded"), so what it follows is equal only to the same with the same word.
"""

import re
from fractions import Fraction

from actors.verifier.tokens import ParseError
from actors.verifier.vocabulary import (
    MAGNITUDES,
    MEGA_UNITS,
    ORDINAL_WORDS,
    UNIT_LETTERS_OF_TEXT,
    UNITS,
    lower_word,
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Such a word restricts what stands before it, unless a noun follows: n > 3 even, but 3 even numbers.
_ADJECTIVES = _words("""
odd even prime composite positive real rational
""")
# Words after a number that are no unit: they change its value, or leave open which number is meant.
_NOT_UNITS = _words("""
about above approximately are at base below between but choose cubed divided dozen dozens each either else
equals except excluded factorial from greater hardly if incl incorrect instead is isn't least less maybe minus
mod modulo more most negative never no nor not nothing of off only otherwise over perhaps plus possibly
probably remainder root roughly squared than then through times to too unless until up versus vs was when
while without wrong
""") | {name + ending for name in ORDINAL_WORDS for ending in ("", "s")}
# Words that end as plurals do and are none.
_NOT_PLURALS = _words("""
across afterwards always appears applies becomes begins besides contains depends divides does ends equals
exceeds excludes exists fails follows gives goes holds implies includes lies makes means minus needs perhaps
plus remains requires satisfies says seems sometimes starts sums towards unless varies versus whereas works
""")
_NOT_PLURAL_ENDINGS = ("ss", "us", "is", "'s")
# What may follow a thing.
_AFTER_THINGS = _words("old tall long wide high deep thick left remaining away apart ago later altogether total all")
# What is counted, where the word does not end in s.
_NOUNS = _words("""
altogether apple arrangement axes ball bird board book bottle box boy brick building bus cake candy car card
cat chair chicken child children choice coin color colour combination cookie cow cup customer dart data deer
desk dice die digit divisor dog door egg element employee euro factor fish flower foci foot friend fruit
function game geese girl goat group guest hand head horse house inch indices integer item job jump kid lap
length level line man marble match matrices men mice minute month mouse move multiple number object orange
outcome overall oxen pack page paint pair passenger pen pencil people percent permutation person piece pig
place plant plate player point polynomial possibility prime problem question rabbit radii rectangle ride ring
road room root round row rs rupee sandwich seat series set sheep side slice solution song square stamp
step sticker stone stop story student subset task teacher team teeth test text ticket tile time total toy
trainee tree triangle trip truck unit value vertex vertices visit walk way week win window woman women won
word worker year yuan zero
""")


def magnitude_and_unit(pieces: list[str]) -> tuple[Fraction, str, bool]:
    """The factor of words like "million", one spelling for a unit, and whether it is known to be a unit.

    "square centimeters", "cm^2" and "centimeters^2" are all "cm^2". Raises ParseError for words that change the value
    or the meaning of the number before them.
    """
    factor, unit, power = Fraction(1), "", ""
    spelled = re.sub(r"[A-Za-z]{2,}", lambda run: lower_word(run.group()), " ".join(pieces))  # but M is no m
    words = re.findall(r"[A-Za-z']+|-?\d+|\S", spelled)
    if words[-1:] and words[-1] in _ADJECTIVES:
        raise ParseError(f"{words[-1]} after a number")
    for position, word in enumerate(words):
        if word == "of" and 0 < position < len(words) - 1 and _is_thing(words[position - 1]):  # cups of flour
            return factor, unit, _is_unit(words[:position])
        if word in _NOT_UNITS and words != ["times"]:
            raise ParseError(f"{word} after a number")
        if word in MAGNITUDES and not unit:
            factor *= MAGNITUDES[word]
        elif word in ("square", "sq", "cubic", "cu"):
            power = "^2" if word[0] == "s" else "^3"
        elif word == "per":
            unit += "/"
        elif re.fullmatch("[A-Za-z]+|%", word):
            name = UNITS.get(word) or UNITS.get(word.removesuffix("s")) or word.removesuffix("s")
            unit += ("" if not unit or unit.endswith("/") else " ") + name + power
            power = ""
        elif word == "*":  # kg m^2 and kg \cdot m^2
            continue
        elif word in ("^", "/", "2", "3", "-1", "-2"):
            unit += word
        else:
            raise ParseError(f"{word} in a unit")
    return factor, unit, _is_unit(words)


def _is_unit(words: list[str]) -> bool:
    """Whether the last word of each part, before and after "/" or "per", is a unit or a thing that is counted."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word in ("/", "per"):
            parts.append([])
        elif re.match("[A-Za-z%]", word) and word not in MAGNITUDES:
            parts[-1].append(word)
    for part in parts:
        while len(part) > 1 and part[-1] in _AFTER_THINGS:  # 18 years old
            part.pop()
    return all(not part or _is_thing(part[-1]) for part in parts)


def _is_thing(word: str) -> bool:
    if (
        word in UNITS
        or word in MEGA_UNITS
        or word in UNIT_LETTERS_OF_TEXT
        or word in _NOUNS
        or word.removesuffix("s") in _NOUNS
    ):
        return True
    return len(word) > 3 and word.endswith("s") and word not in _NOT_PLURALS and not word.endswith(_NOT_PLURAL_ENDINGS)

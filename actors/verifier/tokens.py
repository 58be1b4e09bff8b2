"""Tokens, and how characters and words become tokens: numbers, names, units and signs."""

import re
from dataclasses import dataclass
from fractions import Fraction

from actors.verifier import vocabulary as words


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


_CHARS = re.compile(
    r"(?P<space>[\s~&]+)"
    r"|(?P<repeating>\d*\.\d*\(\d+\)(?=\s*$))"
    r"|(?P<dotted>\d*\.\d+\.\.\.)"
    r"|(?P<num>(?:\d+(?:\.(?!\.)\d*)?|\.\d+)(?:[eE][+-]?\d+(?![\d.]))?)"
    r"|(?P<letters>[A-Za-z]+)|(?P<circled>[\u2460-\u2473])"
    r"|(?P<rel><=|>=|!=|==|=<|<|>|=)"
    r"|(?P<dots>\.\.\.)"
    r"|(?P<open>[(\[])|(?P<close>[)\]])|(?P<bar>\|)|(?P<comma>,)|(?P<semi>;)"
    r"|(?P<op>[-+*/^_!':])"
)


_CIRCLED_NAME, _CIRCLED_ZERO = "circled ", 0x245F


def from_chars(chars: str) -> tuple[Token, ...]:
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
                before, after = chars[found.start() - 1 : found.start()], chars[position : position + 1]
                tokens.extend(from_letters(text, not before.strip() and not after.strip()))
            case "circled":
                if tokens[-1:] and tokens[-1].text.startswith(_CIRCLED_NAME):  # a choice of several statements
                    tokens.append(Token("comma", ","))
                tokens.append(Token("sym", f"{_CIRCLED_NAME}{ord(text) - _CIRCLED_ZERO}"))
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


def from_letters(run: str, is_apart: bool = False) -> list[Token]:
    """Functions, constants, words and units as such, other letters as a product. `is_apart`: spaces are around."""
    lower = run.lower()
    if run in words.CONSTANT_NAMES or (len(run) > 1 and lower in words.CONSTANT_NAMES):
        return [Token("const", words.CONSTANT_NAMES.get(run) or words.CONSTANT_NAMES[lower])]
    if lower in words.PLAIN_FUNCTIONS and (lower != "lg" or run == lower):  # Lg is L times g
        return [Token("func", words.PLAIN_FUNCTIONS[lower])]
    if lower in words.CONNECTORS and (is_apart or len(run) > 3 or lower not in words.CONDITION_WORDS):
        return [Token("and", lower)]
    if re.fullmatch("[IVX]{2,}", run):  # a Roman numeral is no product: IV is not VI
        return [Token("word", lower)]
    if lower == "mod":
        return [Token("op", "mod")]
    is_unit = run in words.SHORT_UNITS or (len(run) > 3 and lower in words.UNITS)  # but Mg is no mg
    if is_unit or lower in words.SHORT_WORDS or (is_apart and lower in words.SHORT_WORDS_APART):
        return [Token("word", lower)]
    if run.isupper() and 3 <= len(run) <= 6:  # points, or an order: ABC is not ACB
        return [Token("sym", run)]
    if len(run) <= 3:
        return [_letter(letter) for letter in run]
    pieces = re.findall(words.SEGMENTS + "|[A-Za-z]", run)
    if sum(len(piece) == 1 for piece in pieces) <= 2:
        return [token for piece in pieces for token in from_letters(piece)]
    return [Token("word", lower)]


def _letter(letter: str) -> Token:
    return Token("const", words.CONSTANT_NAMES[letter]) if letter in words.CONSTANT_NAMES else Token("sym", letter)


def from_text(content: str) -> tuple[Token, ...]:
    """The content of \\text{}: connectors, words, or mathematics in text mode such as \\text{13} or \\text{(C)}."""
    stripped = content.strip().strip(",.").strip()
    if not stripped:
        return (Token("comma", ","),) if "," in content else ()
    if re.fullmatch(r"[A-Za-z]+(?:/[A-Za-z]+)+(?:\^?\d)?", stripped):  # \text{m/s}
        return (Token("word", stripped.lower()),)
    if re.fullmatch(r"[A-J](?:\s*(?:,|,?\s*\band\b|,?\s*\bor\b)\s*[A-J])+", stripped):  # \text{A, B and D}
        return from_chars(stripped)
    if re.fullmatch(r"[A-Za-z](?:\s+[A-Za-z])+", stripped):  # \text{ N m}
        return tuple(Token("letter", letter) for letter in stripped.split())
    if re.search("[A-Za-z]{2}", stripped) is None and re.search(r"\d|[A-Za-z]", stripped):
        return from_chars(stripped) if not re.fullmatch("[A-Za-z]", stripped) else (Token("letter", stripped),)
    tokens: list[Token] = []
    for word in stripped.split():
        clean = words.lower_word(word.strip(",.;:()"))
        if clean in words.CONNECTORS:
            tokens.append(Token("and", clean))
        elif clean in words.CONSTANT_NAMES and len(clean) > 1:
            tokens.append(Token("const", words.CONSTANT_NAMES[clean]))
        elif re.fullmatch(r"[\d./]*\d|[\u2460-\u2473]+", clean):
            tokens.extend(from_chars(clean))
        elif clean:
            tokens.append(Token("word", clean))
            if word.endswith(","):
                tokens.append(Token("comma", ","))
            elif word.endswith(":"):
                tokens.append(Token("op", ":"))
    return tuple(tokens)

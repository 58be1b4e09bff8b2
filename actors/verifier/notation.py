# ruff: noqa: RUF001  the signs of mathematics are meant as they stand
"""Brings the spellings of one answer to plain LaTeX, before it is parsed: unicode, markdown, spacing, digit groups."""

import re
import unicodedata

from actors.verifier.vocabulary import (
    CONNECTORS,
    CONSTANT_NAMES,
    FRACTIONS,
    FUNCTION_NAMES,
    GREEK,
    MACROS,
    PLAIN_FUNCTIONS,
    TEXTS,
)

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣʸ", "0123456789+-()nixy")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₐₑₓₙₖₘᵢⱼ", "0123456789+-()aexnkmij")
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣʸ]+")
_SUBSCRIPT_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₐₑₓₙₖₘᵢⱼ]+")
_VULGAR = re.compile("[¼½¾⅐-⅞↉]")
_GREEK = {
    chr(code): "\\" + unicodedata.name(chr(code)).split()[-1].lower().replace("lamda", "lambda") + " "
    for code in [*range(0x3B1, 0x3C2), *range(0x3C3, 0x3CA)]
}
_SIGNS = {
    **_GREEK,
    **{"Δ": "\\Delta ", "Γ": "\\Gamma ", "Σ": "\\Sigma ", "Φ": "\\Phi ", "Ω": "\\Omega ", "Π": "\\Pi "},
    **{"×": "\\times ", "✕": "\\times ", "÷": "\\div ", "·": "\\cdot ", "⋅": "\\cdot ", "∙": "\\cdot "},
    **{"•": "\\cdot ", "∗": "*", "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "﹣": "-", "⁄": "/", "∕": "/"},
    **{"≤": "\\le ", "⩽": "\\le ", "≥": "\\ge ", "⩾": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "≡": "\\equiv "},
    **{"∞": "\\infty ", "±": "\\pm ", "∓": "\\mp ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "∖": "\\setminus "},
    **{"∅": "\\emptyset ", "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "ℕ": "\\mathbb{N}", "ℚ": "\\mathbb{Q}"},
    **{"°": "^{\\circ}", "º": "^{\\circ}", "′": "'", "’": "'", "″": "''", "…": "...", "⋯": "...", "∶": ":"},
    **{"⌊": "\\lfloor ", "⌋": "\\rfloor ", "⌈": "\\lceil ", "⌉": "\\rceil ", "⟨": "\\langle ", "⟩": "\\rangle "},
    **{"∠": "\\angle ", "△": "\\triangle ", "∣": "|", "→": "\\to ", "€": " ", "£": " ", "¥": " ", "₹": " "},
    **{"㎡": "\\text{ m}^2", "㎠": "\\text{ cm}^2", "㎢": "\\text{ km}^2", "㎥": "\\text{ m}^3", "㎤": "\\text{ cm}^3"},
    **{"¢": "\\text{ cents}", "“": '"', "”": '"', "✓": " ", "✔": " ", "✅": " "},
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad\u2061\u2062\u2063", ""),
}
_SIGN = re.compile("[" + re.escape("".join(_SIGNS)) + "]")
_ROOT = re.compile(r"([√∛∜])\s*(\d+(?:\.\d+)?|[A-Za-z](?![A-Za-z])|\\[a-z]+ ?|(?=[({]))")
_ROOT_INDEX = {"√": "", "∛": "[3]", "∜": "[4]"}

# Numbers in circles name statements: compatibility normalisation would make ② the number 2. Other circles -> these.
_CIRCLED = {
    **{0x24F5 + k: 0x2460 + k for k in range(10)},
    **{start + k: 0x2460 + k for start in (0x2776, 0x2780, 0x278A) for k in range(10)},
    **{0x24EB + k: 0x246A + k for k in range(10)},
}
_NOT_CIRCLED = re.compile("[^\u2460-\u2473]+")
_TEXTCIRCLED = re.compile(r"\\textcircled\s*\{?\s*(?:\\[a-z]+\s*)?\{?\s*(\d{1,2})\s*\}{0,2}")
_CHINESE_UNITS = {
    **{"平方厘米": "cm^2", "平方米": "m^2", "平方千米": "km^2", "立方厘米": "cm^3", "立方米": "m^3", "厘米": "cm"},
    **{"毫米": "mm", "分米": "dm", "千米": "km", "公里": "km", "米": "m", "千克": "kg", "公斤": "kg", "克": "g"},
    **{
        "吨": "ton",
        "升": "l",
        "毫升": "ml",
        "小时": "h",
        "分钟": "min",
        "秒": "s",
        "天": "day",
        "年": "year",
        "元": "yuan",
    },
    **{"度": "degree", "岁": "year", "千米/时": "km/h", "米/秒": "m/s"},
    **dict.fromkeys("个人次种只本名条块张页支件棵位辆组班", "items"),
}
# Such a unit at the end, alone in \\text{} or after a number; a thing may follow a counting word.
_CHINESE_UNIT = re.compile(
    r"(?:\\text\s*\{\s*(%s)[\u4e00-\u9fff]{0,4}\s*\}|(?<=[\d})])\s*(%s)[\u4e00-\u9fff]{0,4})\s*[。.]?\s*$"
    % (("|".join(sorted(_CHINESE_UNITS, key=len, reverse=True)),) * 2)
)

# A sign or code before an amount, with which the answer or an item of it ends or goes on in words.
_CURRENCY = re.compile(
    r"(\\\$|^\$(?!.*\$)|[€£¥₹]|\b(?:USD|EUR|GBP|INR|Rs\.?)(?=[\s\d]))\s*"
    r"(-?(?:\d|,\\!|\{,\}|\\,|[.,](?=\d))+(?:\s*(?:\\text\{\s*)?(?:thousand|million|billion|trillion)\}?)?)"
    r"(?=\s*(?:\.?$|[,;$)/]|-\s*[\\$€£]|\\(?:text|textrm|mbox|mathrm|quad| )|(?:and|or|per|an?|each)\b))"
    r"(?!\s*(?:\\text\{\s*)?(?:dollar|USD|EUR|euro|pound|rupee))"
)
_CURRENCY_NAMES = {"$": "dollar", "U": "dollar", "€": "euro", "E": "euro", "£": "pound", "G": "pound", "¥": "yen"}

_OVER_ESCAPED = re.compile(r"\\\\(?=[a-zA-Z{}$%,;!()\[\]])")
_MACRO_NAMES = sorted(name for name in FRACTIONS | TEXTS | GREEK | {*MACROS, *FUNCTION_NAMES, "sqrt", "left", "right"})
_OVER_ESCAPED_MACRO = re.compile(rf"\\\\(?=(?:{'|'.join(filter(str.isalpha, _MACRO_NAMES))})(?![a-zA-Z]))")
_SINGLE_ESCAPE = re.compile(r"(?<!\\)\\(?!\\|n\b)")
_DELIMITERS = re.compile(r"\$|(?<!\\)\\[()\[\]$]|\\(?:begin|end)\{(?:equation|align|gather|math)\*?\}")
_EMPHASIS = re.compile(r"^(\*\*|__|\*|_|`+|\")(?!\s)(.+?)(?<!\s)\1$", re.DOTALL)
_THIN_JOIN = re.compile(
    r"(?<=\d)(?<!\D0)(?<!^0)(?:,?\s*\\[!,]\s*|\{,\}|(?<![.\d]\d{4})\u2009|\u202f|\u00a0)(?=\d{3}(?!\d))"
)
_SPACE_GROUPS = re.compile(r"(?<![\d.,^_])[1-9]\d{0,2}(?: \d{3})+(?![\d]| *[/\\])")
_COMMA_GROUPS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)")
_MIXED = re.compile(r"(?<![\w.}^/)])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])")
_LAST_WORDS = re.compile(r"(?<=[\d}])\s+((?:[a-z]{3,} +)*[a-z]{3,})$")
_TIMES_TEN = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)")
_METRES = re.compile(r"(?<=\d)\s*(m)(\^\{?[23]\}?)$|(?<=\d)\s+([msgLh]|K[gGmM])$")
_TAIL = re.compile(r"(?:\\\\|\\[,;!: ]?|(?<!\.)\.|[,;:~])\Z")
_HEAD = re.compile(r"[:=~]|\\[,;!: ]|\\approx(?![a-zA-Z])")
_DEGREES_OF = r"\^\s*\{{?\s*\\circ\s*\}}?\s*(?:\\(?:text|mathrm|textrm|rm)\s*)?\{{?\s*{}\s*\}}?$"
_DEGREES_MINUTES = r"(?<![\w.])(\d+)\s*\^\s*\{?\s*\\circ\s*\}?\s*(\d+(?:\.\d+)?)'"
_REALS = r"\\mathbb\s*\{?R\}?\s*"
_IN_BASE = r"\s*(?:\\text\s*\{\s*)?\(?(?:in\s+)?base[\s-]*\}?\s*(\w+)\s*\}?\)?\}?$"
_SPEED = r"(?<=\d)(?:\s+|\\[, ;]\s*|~)((?:[kc]?m|mi|ft)/(?:s|h|hr|min|sec))(\^\{?2\}?)?$"
_BALANCED = r"(?:[^{}]|\{[^{}]*\})*"
_SYSTEM = r"\\left\s*\\\{\s*\\begin\{array\}\s*\{[lcr]\}(.*?)\\end\{array\}"
_SIMPLE = (
    (re.compile(r"<\|[^|<>]*\|>"), " "),
    (re.compile(r"\\n(?![a-z])"), " "),
    (re.compile(r"\\(?:left|right)\s*\."), " "),
    (re.compile(r"\\left\s*(?:\||\\vert(?![a-z]))"), r"\\lvert "),
    (re.compile(r"\\right\s*(?:\||\\vert(?![a-z]))"), r"\\rvert "),
    (re.compile(r"\\left\s*<"), r"\\langle "),
    (re.compile(r"\\right\s*>"), r"\\rangle "),
    (re.compile(r"\\(q?quad)(?=[a-zA-Z])"), r"\\\1 "),
    (re.compile(r"\\(?:ldots|dots|cdots|dotsc|dotsb|hdots)(?![a-zA-Z])"), "..."),
    (re.compile(r"(?<![\w)}*])\*\*(?=[^\s*])([^*]+)(?<=[^\s*])\*\*(?![\w({*])"), r"\1"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"<sup>(.{1,40}?)</sup>"), r"^{\1}"),
    (re.compile(r"<sub>(.{1,40}?)</sub>"), r"_{\1}"),
    (re.compile(r"(?<=\d)\s*(?:\^\s*)?(?:\{?\\(?:text|mathrm|textrm)\s*)?\{?(?:st|nd|rd|th)\}{0,2}$"), ""),
    (re.compile(r"(?<=[\d)}])(or|and)(?=[A-Z(\\\d])"), r" \1 "),
    (re.compile(r"(?:\\text\{\s*)?\((?:\\text\{\s*)?\\?b?mod\b\s*\}?\s*(\w+)\s*\)\}?"), r"\\pmod{\1}"),
    (re.compile(r"(?<!\\)%"), r"\\%"),
    (re.compile(r"(?<!\\)#"), r"\\#"),
)
# (what the text must contain, pattern, replacement): spellings that are too rare to be searched for in every answer
_RARE: tuple[tuple[str, re.Pattern[str], str], ...] = (
    ("</", re.compile(r"</?(?:b|i|u|em|strong|p|span)>"), ""),
    ("color", re.compile(r"\\(?:text)?color\s*\{[a-zA-Z]+\}"), ""),
    ("\\checkmark", re.compile(r"\\checkmark(?![a-zA-Z])"), ""),
    ("'", re.compile(_DEGREES_MINUTES + r"\s*(\d+(?:\.\d+)?)''$"), r"(\1+\\frac{\2}{60}+\\frac{\3}{3600})^{\\circ}"),
    ("'", re.compile(_DEGREES_MINUTES + "$"), r"(\1+\\frac{\2}{60})^{\\circ}"),
    ("\\mathbb", re.compile(_REALS + r"(?:\^\s*\{?\+\}?|_\s*\{?(?:\+|>\s*0)\}?)"), r"(0,\\infty)"),
    ("\\mathbb", re.compile(_REALS + r"(?:\^\s*\{?-\}?|_\s*\{?(?:-|<\s*0)\}?)"), r"(-\\infty,0)"),
    ("\\mathbb", re.compile(_REALS + r"_\s*\{?\\geq?\s*0\}?"), r"[0,\\infty)"),
    (
        "\\mathbb",
        re.compile(r"\\mathbb\s*\{?[ZN]\}?\s*(?:[\^_]\s*\{?\+\}?|\^\s*\{?\*\}?|_\s*\{?>\s*0\}?)"),
        r"\\mathbb{Z+}",
    ),
    ("\\not", re.compile(r"\\not\s*="), r"\\ne "),
    ("\\mid", re.compile(r"\\mid(?![a-zA-Z])"), "|"),
    ("+/", re.compile(r"\+\s*/\s*-"), r"\\pm "),
    ("<", re.compile(r"^\s*<([^<>=]*,[^<>=]*)>\s*$"), r"\\langle \1\\rangle "),
    ("\\dot", re.compile(r"\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?$"), r"\\overline{\1\2\3}"),
    ("o", re.compile(r"(?<=\d)\s*\^\s*\{?\s*(?:\\(?:text|mathrm|rm)\s*)?\{?o\}{0,2}(?!\w)"), r"^{\\circ}"),
    ("circ", re.compile(_DEGREES_OF.format("C")), r"\\text{ degrees Celsius}"),
    ("circ", re.compile(_DEGREES_OF.format("F")), r"\\text{ degrees Fahrenheit}"),
    (")", re.compile(r"^\(\s*(\d[0-9A-F]*)\s*\)\s*_(?=[({]*\d)"), r"\1_"),
    (":", re.compile(r"^\\text\s*\{\s*(\d{1,2}:\d\d[^{}]*)\}$"), r"\1"),
    (":", re.compile(r"(?:\\text\s*)?\{\s*:\s*\}"), ":"),
    ("quad", re.compile(r"(?<=[\w})])\s*\\q?quad\s*(?=[a-zA-Z](?:_\{?\w+\}?)?\s*=)"), ", "),
    ("base", re.compile(r"^\(?(\d[0-9A-F]*)\)?" + _IN_BASE), r"\1_{\2}"),
    (":", re.compile(r"(?<=:\d\d)\s*(?:\\text\s*\{\s*)?a\.?\s?m\b\.?\s*\}?$", re.IGNORECASE), r"\\text{ am}"),
    (":", re.compile(r"(?<=:\d\d)\s*(?:\\text\s*\{\s*)?p\.?\s?m\b\.?\s*\}?$", re.IGNORECASE), r"\\text{ pm}"),
    ("\\over", re.compile(rf"\{{({_BALANCED})\\over(?![a-zA-Z])({_BALANCED})\}}"), r"\\frac{\1}{\2}"),
    ("\\over", re.compile(rf"^({_BALANCED})\\over(?![a-zA-Z])({_BALANCED})$"), r"\\frac{\1}{\2}"),
    ("{array}", re.compile(_SYSTEM, re.DOTALL), r"\\begin{cases}\1\\end{cases}"),
    ("ed}", re.compile(r"\\left\s*\\\{\s*(?=\\begin\{(?:aligned|gathered)\})"), ""),
    ("/", re.compile(_SPEED), r"\\text{ \1}\2"),
)


def normalize(text: str) -> str:
    """The answer in plain LaTeX without delimiters; digit groups with commas are left for `join_comma_groups`."""
    if "\\textcircled" in text:
        text = _TEXTCIRCLED.sub(_spell_circled, text)
    text = _from_unicode(_CURRENCY.sub(_spell_currency, text))
    if "\\\\" in text:
        is_always_so = not _SINGLE_ESCAPE.search(text.replace("\\\\", ""))
        if is_always_so or "\\begin" not in text:
            text = (_OVER_ESCAPED if is_always_so else _OVER_ESCAPED_MACRO).sub(r"\\", text)
    text = _strip(text)
    while (emphasis := _EMPHASIS.match(text)) and emphasis.group(1) not in emphasis.group(2):
        text = _strip(emphasis.group(2))
    for pattern, new in _SIMPLE:
        text = pattern.sub(new, text)
    for part, pattern, new in _RARE:
        if part in text:
            text = pattern.sub(new, text)
    text = _strip(_DELIMITERS.sub(" ", text))
    text = _THIN_JOIN.sub("", text)
    text = _SPACE_GROUPS.sub(lambda found: found.group().replace(" ", ""), text)
    text = _TIMES_TEN.sub(r"\\times ", _MIXED.sub(_spell_mixed, text))
    text = _LAST_WORDS.sub(_spell_unit, text)
    return _METRES.sub(lambda found: rf"\text{{{found.group(1) or found.group(3)}}}{found.group(2) or ''}", text)


def _strip(text: str) -> str:
    """Without the spaces and punctuation around the answer; an ellipsis stays."""
    text = text.strip()
    while (found := _HEAD.match(text)) is not None:
        text = text[found.end() :].lstrip()
    while (found := _TAIL.search(text, max(0, len(text) - 3))) is not None:
        text = text[: found.start()].rstrip()
    return text


def _spell_currency(found: re.Match[str]) -> str:
    """$5 as 5 dollars."""
    sign, amount = found.groups()
    return rf"{amount}\text{{ {_CURRENCY_NAMES.get(sign.lstrip(chr(92))[0], 'rupee')}}}"


def _spell_unit(found: re.Match[str]) -> str:
    """Words after a space at the end are a unit, not products of letters."""
    words = set(found.group(1).split())
    is_formula = (words - {"min"}) & ({*PLAIN_FUNCTIONS, *CONSTANT_NAMES, "mod"} | CONNECTORS)
    return found.group() if is_formula else rf"\text{{ {found.group(1)}}}"


def _spell_mixed(found: re.Match[str]) -> str:
    """1 1/2 as a mixed number; an improper fraction after a space is left as it is, and refused by the parser."""
    whole, top, bottom = found.groups()
    return rf"{whole}\frac{{{top}}}{{{bottom}}}" if int(top) < int(bottom) else found.group()


def _from_unicode(text: str) -> str:
    if text.isascii():
        return text
    text = _SUPERSCRIPT_RUN.sub(lambda run: "^{" + run.group().translate(_SUPERSCRIPTS) + "}", text)
    text = _SUBSCRIPT_RUN.sub(lambda run: "_{" + run.group().translate(_SUBSCRIPTS) + "}", text)
    text = _VULGAR.sub(_spell_vulgar, text)
    text = _SIGN.sub(lambda sign: _SIGNS[sign.group()], text)
    text = _ROOT.sub(_spell_root, text)
    text = _CHINESE_UNIT.sub(_spell_chinese_unit, text)
    return _NOT_CIRCLED.sub(lambda run: unicodedata.normalize("NFKC", run.group()), text.translate(_CIRCLED))


def _spell_circled(found: re.Match[str]) -> str:
    """\\textcircled{2} as the character for it."""
    number = int(found.group(1))
    return chr(0x245F + number) if 1 <= number <= 20 else found.group()


def _spell_chinese_unit(found: re.Match[str]) -> str:
    name, _, power = _CHINESE_UNITS[found.group(1) or found.group(2)].partition("^")
    return rf"\text{{ {name}}}" + (f"^{power}" if power else "")


def _spell_vulgar(found: re.Match[str]) -> str:
    numerator, _, denominator = unicodedata.normalize("NFKC", found.group()).partition("⁄")
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def _spell_root(found: re.Match[str]) -> str:
    sign, radicand = found.groups()
    return rf"\sqrt{_ROOT_INDEX[sign]}" + (f"{{{radicand}}}" if radicand else "")


def join_comma_groups(text: str) -> str:
    """Removes the commas of numbers like 1,234,567.

    Within brackets a comma more often separates items, so there digits are joined only where a list would be odd: a
    group with a leading zero (1,000), or other commas with spaces (1,234, 5,678).
    """
    pieces, position, depth = [], 0, 0
    has_spaced_comma = ", " in text
    for found in _COMMA_GROUPS.finditer(text):
        before = text[position : found.start()]
        depth += sum(before.count(c) for c in "([") - sum(before.count(c) for c in ")]")
        depth += before.count("\\{") - before.count("\\}")
        has_zero_group = any(group.startswith("0") for group in found.group().split(",")[1:])
        joins = depth <= 0 or has_zero_group or has_spaced_comma
        pieces += [before, found.group().replace(",", "") if joins else found.group()]
        position = found.end()
    return "".join(pieces) + text[position:]

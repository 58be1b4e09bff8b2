# ruff: noqa: RUF001  the signs of mathematics are meant as they stand
"""The words of mathematical notation that the verifier knows."""

FRACTIONS = frozenset({"frac", "dfrac", "tfrac", "cfrac", "sfrac", "nicefrac"})
IGNORED_WITH_ARGUMENT = frozenset({"phantom", "hphantom", "vphantom", "hspace", "vspace", "label", "tag"})
BINOMIALS = frozenset({"binom", "dbinom", "tbinom"})
OVERLINES = frozenset({"overline", "dot", "bar", "widebar"})
TEXTS = frozenset(
    [
        "text",
        "textbf",
        "textit",
        "textrm",
        "textsf",
        "texttt",
        "textnormal",
        "textup",
        "textsc",
        "textmd",
        "mbox",
        "hbox",
        "emph",
    ]
)
WRAPPERS = frozenset(
    [
        "mathbf",
        "mathrm",
        "mathit",
        "mathsf",
        "mathtt",
        "mathbb",
        "mathcal",
        "mathfrak",
        "mathscr",
        "mathnormal",
        "boldsymbol",
        "bm",
        "pmb",
        "vec",
        "hat",
        "overrightarrow",
        "underline",
        "boxed",
        "fbox",
        "ensuremath",
    ]
)
MATRICES = frozenset(["matrix", "pmatrix", "bmatrix", "Bmatrix", "vmatrix", "Vmatrix", "smallmatrix", "array"])
# Environments whose lines are items; in the second group & only aligns.
SYSTEMS = frozenset({"cases", "aligned", "gathered", "split"})
ALIGNED = SYSTEMS - {"cases"}
IGNORED = frozenset(
    [
        "left",
        "right",
        "big",
        "Big",
        "bigg",
        "Bigg",
        "bigl",
        "bigr",
        "Bigl",
        "Bigr",
        "biggl",
        "biggr",
        "Biggl",
        "Biggr",
        "displaystyle",
        "textstyle",
        "limits",
        "nolimits",
        "quad",
        "qquad",
        "enspace",
        "thinspace",
        "negthinspace",
        "small",
        "large",
        "Large",
        "normalsize",
        "rm",
        "bf",
        "it",
        "cal",
        "hfill",
        "noindent",
        "centering",
        ",",
        ";",
        "!",
        ":",
        ">",
        "$",
        "\\",
    ]
) | {" ", "\n"}
GREEK = frozenset(
    [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "varepsilon",
        "zeta",
        "eta",
        "theta",
        "vartheta",
        "iota",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
        "omicron",
        "rho",
        "varrho",
        "sigma",
        "varsigma",
        "tau",
        "upsilon",
        "phi",
        "varphi",
        "chi",
        "psi",
        "omega",
        "Gamma",
        "Delta",
        "Theta",
        "Lambda",
        "Xi",
        "Pi",
        "Sigma",
        "Upsilon",
        "Phi",
        "Psi",
        "Omega",
        "ell",
        "hbar",
        "partial",
        "nabla",
    ]
)
RELATIONS = {
    **{"=": "=", "==": "=", "<": "<", ">": ">", "<=": "≤", "=<": "≤", ">=": "≥", "!=": "≠"},
}
_RELATION_MACROS = {
    **dict.fromkeys(("le", "leq", "leqslant", "leqq"), "≤"),
    **dict.fromkeys(("ge", "geq", "geqslant", "geqq"), "≥"),
    **dict.fromkeys(("ne", "neq"), "≠"),
    **dict.fromkeys(("approx", "approxeq", "thickapprox", "simeq"), "≈"),
    **{"lt": "<", "gt": ">", "equiv": "≡", "sim": "∼", "cong": "≅", "mid": "|", "to": "→", "rightarrow": "→"},
}
# Macro without arguments -> (kind, text) of its token.
MACROS: dict[str, tuple[str, str]] = {
    **{name: ("rel", sign) for name, sign in _RELATION_MACROS.items() if name != "mid"},
    **{"times": ("op", "*"), "cdot": ("op", "*"), "ast": ("op", "*"), "div": ("op", "/"), "colon": ("op", ":")},
    **{"pm": ("op", "±"), "mp": ("op", "∓"), "bmod": ("op", "mod"), "mod": ("op", "mod"), "%": ("op", "%")},
    **{"cup": ("op", "∪"), "cap": ("op", "∩"), "setminus": ("op", "∖"), "backslash": ("op", "∖")},
    **{"bigcup": ("op", "∪"), "choose": ("op", "choose"), "circ": ("op", "°"), "degree": ("degree", "°")},
    **{"in": ("rel", "∈"), "prime": ("op", "'"), "infty": ("const", "oo"), "pi": ("const", "pi")},
    **{"emptyset": ("empty", ""), "varnothing": ("empty", ""), "{": ("open", "{"), "}": ("close", "}")},
    **{"lbrace": ("open", "{"), "rbrace": ("close", "}"), "lbrack": ("open", "["), "rbrack": ("close", "]")},
    **{"langle": ("open", "<"), "rangle": ("close", ">"), "lfloor": ("open", "⌊"), "rfloor": ("close", "⌋")},
    **{"lceil": ("open", "⌈"), "rceil": ("close", "⌉"), "lvert": ("open", "|"), "rvert": ("close", "|")},
    **{"vert": ("bar", "|"), "|": ("bar", "|"), "mid": ("bar", "|"), "land": ("and", "∧"), "lor": ("and", "∨")},
    **{"wedge": ("and", "∧"), "vee": ("and", "∨"), "sum": ("series", "sum"), "prod": ("series", "product")},
    **{
        "angle": ("mark", "angle"),
        "triangle": ("mark", "triangle"),
        "R": ("numbers", "R"),
        "Pr": ("sym", "P"),
        "top": ("sym", "T"),
        "intercal": ("sym", "T"),
        "lim": ("lim", "lim"),
        "int": ("opaque", "int"),
    },
}
NUMBER_SETS = frozenset({*"RZNQC", "Z+"})
_BOTH = {
    **{name: name for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "exp", "ln")},
    **{f"arc{name}": f"arc{name}" for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh")},
    **{name: name for name in ("coth", "sech", "csch", "arccoth", "arcsech", "arccsch")},
    **{"log": "log", "lg": "lg", "gcd": "gcd", "max": "max", "min": "min", "lcm": "lcm", "det": "det"},
}
FUNCTION_NAMES = {**_BOTH, "tg": "tan", "ctg": "cot"}
PLAIN_FUNCTIONS = {
    **_BOTH,
    **{"sqrt": "sqrt", "abs": "abs", "floor": "floor", "ceil": "ceil", "ceiling": "ceil", "cbrt": "cbrt"},
    **{f"a{name}": f"arc{name}" for name in ("sin", "cos", "tan")},
    **{"binomial": "binomial", "binom": "binomial", "factorial": "factorial"},
}
CONSTANT_NAMES = {
    **{"pi": "pi", "e": "e", "i": "i"},
    **{"inf": "oo", "infty": "oo", "infinity": "oo", "oo": "oo"},
}
CONNECTORS = frozenset({"and", "or", "where"})
SEGMENTS = "arcsin|arccos|arctan|sqrt|sin|cos|tan|cot|sec|csc|ln|log|exp|pi|and|or"

MAGNITUDES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
MAGNITUDES |= {f"{name}s": value for name, value in MAGNITUDES.items()}
# What parts are called, by the number of them that make a whole.
ORDINAL_WORDS = {
    **{"half": 2, "halve": 2, "third": 3, "fourth": 4, "quarter": 4, "fifth": 5, "sixth": 6, "seventh": 7},
    **{"eighth": 8, "ninth": 9, "tenth": 10, "twelfth": 12, "hundredth": 100, "thousandth": 1000},
}
_MONTHS = "january february march april june july august september october november december"
# Such a word restricts what stands before it, unless a noun follows: n > 3 even, but 3 even numbers.
ADJECTIVES = frozenset({"odd", "even", "prime", "composite", "positive", "real", "rational"})
# Words after a number that are no unit: they change its value, or leave open which number is meant.
NOT_UNITS = frozenset(
    [
        *_MONTHS.split(),
        *ORDINAL_WORDS,
        *(f"{word}s" for word in ORDINAL_WORDS),
        "about",
        "above",
        "approximately",
        "at",
        "below",
        "between",
        "but",
        "choose",
        "cubed",
        "divided",
        "dozen",
        "dozens",
        "each",
        "either",
        "except",
        "factorial",
        "from",
        "greater",
        "hardly",
        "if",
        "incorrect",
        "isn't",
        "least",
        "less",
        "maybe",
        "minus",
        "modulo",
        "more",
        "most",
        "negative",
        "never",
        "no",
        "not",
        "nor",
        "of",
        "off",
        "only",
        "over",
        "perhaps",
        "plus",
        "possibly",
        "probably",
        "remainder",
        "root",
        "roughly",
        "squared",
        "than",
        "then",
        "through",
        "times",
        "to",
        "too",
        "unless",
        "until",
        "up",
        "versus",
        "vs",
        "when",
        "while",
        "without",
        "wrong",
        "is",
        "are",
        "was",
        "mod",
        "base",
        "equals",
        "else",
        "otherwise",
        "instead",
    ]
)
# Runs of at most three letters are products of variables, except these.
SHORT_WORDS = frozenset({"per", "the", "but", "not", "nor", "are", "was", "too", "sq", "cu"})
NUMBER_WORDS = {
    word: str(value)
    for value, word in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
        ]
    )
}
TENS = {
    word: str(value)
    for value, word in zip(
        range(20, 100, 10),
        ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"],
        strict=True,
    )
}

# Upright letters that are units after a number; others, as \mathrm{x}, may be variables.
UNIT_LETTERS = frozenset("gmsJKNVW")
MEGA_UNITS = frozenset({"Mg", "MN", "MW", "MV", "MJ", "MHz", "MeV", "MPa"})  # in lower case they would be milli
# Spellings of units -> one spelling each. Other words after a number count as a unit in the spelling given.
UNITS = {
    **dict.fromkeys(("%", "percent", "pct", "percentage", "percents"), "%"),
    **dict.fromkeys(("degree", "degrees", "deg", "°"), "degree"),
    **dict.fromkeys(("dollar", "dollars", "usd", "bucks"), "dollar"),
    **dict.fromkeys(("cent", "cents"), "cent"),
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), "m"),
    **dict.fromkeys(("cm", "centimeter", "centimeters", "centimetre", "centimetres"), "cm"),
    **dict.fromkeys(("mm", "millimeter", "millimeters", "millimetre", "millimetres"), "mm"),
    **dict.fromkeys(("km", "kilometer", "kilometers", "kilometre", "kilometres"), "km"),
    **dict.fromkeys(("in", "inch", "inches"), "in"),
    **dict.fromkeys(("ft", "foot", "feet"), "ft"),
    **dict.fromkeys(("yd", "yard", "yards"), "yd"),
    **dict.fromkeys(("mi", "mile", "miles"), "mi"),
    **dict.fromkeys(("g", "gram", "grams"), "g"),
    **dict.fromkeys(("kg", "kilogram", "kilograms", "kgs"), "kg"),
    **dict.fromkeys(("mg", "milligram", "milligrams"), "mg"),
    **dict.fromkeys(("lb", "lbs", "pound", "pounds"), "lb"),
    **dict.fromkeys(("oz", "ounce", "ounces"), "oz"),
    **dict.fromkeys(("l", "L", "liter", "liters", "litre", "litres"), "l"),
    **dict.fromkeys(("ml", "mL", "milliliter", "milliliters", "millilitre", "millilitres"), "ml"),
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), "s"),
    **dict.fromkeys(("min", "mins", "minute", "minutes"), "min"),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), "h"),
    **dict.fromkeys(("day", "days"), "day"),
    **dict.fromkeys(("year", "years", "yr", "yrs"), "year"),
    **dict.fromkeys(("unit", "units"), "unit"),
    **dict.fromkeys(("mph",), "mi/h"),
    **dict.fromkeys(("rad", "radian", "radians"), "rad"),
}

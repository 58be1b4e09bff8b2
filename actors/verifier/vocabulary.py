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
        **{name: ("opaque", name) for name in ("int", "iint", "iiint", "oint")},
    },
}
# Signs that are no symbols: operators without a meaning here, relations, arrows. Other unknown macros are symbols.
_OPERATORS = """
oplus ominus otimes oslash odot star bullet diamond bigcirc amalg wr sqcap sqcup uplus dagger ddagger bigoplus
bigotimes bigodot bigsqcup biguplus bigcap bigvee bigwedge coprod triangleleft triangleright rtimes ltimes Cap
Cup boxplus boxtimes subset supset subseteq supseteq subsetneq supsetneq nsubseteq nsupseteq sqsubset sqsupset
sqsubseteq sqsupseteq ni notin nin prec succ preceq succeq ll gg lll ggg perp parallel nparallel propto vdash
dashv models vDash asymp doteq smile frown bowtie trianglelefteq trianglerighteq nmid not doteqdot leqgtr
lesssim gtrsim sym nless ngtr nleq ngeq vartriangleleft leftarrow Leftarrow Rightarrow leftrightarrow
Leftrightarrow longrightarrow Longrightarrow longleftarrow mapsto longmapsto uparrow downarrow updownarrow
nearrow searrow hookrightarrow rightharpoonup rightleftharpoons implies impliedby iff leadsto gets lnot neg
forall exists nexists therefore because vdots ddots sup inf limsup liminf arg Re Im dim ker hom deg argmax
argmin middle over atop stackrel overset underset substack cancel sout textsuperscript textsubscript mathop
mathrel mathbin
"""
OPERATORS = frozenset(_OPERATORS.split())
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
# What joins the items of a list, and what joins a statement and its condition.
CONDITION_WORDS = frozenset({"where", "for", "if", "when", "whenever", "with", "provided"})
CONNECTORS = frozenset({"and", "or"}) | CONDITION_WORDS
SEGMENTS = "arcsin|arccos|arctan|sqrt|sin|cos|tan|cot|sec|csc|ln|log|exp|pi|and|or"

MAGNITUDES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
MAGNITUDES |= {f"{name}s": value for name, value in MAGNITUDES.items()}
# What parts are called, by the number of them that make a whole.
ORDINAL_WORDS = {
    **{"half": 2, "halve": 2, "third": 3, "fourth": 4, "quarter": 4, "fifth": 5, "sixth": 6, "seventh": 7},
    **{"eighth": 8, "ninth": 9, "tenth": 10, "twelfth": 12, "hundredth": 100, "thousandth": 1000},
}
# Runs of at most three letters are products of variables, except these.
SHORT_WORDS = frozenset({"per", "the", "but", "not", "nor", "are", "was", "too", "sq", "cu"})
# The same where spaces set them apart.
SHORT_WORDS_APART = frozenset({"is", "of", "on", "its", "has", "all", "any", "one", "two", "out", "off", "let"})
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
UNIT_LETTERS_OF_TEXT = UNIT_LETTERS | frozenset("ACFHLMTWbhlt")
MEGA_UNITS = frozenset({"Mg", "MN", "MW", "MV", "MJ", "MHz", "MeV", "MPa"})  # in lower case they would be milli
_SPELLINGS = """
% percent pct percentage percents
degree degrees deg °
dollar dollars usd bucks
cent cents
m meter meters metre metres
cm centimeter centimeters centimetre centimetres
mm millimeter millimeters millimetre millimetres
km kilometer kilometers kilometre kilometres
dm decimeter decimeters decimetre decimetres
in inch inches
ft foot feet
yd yard yards
mi mile miles
g gram grams
kg kilogram kilograms kgs kilo kilos
mg milligram milligrams
lb lbs pound pounds
oz ounce ounces
l L liter liters litre litres
ml mL milliliter milliliters millilitre millilitres
s sec secs second seconds
min mins minute minutes
h hr hrs hour hours
day days
year years yr yrs
unit units
mi/h mph
rad radian radians
n newton newtons
j joule joules
kj kilojoule kilojoules
w watt watts
kw kilowatt kilowatts
v volt volts
a amp amps ampere amperes
k kelvin kelvins
pa pascal pascals
hz hertz
mol mole moles
t ton tons tonne tonnes
gal gallon gallons
qt quart quarts
pt pint pints
acre acres
ha hectare hectares
month months
week weeks
yuan rmb cny
euro euros eur
yen jpy
rupee rupees inr rs
"""
_OTHERS = """
celsius fahrenheit nm pm um ms ns us khz ghz kpa atm bar kn mn ev kev gev kv mv ma ohm ohms tesla gauss wb weber
henry farad coulomb coulombs lux lumen lumens cal kcal calorie calories btu hp db ly pc au knot knots rpm ppm
bit bits byte bytes kb mb gb tb tbsp tsp cup cups teaspoon teaspoons tablespoon tablespoons decade decades
century centuries fortnight erg ergs dyne dynes psi poise angstrom angstroms micron microns mmol sr steradian am
pm kph kmh kmph revolution revolutions cycle cycles turn turns pence penny pennies nickel nickels dime dimes
quarter quarters peso pesos franc francs krone kroner won ruble rubles bps mbps kbps lightyear lightyears
furlong furlongs league leagues stone stones carat carats
"""
# Spellings of units -> one spelling each.
UNITS = {
    name: names[0] for names in map(str.split, _SPELLINGS.strip().splitlines()) for name in names if name != "mi/h"
}
UNITS |= {name: name for name in _OTHERS.split() if name not in UNITS}
# Runs of at most three letters that are units and not products, even outside of \\text{}.
_SHORT = "pct usd deg cm mm km in ft yd mi kg kgs mg lb lbs oz ml mL sec min hr hrs day yr yrs mph rad"
SHORT_UNITS = frozenset(_SHORT.split())


def lower_word(word: str) -> str:
    """The word in lower case, except units that would be others then."""
    return word if word in MEGA_UNITS else word.lower()

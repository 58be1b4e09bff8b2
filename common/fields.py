"""What the wire (common/wire.py) has to know of a field beyond its Python type: how an array travels, what numbers and
texts may be. Who sends a number outside its range has sent no message; a text that is too long is cut.
"""

from typing import Annotated, NamedTuple, TypeAlias

MAX_TEXT = 4000  # characters
MAX_SECONDS = 1e9  # thirty years: the sums over all actors stay finite
MAX_COUNT = 1 << 53  # exact as a float


class ArraySpec(NamedTuple):
    """How an array field travels: its dtype and number of dimensions."""

    dtype: str
    ndim: int


class Range(NamedTuple):
    """What a number may be, the ends included."""

    lowest: float
    highest: float


class Length(NamedTuple):
    """Of a text, in characters, at most."""

    most: int


Seconds: TypeAlias = Annotated[float, Range(0, MAX_SECONDS)]  # a duration, or a time since the start of something
Count: TypeAlias = Annotated[int, Range(0, MAX_COUNT)]
Text: TypeAlias = Annotated[str, Length(MAX_TEXT)]  # for people: what somebody says of an error, or why

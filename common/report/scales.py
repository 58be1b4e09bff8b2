"""Axes of plots: which part of the numbers they show, at which values they have ticks, and how numbers are written."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

TICKS = 4  # about so many intervals an axis
INSIDE = 6  # the same where ticks are only between the ends
DECADES = 5  # so many ticks on a logarithmic axis
MOST_DECADES = 6  # from its lower end to the largest number
ROUNDING = 1e-9  # numbers that differ by less of their size are one number
NOTHING = 1e-100  # smaller numbers are 0


@dataclass(frozen=True, kw_only=True)
class Axis:
    """`label` names the quantity and its unit. Values outside `low` to `high` are drawn at the ends."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    is_log: bool = False

    def share(self, value: float) -> float:
        """Where `value` lies between `low`, 0, and `high`, 1."""
        if self.is_log:
            low, high, value = math.log(self.low), math.log(self.high), math.log(max(value, self.low))
        else:
            low, high = self.low, self.high
        return min(max((value - low) / (high - low), 0.0), 1.0)


def linear(label: str, shown: Iterable[float], unit: str = "", whole: bool = False) -> Axis:
    """An axis that ends at ticks and holds all of `shown`. `unit` "%" writes shares as percent; `whole`: only integers
    have ticks."""
    low, high = _ends(shown, (0.0, 0.0))
    if high - low <= ROUNDING * max(abs(low), abs(high)):
        low, high = (low, low + 1.0) if low == 0 else (low - abs(low) / 2, low + abs(low) / 2)
    step = _nice((high - low) / TICKS)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    at = [index * step for index in range(first, max(last, first + 1) + 1)]
    texts = [percent(value, step) for value in at] if unit == "%" else _texts(at, step)
    return Axis(label=label, low=at[0], high=at[-1], ticks=tuple(zip(at, texts, strict=True)))


def span(label: str, shown: Sequence[float]) -> Axis:
    """An axis from the smallest to the largest of `shown`, ticks inside: for steps and times, which have an end."""
    low, high = _ends(shown, (0.0, 1.0))
    if high - low <= ROUNDING * max(abs(low), abs(high)):
        low, high = low - 1.0, low + 1.0
    step = _nice((high - low) / INSIDE)
    at = [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return Axis(label=label, low=low, high=high, ticks=tuple(zip(at, _texts(at, step), strict=True)))


def logarithmic(label: str, shown: Iterable[float]) -> Axis:
    """An axis that ends at powers of ten, or at 1, 2, 5 where it spans few of them.

    What is more than MOST_DECADES below the largest is drawn at the lower end, whose tick says so.
    """
    numbers = [value for value in shown if value > NOTHING] or [1.0]
    low, high = math.log10(min(numbers)), math.log10(max(numbers))
    is_cut, low = low < high - MOST_DECADES, max(low, high - MOST_DECADES)
    first, last = math.floor(low + 1e-9), math.ceil(high - 1e-9)
    if high - low < 1.0:  # less than a decade: the digits 1, 2, 5 around it
        grid = [digit * 10.0**power for power in range(first - 1, last + 2) for digit in (1, 2, 5)]
        start = max(index for index, value in enumerate(grid) if value <= 10.0**low * 1.001)
        end = min(index for index, value in enumerate(grid) if value >= 10.0**high * 0.999)
        at = grid[start : max(end, start + 1) + 1]
    else:
        stride = math.ceil((last - first) / DECADES)
        last = first + stride * math.ceil((last - first) / stride)
        at = [10.0**power for power in range(first, last + 1, stride)]
    texts = [f"≤ {short(at[0])}" if is_cut else short(at[0]), *map(short, at[1:])]
    return Axis(label=label, low=at[0], high=at[-1], ticks=tuple(zip(at, texts, strict=True)), is_log=True)


def categories(label: str, names: Sequence[str]) -> Axis:
    """Places 0, 1, 2, ... with a name each."""
    return Axis(label=label, low=-0.5, high=len(names) - 0.5, ticks=tuple(enumerate(names)))


def short(value: float) -> str:
    """Three digits, and k, M, G for thousands, millions, billions."""
    size = abs(value)
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= factor * 0.9995 and size >= 9999.5:
            return f"{value / factor:.3g}{letter}"
    if size >= 999.5:
        return f"{value:,.0f}"
    if 0 < size < 1e-3:
        digits, _, power = f"{value:.2g}".partition("e")
        return f"{digits}e{int(power)}" if power else digits
    return f"{value:.3g}"


def percent(value: float, step: float = 0.01) -> str:
    decimals = max(0, -math.floor(math.log10(step * 100) + 1e-9))
    return "0%" if value == 0 else f"{100 * value:z.{decimals}f}%"


def _ends(shown: Iterable[float], otherwise: tuple[float, float]) -> tuple[float, float]:
    numbers = [value if abs(value) > NOTHING else 0.0 for value in shown]
    return (min(numbers), max(numbers)) if numbers else otherwise


def _texts(at: Sequence[float], step: float) -> list[str]:
    """All with the same number of decimals, as many as the step needs."""
    top = max(map(abs, at))
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if top >= 10 * factor or (letter != "k" and top >= factor):
            break
    else:
        factor, letter = 1.0, ""
    if top < 1e-3:
        power = math.floor(math.log10(top))
        factor, letter = 10.0**power, f"e{power}"
    decimals = max(0, -math.floor(math.log10(step / factor) + 1e-9))
    write: Callable[[float], str] = lambda value: "0" if value == 0 else f"{value / factor:,.{decimals}f}{letter}"  # noqa: E731
    return [write(value) for value in at]


def _nice(step: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(digit * power for digit in (1.0, 2.0, 5.0, 10.0) if digit * power >= step * 0.999)

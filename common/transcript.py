"""A sample as a terminal shows it: a header, the prompt, and the response, each token shaded by one of its numbers.

Texts pass through `visible`, and rich is given no markup, so that nothing of a model or an actor reaches the terminal
as a command.
"""

import math
from collections.abc import Iterable, Sequence
from enum import StrEnum

from rich.style import Style
from rich.text import Text

from common.samples import Sample, visible

RGB = tuple[int, int, int]
# White is legible on each of them, blue and red are told apart by all eyes, and 16 colours have something like them.
GREY, BLUE, RED, GREEN, AMBER = (58, 58, 58), (20, 60, 200), (190, 20, 30), (0, 125, 50), (170, 95, 0)
NOT_FINITE = Style(color="black", bgcolor="yellow")
LINE_END = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n"  # a token's shade needs something to be seen on
LABEL_WIDTH = 11


class Color(StrEnum):
    """What tokens are shaded by."""

    ADVANTAGE = "advantage"
    VALUE = "value"
    VERSION = "version"  # by how many versions older than the learner


def numbers(sample: Sample, color: Color) -> Sequence[float]:
    """Of each token; none where they were not computed."""
    match color:
        case Color.ADVANTAGE:
            return sample.advantages
        case Color.VALUE:
            return sample.values
        case Color.VERSION:
            return [sample.version - version for version in sample.versions]


def scale(samples: Iterable[Sample], color: Color) -> tuple[float, float] | None:
    """The ends of the shades that all these samples share; None where there are no numbers.

    Advantages have 0 in the middle, and the ends are such that one in twenty is beyond: a few large ones would leave
    all others grey. Versions begin at the learner's own.
    """
    found = [number for sample in samples for number in numbers(sample, color) if math.isfinite(number)]
    if not found:
        return None
    low, high = min(found), max(found)
    match color:
        case Color.ADVANTAGE:
            sizes = sorted(map(abs, found))
            end = sizes[(len(sizes) - 1) * 19 // 20] or sizes[-1]
            return -end, end
        case Color.VALUE:
            return low, high
        case Color.VERSION:
            return 0, high


def transcript(sample: Sample, place: str, color: Color | None, ends: tuple[float, float] | None) -> Text:
    """All of one sample. `place` is which of how many it is, `color` None where nothing can be shaded, `ends` what
    `scale` says of the samples that it is compared with."""
    text = Text()
    for label, content in header(sample, place):
        text.append(f"{label:<{LABEL_WIDTH}}", "bold").append(f"{visible(content.replace(chr(10), ' '))}\n")
    text.append("\nprompt\n", "bold").append(visible(sample.prompt))
    text.append("\n\nresponse", "bold")
    if color is None:
        return text.append("\n").append(visible(sample.response))
    text.append("  ").append_text(legend(color, ends)).append("\n")
    return text.append_text(response(sample, color, ends))


def header(sample: Sample, place: str) -> list[tuple[str, str]]:
    """(label, text) of each line."""
    oldest, newest = min(sample.versions), max(sample.versions)
    drawn = f"version {oldest}" if oldest == newest else f"versions {oldest} to {newest}"
    group = f"response {sample.index + 1} of its group (lease {sample.lease_id})"
    spans = [
        f"{name} {min(values):+.2f} to {max(values):+.2f}"
        for name, values in (("advantages", sample.advantages), ("values", sample.values))
        if values
    ]
    return [
        (str(sample.verdict), f"reward {sample.reward:+.2f}, {len(sample.tokens)} tokens, ended by {sample.reason}"),
        ("sample", f"{place} of step {sample.step}: {group}"),
        ("drawn", f"by {sample.actor} with {drawn}, trained at {sample.version}"),
        *([("tokens", ", ".join(spans))] if spans else []),
        *([("engine", f"{_mismatch(sample):.4f} nats a token from the learner")] if sample.old_logprobs else []),
        ("prompt uid", sample.prompt_uid),
        ("reference", sample.reference),
    ]


def _mismatch(sample: Sample) -> float:
    """Mean difference between the log-probs when the tokens were drawn and those when they were trained."""
    pairs = zip(sample.old_logprobs, sample.behavior_logprobs, strict=True)
    return sum(abs(old - behavior) for old, behavior in pairs) / len(sample.tokens)


def response(sample: Sample, color: Color, ends: tuple[float, float] | None) -> Text:
    """The tokens' texts, shaded where there are numbers."""
    text = Text()
    values = numbers(sample, color)
    for i, token in enumerate(sample.tokens):
        style = shade(color, values[i], ends) if values and ends is not None else None
        text.append(visible(token).replace("\n", LINE_END), style)
    return text


def legend(color: Color, ends: tuple[float, float] | None) -> Text:
    """What the shades mean; or that there are none, and why."""
    if ends is None:
        why = {Color.ADVANTAGE: "there are none in the critic's warm-up", Color.VALUE: "there is no critic"}
        return Text(f"not shaded by {color}: {why.get(color, '')}", "dim")
    low, high = ends
    steps = [low + (high - low) * i / 4 for i in range(5)] if high > low else [low]
    labels = {value: f" {value:+.2f} " for value in steps}
    if color is Color.VERSION:
        labels = {round(value): f" {value:.0f} old " for value in steps}
    text = Text().append(f"{color} ", "dim")
    for value, label in labels.items():
        text.append(label, shade(color, value, ends))
    return text


def shade(color: Color, number: float, ends: tuple[float, float]) -> Style:
    """White on a mixture of grey and the colour at the end of the scale that `number` is nearer to."""
    if not math.isfinite(number):
        return NOT_FINITE
    low, high = ends
    part = min(1.0, max(-1.0, number / high)) if color is Color.ADVANTAGE and high else 0.0
    if color is not Color.ADVANTAGE and high > low:
        part = (number - low) / (high - low)
    target = {Color.ADVANTAGE: BLUE if part > 0 else RED, Color.VALUE: GREEN, Color.VERSION: AMBER}[color]
    red, green, blue = (round(grey + abs(part) * (full - grey)) for grey, full in zip(GREY, target, strict=True))
    return Style(color="white", bgcolor=f"rgb({red},{green},{blue})")

"""Samples of a run on its page: what was asked, what was answered, and which version drew which part of the answer."""

from collections.abc import Sequence
from html import escape
from itertools import groupby

from common.report.blocks import prose
from common.report.reading import Run
from common.report.svg import age, shortened
from common.report.views.view import some
from common.samples import Sample, read_samples, sampled_steps, visible

SHOWN = 6  # responses of the newest step that has samples
MOST_CHARACTERS = 3000  # of a prompt or a response
REFERENCE = 200.0  # width of a reference, in the units of a plot


def samples(run: Run) -> str:
    """A section, also when there is nothing to show."""
    found, note = _read(run)
    oldest = max((sample.staleness for sample in found), default=0)
    cards = "".join(_sample(sample, oldest) for sample in found)
    said = f'<p class="decision">{prose(note)}{_legend(oldest) if found else ""}</p>'
    return f'<section id="samples"><h2>Samples</h2><div class="card">{said}{cards}</div></section>'


def _read(run: Run) -> tuple[list[Sample], str]:
    """(samples, what to say of them). Of the newest step."""
    steps = sampled_steps(run.folder)
    if not steps:
        return [], "None were kept (samples.groups and samples.every say how many are)."
    try:
        found = read_samples(run.folder, steps[-1])
    except (ValueError, FileNotFoundError) as error:
        return [], f"Not readable: {error}."
    note = (
        f"{min(len(found), SHOWN)} of {len(found)} responses of step {steps[-1]}; the command show has all. The "
        "colour under a text is the age of its tokens. "
    )
    return _chosen(found), note


def _chosen(found: Sequence[Sample]) -> list[Sample]:
    """SHOWN of them, the right ones first: half of them right and half wrong, as far as there are both."""
    right = [sample for sample in found if sample.is_right]
    wrong = [sample for sample in found if not sample.is_right]
    half = SHOWN // 2
    num_right = max(half, SHOWN - len(wrong))
    return [*right[:num_right], *wrong[: SHOWN - min(num_right, len(right))]]


def _legend(oldest: int) -> str:
    """The colours under the tokens. Of many ages some."""
    keys = (f'<span class="{age(gap, oldest + 1)}">{gap}</span>' for gap in some(range(oldest + 1)))
    return f'<span class="ages">versions old: {" ".join(keys)}</span>'


def _sample(sample: Sample, oldest: int) -> str:
    ages = [sample.version - version for version in sample.versions]
    span = f"{min(ages)}" if min(ages) == max(ages) else f"{min(ages)} to {max(ages)}"
    about = [
        f"{sample.verdict}",
        f"reward {sample.reward:+.2f}",
        f"{len(ages)} tokens, {span} versions old",
        f"ended by {sample.reason}",
        f"reference {shortened(sample.reference, REFERENCE)}",
        f"prompt {sample.prompt_uid}",
        f"{sample.actor}",
    ]
    return (
        f'<div class="sample"><h4>{escape(visible(" · ".join(about)))}</h4><pre>{_text(sample.prompt)}</pre>'
        f'<pre class="tokens">{_response(sample, ages, oldest)}</pre></div>'
    )


def _response(sample: Sample, ages: Sequence[int], oldest: int) -> str:
    """Runs of tokens of one age, each underlined in the colour of its age."""
    parts, left = [], MOST_CHARACTERS
    for number, run in groupby(zip(ages, sample.tokens, strict=True), key=lambda pair: pair[0]):
        text = "".join(token for _, token in run)
        parts.append(
            f'<span class="{age(number, oldest + 1)}" title="{number} versions old">{_text(text[:left])}</span>'
        )
        left -= len(text)
        if left <= 0:
            return f"{''.join(parts)} ..."
    return "".join(parts)


def _text(text: str) -> str:
    """Escaped, and what a browser might obey or hide is written out."""
    shown = text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} ..."
    return escape(visible(shown))

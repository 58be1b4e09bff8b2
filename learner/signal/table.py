"""What the moments of the gradients say: a row for each estimator, and one sentence."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from common.types import JSON
from learner.signal.estimators import Estimator
from learner.signal.moments import Array, Estimate, Moments

STANDS_OUT = 2.0  # errors: a smaller difference is none that was seen
AGAINST = "GRPO"  # what a critic has to be better than
HEADINGS = ("estimator", "signal/noise", "bias", "aim", "responses")


@dataclass(frozen=True, kw_only=True)
class Row:
    """See learner/signal/moments.py."""

    name: str
    fixed_lambda: float | None
    signal_to_noise: Estimate
    bias: Estimate
    aim: Estimate


@dataclass(frozen=True, kw_only=True)
class Table:
    rows: tuple[Row, ...]
    truth: str  # the estimator whose mean counts as the true gradient
    truth_power: Estimate  # of that mean, squared length
    gain: Estimate | None  # aim of the best lambda below 1 minus that of AGAINST; None without either
    num_batches: int

    @property
    def sees_truth(self) -> bool:
        power = self.truth_power
        return power.value is not None and power.error is not None and power.value > STANDS_OUT * power.error


def table(estimators: Sequence[Estimator], gram_ENEN: Array) -> Table:
    """Of all estimators but the one that is the truth."""
    reference = next(number for number, estimator in enumerate(estimators) if estimator.is_truth)
    moments = Moments(gram_ENEN, reference)
    shown = [(number, one) for number, one in enumerate(estimators) if not one.is_truth]
    rows = [_row(moments, number, estimator) for number, estimator in shown]
    numbers = {row.name: number for (number, _), row in zip(shown, rows, strict=True)}
    below_one, against = best_lambda(rows, below=1.0), numbers.get(AGAINST)
    gain = None
    if below_one is not None and against is not None:
        gain = Estimate.of(moments.aim_KE[:, numbers[below_one.name]] - moments.aim_KE[:, against])
    return Table(
        rows=tuple(rows),
        truth=estimators[reference].name,
        truth_power=moments.truth,
        gain=gain,
        num_batches=gram_ENEN.shape[1],
    )


def best_lambda(rows: Sequence[Row], below: float = 2.0) -> Row | None:
    """The row of the largest aim among those of one lambda, which is smaller than `below`; None without any."""
    candidates = [row for row in rows if row.fixed_lambda is not None and row.fixed_lambda < below]
    return max((row for row in candidates if row.aim.value is not None), key=_aim, default=None)


def responses_for(row: Row, aim: float) -> float | None:
    """How many times the responses of a batch this estimator needs to have `aim`; None when no number is enough.

    k times the responses have k times the signal/noise s, so that aim^2 = bias^2 k s / (1 + k s), solved for k.
    """
    signal, bias = row.signal_to_noise.value, row.bias.value
    if signal is None or bias is None or signal <= 0.0 or bias <= 0.0:
        return None
    room = min(bias, 1.0) ** 2 - aim**2
    return aim**2 / (signal * room) if room > 0.0 else None


def sentence(found: Table) -> str:
    """Whether the critic helps, and with which lambda."""
    best, below_one = best_lambda(found.rows), best_lambda(found.rows, below=1.0)
    if not found.sees_truth:
        return (
            f"The true gradient does not stand out of the noise of {found.num_batches} batches, so nothing is known of "
            "aims: take more batches, or larger ones."
        )
    gain = found.gain
    if best is None or below_one is None or gain is None or gain.value is None or gain.error is None:
        return _without_comparison(found, best)
    against = next(row for row in found.rows if row.name == AGAINST)
    aims = f"{best.name} has the best aim of all lambdas, {best.aim}"
    who = "it" if below_one is best else f"{below_one.name} ({below_one.aim})"
    differs = f"{aims}, and {who} is {abs(gain.value):.2f} ± {gain.error:.2f}"
    if abs(gain.value) <= STANDS_OUT * gain.error:
        side = "above" if gain.value > 0.0 else "below"
        return (
            f"Whether the critic helps is not seen in {found.num_batches} batches: {differs} {side} {AGAINST} "
            f"({against.aim})."
        )
    if gain.value < 0.0:
        return f"The critic does harm here: {differs} below {AGAINST} ({against.aim})."
    times = responses_for(against, _aim(below_one))
    needs = "never gets there" if times is None else f"would need about {times:.1f} times the responses for that"
    return f"The critic helps here: {differs} above {AGAINST} ({against.aim}), which {needs}."


def render(found: Table) -> str:
    """The rows as text."""
    top = max((_aim(row) for row in found.rows if row.aim.value is not None), default=0.0)
    cells = [HEADINGS, *(_cells(row, top) for row in found.rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADINGS))]
    pad = [str.ljust, *[str.rjust] * (len(HEADINGS) - 1)]
    lines = ["  ".join(f(text, width) for f, text, width in zip(pad, line, widths, strict=True)) for line in cells]
    power, error = found.truth_power.value, found.truth_power.error
    far = f"{power / error:.1f} errors above 0" if power is not None and error else "of unknown error"
    truth = f"true gradient: the mean of {found.num_batches} batches by {found.truth}; its power is {far}"
    return "\n".join([*map(str.rstrip, lines), "", truth])


def as_json(found: Table) -> dict[str, JSON]:
    return asdict(found) | {"sentence": sentence(found)}


def _row(moments: Moments, number: int, estimator: Estimator) -> Row:
    return Row(
        name=estimator.name,
        fixed_lambda=estimator.fixed_lambda,
        signal_to_noise=Estimate.of(moments.signal_to_noise_KE[:, number]),
        bias=Estimate.of(moments.bias_KE[:, number]),
        aim=Estimate.of(moments.aim_KE[:, number]),
    )


def _aim(row: Row) -> float:
    assert row.aim.value is not None
    return row.aim.value


def _cells(row: Row, top: float) -> tuple[str, ...]:
    """`top` is the best aim: an estimator that has it needs no more responses."""
    is_top = row.aim.value == top
    times = 1.0 if is_top else responses_for(row, top)
    cell = "-" if times is None else f"x {times:.1f}"
    return (row.name, str(row.signal_to_noise), str(row.bias), str(row.aim), cell)


def _without_comparison(found: Table, best: Row | None) -> str:
    seen = [row for row in found.rows if row.aim.value is not None]
    first = max(seen, key=_aim, default=None)
    if first is None:
        return "No estimator's mean stands out of its noise: take more batches, or larger ones."
    if best is None:
        return f"{first.name} has the best aim, {first.aim}; there is no critic to compare it with."
    return f"{best.name} has the best aim of all lambdas, {best.aim}; nothing without a critic is there to compare."

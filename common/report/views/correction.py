"""What does age cost, and what does the correction do about it? Views 3 to 8."""

from common.config import Correction
from common.report.marks import Bar, Bars, Limit, Range, Ranges
from common.report.reading import Run
from common.report.scales import linear, logarithmic, percent, short
from common.report.svg import Plot
from common.report.views.view import (
    Curve,
    Panel,
    View,
    absent,
    as_powers,
    bound_at_gap,
    by_age,
    ends,
    gap_axis,
    now_by_gap,
    over_steps,
    recent_text,
    unit_interval,
)

SMALL = 0.1  # numbers from there on are written with three decimals
HALF = 0.5  # of a batch's weight: an ESS below it
LOSSES = ("clipped", "truncated", "masked")
SIGNS = ("positive", "negative")


def ratio_band(run: Run) -> View:
    return View(
        number=3,
        panels=(_ratio_band(run),),
    )


def _ratio_band(run: Run) -> Panel:
    quantiles = [now_by_gap(run, f"offpolicy/gap_{{}}/ratio_{name}") for name in ("p01", "p50", "p99")]
    if (panel := absent(run, [f"offpolicy/gap_{gap}/ratio_p50" for gap in run.gaps or (0,)])) is not None:
        return panel
    gaps = sorted(set.intersection(*map(set, quantiles)))
    low, middle, high = quantiles
    ranges = [
        Range(
            x=gap,
            low=low[gap],
            middle=middle[gap],
            high=high[gap],
            told=f"{gap} versions old: 1% below {low[gap]:.3f}, median {middle[gap]:.3f}, 1% above {high[gap]:.3f}",
        )
        for gap in gaps
    ]
    if not ranges:
        return Panel(missing=f"Not measured because {recent_text(run)} trained on no token of a known age.")
    limits = _limits_of_ratio(run)
    shown = [1.0, *low.values(), *high.values(), *(limit.y for limit in limits if limit.y is not None)]
    spans = Ranges(ranges=ranges, style="c0", name="1% to 99%, dot: median")
    plot = Plot(
        x=gap_axis(run),
        y=logarithmic("ratio pi_old / pi_behavior", shown),
        marks=[*bound_at_gap(run), *limits, spans],
    )
    oldest = gaps[-1]
    reading = f"At age {oldest}: {low[oldest]:.2f} to {high[oldest]:.2f} (mean of {recent_text(run)})."
    return Panel(plot=plot, reading=reading)


def _limits_of_ratio(run: Run) -> list[Limit]:
    """Where the correction acts on the ratio. Those of m2 are others in every mini-batch."""
    settings = run.config.algorithm
    if settings.correction in (Correction.decoupled, Correction.tis):
        return [Limit(name=f"truncation={settings.truncation:g}", y=settings.truncation, style="c1")]
    if settings.correction is Correction.icepop:
        band = (("mask_low", settings.mask_low), ("mask_high", settings.mask_high))
        return [Limit(name=f"{name}={value:g}", y=value, style="c1") for name, value in band if value > 0]
    if settings.correction is Correction.behavior:
        band = (("1 - clip_low", 1 - settings.clip_low), ("1 + clip_high", 1 + settings.clip_high))
    elif settings.correction is Correction.dis:
        band = (("1 - dis_low", 1 - settings.dis_low), ("1 + dis_high", 1 + settings.dis_high))
    else:
        return []
    return [Limit(name=f"{name} = {value:g}", y=value, style="c1") for name, value in band if value > 0]


def token_ess(run: Run) -> View:
    return View(
        number=4,
        panels=(_ess(run, "offpolicy/gap_{}/ess", "offpolicy/ess", "token"),),
    )


def sequence_ess(run: Run) -> View:
    return View(
        number=5,
        panels=(_ess(run, "offpolicy/gap_{}/sequence_ess", "offpolicy/sequence_ess", "sequence"),),
    )


def _ess(run: Run, pattern: str, everything: str, what: str) -> Panel:
    if (panel := absent(run, [everything, *(pattern.format(gap) for gap in run.gaps)])) is not None:
        return panel
    limits = [Limit(name="half is lost", y=HALF, style="c1")]
    plot = over_steps(run, by_age(run, pattern, everything), unit_interval(f"{what} ESS, share of n"), limits, "age")
    return Panel(plot=plot, reading=_by_age_text(run, pattern, f"{what} ESS"))


def distance(run: Run) -> View:
    return View(
        number=6,
        panels=(
            _distance(run, "m2", "M2: mean (log ratio)²", "nats²"),
            _distance(run, "tv", "TV: mean |pi_old - pi_behavior|", "probability"),
        ),
    )


def _distance(run: Run, name: str, title: str, unit: str) -> Panel:
    pattern, everything = f"offpolicy/gap_{{}}/{name}", f"offpolicy/{name}"
    if (panel := absent(run, [everything, *(pattern.format(gap) for gap in run.gaps)])) is not None:
        return Panel(title=title, missing=panel.missing)
    plot = over_steps(run, by_age(run, pattern, everything), as_powers(unit), legend="age")
    return Panel(title=title, plot=plot, reading=_by_age_text(run, pattern, name.upper()))


def mismatch(run: Run) -> View:
    return View(
        number=7,
        panels=(_mismatch(run),),
    )


def _mismatch(run: Run) -> Panel:
    name, floor = "offpolicy/mismatch_abs_mean", run.last("offpolicy/mismatch_floor")
    because = "no batch held a response that the current version drew whole" if "offpolicy/ess" in run.names else ""
    if (panel := absent(run, [name], because)) is not None:
        return panel
    factor = run.config.weights.drift_factor
    limits = []
    if floor:
        limits = [
            Limit(name="floor", y=floor, style="c2"),
            Limit(name=f"{factor:g} x floor", y=factor * floor, style="c1"),
        ]
    now = run.now(name)
    reading = ""
    if now is not None and floor:
        reading = f"{short(now)} nats a token, {now / floor:.1f} times the floor of {short(floor)}."
    curves = [Curve(points=run.policy_series(name), name="now", style="c0")]
    return Panel(plot=over_steps(run, curves, as_powers("mean |log ratio|, nats a token"), limits), reading=reading)


def lost_advantage(run: Run) -> View:
    return View(
        number=8,
        panels=tuple(_lost(run, sign) for sign in SIGNS),
    )


def _lost(run: Run, sign: str) -> Panel:
    title = "right choices: positive advantages" if sign == "positive" else "wrong choices: negative advantages"
    patterns = {loss: f"offpolicy/gap_{{}}/lost_{loss}_{sign}" for loss in LOSSES}
    names = [pattern.format(gap) for pattern in patterns.values() for gap in run.gaps or (0,)]
    if (panel := absent(run, names)) is not None:
        return Panel(title=title, missing=panel.missing)
    found = {loss: now_by_gap(run, pattern) for loss, pattern in patterns.items()}
    tops: dict[int, float] = {}
    marks = []
    for index, loss in enumerate(LOSSES):
        bars = []
        for gap, share in found[loss].items():
            if not share:
                continue
            base = tops.get(gap, 0.0)
            tops[gap] = base + share
            told = f"{gap} versions old: {percent(share, 0.001)} {loss}"
            bars.append(Bar(x0=gap - 0.3, x1=gap + 0.3, y0=base, y1=base + share, told=told))
        if bars:
            marks.append(Bars(bars=bars, style=f"c{index}", name=loss))
    if not marks:
        return Panel(title=title, missing=f"Nothing to draw: none was taken away in {recent_text(run)}.")
    worst = max(tops, key=lambda gap: tops[gap])
    y = linear("share of sum |A| of that age", [0.0, max(*tops.values(), 0.01)], unit="%")
    plot = Plot(x=gap_axis(run), y=y, marks=[*marks, *bound_at_gap(run)])
    return Panel(
        title=title, plot=plot, reading=f"Most at age {worst}: {percent(tops[worst], 0.001)} ({recent_text(run)})."
    )


def _by_age_text(run: Run, pattern: str, what: str) -> str:
    found = now_by_gap(run, pattern)
    if not found:
        return ""
    write = short if min(map(abs, found.values())) < SMALL else "{:.3f}".format
    parts = ", ".join(f"{write(value)} at age {gap}" for gap, value in ends(found))
    return f"{what[0].upper()}{what[1:]} {parts} ({recent_text(run)})."

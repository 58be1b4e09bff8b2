"""Does the critic explain the outcomes, also of old tokens? View 11."""

from collections.abc import Iterable

from common.config import AdvantageEstimator
from common.report.marks import Bar, Bars, Limit, Mark
from common.report.reading import Run
from common.report.scales import linear
from common.report.svg import Plot
from common.report.views.view import (
    Curve,
    Panel,
    View,
    absent,
    bound_at_gap,
    ends,
    gap_axis,
    now_by_gap,
    over_steps,
    recent_text,
)

POSITIONS = (("first", "first token", "c4"), ("p50", "middle", "c2"), ("last", "last token", "c0"))
LOWEST = -1.0  # explained variance has no lower end; how far below it is does not matter


def critic(run: Run) -> View:
    return View(
        number=11,
        panels=(
            _critic_over_steps(run),
            _critic_by_age(run, "explained_variance", "explained variance by age", "share of Var(R)"),
            _critic_by_age(run, "bias", "bias by age: mean of V - R", "reward"),
        ),
    )


def _critic_over_steps(run: Run) -> Panel:
    title = "explained variance by position in the response"
    if (panel := absent(run, ["critic/explained_variance"], no_critic(run))) is not None:
        return Panel(title=title, missing=panel.missing)
    curves = [
        Curve(points=run.series(f"critic/explained_variance_{position}"), name=name, style=style)
        for position, name, style in POSITIONS
    ]
    curves.append(Curve(points=run.series("critic/explained_variance"), name="all tokens", style="ink", is_dashed=True))
    limits = [Limit(name="explains nothing", y=0.0, style="c1")]
    now = run.now("critic/explained_variance")
    return Panel(
        title=title,
        plot=over_steps(run, curves, lambda shown: linear("share of Var(R)", [*_clamped(shown), 0.0, 1.0]), limits),
        reading=f"All tokens: {now:.2f} ({recent_text(run)})." if now is not None else "",
    )


def _clamped(shown: Iterable[float]) -> list[float]:
    return [max(value, LOWEST) for value in shown]


def _critic_by_age(run: Run, name: str, title: str, unit: str) -> Panel:
    pattern = f"critic/gap_{{}}/{name}"
    names = [pattern.format(gap) for gap in run.gaps or (0,)]
    if (panel := absent(run, names, no_critic(run))) is not None:
        return Panel(title=title, missing=panel.missing)
    found = now_by_gap(run, pattern)
    bars = [
        Bar(x0=gap - 0.3, x1=gap + 0.3, y0=0.0, y1=value, told=f"{gap} versions old: {value:.3f} {unit}")
        for gap, value in found.items()
    ]
    shown = _clamped(found.values()) if name == "explained_variance" else list(found.values())
    y = linear(unit, [0.0, *shown, *([1.0] if name == "explained_variance" else [])])
    marks: list[Mark] = [Bars(bars=bars, style="c0"), Limit(name="", y=0.0, style="ink solid"), *bound_at_gap(run)]
    text = ", ".join(f"{gap}: {value:+.2f}" for gap, value in ends(found))
    return Panel(
        title=title, plot=Plot(x=gap_axis(run), y=y, marks=marks), reading=f"By age {text} ({recent_text(run)})."
    )


def no_critic(run: Run) -> str:
    if run.config.algorithm.advantage is AdvantageEstimator.gae:
        return ""
    return f"algorithm.advantage={run.config.algorithm.advantage} has no critic"

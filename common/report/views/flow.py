"""What reaches the learner, what is lost on the way, and who waits? Views 12, 13 and 14."""

from collections.abc import Callable, Iterable

from common.report.marks import Bar, Bars
from common.report.reading import Point, Run, counts, number, time_mean, values
from common.report.scales import Axis, categories, linear, percent, short
from common.report.svg import Plot
from common.report.views.view import Curve, Panel, View, absent, as_share, from_zero, over_steps, recent_text

FATES = (("sampled", "c0"), ("trained", "c2"), ("dropped", "c1"))


def selection(run: Run) -> View:
    return View(
        number=12,
        panels=(
            _fates(run, "length", "mean length of a response", "tokens"),
            _fates(run, "pass_rate", "pass rate", "%"),
        ),
    )


def _fates(run: Run, name: str, title: str, unit: str) -> Panel:
    metrics = {fate: f"selection/{name}_{fate}" for fate, _ in FATES}
    if (panel := absent(run, list(metrics.values()), replays(run))) is not None:
        return Panel(title=title, missing=panel.missing)
    curves = [Curve(points=run.series(metrics[fate]), name=fate, style=style) for fate, style in FATES]
    axis = as_share("share of responses") if unit == "%" else from_zero(unit)
    sampled, trained = run.now(metrics["sampled"]), run.now(metrics["trained"])
    reading = ""
    if sampled is not None and trained is not None:
        write = percent if unit == "%" else short
        reading = f"Sampled {write(sampled)}, trained {write(trained)} ({recent_text(run)})."
    return Panel(title=title, plot=over_steps(run, curves, axis), reading=reading)


def waste(run: Run) -> View:
    return View(
        number=13,
        panels=(_waste(run),),
    )


def _waste(run: Run) -> Panel:
    generated = run.last("tokens/generated")
    dropped = {reason: count for reason, count in counts(run, "dropped_tokens/").items() if count}
    if (panel := absent(run, ["tokens/generated"], replays(run))) is not None:
        return panel
    if not any(name.startswith("dropped_tokens/") for name in run.names) or not generated:
        return Panel(missing="Not measured because no line of metrics.jsonl has dropped_tokens/*.")
    if not dropped:
        return Panel(missing=f"Nothing to draw: no token of {short(generated)} generated ones was dropped.")
    reasons = sorted(dropped, key=lambda reason: dropped[reason])
    shares = [dropped[reason] / generated for reason in reasons]
    bars = [
        Bar(
            x0=0.0,
            x1=share,
            y0=index - 0.3,
            y1=index + 0.3,
            told=f"{reason}: {dropped[reason]:,} tokens, {percent(share, 0.0001)} of those generated",
        )
        for index, (reason, share) in enumerate(zip(reasons, shares, strict=True))
    ]
    x = linear("share of generated tokens, whole run", [0.0, *shares], unit="%")
    names = [reason.replace("_", " ") for reason in reasons]
    plot = Plot(
        x=x, y=categories("reason", names), marks=[Bars(bars=bars, style="c1")], height=max(40.0, 24.0 * len(bars))
    )
    total = sum(dropped.values())
    return Panel(
        plot=plot, reading=f"{short(total)} of {short(generated)} tokens, {percent(total / generated, 0.001)}."
    )


def pace(run: Run) -> View:
    return View(
        number=14,
        panels=(_idle(run), _window(run)),
    )


def _idle(run: Run) -> Panel:
    title = "share of time without work"
    learner, actors = "learner/idle_fraction", "actors/idle_fraction"
    if (panel := absent(run, [learner, actors], replays(run))) is not None:
        return Panel(title=title, missing=panel.missing)
    curves = (
        Curve(points=run.series(learner), name="learner waits for a batch", style="c0"),
        Curve(points=run.series(actors), name="actors wait for leases", style="c1"),
    )
    shares = (("learner", time_mean(run.recent, learner)), ("actors", time_mean(run.recent, actors)))
    parts = ", ".join(f"{name} {percent(share)}" for name, share in shares if share is not None)
    return Panel(title=title, plot=over_steps(run, curves, _whole("share of the step")), reading=_now(run, parts))


def _window(run: Run) -> Panel:
    title = "publication and window"
    fill, published = "queue/window_fill", publish_shares(run)
    if not published and (panel := absent(run, [fill], replays(run))) is not None:
        return Panel(title=title, missing=panel.missing)
    curves = (
        Curve(points=run.series(fill), name="window: admitted of allowed", style="c2"),
        Curve(points=published, name="publishing: share of the step", style="c3", is_dashed=True),
    )
    stall, filled = publish_share(run), run.now(fill)
    waits = ", the wait for a full window included" if run.config.staleness.exact else ""
    parts = [f"publishing takes {percent(stall)} of a step{waits}"] if stall is not None else []
    parts += [f"the window is {percent(filled)} full"] if filled is not None else []
    return Panel(title=title, plot=over_steps(run, curves, _whole("share")), reading=_now(run, "; ".join(parts)))


def publish_shares(run: Run) -> list[Point]:
    """(step, the part of its time that publication took), for steps that published."""
    found = [(row, number(row, "time/publish_s"), number(row, "time/step_s")) for row in run.steps]
    return [(float(row["step"]), publish / step) for row, publish, step in found if publish is not None and step]


def publish_share(run: Run) -> float | None:
    """The part of the time of the recent steps that publication took."""
    published, lasted = values(run.recent, "time/publish_s"), values(run.recent, "time/step_s")
    return sum(published) / sum(lasted) if published and sum(lasted) else None


def replays(run: Run) -> str:
    """Why a run without actors has no numbers of them; "" for others."""
    return "" if run.config.learner.replay is None else "the run replays a record: nothing is sampled"


def _whole(label: str) -> Callable[[Iterable[float]], Axis]:
    """0% to 100%, whatever is shown."""
    return lambda shown: linear(label, [0.0, 1.0], unit="%")


def _now(run: Run, text: str) -> str:
    return f"{text[0].upper()}{text[1:]} ({recent_text(run)})." if text else ""

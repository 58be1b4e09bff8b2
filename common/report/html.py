"""The page of a run, or of several: one file without scripts, readable on paper and on a phone. Everything is escaped.

The plots are SVG of our own (svg.py). A plotting library would bring 4 MB of script into each page, which would have to
run before anything is seen, would print what its canvas shows, and would not know of the reader's dark mode.
"""

import time
from collections.abc import Iterable, Sequence
from html import escape

from common.report import blocks
from common.report.compare import Comparison
from common.report.reading import Run
from common.report.sampled import samples
from common.report.style import STYLE
from common.report.svg import draw
from common.report.views.accuracy import accuracy
from common.report.views.all import questions
from common.report.views.view import Panel, View

# Nothing may be loaded or run, whatever a model wrote into a sample.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(run: Run) -> str:
    """The report of one run."""
    asked = questions(run)
    links = [("advice", "advice"), *((_anchor(question.text), question.text) for question in asked)]
    links += [("samples", "samples"), ("configuration", "configuration")]
    beside = {
        "Does it learn?": [blocks.evaluations(run)],
        "Who waits, and what is lost?": [blocks.members(run)],
        "How old is what it trains on?": [blocks.words()],
        "What does age cost?": [blocks.ages(run)],
    }
    sections = [
        _section(question.text, [*map(_view, question.views), *beside.get(question.text, [])]) for question in asked
    ]
    body = [
        blocks.head(run),
        blocks.facts(run),
        blocks.advice(run),
        blocks.alarms(run),
        _contents(links),
        *sections,
        samples(run),
        blocks.configuration(run),
    ]
    return _document(f"{run.config.name}: report", body)


def comparison_page(comparison: Comparison) -> str:
    """Several runs: view 15, the facts and what differs."""
    runs = list(zip(comparison.labels, comparison.runs, strict=True))
    names = ", ".join(run.folder.resolve().name for run in comparison.runs)
    head = f'<header><h1>{len(runs)} runs beside each other</h1><p class="about">{escape(names)}</p></header>'
    body = [
        head,
        _section("Accuracy for time and for tokens", [_view(accuracy(runs)), blocks.names(runs)]),
        _section("What came of it", [blocks.columns(comparison.labels, comparison.facts)]),
        _section("What differs in their configurations", [blocks.columns(comparison.labels, comparison.differences)]),
    ]
    return _document("comparison of runs", body)


def _document(title: str, body: Iterable[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + f'\n<p class="small">async-vapo, written {time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}</p>'
        "\n</main></body></html>\n"
    )


def _contents(links: Sequence[tuple[str, str]]) -> str:
    items = (f'<a href="#{anchor}">{escape(text)}</a>' for anchor, text in links)
    return f'<nav class="contents">{"".join(items)}</nav>'


def _section(title: str, cards: Iterable[str]) -> str:
    return f'<section id="{_anchor(title)}"><h2>{escape(title)}</h2><div class="cards">{"".join(cards)}</div></section>'


def _anchor(title: str) -> str:
    return "-".join("".join(sign if sign.isalnum() else " " for sign in title.lower()).split())


def _view(view: View) -> str:
    panels = "".join(_panel(view, panel) for panel in view.panels)
    return (
        f'<article class="card span-{len(view.panels)}" id="view-{view.number}"><h3>{escape(view.title)}'
        f'<span class="number">view {view.number}</span></h3>'
        f'<p class="decision">To decide: {blocks.prose(view.decision)}.</p>'
        f'<div class="panels">{panels}</div></article>'
    )


def _panel(view: View, panel: Panel) -> str:
    title = f"<h4>{escape(panel.title)}</h4>" if panel.title or len(view.panels) > 1 else ""
    if panel.plot is None:
        return f'<div class="panel">{title}<p class="missing">{blocks.prose(panel.sentence)}</p></div>'
    drawing = draw(panel.plot, f"{view.title}: {panel.title}" if panel.title else view.title)
    return f'<figure class="panel">{title}{drawing.svg}<figcaption>{escape(panel.reading)}</figcaption></figure>'

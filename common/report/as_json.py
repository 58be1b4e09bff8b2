"""A run for other programs: summary, advice, alarms, and what of the views was measured.

The curves are in metrics.jsonl.
"""

from dataclasses import asdict

from common.report.advice import advise
from common.report.reading import Run
from common.report.summary import summarise
from common.report.views.all import questions
from common.types import JSON


def to_json(run: Run) -> dict[str, JSON]:
    """Of plain types. The names are those of `Summary`, `Evaluation`, `Member` and `Advice`."""
    summary = summarise(run)
    return asdict(summary) | {
        "run_dir": str(run.folder),
        "config": asdict(run.config),
        "num_planned_steps": summary.num_planned_steps,
        "advice": [asdict(advice) for advice in advise(run)],
        "alarms": list(run.alarms),
        "views": [
            {
                "number": view.number,
                "title": view.title,
                "is_measured": view.is_measured,
                "panels": [
                    {"title": panel.title, "missing": panel.sentence, "reading": panel.reading} for panel in view.panels
                ],
            }
            for question in questions(run)
            for view in question.views
        ],
    }

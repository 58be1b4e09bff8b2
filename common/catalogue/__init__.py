"""Every metric that a run can log, once: name, unit, definition, and the view of staleness that it belongs to.

    python -m common.catalogue > docs/metrics.md      a test compares the page

A name may have variable parts in braces, such as `drops/{reason}`; PARTS has what may stand there. A new metric needs a
row in common/catalogue/tables.py: tests look for logged names that have none.
"""

import re
from functools import cache

from common.catalogue.tables import PARTS, SECTIONS, Metric

__all__ = ["METRICS", "PARTS", "SECTIONS", "Metric", "find"]

METRICS: tuple[Metric, ...] = tuple(metric for metrics in SECTIONS.values() for metric in metrics)


def find(name: str) -> Metric | None:
    """The row of a logged name; None when there is none."""
    return next((metric for metric, pattern in _patterns() if pattern.fullmatch(name)), None)


@cache
def _patterns() -> list[tuple[Metric, re.Pattern[str]]]:
    return [(metric, re.compile(_as_expression(metric.name))) for metric in METRICS]


def _as_expression(name: str) -> str:
    parts = re.split(r"{(\w+)}", name)  # every second one is the name of a variable part
    return "".join(f"(?:{PARTS[part].expression})" if i % 2 else re.escape(part) for i, part in enumerate(parts))

"""docs/metrics.md, from the catalogue, the views and the limits of health.

python -m common.catalogue > docs/metrics.md
"""

from collections.abc import Iterable, Iterator

from common.catalogue import METRICS, PARTS, SECTIONS
from common.catalogue.views import VIEWS
from common.config import AlarmConfig
from common.limits import LIMITS, Limit

TOP = """\
# Metrics

`RUN/metrics.jsonl` has a line a step with these names, TensorBoard the same. What could not be measured in a step is
left out: there is no critic without `advantage: gae`, no policy update in warm-up, no gap without a token of it.
Unless a row says otherwise a mean is over the response tokens in the losses of the whole batch, on all ranks. This
page is made by `python -m common.catalogue > docs/metrics.md`.

The names of policies: pi_behavior drew a token, pi_old is the policy at the start of the step, pi the one that is
being updated; rho = pi_old / pi_behavior. The *gap* g of a token is the learner's version when it trains on it minus
the version that drew it.

## The fifteen views of staleness

`run.py inspect RUN` shows them; each serves a decision.
[staleness.md](staleness.md#reading-the-views) reads them with pictures.
"""

ALARMS = """
## Alarms

From the first policy step on the learner holds these numbers against limits: the median of the last `alarm.window`
steps, so that single outliers do not count. When one is crossed the console says so in one line, once, with what it
means and what to do; `RUN/events.jsonl` has the same as an event, and `alarm/active` counts the limits that are
crossed. A limit is over, and can be crossed anew, when the median has been inside for `alarm.window` steps.
`alarm.enabled=false` switches all off, null one. An alarm changes nothing in the training.
"""

METRICS_TOP = """
## All metrics

Parts of a name that vary are in braces:
"""


def page() -> str:
    """The whole of docs/metrics.md."""
    lines = [
        TOP,
        *_table(("", "view", "what it is", "decision", "metrics"), _view_rows()),
        ALARMS,
        *_table(("metric", "limit", "default", "what it means", "what to do"), map(_limit_row, LIMITS)),
        METRICS_TOP,
        *_table(("part", "values"), ((f"`{{{name}}}`", part.meaning) for name, part in PARTS.items())),
    ]
    for title, metrics in SECTIONS.items():
        rows = ((f"`{m.name}`", m.unit, m.definition, "" if m.view is None else str(m.view)) for m in metrics)
        lines += [f"\n### {title}\n", *_table(("name", "unit", "what it is", "view"), rows)]
    return "\n".join(lines) + "\n"


def _view_rows() -> Iterator[tuple[str, ...]]:
    for number, view in VIEWS.items():
        names = ", ".join(f"`{metric.name}`" for metric in METRICS if metric.view == number)
        yield str(number), view.name, view.definition, view.decision, names


def _limit_row(limit: Limit) -> tuple[str, ...]:
    default = getattr(AlarmConfig(), limit.setting)
    side = "at least" if limit.is_lowest else "at most"
    number = f"{side} {default:g}" + (" times the first steps" if limit.is_relative else "")
    return f"`{limit.metric}`", f"`alarm.{limit.setting}`", number, limit.meaning, limit.remedy


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *rows)]


if __name__ == "__main__":
    print(page(), end="")

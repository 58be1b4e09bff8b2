"""Whether what is trained is a fair part of what was sampled: lengths and pass rates before and after the selection."""

from enum import StrEnum

from common.types import JSON, CompletedGroup, Verdict

_TOTALS = ("responses", "tokens", "correct")


class Fate(StrEnum):
    """Every training group that arrives is SAMPLED, and later, once, TRAINED or DROPPED."""

    SAMPLED = "sampled"
    TRAINED = "trained"
    DROPPED = "dropped"


class Selection:
    """Responses, their tokens and the correct ones among them, by fate, since the run began.

    Invariant: sampled - trained - dropped is what is buffered.
    """

    def __init__(self) -> None:
        self._totals = {f"{fate}_{total}": 0 for fate in Fate for total in _TOTALS}

    def add(self, fate: Fate, group: CompletedGroup) -> None:
        self._totals[f"{fate}_responses"] += len(group.lengths)
        self._totals[f"{fate}_tokens"] += len(group.token_ids)
        self._totals[f"{fate}_correct"] += group.verdicts.count(Verdict.CORRECT)

    def stats(self) -> dict[str, float]:
        return {f"selection/{name}": count for name, count in self._totals.items()}

    def state_dict(self) -> dict[str, JSON]:
        return dict(self._totals)

    def load_state_dict(self, state: dict[str, JSON]) -> None:
        """What was buffered then counts as sampled when it is buffered again."""
        self._totals = dict(state)
        for total in _TOTALS:
            self._totals[f"sampled_{total}"] = state[f"trained_{total}"] + state[f"dropped_{total}"]


def selection_metrics(change: dict[str, float]) -> dict[str, float]:
    """Means of one step from the differences of Selection.stats(); a mean over nothing is left out.

    `selection/length_*` in tokens and `selection/pass_rate_*`, per response, of what arrived, what was trained and what
    was dropped since the last step; and trained over sampled, where both are there and not 0.
    """
    metrics: dict[str, float] = {}
    for name, total in (("length", "tokens"), ("pass_rate", "correct")):
        means = {
            fate: change[f"selection/{fate}_{total}"] / change[f"selection/{fate}_responses"]
            for fate in Fate
            if change[f"selection/{fate}_responses"] > 0
        }
        metrics |= {f"selection/{name}_{fate}": mean for fate, mean in means.items()}
        if Fate.TRAINED in means and means.get(Fate.SAMPLED):
            metrics[f"selection/{name}_trained_over_sampled"] = means[Fate.TRAINED] / means[Fate.SAMPLED]
    return metrics

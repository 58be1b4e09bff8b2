"""Algorithms side by side on one task: how far each is by step, by generated tokens and by CPU seconds.

A Plan says what is compared, `main` makes the runs that are missing (benchmarks/miniature/jobs.py) and prints the
tables. benchmarks/ablations.py is one.

Every row has the same learning rates to choose from, and the choice is made on seeds that are not reported.
"""

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.cost import Meter
from benchmarks.miniature.jobs import run_jobs, spent
from benchmarks.miniature.run import CRITIC_SEED, Job, Outcome
from benchmarks.tables import curves, markdown, mean_sd
from common.report.scales import linear


class Pretrained(Enum):
    """Where a row's critic comes from, if it has value pretraining. Each seed has a critic of its own."""

    reference = "as the reference's, which all such rows share"
    row = "like that, with the row's own settings"
    run = "pretrained by the run itself"


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    recipes: tuple[str, ...] = ()  # after the task's
    settings: tuple[str, ...] = ()
    critic: Pretrained = Pretrained.reference


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared, and where the numbers of the tables are read off."""

    table: str  # its name in the file of runs
    title: str  # of the drawing
    recipe: str  # of the task
    settings: tuple[str, ...] = ()  # of every row
    rows: tuple[Row, ...]
    reference: str  # the row that others are compared with, seed by seed
    drawn: int  # rows, the first so many
    rates: tuple[float, ...]  # of the policy
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    small_rows: tuple[Row, ...]
    small_rates: tuple[float, ...]
    small_seeds: tuple[int, ...]
    steps: int  # of the policy
    every: int  # steps between evaluations
    prompts: int  # of an evaluation
    samples: int
    at_steps: tuple[int, ...]
    at_tokens: tuple[int, ...]
    at_seconds: tuple[float, ...]
    goal: float  # accuracy; how much it takes until there

    def job(self, row: Row, rate: float, seed: int) -> Job:
        like = self.row(self.reference) if row.critic is Pretrained.reference else row
        return Job(
            table=self.table,
            row=row.name,
            seed=seed,
            recipes=(self.recipe, *row.recipes),
            settings=(*self.settings, *row.settings, f"learner.policy.learning_rate={rate}"),
            steps=self.steps,
            evaluate_every=self.every,
            prompts=self.prompts,
            samples=self.samples,
            reuses_critic=row.critic is not Pretrained.run,
            critic_seed=CRITIC_SEED + seed,
            critic_recipes=(self.recipe, *like.recipes),
            critic_settings=(*self.settings, *like.settings),
        )

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def rate_of(self, row: Row, tuning: Mapping[Job, Outcome], rates: Sequence[float]) -> float:
        """The rate whose runs were right most often over the whole of the run, on the seeds for choosing."""
        if len(rates) == 1:
            return rates[0]

        def height(rate: float) -> float:
            return statistics.mean(self._height(tuning[self.job(row, rate, seed)]) for seed in self.tuning_seeds)

        return max(rates, key=height)

    def _height(self, outcome: Outcome) -> float:
        """Mean accuracy of all evaluations after the first; those that a failed run has not reached count as 0."""
        return sum(point.accuracy for point in outcome.points[1:]) / (self.steps / self.every)


def measure(plan: Plan, rows: Sequence[Row], options: argparse.Namespace) -> dict[str, tuple[float, list[Outcome]]]:
    """(learning rate, outcome of each reported seed) of each row."""
    rates, seeds = (plan.small_rates, plan.small_seeds) if options.small else (plan.rates, plan.seeds)

    def run(jobs: Sequence[Job]) -> dict[Job, Outcome]:
        return run_jobs(jobs, options.runs, options.cores, options.critics)

    tried = [] if options.small else [plan.job(row, r, s) for row in rows for r in rates for s in plan.tuning_seeds]
    tuning = run(tried) if tried else {}
    chosen = {row.name: plan.rate_of(row, tuning, rates) for row in rows}
    done = run([plan.job(row, chosen[row.name], seed) for seed in seeds for row in rows])
    return {
        row.name: (chosen[row.name], [done[plan.job(row, chosen[row.name], seed)] for seed in seeds]) for row in rows
    }


def at(outcome: Outcome, place: str, where: float, before: float = 0.0) -> float | None:
    """Accuracy where `place` (step, tokens, cpu_s), with `before` added, reaches `where`: on the line between the
    evaluations around it; None beyond the end of the run."""
    points = _points(outcome, place, before)
    if where <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= where <= x1:
            return y0 + (y1 - y0) * (where - x0) / (x1 - x0)
    return None


def _points(outcome: Outcome, place: str, before: float) -> list[tuple[float, float]]:
    return [(before + getattr(point, place), point.accuracy) for point in outcome.points]


def until(outcome: Outcome, place: str, goal: float, before: float = 0.0) -> float | None:
    """`place`, with `before` added, at which the accuracy first is `goal`; None when it never is."""
    points = _points(outcome, place, before)
    if points[0][1] >= goal:
        return points[0][0]
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 >= goal:
            return x0 + (x1 - x0) * (goal - y0) / (y1 - y0)
    return None


def row_of(plan: Plan, name: str, rate: float, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The numbers of one row, lists in the order of seeds, null where a run was over before or never got there."""
    row: dict[str, Any] = {
        "row": name,
        "learning_rate": rate,
        "steps": {str(step): [at(o, "step", step) for o in outcomes] for step in plan.at_steps},
        "steps_to_goal": [until(o, "step", plan.goal) for o in outcomes],
        "pretraining_tokens": [o.pretraining_tokens for o in outcomes],
        "pretraining_cpu_s": [o.pretraining_cpu_s for o in outcomes],
        "failures": [o.failure for o in outcomes],
    }
    for place, places in (("tokens", plan.at_tokens), ("cpu_s", plan.at_seconds)):
        for suffix in ("", "_with_pretraining"):
            befores = [getattr(o, f"pretraining_{place}") if suffix else 0.0 for o in outcomes]
            pairs = list(zip(outcomes, befores, strict=True))
            row[place + suffix] = {f"{where:g}": [at(o, place, where, b) for o, b in pairs] for where in places}
            row[f"{place}{suffix}_to_goal"] = [until(o, place, plan.goal, b) for o, b in pairs]
    return row


def render(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> str:
    by_step = markdown(
        ["row", "rate", *(f"step {step}" for step in plan.at_steps), f"steps to {plan.goal:g}"],
        [
            [
                row["row"],
                f"{row['learning_rate']:g}",
                *(_cell(row["steps"][str(step)]) for step in plan.at_steps),
                _cell(row["steps_to_goal"], 1),
            ]
            for row in rows
        ],
    )
    by_cost = [
        markdown(
            [
                f"value pretraining {'' if suffix else 'not '}counted",
                *(f"{tokens // 1000}k tokens" for tokens in plan.at_tokens),
                *(f"{seconds:g} CPU s" for seconds in plan.at_seconds),
                f"thousand tokens to {plan.goal:g}",
                f"CPU s to {plan.goal:g}",
            ],
            [
                [
                    row["row"],
                    *(_cell(row[f"tokens{suffix}"][f"{tokens:g}"]) for tokens in plan.at_tokens),
                    *(_cell(row[f"cpu_s{suffix}"][f"{seconds:g}"]) for seconds in plan.at_seconds),
                    _cell([None if t is None else t / 1000 for t in row[f"tokens{suffix}_to_goal"]], 0),
                    _cell(row[f"cpu_s{suffix}_to_goal"], 1),
                ]
                for row in rows
            ],
        )
        for suffix in ("", "_with_pretraining")
    ]
    return "\n\n".join([by_step, *by_cost, *_differences(plan, rows)])


def _differences(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How each row differs from the reference on the same seeds, if that is among them."""
    reference = next((row for row in rows if row["row"] == plan.reference), None)
    if reference is None or len(rows) == 1:
        return []
    middle, end = str(plan.at_steps[len(plan.at_steps) // 2]), str(plan.at_steps[-1])
    lines = [
        [
            row["row"],
            paired(row["steps_to_goal"], reference["steps_to_goal"], 1),
            *(paired(row["steps"][step], reference["steps"][step], 3) for step in (middle, end)),
        ]
        for row in rows
        if row is not reference
    ]
    head = [f"less {plan.reference}, same seeds", f"steps to {plan.goal:g}", f"step {middle}", f"step {end}"]
    return [markdown(head, lines)]


def paired(values: Sequence[float | None], reference: Sequence[float | None], digits: int) -> str:
    """Mean difference and its standard error over the seeds that have both; "-" where fewer than two have."""
    pairs = zip(values, reference, strict=True)
    differences = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
    if len(differences) < 2:
        return "-"
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{statistics.mean(differences):+.{digits}f} ± {error:.{digits}f}"


def _cell(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean and standard deviation of the seeds that have a value, and how many have, if not all."""
    there = [value for value in values if value is not None]
    return mean_sd(there, digits) + (f" ({len(there)} of {len(values)})" if 0 < len(there) < len(values) else "")


def drawing(plan: Plan, outcomes: Mapping[str, tuple[float, list[Outcome]]], names: Sequence[str]) -> str:
    lines = [
        (
            name,
            [(p[0].step, statistics.mean(x.accuracy for x in p)) for p in zip(*(o.points for o in runs), strict=False)],
        )
        for name, (_, runs) in outcomes.items()
        if name in names
    ]
    return curves(plan.title, "policy steps", linear("accuracy, share of responses", [0.0, 1.0], unit="%"), lines)


def main(plan: Plan, description: str | None, runs: Path, arguments: Sequence[str] | None = None) -> None:
    """The command line of a benchmark with this plan; `runs` is where its runs are kept if nothing else is said."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--small", action="store_true", help=f"{len(plan.small_rows)} rows, {len(plan.small_seeds)} seeds, one rate"
    )
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in plan.rows], help="these (default: all)")
    parser.add_argument("--cores", nargs="+", type=int, default=[0, 1], help="each makes one run at a time")
    parser.add_argument("--runs", type=Path, default=runs, help="where they are kept")
    parser.add_argument("--critics", type=Path, default=Path("runs/critics"), help="folder of pretrained critics")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("--svg", type=Path, help=f"draw the curves of the first {plan.drawn} rows here")
    options = parser.parse_args(arguments)
    meter = Meter()
    rows_wanted = plan.small_rows if options.small else plan.rows
    if options.rows is not None:
        rows_wanted = tuple(row for row in plan.rows if row.name in options.rows)
    outcomes = measure(plan, rows_wanted, options)
    rows = [row_of(plan, name, rate, made) for name, (rate, made) in outcomes.items()]
    print(render(plan, rows), "", meter.cost(), sep="\n")
    if options.json is not None:
        options.json.write_text(json.dumps({"rows": rows, "all_runs": spent(options.runs)}, indent=1) + "\n")
    if options.svg is not None:
        options.svg.write_text(drawing(plan, outcomes, [row.name for row in plan.rows[: plan.drawn]]))

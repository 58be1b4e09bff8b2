"""What the age of a batch costs, what a correction gives back, and whether the alarm speaks before the fall.

    python benchmarks/age.py [--cores 0 1] [--runs FILE] [--json FILE] [--svg FILE] [--only age|rate]

First table: VAPO on the contrary walker (configs/models/contrary_walk, configs/number_walk.yaml), every batch exactly
AGES versions old, with each of ARMS; five seeds for the clip around the behavior policy and for decoupling, three for
the others. Nothing is tuned for a row. `tis` has no rows: it is another name of `decoupled`, bit for bit. Second table:
age against the learning rate, decoupled, two seeds. Runs are made in this process (benchmarks/miniature), a minute of
one core each, kept in --runs and not repeated: the command can be stopped and given again. About two hours on two
cores.

A run falls when an evaluation is FALL below the best one before it; a fall has a step, that of the evaluation. It has
collapsed when it ends so. The alarm (learner/alarm.py, limits as they are by default) is timely when it has spoken by
then, of any metric; its lead is the number of steps between. In a run without a fall it is false, unless the run
has lost accuracy all the same: it ended LOSS or more below the mean of the runs with fresh batches.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cost import Meter
from benchmarks.miniature.jobs import run_jobs
from benchmarks.miniature.run import Job, Outcome
from benchmarks.tables import curves, markdown, mean_sd
from common.report.scales import linear

AGES = (0, 1, 2, 4, 8, 16)
STEPS, EVERY = 60, 5  # policy steps of a run, and between its evaluations
PROMPTS, SAMPLES = 256, 2  # of an evaluation: standard error 0.02
FALL = 0.15  # of accuracy; five standard errors of a difference
LOSS = 0.1  # of accuracy, against age 0 with the same arm and rate
RATE, RATES, RATE_AGES, RATE_SEEDS = 3e-4, (1.5e-4, 3e-4, 6e-4, 1.2e-3), (0, 1, 4, 16), (0, 1)
MODEL = "model.path=configs/models/contrary_walk"
RUNS = Path("benchmarks/results/age.jsonl")


@dataclass(frozen=True, kw_only=True)
class Arm:
    name: str
    settings: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)


ARMS = (
    Arm(name="none", settings=("algorithm.correction=none",)),
    Arm(name="behavior", settings=("algorithm.correction=behavior",), seeds=(0, 1, 2, 3, 4)),
    Arm(name="decoupled", settings=("algorithm.correction=decoupled",), seeds=(0, 1, 2, 3, 4)),
    Arm(name="M2 mask", settings=("algorithm.correction=m2",)),
    Arm(name="V-trace targets", settings=("algorithm.correction=decoupled", "algorithm.value_target=vtrace")),
    Arm(name="ESS-scaled step", settings=("algorithm.correction=decoupled", "algorithm.ess_scaled_step=true")),
)
DECOUPLED = ARMS[2]


def job(arm: Arm, age: int, seed: int, rate: float = RATE) -> Job:
    return Job(
        table="age",
        row=f"{arm.name}, age {age}, rate {rate:g}",
        seed=seed,
        recipes=("number_walk", "vapo"),
        settings=(MODEL, *arm.settings, f"learner.policy.learning_rate={rate}"),
        age=age,
        steps=STEPS,
        evaluate_every=EVERY,
        prompts=PROMPTS,
        samples=SAMPLES,
        reuses_critic=True,
    )


@dataclass(frozen=True, kw_only=True)
class Course:
    """How one run went."""

    best: float
    end: float  # mean of the last two evaluations
    fall: int | None  # policy step
    has_collapsed: bool
    first_alarms: dict[str, int]  # policy step at which the alarm first spoke of a metric

    @property
    def alarm(self) -> int | None:
        return min(self.first_alarms.values(), default=None)


def course(outcome: Outcome) -> Course:
    accuracies = [point.accuracy for point in outcome.points]
    best_before = [max(accuracies[: i + 1]) for i in range(len(accuracies))]
    falls = [
        point.step for point, best in zip(outcome.points, best_before, strict=True) if point.accuracy <= best - FALL
    ]
    end = statistics.mean(accuracies[-2:])
    first: dict[str, int] = {}
    for step, name in outcome.alarms:
        first.setdefault(name, step)
    return Course(
        best=max(accuracies),
        end=end,
        fall=falls[0] if falls else (outcome.points[-1].step if outcome.failure else None),
        has_collapsed=outcome.failure is not None or end <= max(accuracies) - FALL,
        first_alarms=first,
    )


def row_of(arm: str, age: int, rate: float, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    courses = [course(outcome) for outcome in outcomes]
    return {
        "arm": arm,
        "age": age,
        "learning_rate": rate,
        "best": [c.best for c in courses],
        "end": [c.end for c in courses],
        "height": [statistics.mean(point.accuracy for point in o.points[1:]) for o in outcomes],
        "fall": [c.fall for c in courses],
        "collapsed": [c.has_collapsed for c in courses],
        "alarm": [c.alarm for c in courses],
        "first_alarms": [c.first_alarms for c in courses],
        "failures": [o.failure for o in outcomes],
    }


def _lead(fall: int, first_alarms: Mapping[str, int], name: str) -> int | None:
    """Steps from the first alarm of this name, or of any, to the fall; None if it had not spoken by then."""
    steps = first_alarms.values() if name == "any" else [step for key, step in first_alarms.items() if key == name]
    return next((fall - step for step in sorted(steps) if step <= fall), None)


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy at the end by age, then falls and alarms, of rows at the default rate."""
    at_rate = {(row["arm"], row["age"]): row for row in rows if row["learning_rate"] == RATE}
    arms = list(dict.fromkeys(arm for arm, _ in at_rate))
    ages = sorted({age for _, age in at_rate})

    def cell(arm: str, age: int) -> str:
        row = at_rate.get((arm, age))
        if row is None:
            return "-"
        text = mean_sd(row["end"], 2)
        return text + (f", {sum(row['collapsed'])}/{len(row['end'])} collapsed" if any(row["collapsed"]) else "")

    accuracy = markdown(["age", *arms], [[str(age), *(cell(arm, age) for arm in arms)] for age in ages])
    return f"{accuracy}\n\n{_alarms(rows)}"


def _alarms(rows: Sequence[Mapping[str, Any]]) -> str:
    """For each metric: in how many falling runs it spoke before the fall, by how many steps; how often in others, and
    in those of them that lost nothing."""
    fresh = {(row["arm"], row["learning_rate"]): statistics.mean(row["end"]) for row in rows if row["age"] == 0}
    runs = [
        (fall, first, end <= fresh.get((row["arm"], row["learning_rate"]), 0.0) - LOSS)
        for row in rows
        for fall, first, end in zip(row["fall"], row["first_alarms"], row["end"], strict=True)
    ]
    fallen = [(fall, first) for fall, first, _ in runs if fall is not None]
    calm = [(first, has_lost) for fall, first, has_lost in runs if fall is None]
    names = sorted({name for _, first, _ in runs for name in first})
    lines = []
    for name in [*names, "any"]:
        leads = [lead for fall, first in fallen if (lead := _lead(fall, first, name)) is not None]
        spoke = [has_lost for first, has_lost in calm if (bool(first) if name == "any" else name in first)]
        lost_nothing = sum(not has_lost for _, has_lost in calm)
        counts = f"{len(spoke)} of {len(calm)}", f"{spoke.count(False)} of {lost_nothing}"
        lines.append([name, f"{len(leads)} of {len(fallen)}", mean_sd(leads, 0), *counts])
    head = ["alarm", "spoke before a fall", "lead in steps", "spoke in a run without one", "that lost nothing either"]
    return markdown(head, lines)


def render_rates(rows: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy at the end by age and learning rate, decoupled."""
    found = {(row["age"], row["learning_rate"]): row for row in rows if row["arm"] == DECOUPLED.name}

    def cell(age: int, rate: float) -> str:
        row = found[age, rate]
        ends = row["end"][: len(RATE_SEEDS)]
        collapsed = sum(row["collapsed"][: len(RATE_SEEDS)])
        return mean_sd(ends, 2) + (f", {collapsed}/{len(ends)} collapsed" if collapsed else "")

    return markdown(
        ["age", *(f"rate {rate:g}" for rate in RATES)],
        [[str(age), *(cell(age, rate) for rate in RATES)] for age in RATE_AGES],
    )


def cells(only: str | None) -> Iterator[tuple[Arm, int, float, tuple[int, ...]]]:
    """(arm, age, learning rate, seeds) of what is to be measured."""
    if only != "rate":
        yield from ((arm, age, RATE, arm.seeds) for age in AGES for arm in ARMS)
    if only != "age":
        yield from (
            (DECOUPLED, age, rate, RATE_SEEDS)
            for age in RATE_AGES
            for rate in RATES
            if rate != RATE or only == "rate"  # else it is a row of the first table
        )


def drawing(rows: Sequence[Mapping[str, Any]]) -> str:
    arms = dict.fromkeys(row["arm"] for row in rows)
    lines = [
        (
            arm,
            [
                (row["age"], statistics.mean(row["end"]))
                for row in rows
                if row["arm"] == arm and row["learning_rate"] == RATE
            ],
        )
        for arm in arms
    ]
    return curves("Age", "age of every batch, versions", linear("accuracy at the end", [0.0, 1.0], unit="%"), lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["age", "rate"], help="one of the two tables")
    parser.add_argument("--cores", nargs="+", type=int, default=[0, 1], help="each makes one run at a time")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where they are kept")
    parser.add_argument("--critics", type=Path, default=Path("runs/critics"), help="folder of pretrained critics")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("--svg", type=Path, help="draw accuracy against age here")
    options = parser.parse_args(arguments)
    meter, wanted = Meter(), list(cells(options.only))
    by_seed = sorted((seed, i) for i, (_, _, _, seeds) in enumerate(wanted) for seed in seeds)
    jobs = [job(wanted[i][0], wanted[i][1], seed, wanted[i][2]) for seed, i in by_seed]  # all rows once, then again
    done = run_jobs(jobs, options.runs, options.cores, options.critics)
    rows = [
        row_of(arm.name, age, rate, [done[job(arm, age, seed, rate)] for seed in seeds])
        for arm, age, rate, seeds in wanted
    ]
    tables = [render(rows)] if options.only != "rate" else []
    tables += [render_rates(rows)] if options.only != "age" else []
    print("\n\n".join(tables), "", meter.cost(), sep="\n")
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.svg is not None:
        options.svg.write_text(drawing(rows))


if __name__ == "__main__":
    main()

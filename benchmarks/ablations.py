"""What each part of VAPO does here: the ablation table of the paper (arXiv 2504.05118, section 5) in miniature.

    python benchmarks/ablations.py [--small] [--cores 0 1] [--runs FILE] [--json FILE] [--svg FILE]

The contrary walker (configs/models/contrary_walk) is trained with vanilla PPO, GRPO, DAPO, VAPO, VAPO without each of
its seven parts, and VAPO with each of the switches that change something while batches are fresh. Settings are those of
configs/number_walk.yaml and of the recipes; only the policy's learning rate is chosen, for every row from the same
RATES, by the mean accuracy of all evaluations over TUNING_SEEDS, which are not reported. Runs are made in this process
(benchmarks/miniature): a minute of one core each. A run that is done is kept in --runs and not repeated, so that the
command can be stopped and given again. All of it takes about an hour and a half on two cores; --small, with two seeds a
row at the middle rate, ten minutes.

Value pretraining: all rows with a critic share one that was pretrained once (as the paper shares its own), except
"VAPO, its own critic", which pretrains one for each seed. Numbers are given without and with what it cost.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cost import Meter
from benchmarks.miniature.jobs import run_jobs
from benchmarks.miniature.run import Job, Outcome
from benchmarks.tables import curves, markdown, mean_sd
from common.report.scales import linear

RATES = (1.5e-4, 3e-4, 6e-4)
TUNING_SEEDS, SEEDS = (100, 101), (0, 1, 2, 3, 4)
SMALL_SEEDS, SMALL_RATES = (0, 1), (3e-4,)
STEPS, EVERY = 40, 5  # policy steps of a run, and between its evaluations
PROMPTS, SAMPLES = 256, 2  # of an evaluation
AT_STEPS = (10, 15, 20, 30, 40)
AT_TOKENS = (100_000, 200_000)
AT_SECONDS = (10.0, 20.0)
GOAL = 0.8  # accuracy; how much it takes until there
RUNS = Path("benchmarks/results/ablations.jsonl")
MODEL = "model.path=configs/models/contrary_walk"


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    recipes: tuple[str, ...] = ()  # after number_walk
    settings: tuple[str, ...] = ()
    reuses_critic: bool = True


ROWS = (
    Row(name="vanilla PPO", recipes=("ppo",)),
    Row(name="GRPO", recipes=("grpo",)),
    Row(name="DAPO", recipes=("dapo",)),
    Row(name="VAPO", recipes=("vapo",)),
    Row(name="VAPO, its own critic", recipes=("vapo",), reuses_critic=False),
    Row(name="without value pretraining", recipes=("vapo", "ablations/no_value_pretraining")),
    Row(name="without decoupled GAE", recipes=("vapo", "ablations/no_decoupled_gae")),
    Row(name="without length-adaptive GAE", recipes=("vapo", "ablations/no_length_adaptive_gae")),
    Row(name="without clip-higher", recipes=("vapo", "ablations/no_clip_higher")),
    Row(name="without token-level loss", recipes=("vapo", "ablations/no_token_level_loss")),
    Row(name="without positive-example LM loss", recipes=("vapo", "ablations/no_positive_lm_loss")),
    Row(name="without group sampling", recipes=("vapo", "ablations/no_group_sampling")),
)


def job(row: Row, rate: float, seed: int) -> Job:
    return Job(
        table="ablations",
        row=row.name,
        seed=seed,
        recipes=("number_walk", *row.recipes),
        settings=(MODEL, *row.settings, f"learner.policy.learning_rate={rate}"),
        steps=STEPS,
        evaluate_every=EVERY,
        prompts=PROMPTS,
        samples=SAMPLES,
        reuses_critic=row.reuses_critic,
    )


def rate_of(row: Row, tuning: Mapping[Job, Outcome], rates: Sequence[float]) -> float:
    """The rate whose runs were right most often over the whole of the run, on the seeds for choosing."""
    if len(rates) == 1:
        return rates[0]

    def height(rate: float) -> float:
        return statistics.mean(_height(tuning[job(row, rate, seed)]) for seed in TUNING_SEEDS)

    return max(rates, key=height)


def _height(outcome: Outcome) -> float:
    """Mean accuracy of all evaluations after the first; those that a failed run has not reached count as 0."""
    return sum(point.accuracy for point in outcome.points[1:]) / (STEPS / EVERY)


def measure(rows: Sequence[Row], options: argparse.Namespace) -> dict[str, tuple[float, list[Outcome]]]:
    """(learning rate, outcome of each reported seed) of each row."""
    rates, seeds = (SMALL_RATES, SMALL_SEEDS) if options.small else (RATES, SEEDS)

    def run(jobs: Sequence[Job]) -> dict[Job, Outcome]:
        return run_jobs(jobs, options.runs, options.cores, options.critics)

    tuning = {} if options.small else run([job(row, r, s) for row in rows for r in rates for s in TUNING_SEEDS])
    chosen = {row.name: rate_of(row, tuning, rates) for row in rows}
    done = run([job(row, chosen[row.name], seed) for seed in seeds for row in rows])
    return {row.name: (chosen[row.name], [done[job(row, chosen[row.name], seed)] for seed in seeds]) for row in rows}


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


def until(outcome: Outcome, place: str, goal: float = GOAL, before: float = 0.0) -> float | None:
    """`place`, with `before` added, at which the accuracy first is `goal`; None when it never is."""
    points = _points(outcome, place, before)
    if points[0][1] >= goal:
        return points[0][0]
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 >= goal:
            return x0 + (x1 - x0) * (goal - y0) / (y1 - y0)
    return None


def row_of(name: str, rate: float, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The numbers of one row, lists in the order of seeds, null where a run was over before or never got there."""
    row: dict[str, Any] = {
        "row": name,
        "learning_rate": rate,
        "steps": {str(step): [at(o, "step", step) for o in outcomes] for step in AT_STEPS},
        "steps_to_goal": [until(o, "step") for o in outcomes],
        "pretraining_tokens": [o.pretraining_tokens for o in outcomes],
        "pretraining_cpu_s": [o.pretraining_cpu_s for o in outcomes],
        "failures": [o.failure for o in outcomes],
    }
    for place, places in (("tokens", AT_TOKENS), ("cpu_s", AT_SECONDS)):
        for suffix in ("", "_with_pretraining"):
            befores = [getattr(o, f"pretraining_{place}") if suffix else 0.0 for o in outcomes]
            pairs = list(zip(outcomes, befores, strict=True))
            row[place + suffix] = {f"{where:g}": [at(o, place, where, b) for o, b in pairs] for where in places}
            row[f"{place}{suffix}_to_goal"] = [until(o, place, before=b) for o, b in pairs]
    return row


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    by_step = markdown(
        ["row", "rate", *(f"step {step}" for step in AT_STEPS), f"steps to {GOAL:g}"],
        [
            [
                row["row"],
                f"{row['learning_rate']:g}",
                *(_cell(row["steps"][str(step)]) for step in AT_STEPS),
                _cell(row["steps_to_goal"], 1),
            ]
            for row in rows
        ],
    )
    by_cost = [
        markdown(
            [
                f"value pretraining {'' if suffix else 'not '}counted",
                *(f"{tokens // 1000}k tokens" for tokens in AT_TOKENS),
                *(f"{seconds:g} CPU s" for seconds in AT_SECONDS),
                f"thousand tokens to {GOAL:g}",
                f"CPU s to {GOAL:g}",
            ],
            [
                [
                    row["row"],
                    *(_cell(row[f"tokens{suffix}"][f"{tokens:g}"]) for tokens in AT_TOKENS),
                    *(_cell(row[f"cpu_s{suffix}"][f"{seconds:g}"]) for seconds in AT_SECONDS),
                    _cell([None if t is None else t / 1000 for t in row[f"tokens{suffix}_to_goal"]], 0),
                    _cell(row[f"cpu_s{suffix}_to_goal"], 1),
                ]
                for row in rows
            ],
        )
        for suffix in ("", "_with_pretraining")
    ]
    return "\n\n".join([by_step, *by_cost])


def _cell(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean and standard deviation of the seeds that have a value, and how many have, if not all."""
    there = [value for value in values if value is not None]
    return mean_sd(there, digits) + (f" ({len(there)} of {len(values)})" if 0 < len(there) < len(values) else "")


def _by_step(runs: Sequence[Outcome]) -> Iterator[tuple[int, list[float]]]:
    """(policy step, accuracy of each run that got there)."""
    for step in range(0, STEPS + 1, EVERY):
        yield step, [point.accuracy for run in runs for point in run.points if point.step == step]


def drawing(outcomes: Mapping[str, tuple[float, list[Outcome]]], names: Sequence[str]) -> str:
    lines = [
        (
            name,
            [(p[0].step, statistics.mean(x.accuracy for x in p)) for p in zip(*(o.points for o in runs), strict=False)],
        )
        for name, (_, runs) in outcomes.items()
        if name in names
    ]
    return curves("Ablations", "policy steps", linear("accuracy, share of responses", [0.0, 1.0], unit="%"), lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="two seeds a row, at one learning rate")
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], help="these (default: all)")
    parser.add_argument("--cores", nargs="+", type=int, default=[0, 1], help="each makes one run at a time")
    parser.add_argument(
        "--runs", type=Path, default=Path("benchmarks/results/ablations.jsonl"), help="where they are kept"
    )
    parser.add_argument("--critics", type=Path, default=Path("runs/critics"), help="folder of pretrained critics")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("--svg", type=Path, help="draw the curves of the first five rows here")
    options = parser.parse_args(arguments)
    meter = Meter()
    outcomes = measure([row for row in ROWS if options.rows is None or row.name in options.rows], options)
    rows = [row_of(name, rate, runs) for name, (rate, runs) in outcomes.items()]
    print(render(rows), "", meter.cost(), sep="\n")
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.svg is not None:
        options.svg.write_text(drawing(outcomes, [row.name for row in ROWS[:6]]))


if __name__ == "__main__":
    main()

"""One learner and more and more actors, as processes: the part `--processes` of benchmarks/scaling.py.

Every run is `run.py train` with the stand-ins of benchmarks/fixed_rate.py. vLLM itself would not fit: one engine needs
a core, and here eight of them, their verifiers and the learner share two.

Measured are the steps of a run in its steady state (learner/planning/runs.py). Ideal: what the actors would have drawn
of these very groups with all places full, or what the learner can train, whichever is less. The prediction is a
simulation of the same configuration (`run.py plan`) with the engine's nominal speed, and with the times that the run of
the fewest actors shows for training, publication and verification.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import fixed_rate
from benchmarks.picture import picture
from common.report.marks import Line
from common.report.scales import linear
from common.report.svg import Plot, draw, kind
from learner.planning.runs import MeasuredRun
from learner.planning.simulation import simulate
from learner.planning.speeds import Speeds

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 300.0  # of one run
SETTINGS = (
    "model.path=configs/models/number_walk",
    "model.max_model_len=128",
    "task.name=number_walk",
    "task.num_train=4096",
    f"rollout.prompts_per_step={fixed_rate.GROUPS}",
    f"rollout.group_size={fixed_rate.SAMPLES}",
    f"rollout.max_tokens={fixed_rate.MAX_TOKENS}",
    f"actors.groups_in_flight={fixed_rate.PLACES}",
    "staleness.max_staleness=2",
    "learner.policy.learning_rate=1e-6",
    "eval.every=0",
    "eval.num_prompts=1",
    "eval.samples_per_prompt=1",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run. Rates in tokens per second, idle times in shares of the time."""

    actors: int
    steps: int  # that are counted
    tokens_per_s: float
    ideal_tokens_per_s: float
    learner_idle: float
    staleness_mean: float
    simulated_tokens_per_s: float
    simulated_idle: float
    simulated_staleness: float
    train_pace: float  # time for all of a step but waiting and publishing, in what it should have taken
    publish_s: float  # mean
    group_pace: float  # time for a group, in what it should have taken; over all groups

    @property
    def share(self) -> float:
        return self.tokens_per_s / self.ideal_tokens_per_s

    @property
    def ratio(self) -> float:
        return self.simulated_tokens_per_s / self.tokens_per_s


def train(actors: int, steps: int, runs_dir: Path) -> MeasuredRun:
    """A run of so many actors. Raises RuntimeError when it fails."""
    command = [sys.executable, "-m", "benchmarks.fixed_rate", "train", "-c", "grpo", *SETTINGS]
    command += [f"runs_dir={runs_dir}", f"name=actors-{actors}", f"actors.count={actors}", f"learner.steps={steps}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"the run of {actors} actors ended with {done.returncode}: {done.stdout}{done.stderr}")
    return MeasuredRun(runs_dir / f"actors-{actors}")


def ideal(groups: Sequence[Sequence[int]], actors: int) -> float:
    """Tokens per second of these groups, given the lengths of each."""
    tokens = sum(map(sum, groups))
    drawing_s = fixed_rate.TOKEN_S * sum(map(max, groups)) / (actors * fixed_rate.PLACES)
    return tokens / max(drawing_s, fixed_rate.SPEEDS.train_s(0, tokens))


def speeds_of(one: MeasuredRun) -> Speeds:
    """What a simulation takes: the engine as it was built, everything else as this run shows it."""
    nominal = fixed_rate.SPEEDS
    return replace(
        nominal,
        train_token_s=one.train_token_s,
        publish_s=one.publish_s,
        pause_share=one.pause_share,
        engine=replace(nominal.engine, verification_s=one.verification_s),
    )


def compare(run: MeasuredRun, actors: int, speeds: Speeds) -> Row:
    outcome = simulate(run.config, speeds, actors=actors, steps=len(run.rows), filling=2)
    trained = fixed_rate.SPEEDS.train_s(0, sum(run.tokens))
    spent = sum(pace * tokens for pace, tokens in zip(run.train_token_s, run.tokens, strict=True))
    return Row(
        actors=actors,
        steps=len(run.rows),
        tokens_per_s=run.trained_tokens_per_s,
        ideal_tokens_per_s=ideal([group["lengths"] for group in run.groups], actors),
        learner_idle=run.learner_idle,
        staleness_mean=run.staleness_mean,
        simulated_tokens_per_s=outcome.trained_tokens_per_s,
        simulated_idle=outcome.learner_idle,
        simulated_staleness=outcome.staleness_mean,
        train_pace=spent / trained,
        publish_s=sum(run.publish_s) / len(run.publish_s),
        group_pace=run.token_s / fixed_rate.TOKEN_S,
    )


def measure(steps: Mapping[int, int]) -> Iterator[Row]:
    """A row for each number of actors; `steps` of its run. Predictions are from the run of the fewest actors."""
    with TemporaryDirectory() as folder:
        speeds: Speeds | None = None
        for actors in sorted(steps):
            run = train(actors, steps[actors], Path(folder))
            speeds = speeds or speeds_of(run)
            yield compare(run, actors, speeds)


HEADER = (
    "| actors | tokens/s | ideal | share | learner idle | predicted tokens/s | predicted / measured | "
    "predicted idle | mean age | predicted age | training, of its time | drawing, of its time | publication, ms |"
)


def render(row: Row) -> str:
    return (
        f"| {row.actors} | {row.tokens_per_s:,.0f} | {row.ideal_tokens_per_s:,.0f} | {row.share:.2f} | "
        f"{row.learner_idle:.0%} | {row.simulated_tokens_per_s:,.0f} | {row.ratio:.2f} | {row.simulated_idle:.0%} | "
        f"{row.staleness_mean:.2f} | {row.simulated_staleness:.2f} | {row.train_pace:.2f} | {row.group_pace:.2f} | "
        f"{1e3 * row.publish_s:.0f} |"
    )


def drawing(rows: Sequence[Row]) -> str:
    """Measured, ideal and predicted throughput by the number of actors."""
    lines = (
        ("measured", lambda row: row.tokens_per_s, False),
        ("ideal", lambda row: row.ideal_tokens_per_s, True),
        ("predicted", lambda row: row.simulated_tokens_per_s, True),
    )
    marks = [
        Line(points=[(row.actors, value(row)) for row in rows], style=kind(number), name=name, is_dashed=is_dashed)
        for number, (name, value, is_dashed) in enumerate(lines)
    ]
    shown = [0.0, *(y for mark in marks for _, y in mark.points)]
    x = linear("actors", [0.0, *(float(row.actors) for row in rows)], whole=True)
    return picture(draw(Plot(x=x, y=linear("tokens/s", shown), marks=marks), "tokens per second by number of actors"))

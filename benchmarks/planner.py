"""Does the planner say what runs do? Trains short runs of the demo, simulates each of them, and compares.

    python benchmarks/planner.py --runs-dir runs/planner [--json OUT.json]       trains what is not there yet, compares
    python benchmarks/planner.py --runs-dir runs/planner --only one-admission_order ...

Three ratios of actor to learner, and one of them beside evaluations (RATIOS), each in both orders of batching. Every
run is simulated twice: with its own speeds, and with those of its sibling in the other order, which is a prediction if
the machine was as busy. Compared are the same steps (learner/planning/runs.py): trained tokens per second and the mean
age of a token. Exit code 1 when one of the first kind is more than TOLERANCE off.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.config import Batching
from common.quiet import quieter
from learner.planning.runs import MeasuredRun, measured
from learner.planning.simulation import Outcome

RUN_PY = Path(__file__).resolve().parents[1] / "run.py"
TIMEOUT_S = 1800.0  # of one run, start included
TOLERANCE = 0.15
SHORT = (
    "algorithm.critic_warmup_steps=1",
    "algorithm.critic_warmup_epochs=1",
    "learner.steps=24",
    "eval.every=0",
    "eval.num_prompts=1",
    "eval.samples_per_prompt=1",
)
RATIOS: dict[str, tuple[str, ...]] = {
    "one": (),
    "busy-learner": ("algorithm.critic_updates_per_step=4",),
    "slow-actor": ("actors.groups_in_flight=4",),
    "evaluated": ("eval.every=8", "eval.num_prompts=32", "eval.samples_per_prompt=4"),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    run: str
    speeds_of: str
    measured_tokens_per_s: float
    simulated_tokens_per_s: float
    measured_staleness: float
    simulated_staleness: float
    measured_learner_idle: float
    simulated_learner_idle: float
    load: str  # of the machine, when the run began

    @property
    def is_own(self) -> bool:
        return self.run == self.speeds_of

    @property
    def tokens_ratio(self) -> float:
        return self.simulated_tokens_per_s / self.measured_tokens_per_s

    @property
    def staleness_ratio(self) -> float:
        return self.simulated_staleness / self.measured_staleness if self.measured_staleness else float("nan")

    @property
    def is_within(self) -> bool:
        return all(abs(ratio - 1) <= TOLERANCE for ratio in (self.tokens_ratio, self.staleness_ratio))


def names() -> list[str]:
    return [f"{ratio}-{batching}" for ratio in RATIOS for batching in Batching]


def sibling(name: str) -> str:
    """The same run in the other order."""
    ratio, _, batching = name.rpartition("-")
    return next(f"{ratio}-{other}" for other in Batching if other != batching)


def train(name: str, runs_dir: Path) -> None:
    """One run, unless it is there and complete."""
    folder, (ratio, _, batching) = runs_dir / name, name.rpartition("-")
    if (folder / "load").is_file():
        return
    load = " ".join(f"{load:.1f}" for load in os.getloadavg())
    command = [sys.executable, str(RUN_PY), "train", "-c", "demo", "--overwrite", f"runs_dir={runs_dir}"]
    command += [f"name={name}", f"staleness.batching={batching}", *SHORT, *RATIOS[ratio]]
    subprocess.run(command, check=True, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL)
    (folder / "load").write_text(load)


def compare(runs: dict[str, MeasuredRun]) -> Iterator[Row]:
    for name, run in runs.items():
        for other in (name, sibling(name)):
            if other in runs:
                yield _row(name, run, other, run.simulated(measured([runs[other]])))


def _row(name: str, run: MeasuredRun, other: str, outcome: Outcome) -> Row:
    load = run.folder / "load"
    return Row(
        run=name,
        speeds_of=other,
        measured_tokens_per_s=run.trained_tokens_per_s,
        simulated_tokens_per_s=outcome.trained_tokens_per_s,
        measured_staleness=run.staleness_mean,
        simulated_staleness=outcome.staleness_mean,
        measured_learner_idle=run.learner_idle,
        simulated_learner_idle=outcome.learner_idle,
        load=load.read_text() if load.is_file() else "",
    )


def render(rows: Sequence[Row]) -> str:
    lines = [
        "| run | speeds of | tokens/s | simulated | ratio | mean age | simulated | ratio | learner idle | simulated |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.run} | {'itself' if row.is_own else row.speeds_of} | {row.measured_tokens_per_s:,.0f} | "
            f"{row.simulated_tokens_per_s:,.0f} | {row.tokens_ratio:.2f} | {row.measured_staleness:.2f} | "
            f"{row.simulated_staleness:.2f} | {row.staleness_ratio:.2f} | {row.measured_learner_idle:.0%} | "
            f"{row.simulated_learner_idle:.0%} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", type=Path, required=True, help="where the runs are, or are put")
    parser.add_argument("--only", nargs="+", choices=names(), default=names(), help="these runs (default: all)")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    options = parser.parse_args(arguments)
    for name in options.only:
        train(name, options.runs_dir)
    with quieter("learner.rollouts"):
        rows = list(compare({name: MeasuredRun(options.runs_dir / name) for name in options.only}))
    print(render(rows))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0 if all(row.is_within for row in rows if row.is_own) else 1


if __name__ == "__main__":
    sys.exit(main())

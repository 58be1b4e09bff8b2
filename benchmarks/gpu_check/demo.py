"""Part e: the demo in bfloat16, learner and actor on one device, overlapping and synchronous.

Through `run.py train` like a user's own run; the numbers are read from its metrics.jsonl. Without a vLLM for the device
nothing is run, and the report says why.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.demo import RUN_PY, train
from benchmarks.gpu_check.engines import missing_engine
from benchmarks.gpu_check.report import Report
from common.metrics import read_jsonl
from common.report.summary import summary

Row = Mapping[str, object]

SETTINGS: Mapping[str, Sequence[str]] = {
    "cuda": (
        "device=cuda",
        "actors.placement=auto",
        "model.dtype=bfloat16",
        "learner.steps=20",
        "algorithm.critic_warmup_steps=8",
    ),
    "cpu": (
        "learner.steps=2",
        "algorithm.critic_warmup_steps=1",
        "rollout.prompts_per_step=2",
        "eval.num_prompts=8",
        "eval.samples_per_prompt=1",
    ),
}
RUNS: Mapping[str, str] = {"overlapping": "staleness.max_staleness=2", "synchronous": "staleness.max_staleness=0"}

MIN_GAIN = 0.1  # of accuracy in 20 steps on a GPU; the demo goes from 0.2 to above 0.7 in 10

# Means over the policy steps, where a run has them. What a publication consists of is named weights/..._s.
MEANS = (
    "time/train_s",
    "time/publish_s",
    "learner/idle_fraction",
    "actors/idle_fraction",
    "throughput/generated_tokens_per_s",
    "throughput/trained_tokens_per_s",
    "staleness/token_mean",
    "memory/peak_gib",
)


def run(report: Report, device: torch.device, folder: Path) -> None:
    missing = missing_engine(device)
    if missing is not None:
        report.skip(f"the demo was not run: {missing}")
        return
    steps, runs = {}, report.path.parent / "runs"  # which stay, with their logs: `folder` does not
    for name, staleness in RUNS.items():
        command = [sys.executable, str(RUN_PY), "train", "-c", "demo", "--overwrite", *SETTINGS[device.type]]
        command += [staleness, "eval.every=0", f"runs_dir={runs}", f"name={name}"]
        try:
            train(command)
        except RuntimeError as error:
            report.fail(str(error))
            continue
        steps[name] = figures(report, name, runs / name, is_judged=device.type == "cuda")
    if len(steps) == len(RUNS):
        ratio = steps["synchronous"] / steps["overlapping"]
        report.number("time of a synchronous step over that of an overlapping one", ratio)


def figures(report: Report, name: str, run_dir: Path, is_judged: bool) -> float:
    """Writes down what a complete run shows; the median seconds of its policy steps."""
    done = summary(run_dir)
    before, after = done.evaluations[0].accuracy, done.evaluations[-1].accuracy
    report.number(f"{name}: accuracy before", before)
    report.number(f"{name}: accuracy after", after)
    if is_judged and after - before < MIN_GAIN:
        report.fail(f"{name}: accuracy went from {before:.3f} to {after:.3f}, at least {MIN_GAIN} more was expected")
    rows = [
        row
        for row in read_jsonl(run_dir / "metrics.jsonl")
        if "time/step_s" in row and row["step"] > done.num_warmup_steps
    ]
    for metric in (*MEANS, *publication_parts(rows)):
        values = [float(row[metric]) for row in rows if row.get(metric) is not None]
        if values:
            report.number(f"{name}: {metric}, mean", statistics.mean(values))
    median = statistics.median(float(row["time/step_s"]) for row in rows)
    report.number(f"{name}: time/step_s, median", median)
    return median


def publication_parts(rows: Sequence[Row]) -> list[str]:
    names = {name for row in rows for name in row}
    return sorted(name for name in names if name.startswith("weights/") and name.endswith("_s"))

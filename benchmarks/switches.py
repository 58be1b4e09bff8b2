"""What single settings of the learner cost or save: the same training step with and without each.

    python benchmarks/switches.py [--model-size 150k|3m] [--sequences N] [--repeats N] [--only NAME ...]

Batch, models and clock are those of benchmarks/learner.py: CPU seconds of this process on one thread. The variants of
one switch take turns; the first round is not timed, and its peak of torch's allocations is recorded. What counts is
the median over the rounds of a variant's time against the first variant's in the same round.

    warm-up        value pretraining that scores the policy, as the first step of a run does, and that does not
    entropy        log-probs and their backward with an entropy term, and without: 64,000 tokens, width 256
    checkpointing  learner.activation_checkpointing 0, 1, 2, 3
    prefixes       learner.share_prefixes off and on: sequences that differ from the first token or two; groups of 16
                   with prompts of 4..8 tokens; and of 40, the first 20 of which all prompts have in common, as with a
                   chat template. Responses of the groups have 8 tokens on average
    compile        learner.compile off and on (needs a C++ compiler on CPUs; compiling is not timed)
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # or this file would hide the package `learner`

import torch
from transformers.utils import logging as hf_logging

from benchmarks.learner import MIB, batch_of, make_batch, make_config, make_networks, recorded_peak, save_model, show
from benchmarks.opponents import plain_model
from common.config import AlgorithmConfig, Correction
from learner.algorithm.packing import Batch
from learner.algorithm.trainer import Trainer
from learner.networks.logprobs import token_logprobs

MEMBERS = 16  # of a group whose prompt is shared

Variants = dict[str, Callable[[], float]]


def trainer(folder: Path, algorithm: dict[str, object] | None = None, **learner: object) -> Trainer:
    config = make_config(folder, AlgorithmConfig(correction=Correction.none, **(algorithm or {})))  # type: ignore[arg-type]
    config = replace(config, learner=replace(config.learner, **learner))  # type: ignore[arg-type]
    return Trainer(config, *make_networks(config, is_packed=True), rank=0, world=1)


def step(trainer: Trainer, batch: Batch, is_warmup: bool = False, num_steps: int | None = None) -> float:
    """`num_steps` is what the trainer believes to have done."""
    if num_steps is not None:
        trainer.num_steps = num_steps
    return trainer.step(batch, version=0, is_warmup=is_warmup)["critic/grad_norm"]


def warmup(folder: Path, batch: Batch) -> Variants:
    one = trainer(folder)
    return {
        "policy scored": lambda: step(one, batch, is_warmup=True, num_steps=0),
        "not scored": lambda: step(one, batch, is_warmup=True, num_steps=1),
    }


def entropy(folder: Path, batch: Batch) -> Variants:
    """The models here have some twenty tokens: the output layer of a real vocabulary, alone."""
    hidden_TD = torch.randn(1024, 256, requires_grad=True)
    weight_VD = torch.randn(64_000, 256).mul_(0.02).requires_grad_()
    targets_T = torch.randint(64_000, (1024,))

    def side(with_entropy: bool) -> float:
        logprobs_T, entropy_T = token_logprobs(
            hidden_TD, weight_VD, targets_T, temperature=1.0, chunk_tokens=1024, with_entropy=with_entropy
        )
        (logprobs_T if entropy_T is None else logprobs_T + entropy_T).sum().backward()
        hidden_TD.grad = weight_VD.grad = None
        return 0.0

    return {"with entropy": lambda: side(True), "without": lambda: side(False)}


def checkpointing(folder: Path, batch: Batch) -> Variants:
    sides = {f"n = {n}": trainer(folder, activation_checkpointing=n) for n in (0, 1, 2, 3)}
    return {name: lambda side=side: step(side, batch) for name, side in sides.items()}


def prefixes(folder: Path, batch: Batch) -> Variants:
    sizes = batch.num_sequences, int(batch.token_ids_S.max()) + 1
    batches = {
        "no groups": batch,
        "short prompts": grouped(range(4, 9), 0, *sizes),
        "long prompts": grouped(range(40, 41), 20, *sizes),
    }
    variants: Variants = {}
    for name, one in batches.items():
        for is_on in (False, True):
            side = trainer(folder, share_prefixes=is_on)
            variants[f"{name}{', shared' * is_on}"] = lambda side=side, one=one: step(side, one)
    return variants


def grouped(prompt_lengths: range, num_common: int, num_sequences: int, vocabulary: int) -> Batch:
    """Groups of random responses to random prompts, which have their first `num_common` tokens in common."""
    generator = torch.Generator().manual_seed(0)

    def random_tokens(length: int) -> torch.Tensor:
        return torch.randint(2, vocabulary, (length,), generator=generator)

    num_groups = num_sequences // MEMBERS
    common = random_tokens(num_common)
    lengths = [prompt_lengths[k % len(prompt_lengths)] for k in range(num_groups)]
    prompts = [torch.cat([common, random_tokens(length - num_common)]) for length in lengths]
    response_lengths_B = torch.randint(1, 16, (num_groups * MEMBERS,), generator=generator)
    responses = [random_tokens(length) for length in response_lengths_B.tolist()]
    tokens = [part for k, response in enumerate(responses) for part in (prompts[k // MEMBERS], response)]
    prompt_lengths_B = torch.tensor(lengths).repeat_interleave(MEMBERS)
    batch = batch_of(torch.cat(tokens), prompt_lengths_B, response_lengths_B, generator)
    return replace(batch, group_index_B=torch.arange(num_groups).repeat_interleave(MEMBERS))


def compiled(folder: Path, batch: Batch) -> Variants:
    sides = {name: trainer(folder, compile=is_on) for name, is_on in (("eager", False), ("compiled", True))}
    return {name: lambda side=side: step(side, batch) for name, side in sides.items()}


SWITCHES = {
    "warm-up": warmup,
    "entropy": entropy,
    "checkpointing": checkpointing,
    "prefixes": prefixes,
    "compile": compiled,
}


def measure(variants: Variants, repeats: int) -> list[dict[str, object]]:
    peaks = {name: recorded_peak(run)[1] for name, run in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    first = next(iter(seconds.values()))
    return [
        {
            "variant": name,
            "seconds": statistics.median(times),
            "relative": statistics.median(time / base for time, base in zip(times, first, strict=True)),
            "peak_mib": peaks[name] / MIB,
        }
        for name, times in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="What single settings of the learner cost or save")
    parser.add_argument("--model-size", choices=("150k", "3m"), default="150k")
    parser.add_argument("--sequences", type=int, default=128, help="multiple of 8")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=SWITCHES, default=list(SWITCHES), help="switches to measure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    hf_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(arguments.model_size, folder)
        batch = make_batch(arguments.sequences, plain_model(folder).config.vocab_size)
        for switch in arguments.only:
            show(switch, measure(SWITCHES[switch](folder, batch), arguments.repeats))


if __name__ == "__main__":
    main()

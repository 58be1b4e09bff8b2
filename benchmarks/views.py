"""What the metrics of a step cost: CPU seconds of the stage `describe` and of the totals of the updates, in the step.

    python benchmarks/views.py [--model-size 150k|3m] [--repeats N]

Batch, models and clock are those of benchmarks/learner.py, on one thread; the first step is not timed. Tokens are of
eight versions and drawn by a policy that is a little off, so that every view is measured.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # or this file would hide the package `learner`

import torch

from benchmarks.learner import make_batch, make_config, make_networks, save_model
from benchmarks.opponents import plain_model
from common.config import AlgorithmConfig, StalenessConfig
from learner.algorithm import diagnostics, trainer, views
from learner.algorithm.packing import Batch
from learner.algorithm.trainer import Trainer

SIZES = {"the demo's": (128, 60, 370), "64k tokens": (64, 1024, 4096)}  # responses, mean and longest length
VERSIONS = 8
MEASURED = ((Trainer, "_describe"), (diagnostics, "add_policy_totals"), (views, "add_lost_totals"))


class Clock:
    """CPU seconds in some functions, which it replaces."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for owner, name in (*MEASURED, (trainer, "lost_advantage")):
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            started = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.process_time() - started

        return run


def aged(batch: Batch) -> Batch:
    """Tokens of VERSIONS versions, the older ones first in each response."""
    generator = torch.Generator().manual_seed(1)
    ages = [torch.randint(0, VERSIONS, (n,), generator=generator).sort().values for n in batch.response_lengths_B]
    noise_T = 0.1 * torch.randn(batch.num_response_tokens, generator=generator)
    return replace(batch, versions_T=torch.cat(ages), behavior_logprobs_T=batch.behavior_logprobs_T + noise_T)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-size", choices=("150k", "3m"), default="150k")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        save_model(arguments.model_size, Path(folder))
        vocabulary = plain_model(Path(folder)).config.vocab_size
        config = make_config(Path(folder), AlgorithmConfig())
        config = replace(
            config,
            model=replace(config.model, max_model_len=8192),
            staleness=StalenessConfig(max_staleness=VERSIONS),
            learner=replace(config.learner, mini_batches=4),
        )
        for name, (num_sequences, mean, longest) in SIZES.items():
            batch = aged(make_batch(num_sequences, vocabulary, mean, longest))
            one = Trainer(config, *make_networks(config, is_packed=True), rank=0, world=1)
            one.step(batch, VERSIONS, is_warmup=False)
            steps, parts = [], []
            for _ in range(arguments.repeats):
                clock.seconds, started = 0.0, time.process_time()
                one.step(batch, VERSIONS, is_warmup=False)
                steps.append(time.process_time() - started)
                parts.append(clock.seconds)
            step, part = statistics.median(steps), statistics.median(parts)
            print(
                f"{name}: {batch.num_response_tokens} tokens, step {step:.2f} s, metrics {1000 * part:.0f} ms, "
                f"{part / step:.1%}"
            )


if __name__ == "__main__":
    main()

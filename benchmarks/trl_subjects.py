"""What benchmarks/trl_side_by_side.py trains on both sides, and the ways of TRL to generate that it tries."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.smollm2 import work_settings


class Way(NamedTuple):
    """How TRL generates, and with what."""

    generation: str
    threads: int  # of torch
    bf16: bool = False

    def __str__(self) -> str:
        precision = ", bf16" if self.bf16 else ""
        return f"{self.generation}, {self.threads} thread{'s' * (self.threads > 1)}{precision}"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What both sides train."""

    name: str
    recipes: tuple[str, ...]
    settings: tuple[str, ...]
    ways: tuple[Way, ...]  # of TRL, that are tried
    try_steps: int  # batches of a try, the first of which is not counted
    steps: int  # batches of a run
    every: int  # batches between weights that are judged
    targets: tuple[float, ...]  # accuracies that are to be reached


WALK = Subject(
    name="contrary_walk",
    recipes=("number_walk", "grpo"),
    settings=("model.path=configs/models/contrary_walk",),
    ways=(
        Way("transformers", 1),
        Way("transformers", 2),
        Way("static_cache", 1),
        Way("continuous_batching", 1),
        Way("vllm", 1),
    ),
    try_steps=4,
    steps=48,
    every=2,
    targets=(0.6, 0.8),
)


def arithmetic(folder: Path) -> Subject:
    """The pretrained model of benchmarks/smollm2.py and its problems."""
    settings = {**work_settings(folder), "rollout.prompts_per_step": 8, "learner.policy.learning_rate": 2e-5}
    return Subject(
        name="smollm2",
        recipes=("grpo",),
        settings=tuple(f"{key}={value}" for key, value in settings.items()),
        ways=(Way("transformers", 2), Way("transformers", 2, bf16=True)),
        try_steps=2,
        steps=40,
        every=10,
        targets=(0.4, 0.6),
    )

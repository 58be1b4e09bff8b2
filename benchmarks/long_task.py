"""Does value pretraining pay on responses of 240 tokens? VAPO, with the value learned and computed, GRPO and PPO.

    python benchmarks/long_task.py [--letters 8] [--seeds 0 1] [--steps N] [--folder DIR] [--cores 0 1] [--svg FILE]
    python benchmarks/long_task.py --critic [--letters 8] [--folder DIR]

The task is benchmarks/letters.py. Its base model, 150k parameters that have learned a random chain, is made first and
kept in --folder with the runs (benchmarks/miniature), which are not repeated. Rows differ in nothing but what they are
called after: 32 responses a step, the same learning rate, value pretraining on 4,096 responses or on none.

*The value computed* is the probability to reach the target from the sum so far, the pairs that are left and the running
mean and variance of a pair, as if the rest were normal: what a critic could know at best. `--critic` shows what it does
know after value pretraining: within a level, the correlation of its value with the sum so far, and that of the sum with
the reward.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks import letters
from benchmarks.cost import Meter
from benchmarks.miniature.comparison import until
from benchmarks.miniature.jobs import grouped, run_jobs
from benchmarks.miniature.run import Job, Miniature, Outcome, train
from benchmarks.tables import curves, markdown, mean_sd
from common.config import Config
from common.loading import load_config
from common.report.scales import linear
from learner.algorithm.packing import Batch
from learner.prepare import Phase, Recipe, build_base_model

BASE_STEPS = 600  # of the base model's training
EVERY = 10  # policy steps between evaluations
GOALS = (0.3, 0.5, 0.8)  # accuracies
NO_PRETRAINING = "algorithm.critic_warmup_steps=0"
COMPUTED = "VAPO, the value computed"
ROWS: Mapping[str, tuple[str, tuple[str, ...]]] = {  # recipe and settings
    "VAPO": ("vapo", ()),
    "VAPO, a quarter of the pretraining": (
        "vapo",
        ("algorithm.critic_warmup_steps=32", "algorithm.critic_warmup_epochs=8"),  # as many updates
    ),
    "VAPO without value pretraining": ("vapo", (NO_PRETRAINING,)),
    COMPUTED: ("vapo", (NO_PRETRAINING,)),
    "PPO": (
        "ppo",
        (NO_PRETRAINING, "rollout.prompts_per_step=32", "rollout.group_size=1", "algorithm.length_adaptive_alpha=null"),
    ),
    "GRPO": ("grpo", (NO_PRETRAINING,)),
}
SETTINGS = (
    "model.max_model_len=256",
    "task.name=file",
    "verifier.function=benchmarks.letters:verify",
    f"rollout.max_tokens={letters.LENGTH}",
    "rollout.prompts_per_step=4",
    "rollout.group_size=8",
    "learner.mini_batches=2",
    "algorithm.length_adaptive_alpha=0.12",  # lambda 0.965
    "algorithm.critic_warmup_steps=128",
    "algorithm.critic_warmup_epochs=2",
)
TIMES = (60, 120, 180)  # letters, after which `--critic` looks


# ---- the value computed


class Computed(Miniature):
    """Its critic's values are computed; the critic learns nothing, and its gradient is 0."""

    def __init__(self, config: Config, age: int, k: int) -> None:
        super().__init__(config, age)
        self._worth_VV, self._target_V = _tables(self, k)
        self._mean, self._variance = 0.0, 0.5  # of a pair; running
        self._learned = self.trainer._run_critic
        self.trainer._run_critic = self._values  # type: ignore[method-assign]

    def _values(self, network: nn.Module, batch: Batch) -> Tensor:
        values = []
        for prompt, response in _sequences(batch):
            pairs = self._worth_VV[response[:-1], response[1:]]
            done = torch.cat([torch.zeros(2), pairs.cumsum(0)])[: len(response)]  # before each letter
            left = torch.arange(letters.LENGTH, letters.LENGTH - len(response), -1)
            distance = done + self._mean * left - self._target_V[prompt[0]]
            values.append(2 * torch.special.ndtr(distance / (self._variance * left).sqrt()) - 1)
            if len(pairs) == letters.LENGTH - 1:
                self._mean += 0.01 * (pairs.mean().item() - self._mean)
                self._variance += 0.01 * (pairs.var().item() - self._variance)
        return torch.cat(values) + 0.0 * self._learned(network, batch)


def _tables(run: Miniature, k: int) -> tuple[Tensor, Tensor]:
    """By token ids: the worth of a pair [V, V] and the target of a level [V]."""
    tokenizer = run.sampler.tokenizer
    ids = {one: tokenizer.convert_tokens_to_ids(one) for one in letters.characters(k)}
    worth_VV, target_V = torch.full((len(tokenizer),) * 2, -1.0), torch.zeros(len(tokenizer))
    for pair, worth in letters.worth(k).items():
        worth_VV[ids[pair[0]], ids[pair[1]]] = worth
    for level, target in letters.targets(k).items():
        target_V[ids[level]] = target
    return worth_VV, target_V


def _sequences(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids of each prompt and of its response."""
    for start, end, length in zip(batch.cu_seqlens_B1, batch.cu_seqlens_B1[1:], batch.prompt_lengths_B, strict=False):
        yield batch.token_ids_S[start : start + length], batch.token_ids_S[start + length : end]


# ---- runs


def base(folder: Path, k: int) -> tuple[str, ...]:
    """Settings of the task with its base model, which is made if it is not there."""
    folder = folder / f"letters{k}"
    if not (folder / "model" / "model.safetensors").exists():
        (folder / "model").mkdir(parents=True, exist_ok=True)
        recipe = Recipe(
            task="file",
            characters=letters.characters(k),
            max_response_tokens=letters.LENGTH,
            verify=letters.verify,
            phases=(
                Phase(
                    label="chain",
                    num_steps=BASE_STEPS,
                    batch_size=8,
                    learning_rate=3e-3,
                    demonstrate=partial(letters.demonstration, k=k),
                    warmup_steps=50,
                ),
            ),
        )
        build_base_model(recipe, letters.write(folder, k), folder / "model", seed=0)
    return (
        f"model.path={folder}/model",
        f"task.train_file={folder}/train.jsonl",
        f"task.heldout_file={folder}/heldout.jsonl",
    )


def job(task: Sequence[str], k: int, row: str, seed: int, steps: int) -> Job:
    recipe, settings = ROWS[row]
    return Job(
        table=f"letters {k}",
        row=row,
        seed=seed,
        recipes=("number_walk", recipe),
        settings=(*task, *SETTINGS, *settings),
        steps=steps,
        evaluate_every=EVERY,
        prompts=letters.NUM_HELDOUT,
        samples=1,
    )


def work(job: Job, critics: Path) -> Outcome:
    """One run, in a process of its own."""
    make = partial(Computed, k=int(job.table.split()[1])) if job.row == COMPUTED else Miniature
    return train(job, critics, make)


# ---- what the critic knows


def known(config: Config, k: int, num_batches: int = 16) -> list[dict[str, float]]:
    """After value pretraining, at each of TIMES, over responses of the same level: correlations, and how much the
    value varies."""
    run = Miniature(config, 0)
    run.pretrain()
    assert run.trainer.critic is not None
    worth_VV, _ = _tables(run, k)
    found: dict[int, dict[int, list[tuple[float, float, float]]]] = {time: {} for time in TIMES}
    for _ in range(num_batches):
        batch = run.batch()
        with torch.no_grad():
            values_T = run.trainer.critic.network(batch.token_ids_S, batch.cu_seqlens_B1, batch.prompt_lengths_B)
        values_BT = values_T.split(batch.response_lengths_B.tolist())
        for (prompt, response), values, reward in zip(_sequences(batch), values_BT, batch.rewards_B, strict=True):
            for time in TIMES:
                if len(response) > time:
                    done = worth_VV[response[: time - 1], response[1:time]].sum().item()
                    level = found[time].setdefault(int(prompt[0]), [])
                    level.append((values[time].item(), done, reward.item()))
    return [{"letters": time, **_within(list(levels.values()))} for time, levels in found.items()]


def _within(levels: Sequence[Sequence[tuple[float, float, float]]]) -> dict[str, float]:
    """Of (value, sum, reward), each less its mean in the level; levels without two different rewards say nothing."""
    kept = [level for level in levels if len({reward for _, _, reward in level}) == 2]
    rows = torch.cat([torch.tensor(level) - torch.tensor(level).mean(0) for level in kept])
    correlations = torch.corrcoef(rows.T)
    return {
        "responses": len(rows),
        "value_sum": correlations[0, 1].item(),
        "sum_reward": correlations[1, 2].item(),
        "value_reward": correlations[0, 2].item(),
        "value_sd": rows[:, 0].std().item(),
    }


# ---- tables


def render(outcomes: Mapping[Job, Outcome]) -> str:
    rows = grouped(outcomes.items())
    steps = [point.step for point in next(iter(outcomes.values())).points][:: max(1, 20 // EVERY)]
    by_step = [
        [row, *(mean_sd([_at(outcome, step) for _, outcome in pairs], 2) for step in steps)]
        for row, pairs in rows.items()
    ]
    by_tokens = [
        [row, *(_thousands([until(o, "tokens", goal, o.pretraining_tokens) for _, o in pairs]) for goal in GOALS)]
        for row, pairs in rows.items()
    ]
    return "\n\n".join(
        [
            markdown(["accuracy", *(f"step {step}" for step in steps)], by_step),
            markdown(["thousand tokens, pretraining counted", *(f"to {goal}" for goal in GOALS)], by_tokens),
        ]
    )


def _at(outcome: Outcome, step: int) -> float:
    return next(point.accuracy for point in outcome.points if point.step == step)


def _thousands(tokens: Sequence[float | None]) -> str:
    there = [count / 1000 for count in tokens if count is not None]
    return mean_sd(there, 0) + (f" ({len(there)} of {len(tokens)})" if 0 < len(there) < len(tokens) else "")


def drawing(outcomes: Mapping[Job, Outcome]) -> str:
    """Mean accuracy over the seeds by tokens, value pretraining counted."""
    lines = []
    for row, pairs in grouped(outcomes.items()).items():
        points = zip(*(outcome.points for _, outcome in pairs), strict=True)
        before = statistics.mean(outcome.pretraining_tokens for _, outcome in pairs)
        lines.append(
            (
                row,
                [
                    (
                        (before + statistics.mean(p.tokens for p in same)) / 1000,
                        statistics.mean(p.accuracy for p in same),
                    )
                    for same in points
                ],
            )
        )
    accuracy = linear("held-out accuracy", [0.0, 1.0])
    return curves("a long task", "thousand tokens, value pretraining counted", accuracy, lines)


def main(words: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(words)
    torch.set_num_threads(1)
    meter, k = Meter(), options.letters
    task = base(options.folder, k)
    if options.critic:
        table = known(load_config(("number_walk", "vapo"), (*task, *SETTINGS)), k)
        print(
            markdown(list(table[0]), [[f"{value:.2f}".removesuffix(".00") for value in row.values()] for row in table])
        )
        found: Any = table
    else:
        jobs = [job(task, k, row, seed, options.steps) for seed in options.seeds for row in options.rows]
        outcomes = run_jobs(jobs, options.folder / "runs.jsonl", options.cores, options.folder, work)
        print(render(outcomes))
        if options.svg is not None:
            options.svg.write_text(drawing(outcomes))
        found = [{"row": job.row, "seed": job.seed, **asdict(outcome)} for job, outcome in outcomes.items()]
    print(f"\n{(cost := meter.cost())}")
    if options.json is not None:
        options.json.write_text(json.dumps({"letters": k, "found": found, "cost": vars(cost)}, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--letters", type=int, default=8, help="size of the alphabet, 4 to 26 (default: 8)")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=120, help="of the policy (default: 120)")
    parser.add_argument("--folder", type=Path, default=Path("runs/long_task"), help="of the base model and the runs")
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1], help="a run at a time on each")
    parser.add_argument("--critic", action="store_true", help="what a critic knows after value pretraining")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--svg", type=Path, help="also draw the curves here")
    return parser


if __name__ == "__main__":
    main()

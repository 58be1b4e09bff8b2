"""Trains with TRL's GRPOTrainer on the configuration of a run of ours: a side of benchmarks/trl_side_by_side.py.

    python benchmarks/trl_run.py RUN [--generation WAY] [--threads N] [--bf16]

RUN/config.yaml is there already. Written are RUN/metrics.jsonl, a line a batch with the keys of our own runs, and
RUN/weights/STEP.safetensors every checkpoint.every batches. How settings are mapped is in `arguments_of`; what is no
setting of TRL's, the optimizer and its warm-up, is built here as learner/algorithm/optimised.py builds it.
"""

import argparse
import importlib
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about the version of vLLM
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

from common.config import Config
from common.loading import config_of_run, read_config
from common.rewards import verdict_reward
from common.tasks import load_task, verifier_function

GENERATIONS: dict[str, dict[str, Any]] = {
    "transformers": {},
    "static_cache": {"cache_implementation": "static"},
    "continuous_batching": {"use_transformers_continuous_batching": True},
    "vllm": {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3},
}


class Progress(TrainerCallback):
    """Writes a line after the last optimizer step of each batch, and the weights every so many batches."""

    def __init__(self, config: Config, run: Path) -> None:
        self.config, self.run = config, run
        self.step = self.tokens = 0
        self._at = 0.0
        (run / "weights").mkdir()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._at = time.time()

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        if state.global_step % self.config.learner.mini_batches:
            return
        self.step += 1
        now = time.time()
        line = {"step": self.step, "time": now, "time/step_s": now - self._at, "tokens/generated": self.tokens}
        self._at = now
        with (self.run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.step % self.config.checkpoint.every == 0 or self.step == self.config.learner.steps:
            weights = {name: parameter.detach() for name, parameter in model.named_parameters()}  # a tied one once
            save_file(weights, self.run / "weights" / f"{self.step}.safetensors")


def arguments_of(config: Config, run: Path, generation: str, bf16: bool) -> GRPOConfig:
    """A batch of prompts_per_step x group_size responses is generated at once and cut into mini_batches optimizer
    steps: per_device_train_batch_size is the mini-batch, steps_per_generation their number, and neither num_iterations
    nor gradient accumulation adds a pass or a step.
    """
    algorithm, rollout, mini_batches = config.algorithm, config.rollout, config.learner.mini_batches
    vllm = {"vllm_max_model_length": config.model.max_model_len} if generation == "vllm" else {}
    return GRPOConfig(
        output_dir=str(run / "trl"),
        seed=config.seed,
        max_steps=config.learner.steps * mini_batches,
        per_device_train_batch_size=rollout.prompts_per_step * rollout.group_size // mini_batches,
        steps_per_generation=mini_batches,
        gradient_accumulation_steps=1,
        num_iterations=1,
        num_generations=rollout.group_size,
        max_completion_length=rollout.max_tokens,
        temperature=rollout.temperature,
        loss_type="grpo",  # as algorithm.aggregation=sequence
        scale_rewards="group",
        epsilon=algorithm.clip_low,
        epsilon_high=algorithm.clip_high,
        beta=0.0,
        max_grad_norm=config.learner.policy.max_grad_norm,
        use_cpu=True,
        bf16=bf16,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        **GENERATIONS[generation],
        **vllm,
    )


def optimizer_of(model: torch.nn.Module, config: Config) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW over all parameters, and a linear warm-up whose first update has 1 / warmup_steps of the rate."""
    policy = config.learner.policy
    betas = (policy.beta1, policy.beta2)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=policy.learning_rate, betas=betas, weight_decay=policy.weight_decay, fused=True
    )
    warmup = max(policy.warmup_steps, 1)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: min(1.0, (update + 1) / warmup))


def text_of(completion: str | list[dict[str, str]]) -> str:
    """Of a response to a text, or to a conversation."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def train(config: Config, run: Path, generation: str, bf16: bool) -> None:
    task, progress = load_task(config.task), Progress(config, run)
    module, _, name = verifier_function(config).partition(":")
    verify = getattr(importlib.import_module(module), name)

    def reward(
        completions: list[Any], completion_ids: list[list[int]], reference: list[str], row: list[Any], **_: Any
    ) -> list[float]:
        progress.tokens += sum(map(len, completion_ids))
        asked = zip(map(text_of, completions), reference, row, strict=True)
        return [verdict_reward(verify(*one), config.reward) for one in asked]

    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments_of(config, run, generation, bf16),
        train_dataset=Dataset.from_list(
            [{"prompt": list(p.messages or ()) or p.text, "reference": p.reference, "row": p.row} for p in task.train]
        ),
        processing_class=AutoTokenizer.from_pretrained(config.model.path),
        callbacks=[progress],
        optimizers=optimizer_of(model, config),
    )
    trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--generation", choices=list(GENERATIONS), default="transformers")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--bf16", action="store_true", help="TRL's setting of this name: matrices in bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(read_config(config_of_run(options.run)), options.run, options.generation, options.bf16)


if __name__ == "__main__":
    main()

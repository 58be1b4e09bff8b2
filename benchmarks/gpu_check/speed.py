"""Part d: tokens per second, share of the card's peak and memory of a full step of the learner.

A step scores the batch, estimates, and updates critic and policy: 16k tokens of a long tail in micro-batches of at most
8k, FSDP2 over one rank, bfloat16 over float32 master weights; for the smaller model also with the whole batch in one
micro-batch, which tells how much of the time the processor takes to start kernels. Beside it the same Trainer with
plain transformers networks (SDPA, autocast) on padded micro-batches, which are smaller because the logits of every
position exist at once.
Tokens are those of prompts and responses, without padding.
"""

import gc
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.gpu_check.machine import peak_tflops
from benchmarks.gpu_check.models import SHAPES, model_folder, vocabulary
from benchmarks.gpu_check.report import Report
from benchmarks.gpu_check.sharded import alone, configuration
from benchmarks.learner import make_batch, useful_flops
from benchmarks.opponents import PaddedCritic, PaddedPolicy, plain_model
from common.config import AdvantageEstimator, AlgorithmConfig, Config, Device, DType
from learner.algorithm.diagnostics import Metrics
from learner.algorithm.packing import Batch
from learner.algorithm.trainer import Trainer
from learner.networks.model import load_critic, load_policy
from learner.networks.parallel import World, make_mesh

WARM_UP, REPEATS = 1, 2
STAGES = ("score", "critic", "policy")  # of a step's time
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a step works on; lengths in tokens."""

    models: tuple[str, ...]
    sequences: int
    mean: int  # of the responses
    longest: int
    packed: int  # of a micro-batch
    whole: int  # at least all tokens of the step
    padded: int  # of one of the other side, before padding


LOADS: Mapping[str, Load] = {
    "cuda": Load(models=("0.5B", "1.5B"), sequences=32, mean=512, longest=2048, packed=8192, whole=32_768, padded=2048),
    "cpu": Load(models=("tiny",), sequences=8, mean=30, longest=90, packed=200, whole=1000, padded=100),
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a model may have to be trained with, to fit."""

    label: str
    has_critic: bool = True
    checkpoints_activations: bool = False

    def learner(self, config: Config, micro_batch: int) -> Config:
        estimator = AdvantageEstimator.gae if self.has_critic else AdvantageEstimator.grpo
        settings = {
            "tokens_per_micro_batch": micro_batch,
            "activation_checkpointing": int(self.checkpoints_activations),
        }
        return replace(
            config,
            algorithm=replace(config.algorithm, advantage=estimator),
            learner=replace(config.learner, **settings),
        )


VARIANTS = (
    Variant(label="policy and critic"),
    Variant(label="policy and critic, activations recomputed", checkpoints_activations=True),
    Variant(label="policy alone, activations recomputed", has_critic=False, checkpoints_activations=True),
)


class Autocast(nn.Module):
    """A network whose products are in bfloat16 and whose results are in float32."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.network, self.device_type = network, device.type

    def forward(self, *inputs: Tensor, **options: bool) -> object:
        with torch.autocast(self.device_type, torch.bfloat16):
            found = self.network(*inputs, **options)
        return tuple(x if x is None else x.float() for x in found) if isinstance(found, tuple) else found.float()


def run(report: Report, device: torch.device, folder: Path) -> None:
    load = LOADS[device.type]
    with alone(Device(device.type)) as world:
        for side in ("packed", "padded"):
            for name in load.models:
                tokens = load.packed if side == "packed" else load.padded
                measure(report, name, side, model_folder(name, folder, device), load, tokens, world)
        smaller = load.models[0]
        measure(report, smaller, "packed", model_folder(smaller, folder, device), load, load.whole, world)


def measure(report: Report, name: str, side: str, path: Path, load: Load, tokens: int, world: World) -> None:
    """The first variant that fits the card's memory, with micro-batches of `tokens`."""
    batch = make_batch(load.sequences, vocabulary(path), load.mean, load.longest)
    whole = ", one micro-batch" if tokens == load.whole else ""
    for variant in VARIANTS:
        memory = free_gib(world.device)
        needed = estimated_gib(SHAPES[name], variant, tokens, logits=1024 if side == "packed" else 2 * tokens)
        if needed > memory:
            report.skip(f"{name} {side}, {variant.label}: needs about {needed:.0f} GiB, {memory:.0f} are free")
            continue
        try:
            timed(report, f"{name} {side}, {variant.label}{whole}", side, variant, path, batch, tokens, world)
            return
        except torch.OutOfMemoryError:
            report.skip(f"{name} {side}, {variant.label}: out of memory, with {memory:.0f} GiB free before")


def free_gib(device: torch.device) -> float:
    """Memory of the card that is not in use, once what nobody refers to any more is given back."""
    if device.type == "cpu":
        return float("inf")
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0] / GIB


def estimated_gib(shape: Mapping[str, int], variant: Variant, tokens: int, logits: int) -> float:
    """Device memory of a step with tied embeddings: 16 bytes a parameter (weight, gradient and two moments in
    float32), the bfloat16 activations of one micro-batch, and twice the float32 logits of `logits` tokens.

    A layer keeps about 13 values of the model's width and 4 of the intermediate one for each token; with
    recomputation only its input, and one layer's at a time.
    """
    width, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    keys = width * shape["num_key_value_heads"] // shape["num_attention_heads"]
    layer = 2 * width * (width + keys) + 3 * width * inner
    parameters = shape["vocab_size"] * width + layers * layer
    kept = 2 * tokens * (13 * width + 4 * inner)
    activations = kept + layers * 2 * tokens * width if variant.checkpoints_activations else layers * kept
    return (16 * parameters * (1 + variant.has_critic) + activations + 8 * logits * shape["vocab_size"]) / GIB


def timed(
    report: Report, label: str, side: str, variant: Variant, path: Path, batch: Batch, tokens: int, world: World
) -> None:
    """Median time of a step, what that is of the card's peak, and the peak of the memory."""
    is_cuda = world.device.type == "cuda"
    one = trainer(side, variant, path, tokens, world)
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(world.device)
    steps = [timed_step(one, batch) for _ in range(WARM_UP + REPEATS)][WARM_UP:]
    median = statistics.median(seconds for seconds, _ in steps)
    report.number(f"{label}: tokens/s", batch.num_tokens / median)
    report.number(f"{label}: s a step", median)
    for stage in STAGES:
        parts = [values[f"time/{stage}_s"] for _, values in steps if f"time/{stage}_s" in values]
        if parts:
            report.number(f"{label}: s of it for {stage}", statistics.median(parts))
    reached = useful_flops(path, batch, num_critics=int(variant.has_critic)) / median / 1e12
    report.number(f"{label}: useful TFLOP/s", reached)
    if is_cuda:
        peak = peak_tflops(torch.cuda.get_device_name(world.device))
        if peak is not None:
            report.number(f"{label}: MFU, % of {peak:g} TFLOP/s", 100 * reached / peak)
        report.number(f"{label}: peak GiB", torch.cuda.max_memory_allocated(world.device) / GIB)


def timed_step(one: Trainer, batch: Batch) -> tuple[float, Metrics]:
    """(seconds, metrics). The step reads its metrics off the device, so it ends when its kernels have."""
    started = time.perf_counter()
    values = one.step(batch, 0, is_warmup=False)
    return time.perf_counter() - started, values


def trainer(side: str, variant: Variant, path: Path, tokens: int, world: World) -> Trainer:
    config = variant.learner(configuration(path, world, DType.bfloat16, AlgorithmConfig()), tokens)
    policy: nn.Module
    critic: nn.Module | None = None
    if side == "packed":
        mesh = make_mesh(config)
        policy = load_policy(config, world.device, mesh)
        critic = load_critic(config, world.device, mesh) if variant.has_critic else None
        return Trainer(config, policy, critic, rank=0, world=1)
    policy = plain(path, variant)
    if variant.has_critic:
        backbone = plain(path, variant).base_model
        critic = Autocast(PaddedCritic(backbone, nn.Linear(backbone.config.hidden_size, 1, bias=False)), world.device)
    policy = Autocast(PaddedPolicy(policy), world.device)
    return Trainer(config, policy.to(world.device), critic.to(world.device) if critic else None, rank=0, world=1)


def plain(path: Path, variant: Variant) -> nn.Module:
    model = plain_model(path)
    if variant.checkpoints_activations:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model

"""Part a: does the GPU compute the losses of policy and critic, and their gradients, as the CPU does in float32?

One batch, one experience (from the CPU's scores), the same weights. In bfloat16 the parameters are rounded, as FSDP2
rounds them for a forward pass; buffers stay as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.gpu_check.models import DEMO, model_folder, vocabulary, walks
from benchmarks.gpu_check.report import Report
from benchmarks.learner import make_batch, make_config, make_networks
from common.config import AlgorithmConfig
from learner.algorithm import losses
from learner.algorithm.experience import Experience, estimate
from learner.algorithm.objective import Counts, count, policy_terms, trust_region
from learner.algorithm.packing import Batch
from learner.algorithm.trainer import Trainer
from learner.networks.model import Critic, Policy

# Largest accepted mean difference (log-probs in nats, values and losses in units of the reward) and relative error of
# all gradients of a network together. Another order of summation makes 1e-6 and 1e-5 in float32. The CPU's own bfloat16
# is off by 0.002 and 0.019 for the demo's model, by 0.005 and 0.013 for a random one of 24 layers.
LIMITS: Mapping[torch.dtype, tuple[float, float]] = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.03, 0.08)}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one device computed, as float64 on the CPU."""

    logprobs_T: Tensor
    values_T: Tensor
    policy_loss: Tensor
    critic_loss: Tensor
    policy_gradient: Tensor  # of all parameters, end to end
    critic_gradient: Tensor


def run(report: Report, device: torch.device, folder: Path) -> None:
    """The demo's model in both types; on a GPU also a random one of half a billion parameters, in bfloat16."""
    for dtype in LIMITS:
        compare(report, f"demo {name_of(dtype)}", DEMO, walks(32), device, dtype)
    if device.type == "cuda":
        path = model_folder("0.5B", folder, device)
        compare(
            report, "0.5B bfloat16", path, make_batch(4, vocabulary(path), mean=24, longest=64), device, torch.bfloat16
        )


def compare(report: Report, case: str, path: Path, batch: Batch, device: torch.device, dtype: torch.dtype) -> None:
    """Reports how far `device` in `dtype` is from the CPU in float32."""
    config = make_config(path, AlgorithmConfig())
    policy, critic = make_networks(config, is_packed=True)
    assert isinstance(policy, Policy) and isinstance(critic, Critic)
    trainer = Trainer(config, policy, critic, rank=0, world=1)
    (plan,) = trainer._plans(batch, is_warmup=False)
    experience = estimate(config, batch, *trainer._score(batch, plan, is_warmup=False), 0, False, None)
    counts = count(batch, experience, plan[0])
    expected = outcome(policy, critic, config.algorithm, batch, experience, counts)
    move(policy, device, dtype)
    move(critic.backbone, device, dtype)
    critic.head.to(device)
    found = outcome(policy, critic, config.algorithm, batch, on(experience, device), counts)
    mean, relative = LIMITS[dtype]
    for what, unit in (("logprobs_T", "nats"), ("values_T", "rewards"), ("policy_loss", ""), ("critic_loss", "")):
        difference = (getattr(found, what) - getattr(expected, what)).abs().mean().item()
        label = what.removesuffix("_T").replace("_", " ")
        report.at_most(f"{case}: {label}, mean difference {unit}".strip(), difference, mean)
    for what in ("policy_gradient", "critic_gradient"):
        wanted = getattr(expected, what)
        error = ((getattr(found, what) - wanted).norm() / wanted.norm()).item()
        report.at_most(f"{case}: {what.replace('_', ' ')}, relative error", error, relative)


def outcome(
    policy: Policy, critic: Critic, algorithm: AlgorithmConfig, batch: Batch, e: Experience, counts: Counts
) -> Outcome:
    """Losses as the trainer composes them, and their gradients, which are gone afterwards.

    The log-probs at the start of the step are the device's own: no ratio is clipped because of rounding.
    """
    packed = (batch.token_ids_S, batch.cu_seqlens_B1, batch.prompt_lengths_B)
    logprobs_T, _ = policy(*packed, 1.0)
    e = replace(e, old_logprobs_T=logprobs_T.detach())
    terms = policy_terms(algorithm, batch, e, logprobs_T, None, counts, trust_region(algorithm))
    policy_loss = torch.stack(list(terms.values())).sum()
    policy_loss.backward()
    values_T = critic(*packed)
    assert e.values_T is not None and e.value_targets_T is not None
    scale_T = losses.token_scale(e.mask_T, counts.tokens)
    critic_loss = losses.value_loss(values_T, e.values_T, e.value_targets_T, scale_T)
    critic_loss.backward()
    tensors = (logprobs_T, values_T, policy_loss, critic_loss, gradient(policy), gradient(critic))
    names = (field.name for field in fields(Outcome))
    return Outcome(**{name: x.detach().double().cpu() for name, x in zip(names, tensors, strict=True)})


def gradient(network: nn.Module) -> Tensor:
    """All gradients end to end, float32 on the CPU; they are taken away from the network."""
    parts = []
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        parts.append(parameter.grad.float().cpu().flatten())
        parameter.grad = None
    return torch.cat(parts)


def move(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """The network to `device`, its parameters in `dtype`."""
    network.to(device)
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)


def on(experience: Experience, device: torch.device) -> Experience:
    streams = {field.name: getattr(experience, field.name) for field in fields(experience)}
    return replace(experience, **{name: x.to(device) for name, x in streams.items() if isinstance(x, Tensor)})


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

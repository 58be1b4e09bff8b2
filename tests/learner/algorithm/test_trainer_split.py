"""Real networks: splitting the work over micro-batches and ranks changes no loss, gradient or parameter."""

import os
import socket
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from common.config import (
    AlgorithmConfig,
    Config,
    Correction,
    CriticFrozen,
    Device,
    LearnerConfig,
    ModelConfig,
    OptimizerConfig,
    OverAge,
    RolloutConfig,
    StalenessConfig,
    ValueTarget,
)
from learner.algorithm.packing import Batch, boundaries, partition
from learner.algorithm.trainer import Trainer
from learner.networks.model import Policy, load_critics, load_policy
from learner.networks.parallel import make_mesh, process_group
from tests.support.ranks import run_two_ranks
from tests.support.tiny_models import VOCAB, write_tiny_model

CPU = torch.device("cpu")
VERSION = 3
MANY = [1, 20, 21, 5, 9, 3, 30, 2, 14, 7, 1, 11, 26, 4]
# name -> response lengths, and which of the responses are correct
BATCHES = {
    "mixed": (MANY, list(range(0, 14, 3))),
    "one rank has nothing correct": ([9, 8, 7, 6], [0]),
    "one rank has no tokens": ([12, 9], [0, 1]),  # one response for each of the two mini-batches
}
STEPS = (True, False, False)  # is_warmup
ASYPPO = {"agreement_mask": 0.3, "entropy_filter": 0.2, "value_clip": None}
SWITCHES = {"correction": Correction.m2, "m2_threshold": 1.0, "ess_scaled_step": True, "segment_probability": 0.2}


@dataclass(frozen=True)
class Case:
    """A batch by name, and what is other than in make_config."""

    batch: str
    model: dict[str, object] = field(default_factory=dict)
    algorithm: dict[str, object] = field(default_factory=dict)

    def config(self, path: str, tokens_per_micro_batch: int) -> Config:
        config = make_config(path, tokens_per_micro_batch, ValueTarget.gae)
        model, algorithm = replace(config.model, **self.model), replace(config.algorithm, **self.algorithm)
        return replace(config, model=model, algorithm=algorithm)


CASES = {name: Case(name) for name in BATCHES} | {
    "frozen attention": Case("mixed", {"critic_frozen": CriticFrozen.attention}),
    "two critics": Case("mixed", {"num_critics": 2}, ASYPPO),
    "two critics, one rank has no tokens": Case("one rank has no tokens", {"num_critics": 2}, ASYPPO),
    "switches": Case("mixed", algorithm=SWITCHES),
    "switches, one rank has no tokens": Case("one rank has no tokens", algorithm=SWITCHES),
}


def make_batch(lengths: list[int], correct: list[int]) -> Batch:
    """Random tokens of versions 0 to 3, of which 0 and 1 are over age; the third response is truncated."""
    generator = torch.Generator().manual_seed(len(lengths))
    response_lengths_B = torch.tensor(lengths)
    prompt_lengths_B = torch.arange(len(lengths)) % 3 + 1
    num_tokens = int(response_lengths_B.sum())
    cu_seqlens_B1 = boundaries(prompt_lengths_B + response_lengths_B)
    is_correct_B = torch.zeros(len(lengths), dtype=torch.bool)
    is_correct_B[correct] = True
    return Batch(
        token_ids_S=torch.randint(VOCAB, (int(cu_seqlens_B1[-1]),), generator=generator),
        cu_seqlens_B1=cu_seqlens_B1,
        prompt_lengths_B=prompt_lengths_B,
        response_lengths_B=response_lengths_B,
        behavior_logprobs_T=-torch.rand(num_tokens, generator=generator) * 5,
        versions_T=torch.randint(VERSION + 1, (num_tokens,), generator=generator),
        rewards_B=is_correct_B * 2.0 - 1.0 + torch.rand(len(lengths), generator=generator) * 0.1,
        is_correct_B=is_correct_B,
        is_truncated_B=torch.arange(len(lengths)) == 2,
        group_index_B=torch.arange(len(lengths)) // 2,
        loss_mask_T=torch.ones(num_tokens, dtype=torch.bool),
    )


def make_config(path: str, tokens_per_micro_batch: int, value_target: ValueTarget) -> Config:
    """Every part of the loss is on, and gradients are clipped."""
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=3, max_grad_norm=0.5)
    return Config(
        model=ModelConfig(path=path),
        rollout=RolloutConfig(temperature=0.9),
        staleness=StalenessConfig(max_staleness=1, over_age=OverAge.mask),
        algorithm=AlgorithmConfig(
            length_adaptive_alpha=0.4,
            critic_lambda=0.9,
            value_target=value_target,
            whiten_advantages=True,
            dual_clip=3.0,
            entropy_weight=0.01,
            kl_weight=0.05,
            critic_warmup_epochs=2,
            critic_updates_per_step=2,
            value_clip=0.2,
        ),
        learner=LearnerConfig(
            mini_batches=2,
            tokens_per_micro_batch=tokens_per_micro_batch,
            logprob_chunk_tokens=16,
            policy=optimizer,
            critic=optimizer,
        ),
    )


@dataclass
class Trace:
    """What the steps of a run did, as full tensors."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)  # one per optimizer step, after clipping
    parameters: dict[str, Tensor] = field(default_factory=dict)


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def run_steps(config: Config, batch: Batch, rank: int, world: int) -> Trace:
    """A warm-up step and two policy steps on the same batch."""
    mesh = make_mesh(config)
    policy, critic = load_policy(config, CPU, mesh), load_critics(config, CPU, mesh)
    trainer = Trainer(config, policy, critic, rank, world, reference=_reference(config))
    trace = Trace()
    for optimised in (trainer.policy, trainer.critic):
        assert optimised is not None
        named = dict(optimised.network.named_parameters())

        def record(*_: object, named: dict[str, torch.nn.Parameter] = named) -> None:
            trace.gradients.append({name: full(p.grad) for name, p in named.items() if p.grad is not None})

        optimised.optimizer.register_step_pre_hook(record)
    for is_warmup in STEPS:
        trace.metrics.append(trainer.step(batch, VERSION, is_warmup))
    for prefix, network in (("policy", policy), ("critic", critic)):
        trace.parameters |= {f"{prefix}.{name}": full(p) for name, p in network.named_parameters()}
    return trace


def _reference(config: Config) -> Policy:
    reference = load_policy(config, CPU, make_mesh(config))
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(1.05)
    return reference


def assert_same(found: Trace, expected: Trace) -> None:
    assert len(found.gradients) == len(expected.gradients) > 0
    for step, (a, b) in enumerate(zip(found.gradients, expected.gradients, strict=True)):
        assert a.keys() == b.keys()
        for name in b:
            torch.testing.assert_close(
                a[name], b[name], atol=2e-5, rtol=1e-3, msg=lambda m, n=name, s=step: f"update {s}, {n}: {m}"
            )
    for a, b in zip(found.metrics, expected.metrics, strict=True):
        assert a.keys() == b.keys()
        for name in b:
            if not name.startswith(("time/", "throughput/", "memory/")):
                assert a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-4), name
    for name, p in expected.parameters.items():
        # A key's bias adds the same to all scores of a query: its gradient is rounding, which Adam makes a step of.
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(found.parameters[name], p, atol=1e-4, rtol=1e-3, msg=name)


def one_rank(path: str, name: str, tokens_per_micro_batch: int, target: ValueTarget = ValueTarget.gae) -> Trace:
    return run_steps(make_config(path, tokens_per_micro_batch, target), make_batch(*BATCHES[name]), 0, 1)


@pytest.mark.parametrize("target", list(ValueTarget))
def test_seven_micro_batches_equal_one(tmp_path: Path, target: ValueTarget) -> None:
    path = write_tiny_model(tmp_path)
    plan = partition(make_batch(*BATCHES["mixed"]), 2, 1, 1, seed=0)
    assert [len(mini[0]) for mini in plan] == [7, 7]  # a budget of one token: each response alone
    assert_same(one_rank(path, "mixed", 1, target), one_rank(path, "mixed", 10_000, target))


def test_micro_batches_change_nothing_with_every_switch(tmp_path: Path) -> None:
    path, case = write_tiny_model(tmp_path), CASES["switches"]
    pieces, whole = (run_steps(case.config(path, n), make_batch(*BATCHES[case.batch]), 0, 1) for n in (1, 10_000))
    assert_same(pieces, whole)


def _two_ranks(rank: int, path: str, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    with process_group(Device.cpu, timeout_s=120):
        for name, case in CASES.items():
            trace = run_steps(case.config(path, 40), make_batch(*BATCHES[case.batch]), rank, 2)
            torch.save(trace, folder / f"{name} {rank}.pt")
        dist.barrier()


@pytest.mark.slow
def test_two_ranks_equal_one_also_with_nothing_correct_or_nothing_at_all_on_one_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_model(tmp_path / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    run_two_ranks(_two_ranks, path, tmp_path)
    for name, case in CASES.items():
        expected = run_steps(case.config(path, 10_000), make_batch(*BATCHES[case.batch]), 0, 1)
        for rank in (0, 1):
            assert_same(torch.load(tmp_path / f"{name} {rank}.pt", weights_only=False), expected)


def test_with_learning_rate_zero_no_bit_of_a_real_network_changes(tmp_path: Path) -> None:
    config = make_config(write_tiny_model(tmp_path), 40, ValueTarget.gae)
    still = OptimizerConfig(learning_rate=0.0)
    config = replace(config, learner=replace(config.learner, policy=still, critic=still))
    before = load_policy(config, CPU, None)
    after = run_steps(config, make_batch(*BATCHES["mixed"]), 0, 1).parameters
    for name, p in before.named_parameters():
        assert torch.equal(after[f"policy.{name}"], p), name

"""The optimizer on shards: the same steps as on whole tensors, and one rank's overflow is everybody's."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import run
from common.config import OptimizerConfig
from learner.algorithm.optimised import MAX_SKIPPED_IN_A_ROW, Optimised
from tests.support.ranks import run_two_ranks

CONFIG = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, weight_decay=0.1, max_grad_norm=0.5)


def make_network() -> nn.Module:
    """The bias of the last layer has one element, which only one of two ranks holds."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1))


def take_step(network: nn.Module, optimised: Optimised, step: int, scale: float = 1.0) -> torch.Tensor | None:
    inputs = torch.randn(7, 5, generator=torch.Generator().manual_seed(step))
    (network(inputs).square().mean() * scale).backward()
    return optimised.apply()


def _train_on_two_ranks(rank: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo")
    plain, sharded = make_network(), make_network()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))  # averages the gradients of equal work: the same
    one, two = (Optimised("policy", network, CONFIG) for network in (plain, sharded))
    for step in range(3):
        expected, found = take_step(plain, one, step), take_step(sharded, two, step)
        torch.testing.assert_close(found, expected)
    whole = {name: p.full_tensor() for name, p in sharded.named_parameters() if isinstance(p, DTensor)}
    assert len(whole) == 4
    for name, p in plain.named_parameters():
        torch.testing.assert_close(whole[name], p.detach())
    assert take_step(sharded, two, 3, scale=torch.inf if rank == 1 else 1.0) is None
    assert (two.num_updates, two.num_skipped) == (3, 1)
    for name, p in sharded.named_parameters():
        assert isinstance(p, DTensor) and p.grad is None
        assert torch.equal(p.full_tensor(), whole[name]), name
    assert take_step(sharded, two, 4) is not None
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_shards_step_like_the_whole_and_an_overflow_on_one_rank_is_skipped_on_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    run_two_ranks(_train_on_two_ranks)


class FusedUpdates(TorchDispatchMode):
    """How many parameters each call of the fused kernel updates."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "fused_adamw" in func.name():
            self.sizes.append(len(args[0]))
        return func(*args, **(kwargs or {}))


def test_all_parameters_are_updated_in_one_fused_pass() -> None:
    network = make_network()
    optimised = Optimised("policy", network, CONFIG)
    with FusedUpdates() as fused:
        take_step(network, optimised, 0)
    assert fused.sizes == [4]


def test_gradients_that_stay_infinite_end_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    optimised = Optimised("critic", nn.Linear(1, 1), CONFIG)

    def command(_: object) -> int:
        for _ in range(MAX_SKIPPED_IN_A_ROW):
            for parameter in optimised.network.parameters():
                parameter.grad = torch.full_like(parameter, torch.nan)
            optimised.apply()
        return 0

    monkeypatch.setitem(run.COMMANDS, "inspect", command)
    assert run.main(["inspect", "a run"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith(
        "error: the gradients of the critic were not finite 5 times in a row"
    )


def test_a_step_is_adamw_of_the_paper_with_a_warm_up_of_the_rate() -> None:
    """One parameter by hand: decoupled weight decay, corrected moments (arXiv 1711.05101), rate 0.0025, then 0.01."""
    network = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        network.weight.fill_(2.0)
    optimised = Optimised("policy", network, OptimizerConfig(learning_rate=1e-2, warmup_steps=2, weight_decay=0.1))
    weight, first, second = 2.0, 0.0, 0.0
    for step, gradient in enumerate((0.5, -0.25), start=1):
        network.weight.grad = torch.full((1, 1), gradient)
        norm = optimised.apply(rate_factor=0.5 if step == 1 else 1.0)
        assert norm is not None and norm.item() == pytest.approx(abs(gradient))
        rate = 0.01 * min(1.0, step / 2) * (0.5 if step == 1 else 1.0)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        weight -= rate * 0.1 * weight
        weight -= rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)) ** 0.5 + 1e-8)
        assert network.weight.item() == pytest.approx(weight, rel=1e-6)

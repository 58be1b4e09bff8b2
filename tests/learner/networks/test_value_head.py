"""The critic's head computes in float32 under bfloat16 mixed precision, on one rank and on two."""

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Qwen2ForSequenceClassification

from common.config import Config, Device, DType, ModelConfig
from learner.algorithm.packing import prediction_positions
from learner.networks.model import load_critic
from learner.networks.parallel import make_mesh, process_group
from tests.support.ranks import run_two_ranks
from tests.support.tiny_models import packed, tiny_config, tiny_run, write_tiny_model

CPU = torch.device("cpu")
SHARES = [packed([9, 4, 17], seed=1), packed([5, 12], seed=2)]


def make_run(folder: Path) -> Config:
    """A bfloat16 run whose critic starts from a value model with a float32 head."""
    path = write_tiny_model(folder / "policy")
    settings = tiny_config()
    settings.num_labels, settings.pad_token_id = 1, 0
    Qwen2ForSequenceClassification(settings).save_pretrained(folder / "value")
    model = ModelConfig(path=path, critic_path=str(folder / "value"), dtype=DType.bfloat16)
    return replace(tiny_run(path), model=model)


def check(config: Config, rank: int) -> None:
    """Values and the head's gradient, from the backbone's hidden states and the stored head."""
    critic = load_critic(config, CPU, make_mesh(config))
    hidden: list[Tensor] = []
    critic.backbone.register_forward_hook(lambda _, __, output: hidden.append(output.last_hidden_state[0].detach()))
    share = SHARES[rank]
    values_T = critic(*share)
    values_T.sum().backward()
    chosen_TD = hidden[0][prediction_positions(share.cu_seqlens_B1, share.prompt_lengths_B)]
    assert chosen_TD.dtype is torch.bfloat16
    weight = critic.head.weight.full_tensor().detach()  # type: ignore[attr-defined]
    assert not torch.equal(weight, weight.bfloat16().float())
    torch.testing.assert_close(values_T.detach(), chosen_TD.float() @ weight[0], rtol=0, atol=1e-6)
    total = chosen_TD.float().sum(0)
    dist.all_reduce(total)
    assert critic.head.weight.grad is not None
    found = critic.head.weight.grad.full_tensor()[0]  # type: ignore[attr-defined]
    torch.testing.assert_close(found, total, rtol=1e-5, atol=1e-5)


def set_rendezvous(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


def test_the_head_is_float32_on_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_rendezvous(monkeypatch)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    config = make_run(tmp_path)
    with process_group(Device.cpu, timeout_s=60):
        check(config, 0)


def _one_of_two(rank: int, config: Config) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    with process_group(Device.cpu, timeout_s=60):
        check(config, rank)
        dist.barrier()


@pytest.mark.slow
def test_the_head_is_float32_on_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_rendezvous(monkeypatch)
    run_two_ranks(_one_of_two, make_run(tmp_path))

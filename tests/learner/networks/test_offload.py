"""What rests in host memory changes no number: AdamW's moments, or everything (FSDP's own way), on a CPU mesh."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor

from common.config import Config, Device, DType, Offload, ValueTarget
from learner.algorithm.offload import HostAdamW
from learner.algorithm.trainer import Trainer
from learner.checkpoint import Checkpointer
from learner.networks import sharding
from learner.networks.model import load_critic, load_policy
from learner.networks.parallel import make_mesh, process_group
from tests.learner.algorithm.test_trainer_split import BATCHES, VERSION, make_batch, make_config
from tests.support.other_device import There, other_device
from tests.support.tiny_models import write_tiny_model

CPU = torch.device("cpu")
BATCH = make_batch(*BATCHES["mixed"])


def alone_in_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)


def trainer_with(config: Config, offload: Offload) -> Trainer:
    config = replace(config, learner=replace(config.learner, offload=offload))
    mesh = make_mesh(config)
    assert mesh is not None
    policy, critic = load_policy(config, CPU, mesh), load_critic(config, CPU, mesh)
    return Trainer(config, policy, critic, 0, 1)


def tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Parameters and moments of both networks."""
    found: dict[str, Tensor] = {}
    for optimised in (trainer.policy, trainer.critic):
        assert optimised is not None
        for name, p in optimised.network.named_parameters():
            state = optimised.optimizer.state[p]
            entries = {"": p, **{key: state[key] for key in ("step", "exp_avg", "exp_avg_sq")}}
            for key, x in entries.items():
                whole = x.full_tensor() if isinstance(x, DTensor) else x
                found[f"{optimised.name}.{name} {key}"] = whole.detach().clone()
    return found


def test_every_way_of_offloading_trains_to_the_same_bits_and_resumes_from_the_others_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone_in_a_group(monkeypatch)
    config = make_config(write_tiny_model(tmp_path / "base"), 40, ValueTarget.gae)
    algorithm = replace(config.algorithm, kl_weight=0.0)
    config = replace(config, algorithm=algorithm, model=replace(config.model, dtype=DType.bfloat16))
    results = []
    with process_group(Device.cpu, timeout_s=60):
        for before, after in zip(Offload, (Offload.optimizer, Offload.all, Offload.none), strict=True):
            trainer = trainer_with(config, before)
            assert isinstance(trainer.policy.optimizer, HostAdamW) is (before is Offload.optimizer)
            trainer.step(BATCH, VERSION, is_warmup=True)
            trainer.step(BATCH, VERSION, is_warmup=False)
            folder = tmp_path / before
            Checkpointer(folder, keep=1).save(2, 1, trainer)
            trainer = trainer_with(config, after)
            Checkpointer(folder, keep=1).load(2, trainer)
            trainer.step(BATCH, VERSION, is_warmup=False)
            results.append(tensors(trainer))
    for found in results[1:]:
        assert found.keys() == results[0].keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in results[0].items())


def test_all_offloads_every_group_of_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policies: list[object] = []
    monkeypatch.setattr(
        "learner.networks.sharding.fully_shard", lambda *_, offload_policy, **__: policies.append(offload_policy)
    )

    config = make_config(write_tiny_model(tmp_path), 40, ValueTarget.gae)
    policy = load_policy(config, CPU, None)
    config = replace(config, learner=replace(config.learner, offload=Offload.all))
    sharding._shard(policy, policy.model, (), config, None)  # type: ignore[arg-type]
    assert len(policies) == 2 + 2 + 1  # layers, embedding and output layer, the rest
    assert all(isinstance(p, CPUOffloadPolicy) for p in policies)


def test_only_the_moments_rest_on_the_host_and_the_update_is_adamws() -> None:
    """On a device of its own, with a stand-in for it."""
    weights, gradients = torch.randn(2, 3, 4, 5).unbind()
    plain, expected = nn.Parameter(weights[0].clone()), []
    optimizer = torch.optim.AdamW([plain], lr=0.1, weight_decay=0.1, fused=True)
    for gradient in gradients:
        plain.grad = gradient.clone()
        optimizer.step()
        expected.append(plain.detach().clone())
    with other_device() as device:
        there = nn.Parameter(weights[0].to(device))
        streamed = HostAdamW([there], lr=0.1, weight_decay=0.1, fused=True)
        for gradient, after in zip(gradients, expected, strict=True):
            there.grad = gradient.to(device)
            streamed.step()
            assert isinstance(there.grad, There) and torch.equal(there.detach().to(CPU), after)
            moments = {name: x for name, x in streamed.state[there].items() if x.dim() > 0}
            assert moments.keys() == {"exp_avg", "exp_avg_sq"}
            assert not any(isinstance(x, There) for x in moments.values())
        for name, x in optimizer.state[plain].items():
            assert torch.equal(streamed.state[there][name].to(CPU), x), name


def test_embedding_and_output_layer_are_gathered_while_they_compute_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone_in_a_group(monkeypatch)
    for is_tied in (False, True):
        config = make_config(write_tiny_model(tmp_path / str(is_tied), is_tied=is_tied), 40, ValueTarget.gae)
        config = replace(config, model=replace(config.model, dtype=DType.bfloat16))
        with process_group(Device.cpu, timeout_s=60):
            policy = load_policy(config, CPU, make_mesh(config))
            embedding, head = policy.model.get_input_embeddings(), policy.model.get_output_embeddings()
            assert isinstance(embedding, FSDPModule) is isinstance(head, FSDPModule) is (not is_tied)
            seen: list[tuple[bool, bool]] = []

            def look(*_: object, seen: list[tuple[bool, bool]] = seen, modules: tuple = (embedding, head)) -> None:
                seen.append(tuple(isinstance(m.weight, DTensor) for m in modules))  # sharded, as it rests

            for layer in policy.model.model.layers:
                layer.register_forward_hook(look)
                layer.register_full_backward_hook(look)
            policy(BATCH.token_ids_S, BATCH.cu_seqlens_B1, BATCH.prompt_lengths_B, 1.0)[0].sum().backward()
            assert len(seen) == 4
            assert set(seen) == {(not is_tied, not is_tied)}

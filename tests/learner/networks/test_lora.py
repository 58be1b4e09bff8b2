"""LoRA: adapters on frozen models, for the policy and the critic, on two backbones or on one."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from common.config import AlgorithmConfig, Config, ConfigError, CriticNetwork, Device, DType, LoraConfig, Offload
from common.launcher import rank_environment, reserve_port
from learner.networks.model import Critic, Networks, Policy, load_critic, load_networks, load_policy
from learner.networks.parallel import make_mesh, process_group
from learner.publication.buckets import HeldWeights
from tests.support.ranks import run_two_ranks
from tests.support.tiny_models import (
    VOCAB,
    naive_logprobs,
    packed,
    pick,
    tiny_run,
    write_tiny_mixture,
    write_tiny_model,
)

CPU = torch.device("cpu")
LENGTHS = [9, 4, 17, 9, 3, 30, 16]
INPUTS = packed(LENGTHS)
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def lora_run(path: str, is_shared: bool = False, **learner: object) -> Config:
    config = tiny_run(path, **learner)
    critic = CriticNetwork.shared_backbone if is_shared else CriticNetwork.separate
    return replace(config, lora=LoraConfig(rank=4, alpha=6.0), model=replace(config.model, critic=critic))


def networks_of(config: Config) -> tuple[Policy, Critic]:
    networks = load_networks(config, CPU, None)
    assert networks.critic is not None
    return networks.policy, networks.critic


@torch.no_grad()
def perturb(network: nn.Module, seed: int = 1) -> None:
    """As if it had been trained; without, B = 0 and an adapter does nothing."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def merged_by_peft(policy: Policy, path: str) -> PreTrainedModel:
    """The base model with the policy's adapter, put together by PEFT alone."""
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    targets = [name for name, module in model.named_modules() if type(module) is nn.Linear and name != "lm_head"]
    adapted = get_peft_model(model, PeftConfig(r=4, lora_alpha=6.0, target_modules=targets, task_type="CAUSAL_LM"))
    own = {name.removeprefix("model.").replace(".policy.", ".default."): p for name, p in policy.named_parameters()}
    theirs = {n.removeprefix("base_model.model."): p for n, p in adapted.named_parameters() if ".lora_" in n}
    assert own.keys() == theirs.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(own[name])
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged


@pytest.mark.parametrize("is_tied", [False, True])
def test_published_weights_are_those_that_peft_merges(tmp_path: Path, is_tied: bool) -> None:
    path = write_tiny_model(tmp_path, is_tied=is_tied)
    policy = load_policy(lora_run(path), CPU, None)
    perturb(policy)
    merged = merged_by_peft(policy, path)
    published = dict(policy.named_hf_parameters())
    assert list(published) == [name for name, _ in merged.named_parameters()]
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(published[name], parameter.detach(), rtol=0, atol=1e-6)
    logprobs, _ = policy(*INPUTS, 1.0)
    torch.testing.assert_close(logprobs, naive_logprobs(merged, INPUTS, 1.0)[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("is_mixture", [False, True], ids=["dense", "mixture"])
def test_the_names_shapes_and_types_that_are_announced_are_those_of_the_model_without_adapters(
    tmp_path: Path, is_mixture: bool
) -> None:
    """A mixture of experts trains adapters of its attention; experts, one tensor a layer, stay as they are."""
    path = (write_tiny_mixture if is_mixture else write_tiny_model)(tmp_path)
    policy, plain = load_policy(lora_run(path), CPU, None), load_policy(tiny_run(path), CPU, None)
    perturb(policy)
    assert policy.hf_specs(torch.bfloat16) == plain.hf_specs(torch.bfloat16)
    published = dict(policy.named_hf_parameters(torch.bfloat16))
    for spec in policy.hf_specs(torch.bfloat16):
        assert (spec.dtype, spec.shape) == (published[spec.name].dtype, tuple(published[spec.name].shape))
    changed = {
        name.split(".")[-2]
        for name, tensor in plain.named_hf_parameters(torch.bfloat16)
        if not torch.equal(tensor, published[name])
    }
    assert changed == ({"q_proj", "k_proj", "v_proj", "o_proj"} if is_mixture else LINEAR)


@pytest.mark.parametrize("is_shared", [False, True])
def test_gradients_reach_the_networks_own_adapter_and_nothing_else(tmp_path: Path, is_shared: bool) -> None:
    policy, critic = networks_of(lora_run(write_tiny_model(tmp_path), is_shared))
    perturb(policy)
    perturb(critic)

    def trained() -> set[int]:
        """Which parameters of all have a gradient."""
        everything = [*policy.root.parameters(), *critic.root.parameters()]
        found = {id(p) for p in everything if p.grad is not None and p.grad.abs().sum() > 0}
        for p in everything:
            p.grad = None
        return found

    logprobs, entropy = policy(*INPUTS, 1.0, with_entropy=True)
    (logprobs.sum() + entropy.sum()).backward()
    assert trained() == {id(p) for p in policy.parameters()}
    critic(*INPUTS).square().sum().backward()
    assert trained() == {id(p) for p in critic.parameters()}
    assert all(".lora_" in name for name, _ in policy.named_parameters())
    assert [name for name, _ in critic.named_parameters() if ".lora_" not in name] == ["head.weight"]


def test_on_one_backbone_neither_network_sees_what_the_other_learns(tmp_path: Path) -> None:
    policy, critic = networks_of(lora_run(write_tiny_model(tmp_path), is_shared=True))
    with torch.no_grad():
        logprobs, values = policy(*INPUTS, 1.0)[0], critic(*INPUTS)
        perturb(critic)
        assert torch.equal(policy(*INPUTS, 1.0)[0], logprobs)
        moved = critic(*INPUTS)
        assert not torch.equal(moved, values)
        perturb(policy)
        assert torch.equal(critic(*INPUTS), moved)
        assert not torch.equal(policy(*INPUTS, 1.0)[0], logprobs)


def test_networks_on_one_backbone_compute_what_they_compute_on_two(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path)
    both = [networks_of(lora_run(path, is_shared)) for is_shared in (False, True)]
    for networks in both:
        for network in networks:
            perturb(network)
            for name, parameter in network.named_parameters():
                if ".lora_A" in name:  # its initial values are random
                    nn.init.constant_(parameter, 0.03)
    (policy, critic), (other_policy, other_critic) = both
    assert torch.equal(policy(*INPUTS, 1.0)[0], other_policy(*INPUTS, 1.0)[0])
    assert torch.equal(critic(*INPUTS), other_critic(*INPUTS))
    assert policy.model.base_model is not critic.backbone and other_policy.model.base_model is other_critic.backbone


def test_the_reference_is_the_base_model_whatever_the_adapter_learned(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path)
    networks = load_networks(replace(lora_run(path), algorithm=AlgorithmConfig(kl_weight=0.1)), CPU, None)
    assert networks.reference is not None and networks.reference.model is networks.policy.model
    perturb(networks.policy)
    expected = load_policy(tiny_run(path), CPU, None)(*INPUTS, 1.0)[0]
    assert torch.equal(networks.reference(*INPUTS, 1.0)[0], expected)
    assert not torch.equal(networks.policy(*INPUTS, 1.0)[0], expected)


def test_held_weights_copy_adapters_only_and_stay_what_they_were(tmp_path: Path) -> None:
    policy = load_policy(lora_run(write_tiny_model(tmp_path)), CPU, None)
    perturb(policy)
    published = dict(policy.named_hf_parameters(torch.bfloat16))
    held = HeldWeights(policy, torch.bfloat16)
    assert sum(map(Tensor.numel, held._held.values())) == sum(p.numel() for p in policy.parameters())
    perturb(policy, seed=2)
    found = dict(held)
    assert found.keys() == published.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in published.items())
    now = dict(policy.named_hf_parameters(torch.bfloat16))
    assert any(not torch.equal(found[name], tensor) for name, tensor in now.items())


def test_only_the_named_layers_are_adapted(tmp_path: Path) -> None:
    config = replace(
        lora_run(write_tiny_model(tmp_path)), lora=LoraConfig(rank=2, target_modules=["v_proj", "0.mlp.up_proj"])
    )
    names = {name.partition(".lora_")[0] for name, _ in load_policy(config, CPU, None).named_parameters()}
    prefix = "model.model.layers"
    assert names == {f"{prefix}.{i}.self_attn.v_proj" for i in (0, 1)} | {f"{prefix}.0.mlp.up_proj"}


@pytest.mark.parametrize("name", ["qkv_proj", "lm_head", "embed_tokens", "proj"])
def test_names_that_are_no_linear_layer_of_the_decoder_are_refused(tmp_path: Path, name: str) -> None:
    config = replace(lora_run(write_tiny_model(tmp_path)), lora=LoraConfig(rank=2, target_modules=["q_proj", name]))
    with pytest.raises(ConfigError, match=rf"called {name}: choose among down_proj, gate_proj, k_proj"):
        load_policy(config, CPU, None)


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": VOCAB, "bos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=1)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="GPT2LMHeadModel has no linear layers to adapt"):
        load_policy(replace(lora_run(str(tmp_path)), lora=LoraConfig(rank=2)), CPU, None)


def _steps(networks: Networks, share: object) -> dict[str, Tensor]:
    """The trained parameters and the published weights after three SGD steps of each network on `share`."""
    policy, critic, reference = networks.policy, networks.critic, networks.reference
    assert critic is not None and reference is not None
    for _ in range(3):
        with torch.no_grad():
            start = reference(*share, 0.9)[0]
            policy(*share, 0.9)
        critic(*share).sub(1).square().sum().mul(0.01).backward()
        torch.optim.SGD(critic.parameters(), lr=0.5).step()
        critic.zero_grad()
        logprobs, entropy = policy(*share, 0.9, with_entropy=True)
        ((start - logprobs).square().sum() + logprobs.sum() + 0.1 * entropy.sum()).mul(0.01).backward()
        torch.optim.SGD(policy.parameters(), lr=0.5).step()
        policy.zero_grad()
    state = {f"policy.{name}": tensor.clone() for name, tensor in policy.named_hf_parameters()}
    state |= {f"held.{name}": tensor for name, tensor in HeldWeights(policy, torch.float32)}
    state |= {f"critic.{name}": tensor.clone() for name, tensor in critic.named_hf_parameters()}
    for name, p in (*policy.named_parameters(), *critic.named_parameters()):
        state[f"trained.{name}"] = p.full_tensor() if isinstance(p, DTensor) else p.detach()
    return state


def _compare_with_one_rank(rank: int, config: Config, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= rank_environment(rank, 2, port)
    torch.manual_seed(3)
    expected = _steps(load_networks(config, CPU, None), INPUTS)
    with process_group(Device.cpu, timeout_s=60):
        for shares in ([[0, 3, 5, 6], [1, 2, 4]], [[], list(range(7))]):
            torch.manual_seed(3 if rank == 0 else 4)  # the other ranks take rank 0's initial adapters
            networks = load_networks(config, CPU, make_mesh(config))
            assert all(isinstance(p, DTensor) for p in networks.policy.root.parameters())
            found = _steps(networks, pick(INPUTS, shares[rank]))
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                scale = max(1.0, float(tensor.abs().max()))  # an entry near 0 is as exact as the largest of its sums
                assert torch.allclose(found[name], tensor, rtol=1e-4, atol=2e-6 * scale), (
                    name,
                    scale,
                    (found[name] - tensor).abs().max(),
                )


@pytest.mark.slow
@pytest.mark.parametrize("is_shared", [False, True])
def test_two_ranks_equal_one_rank_also_with_nothing_to_do(tmp_path: Path, is_shared: bool) -> None:
    rests = Offload.all if is_shared else Offload.none
    path, every = write_tiny_model(tmp_path), int(is_shared)
    config = lora_run(path, is_shared, ranks=2, activation_checkpointing=every, offload=rests, share_prefixes=is_shared)
    config = replace(config, algorithm=AlgorithmConfig(kl_weight=0.1))
    with reserve_port() as port:
        run_two_ranks(_compare_with_one_rank, config, port)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_in_bfloat16_the_frozen_model_is_stored_so_and_adapters_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_sharded: bool
) -> None:
    config = lora_run(write_tiny_model(tmp_path), is_shared=True)
    plain, _ = networks_of(config)
    low = replace(config, model=replace(config.model, dtype=DType.bfloat16))
    with reserve_port() as port:
        for name, value in rank_environment(0, 1, port).items():
            monkeypatch.setenv(name, value)
        with process_group(Device.cpu, timeout_s=60):
            mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("shard",)) if is_sharded else make_mesh(low)
            assert is_sharded or mesh is None  # nothing that one process would gain by it
            networks = load_networks(low, CPU, mesh)
            policy, critic = networks.policy, networks.critic
            assert critic is not None
            frozen = [p for p in policy.root.parameters() if not p.requires_grad]
            assert {p.dtype for p in frozen} == {torch.bfloat16}
            logprobs, _ = policy(*INPUTS, 1.0)
            (logprobs.sum() + critic(*INPUTS).sum()).backward()
            assert (logprobs - plain(*INPUTS, 1.0)[0]).abs().max() < 0.5
            for network in (policy, critic):
                trained = list(network.parameters())
                assert {p.dtype for p in trained} == {p.grad.dtype for p in trained} == {torch.float32}


def test_a_critic_of_its_own_keeps_the_head_that_it_came_with(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path)
    critic = load_critic(lora_run(path), CPU, None)
    assert critic(*INPUTS).abs().max() == 0
    perturb(critic)
    assert critic(*INPUTS).abs().max() > 0

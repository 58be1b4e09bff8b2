"""Steps of the trainer on networks that train adapters, and what of them a checkpoint holds."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from common.config import Config, CriticNetwork, LoraConfig, ValueTarget
from learner.algorithm.trainer import Trainer
from learner.checkpoint import Checkpointer, step_folder
from learner.networks.model import load_networks
from tests.learner.algorithm.test_trainer_split import BATCHES, CPU, VERSION, make_batch, make_config
from tests.support.tiny_models import write_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

BATCH = make_batch(*BATCHES["mixed"])


def lora_run(path: str, critic: CriticNetwork) -> Config:
    """With every part of the loss, the term towards the reference included."""
    config = make_config(path, 64, ValueTarget.gae)
    return replace(config, lora=LoraConfig(rank=4), model=replace(config.model, critic=critic))


def make_trainer(config: Config) -> Trainer:
    """With the same initial adapters every time, wherever they are."""
    networks = load_networks(config, CPU, None)
    assert networks.critic is not None
    for network in (networks.policy, networks.critic):
        generator = torch.Generator().manual_seed(0)
        for name, parameter in network.named_parameters():
            if ".lora_A." in name:
                nn.init.normal_(parameter, std=0.1, generator=generator)
    return Trainer(config, networks.policy, networks.critic, 0, 1, reference=networks.reference)


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def is_unchanged(network: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(parameter, before[name]) for name, parameter in network.named_parameters())


@pytest.mark.parametrize("critic", list(CriticNetwork))
def test_value_pretraining_trains_the_critics_adapter_and_head_only(tmp_path: Path, critic: CriticNetwork) -> None:
    trainer = make_trainer(lora_run(write_tiny_model(tmp_path), critic))
    assert trainer.critic is not None
    policy, value = trainer.policy.network, trainer.critic.network
    roots = {id(network.root): network.root for network in (policy, value)}
    assert len(roots) == (1 if critic is CriticNetwork.shared_backbone else 2)
    everything = {i: {n: p.detach().clone() for n, p in root.named_parameters()} for i, root in roots.items()}
    before = weights(policy), weights(value)
    trainer.step(BATCH, VERSION, is_warmup=True)
    assert is_unchanged(policy, before[0]) and not is_unchanged(value, before[1])
    trainer.step(BATCH, VERSION, is_warmup=False)
    assert not is_unchanged(policy, before[0])
    for i, root in roots.items():
        moved = {name for name, p in root.named_parameters() if not torch.equal(p, everything[i][name])}
        assert moved and all(".lora_" in name or name == "heads.0.weight" for name in moved)


def test_a_step_on_one_backbone_is_a_step_on_two(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path)
    trainers = [make_trainer(lora_run(path, critic)) for critic in CriticNetwork]
    for is_warmup in (True, False, False):
        one, two = (trainer.step(BATCH, VERSION, is_warmup) for trainer in trainers)
        same = {name for name in one if not name.startswith(("time/", "throughput/", "memory/"))}
        assert {name: one[name] for name in same} == {name: two[name] for name in same}


def test_a_checkpoint_holds_adapters_only_and_a_run_goes_on_from_it(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model")
    config = lora_run(path, CriticNetwork.shared_backbone)
    trainer = make_trainer(config)
    trainer.step(BATCH, VERSION, is_warmup=True)
    trainer.step(BATCH, VERSION, is_warmup=False)
    Checkpointer(tmp_path / "c", keep=1).save(2, 1, trainer)
    saved = dcp.FileSystemReader(step_folder(tmp_path / "c", 2)).read_metadata().state_dict_metadata
    assert {name for name in saved if ".lora_" not in name} == {
        "rng_state",
        "critic/parameters/head.weight",
        *(f"critic/optimizer/head.weight/{entry}" for entry in ("step", "exp_avg", "exp_avg_sq")),
    }
    trainer.step(BATCH, VERSION, is_warmup=False)

    torch.manual_seed(99)  # other adapters to begin with
    networks = load_networks(config, CPU, None)
    again = Trainer(config, networks.policy, networks.critic, 0, 1, reference=networks.reference)
    Checkpointer(tmp_path / "c", keep=1).load(2, again)
    again.step(BATCH, VERSION, is_warmup=False)
    assert trainer.critic is not None and again.critic is not None
    assert is_unchanged(again.policy.network, weights(trainer.policy.network))
    assert is_unchanged(again.critic.network, weights(trainer.critic.network))

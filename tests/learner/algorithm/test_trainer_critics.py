"""Steps of the trainer on critics that are not one network of which all is trained, and what a checkpoint holds."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from common.config import Config, CriticFrozen, ValueTarget
from learner.algorithm.trainer import Trainer
from learner.checkpoint import Checkpointer, step_folder
from learner.networks.model import load_networks
from tests.learner.algorithm.test_trainer_lora import is_unchanged, weights
from tests.learner.algorithm.test_trainer_split import BATCHES, CPU, VERSION, make_batch, make_config
from tests.support.tiny_models import write_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

BATCH = make_batch(*BATCHES["mixed"])
STEPS = (True, False, False)  # is_warmup


def make_run(path: str, **model: object) -> Config:
    """With every part of the loss."""
    config = make_config(path, 64, ValueTarget.gae)
    return replace(config, model=replace(config.model, **model))  # type: ignore[arg-type]


def make_trainer(config: Config) -> Trainer:
    networks = load_networks(config, CPU, None)
    return Trainer(config, networks.policy, networks.critic, 0, 1, reference=networks.reference)


def critic_of(trainer: Trainer) -> nn.Module:
    assert trainer.critic is not None
    return trainer.critic.network


def saved_names(folder: Path, step: int) -> set[str]:
    """Of the critic's tensors in a checkpoint."""
    saved = dcp.FileSystemReader(step_folder(folder, step)).read_metadata().state_dict_metadata
    return {name for name in saved if name.startswith("critic/")}


def test_frozen_attention_is_what_a_critic_without_gradients_there_would_do(tmp_path: Path) -> None:
    """In value pretraining and after it, to the last bit; the clipped norm is that of the trained weights."""
    path = write_tiny_model(tmp_path)
    frozen, reference = make_trainer(make_run(path, critic_frozen=CriticFrozen.attention)), make_trainer(make_run(path))
    attention = {name: p for name, p in critic_of(reference).named_parameters() if ".self_attn." in name}

    def forget(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in attention.values():
        parameter.register_post_accumulate_grad_hook(forget)
    before = weights(critic_of(frozen))
    for is_warmup in STEPS:
        one, two = (trainer.step(BATCH, VERSION, is_warmup) for trainer in (frozen, reference))
        same = {name for name in one if not name.startswith(("time/", "throughput/", "memory/"))}
        assert {name: one[name] for name in same} == {name: two[name] for name in same}
    assert is_unchanged(critic_of(reference), weights(critic_of(frozen)))
    for name, parameter in critic_of(frozen).named_parameters():
        assert parameter.equal(before[name]) is (name in attention), name


def test_a_checkpoint_holds_frozen_weights_without_moments_and_a_run_goes_on_from_it(tmp_path: Path) -> None:
    config = make_run(write_tiny_model(tmp_path / "model"), critic_frozen=CriticFrozen.attention)
    trainer = make_trainer(config)
    for is_warmup in STEPS[:2]:
        trainer.step(BATCH, VERSION, is_warmup)
    Checkpointer(tmp_path / "c", keep=1).save(2, 1, trainer)
    names = weights(critic_of(trainer)).keys()
    assert saved_names(tmp_path / "c", 2) == {f"critic/parameters/{name}" for name in names} | {
        f"critic/optimizer/{name}/{entry}"
        for name in names
        if ".self_attn." not in name
        for entry in ("step", "exp_avg", "exp_avg_sq")
    }
    again = make_trainer(config)
    for parameter in critic_of(again).parameters():  # as where model.path has other weights by then
        nn.init.zeros_(parameter)
    Checkpointer(tmp_path / "c", keep=1).load(2, again)
    for each in (trainer, again):
        each.step(BATCH, VERSION, is_warmup=False)
    assert is_unchanged(critic_of(again), weights(critic_of(trainer)))
    assert is_unchanged(again.policy.network, weights(trainer.policy.network))


def test_a_run_with_two_critics_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    config = make_run(write_tiny_model(tmp_path / "model"), num_critics=2)
    config = replace(config, algorithm=replace(config.algorithm, agreement_mask=0.3, value_clip=None))
    trainer = make_trainer(config)
    for is_warmup in STEPS[:2]:
        trainer.step(BATCH, VERSION, is_warmup)
    Checkpointer(tmp_path / "c", keep=1).save(2, 1, trainer)
    numbers = {name.split("/")[2].partition(".")[0] for name in saved_names(tmp_path / "c", 2)}
    assert numbers == {"0", "1"}
    again = make_trainer(config)
    Checkpointer(tmp_path / "c", keep=1).load(2, again)
    for each in (trainer, again):
        each.step(BATCH, VERSION, is_warmup=False)
    assert is_unchanged(critic_of(again), weights(critic_of(trainer)))
    assert is_unchanged(again.policy.network, weights(trainer.policy.network))

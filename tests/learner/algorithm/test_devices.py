"""A step on another device than the CPU, where the batch is: nothing mixes the two, and the numbers are the same."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch

from common.config import AdvantageEstimator, Correction, OverAge, ValueTarget
from learner.algorithm.trainer import Trainer
from tests.learner.algorithm.test_trainer import (
    EVERYTHING,
    LENGTHS,
    TableCritic,
    TablePolicy,
    config,
    make_batch,
    uneven_rewards,
)
from tests.support.other_device import other_device

CPU = torch.device("cpu")
CRITICS_ALONE = {"value_clip": None, "critic_updates_per_step": 1}


def metrics_on(device: torch.device, steps: tuple[bool, ...], **settings: object) -> list[dict[str, float]]:
    """Of steps that are warm-up or not, with networks on `device`, without what differs from run to run."""
    cfg = config(**settings)  # type: ignore[arg-type]
    has_critic = cfg.algorithm.advantage is AdvantageEstimator.gae
    networks = [TablePolicy(), TablePolicy(seed=9), TableCritic()]
    for network in networks:
        network.table = torch.nn.Parameter(network.table.detach().to(device))
        network.register_forward_pre_hook(lambda _, inputs: tuple(_moved(x, device) for x in inputs))
    policy, reference, critic = networks
    trainer = Trainer(
        cfg,
        policy,
        critic if has_critic else None,
        rank=0,
        world=1,
        reference=reference if cfg.algorithm.kl_weight > 0 else None,
    )
    trainer.device = device
    batch = uneven_rewards(make_batch(LENGTHS))
    found = [trainer.step(replace(batch), 1, is_warmup) for is_warmup in steps]
    return [
        {name: value for name, value in metrics.items() if not name.startswith(("time/", "throughput/", "memory/"))}
        for metrics in found
    ]


def _moved(x: object, device: torch.device) -> object:
    """As the networks move their inputs, which are the batch's."""
    return x.to(device) if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize(
    "settings",
    [
        EVERYTHING | {"correction": Correction.icepop, "gamma": 0.99, "critic_lambda": 0.9},
        EVERYTHING | {"value_target": ValueTarget.vtrace, "value_gate": True, "length_adaptive_alpha": None},
        EVERYTHING | CRITICS_ALONE | {"advantage": AdvantageEstimator.grpo, "correction": Correction.behavior},
        EVERYTHING | CRITICS_ALONE | {"advantage": AdvantageEstimator.rloo},
        {"over_age": OverAge.mask, "max_staleness": 0, "whiten_advantages": True},
    ],
)
def test_a_step_on_another_device_than_the_batch_is_the_same_step(
    settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch's list of devices with a fused AdamW knows no stand-in
    monkeypatch.setattr(import_module("torch.optim.adam"), "_device_dtype_check_for_fused", lambda *_: None)
    steps = (False, False) if settings.get("advantage") else (True, False, False)
    expected = metrics_on(CPU, steps, **settings)
    with other_device() as device:
        found = metrics_on(device, steps, **settings)
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-9)

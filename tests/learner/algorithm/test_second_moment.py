"""algorithm.correction=m2: the most extreme tokens leave the policy loss until the second moment is small enough."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from common.config import AlgorithmConfig, Correction
from learner.algorithm.losses import policy_loss, second_moment
from learner.algorithm.objective import trust_region
from tests.learner.algorithm.test_trainer import (
    LENGTHS,
    TablePolicy,
    config,
    make_batch,
    make_trainer,
    on_policy,
    parameters,
    uneven_rewards,
)


def masked_by_algorithm_1(log_ratios: list[float], advantages: list[float], threshold: float) -> list[bool]:
    """M2PO's Algorithm 1 as it is written: whether each token stays."""
    stays = [True] * len(log_ratios)
    trust_region = [i for i, (x, a) in enumerate(zip(log_ratios, advantages, strict=True)) if x * a > 0]
    while trust_region and sum(log_ratios[i] ** 2 for i in trust_region) / len(trust_region) > threshold:
        worst = max(trust_region, key=lambda i: log_ratios[i] ** 2)
        stays[worst] = False
        trust_region.remove(worst)
    return stays


def tokens(seed: int, spread: float, n: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    """(log-ratios, some of them 0; advantages, some of them 0; mask)."""
    generator = torch.Generator().manual_seed(seed)
    log_ratio_T, advantages_T = spread * torch.randn(n, generator=generator), torch.randn(n, generator=generator)
    mask_T = torch.rand(n, generator=generator) < 0.8
    log_ratio_T[::17], advantages_T[::13] = 0.0, 0.0
    return log_ratio_T, advantages_T, mask_T


@pytest.mark.parametrize("threshold", [1e-9, 0.01, 0.04, 0.5, 100.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_is_that_of_equation_5_under_the_mask_of_algorithm_1(seed: int, threshold: float) -> None:
    log_ratio_T, advantages_T, mask_T = tokens(seed, spread=0.1 + 0.3 * seed)
    moment = second_moment(log_ratio_T, advantages_T, mask_T, threshold)
    region = trust_region(AlgorithmConfig(correction=Correction.m2), moment.edge)
    logprobs_T, ones_T = log_ratio_T.clone().requires_grad_(), torch.ones_like(log_ratio_T)
    zeros_T = torch.zeros_like(log_ratio_T)  # pi_behavior
    policy_loss(
        logprobs_T, zeros_T, advantages_T, ones_T, mask_T.float(), clip_low=region.low, clip_high=region.high
    ).backward()

    places = mask_T.nonzero().squeeze(1).tolist()
    stays_T = torch.zeros_like(mask_T)
    picked = ([log_ratio_T[i].item() for i in places], [advantages_T[i].item() for i in places])
    stays_T[places] = torch.tensor(masked_by_algorithm_1(*picked, threshold))
    assert logprobs_T.grad is not None
    torch.testing.assert_close(logprobs_T.grad, torch.where(stays_T, -log_ratio_T.exp() * advantages_T, 0.0))
    pushed_T = mask_T & (log_ratio_T * advantages_T > 0)
    before, after = (log_ratio_T[chosen_T].double().square() for chosen_T in (pushed_T, pushed_T & stays_T))
    assert moment.before == pytest.approx(before.mean().item())
    assert moment.after == pytest.approx(after.mean().item() if after.numel() else 0.0)
    assert moment.after <= threshold or moment.before == moment.after <= threshold


def moment_of(log_ratios: list[float], advantages: list[float], threshold: float) -> tuple[float, float, float]:
    inputs = torch.tensor(log_ratios), torch.tensor(advantages), torch.ones(len(log_ratios), dtype=torch.bool)
    moment = second_moment(*inputs, threshold)
    return moment.before, moment.after, moment.edge


def test_by_hand() -> None:
    """Squares 0.01, 0.04, 0.09, 0.64 of what is pushed: their means 0.01, 0.025, 0.0467 and 0.195."""
    log_ratios, advantages = [0.3, -0.1, 0.8, -0.2, 5.0, -4.0, 3.0], [1.0, -1.0, 2.0, -0.5, -1.0, 1.0, 0.0]
    assert moment_of(log_ratios, advantages, 0.04) == pytest.approx((0.195, 0.025, 0.25))
    assert moment_of(log_ratios, advantages, 0.05) == pytest.approx((0.195, 0.14 / 3, 0.55))
    assert moment_of(log_ratios, advantages, 0.2) == pytest.approx((0.195, 0.195, math.inf))
    assert moment_of(log_ratios, advantages, 0.005) == pytest.approx((0.195, 0.0, 0.05)), "all of them go"


def test_nothing_pushed_is_nothing_cut() -> None:
    assert moment_of([3.0, -3.0, 0.0], [-1.0, 1.0, 1.0], 0.04) == (0.0, 0.0, math.inf)
    assert moment_of([], [], 0.04) == (0.0, 0.0, math.inf)


def test_equal_squares_go_together() -> None:
    """Squares 0.01, 0.09, 0.09: 0.05 is the mean of the first two, but the third is not to be told from the second."""
    assert moment_of([0.1, 0.3, 0.3], [1.0, 1.0, 1.0], 0.055) == pytest.approx((0.19 / 3, 0.01, 0.2))


def test_the_decision_is_the_mini_batchs_whatever_its_micro_batches_and_follows_the_policy() -> None:
    """Two mini-batches, so that the second one is judged by the policy that the first one has changed."""
    batch = uneven_rewards(make_batch(LENGTHS))
    trainers = [
        make_trainer(
            config(correction=Correction.m2, m2_threshold=0.5, learning_rate=0.1, tokens_per_micro_batch=micro)
        )
        for micro in (1, 10_000)
    ]
    pieces, whole = (trainer.step(batch, 0, is_warmup=False) for trainer in trainers)
    for a, b in zip(*map(parameters, trainers), strict=True):
        torch.testing.assert_close(a, b)
    for name in ("policy/m2", "policy/m2_kept", "policy/clip_fraction_high", "policy/clip_fraction_low"):
        assert pieces[name] == pytest.approx(whole[name])
    assert whole["policy/m2_kept"] <= 0.5 < whole["policy/m2"]
    assert whole["policy/clip_fraction_high"] + whole["policy/clip_fraction_low"] > 0.0


def test_the_second_mini_batch_is_judged_by_the_policy_as_it_is_then() -> None:
    """On-policy tokens have no second moment until an update has moved the policy."""
    batch = uneven_rewards(on_policy(make_batch(LENGTHS), TablePolicy()))
    one, two = (
        make_trainer(config(correction=Correction.m2, learning_rate=0.1, mini_batches=n)).step(batch, 0, False)
        for n in (1, 2)
    )
    assert one["policy/m2"] == pytest.approx(0.0, abs=1e-9)
    assert two["policy/m2"] > 1e-3


def test_a_threshold_that_nothing_crosses_leaves_the_plain_ratio() -> None:
    """No edge is the clip of `behavior` where its edges are too far away to matter."""
    batch = uneven_rewards(on_policy(make_batch(LENGTHS), TablePolicy()))
    batch = replace(batch, behavior_logprobs_T=batch.behavior_logprobs_T - 0.1)
    settings = ({"correction": Correction.m2, "m2_threshold": 1e6}, {"correction": Correction.behavior})
    trainers = [make_trainer(config(clip_low=0.999, clip_high=1e6, **each)) for each in settings]
    for trainer in trainers:
        trainer.step(batch, 0, is_warmup=False)
    for a, b in zip(*map(parameters, trainers), strict=True):
        assert torch.equal(a, b)

"""algorithm.ess_scaled_step: the policy takes smaller steps where few responses carry all the weight."""

import math
from dataclasses import replace
from itertools import chain

import pytest
import torch
from torch import Tensor

from common.config import AdvantageEstimator
from learner.algorithm.losses import sequence_ess
from learner.algorithm.packing import boundaries
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


def ess_of(log_ratios: list[list[float]], masks: list[list[bool]] | None = None) -> float:
    masks = masks or [[True] * len(response) for response in log_ratios]
    log_ratio_T, mask_T = torch.tensor([*chain(*log_ratios)]), torch.tensor([*chain(*masks)])
    lengths_B = torch.tensor([len(response) for response in log_ratios])
    return sequence_ess(log_ratio_T, mask_T, boundaries(lengths_B)).item()


def test_by_hand() -> None:
    """Weights 1, 1, 1 and 9 = 3 x 3: 12^2 / (4 x 84) = 3/7."""
    responses = [[0.0], [math.log(2.0), -math.log(2.0)], [0.0, 0.0, 0.0], [math.log(3.0), math.log(3.0)]]
    assert ess_of(responses) == pytest.approx(3 / 7)
    assert ess_of([[x - 2.5 for x in response[:1]] + response[1:] for response in responses]) == pytest.approx(3 / 7)
    assert ess_of([[0.3], [0.1, 0.2]]) == pytest.approx(1.0)
    assert ess_of([[-4.0, 1.0]]) == 1.0, "one response has nothing to be compared with"


def test_masked_tokens_do_not_weigh_and_responses_without_any_do_not_count() -> None:
    responses = [[0.0, 5.0], [math.log(3.0)], [7.0, 7.0]]
    masks = [[True, False], [True], [False, False]]
    assert ess_of(responses, masks) == pytest.approx(4**2 / (2 * 10))  # weights 1 and 3


def test_a_single_huge_weight_leaves_one_response_of_n() -> None:
    assert ess_of([[20.0] * 200, [0.0], [0.0], [-20.0] * 200]) == pytest.approx(0.25)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_quotient_of_sums_of_products(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (12,), generator=generator).tolist()
    log_ratios = [(0.2 * torch.randn(length, generator=generator)).tolist() for length in lengths]
    masks = [(torch.rand(length, generator=generator) < 0.7).tolist() for length in lengths]
    weights = [
        math.prod(math.exp(x) for x, kept in zip(response, mask, strict=True) if kept)
        for response, mask in zip(log_ratios, masks, strict=True)
        if any(mask)
    ]
    expected = sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights))
    assert ess_of(log_ratios, masks) == pytest.approx(expected)


def moved(before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
    return [b - a for a, b in zip(before, after, strict=True)]


def test_the_policys_step_is_scaled_and_the_critics_is_not() -> None:
    """With one mini-batch the factor is the square root of `offpolicy/sequence_ess`, which is measured elsewhere."""
    batch = uneven_rewards(make_batch(LENGTHS))
    steps, metrics = [], []
    for is_scaled in (False, True):
        trainer = make_trainer(config(mini_batches=1, ess_scaled_step=is_scaled))
        before = parameters(trainer)
        metrics.append(trainer.step(batch, 0, is_warmup=False))
        steps.append(moved(before, parameters(trainer)))
    plain, scaled = metrics
    factor = scaled["policy/ess_factor"]
    assert factor == pytest.approx(math.sqrt(scaled["offpolicy/sequence_ess"])) and factor < 0.9
    assert "policy/ess_factor" not in plain
    assert scaled["policy/learning_rate"] == plain["policy/learning_rate"], "the schedule's, of the next update"
    assert scaled["staleness/lr_gauge"] == pytest.approx(factor * plain["staleness/lr_gauge"])
    (policy, critic), (scaled_policy, scaled_critic) = steps
    torch.testing.assert_close(scaled_policy, factor * policy, rtol=1e-4, atol=1e-7)
    assert torch.equal(scaled_critic, critic)


def test_each_mini_batch_has_its_own_factor() -> None:
    """All but the last of the responses are on-policy: one mini-batch of two takes a whole step."""
    batch = uneven_rewards(on_policy(make_batch(LENGTHS), TablePolicy()))
    behavior_T = batch.behavior_logprobs_T.clone()
    behavior_T[-LENGTHS[-1] :] -= 5.0
    batch = replace(batch, behavior_logprobs_T=behavior_T)
    options = {"advantage": AdvantageEstimator.rloo, "ess_scaled_step": True, "critic_warmup_steps": 0}
    two, one = (
        make_trainer(config(mini_batches=n, **options)).step(batch, 0, is_warmup=False)["policy/ess_factor"]
        for n in (2, 1)
    )
    assert two == pytest.approx((1.0 + 0.5) / 2, abs=0.01)  # 1/4 of four responses: nearly all weight is on one
    assert one == pytest.approx(math.sqrt(1 / 8), abs=0.01)


def test_on_policy_every_step_is_whole() -> None:
    batch = uneven_rewards(on_policy(make_batch(LENGTHS), TablePolicy()))
    trainer = make_trainer(config(ess_scaled_step=True))
    assert trainer.step(batch, 0, is_warmup=False)["policy/ess_factor"] == pytest.approx(1.0)

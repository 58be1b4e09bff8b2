"""Gradients of the estimators: against the trainer's own, against a softmax bandit's, and folded against whole."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from common.config import AdvantageEstimator, Aggregation, AlgorithmConfig
from learner.algorithm.packing import Batch, boundaries
from learner.signal.estimators import CRITIC, Estimator, configured, critic_free, fixed, token_weights, unbiased, usual
from learner.signal.gradients import Sketch, batch_gradients, gram, products
from learner.signal.moments import Estimate, Moments
from tests.learner.algorithm.test_trainer import (
    LENGTHS,
    VOCAB,
    TableCritic,
    TablePolicy,
    config,
    make_batch,
    make_trainer,
    on_policy,
    uneven_rewards,
)

SETTINGS = [
    {"whiten_advantages": True},
    {"length_adaptive_alpha": None, "policy_lambda": 0.9, "aggregation": Aggregation.sequence},
    {"length_adaptive_alpha": None, "value_gate": True},
    {"advantage": AdvantageEstimator.grpo, "critic_warmup_steps": 0, "aggregation": Aggregation.sequence},
    {"advantage": AdvantageEstimator.rloo, "critic_warmup_steps": 0},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_configured_gradient_is_that_of_the_first_update_of_a_step(settings: dict[str, object]) -> None:
    """Without the language-model loss. Micro-batches make no difference."""
    cfg = config(mini_batches=1, **{"positive_lm_weight": 0.0, **settings})
    trainer, found = make_trainer(cfg), []
    if trainer.critic is not None:
        with torch.no_grad():
            trainer.critic.network.table.copy_(torch.linspace(-1.0, 1.0, VOCAB))  # type: ignore[operator, union-attr]
    policy = trainer.policy.network
    batch = uneven_rewards(on_policy(make_batch(LENGTHS), policy))
    critics = {} if trainer.critic is None else {CRITIC: trainer.critic.network}
    values = {name: critic(batch.token_ids_S, batch.cu_seqlens_B1, batch.prompt_lengths_B).detach()[:, None]
              for name, critic in critics.items()}  # fmt: skip
    estimator = configured(cfg.algorithm, CRITIC if critics else None)
    weights = [token_weights(cfg, batch, estimator, values)]
    sketch = Sketch(list(policy.parameters()))
    for budget in (10_000, 25):
        one = replace(cfg, learner=replace(cfg.learner, tokens_per_micro_batch=budget))
        found.append(batch_gradients(one, policy, batch, weights, sketch)[0])
    gradient: list[torch.Tensor] = []
    apply = trainer.policy.apply
    trainer.policy.apply = lambda factor: (gradient.append(policy.table.grad.clone()), apply(factor))[1]  # type: ignore
    trainer.step(batch, 0, False)
    for mine in found:
        torch.testing.assert_close(mine, gradient[0].reshape(-1), atol=1e-6, rtol=1e-4)


def test_the_unbiased_estimator_weighs_all_tokens_by_the_reward_less_its_baseline() -> None:
    """c = -(R - V) / B: two responses of 1 and 3 tokens; and the mean of the others where there is no critic."""
    cfg = config(whiten_advantages=True, gamma=0.9, aggregation=Aggregation.sequence)
    batch = replace(make_batch([1, 3]), rewards_B=torch.tensor([1.0, -1.0]))
    values = {CRITIC: torch.tensor([[0.5], [0.1], [0.2], [0.3]])}
    with_critic = token_weights(cfg, batch, unbiased(cfg.algorithm, CRITIC, has_groups=True), values)
    torch.testing.assert_close(with_critic, -torch.tensor([0.5, -1.1, -1.2, -1.3]) / 2)
    without = token_weights(cfg, batch, unbiased(cfg.algorithm, None, has_groups=True), {})
    torch.testing.assert_close(without, -torch.tensor([2.0, -2.0, -2.0, -2.0]) / 2)
    plain = token_weights(cfg, batch, unbiased(cfg.algorithm, None, has_groups=False), {})
    torch.testing.assert_close(plain, -torch.tensor([1.0, -1.0, -1.0, -1.0]) / 2)


def test_estimators_without_a_critic_by_hand() -> None:
    """Two groups; (1, -1) has mean 0 and deviation sqrt 2. GRPO: mean over responses, DAPO and RLOO: over tokens."""
    batch = replace(make_batch([1, 3]), rewards_B=torch.tensor([1.0, -1.0]))
    cfg = config(whiten_advantages=True)
    grpo, dapo, rloo = (token_weights(cfg, batch, one, {}) for one in critic_free(cfg.algorithm))
    unit = 0.5**0.5
    torch.testing.assert_close(grpo, -torch.tensor([unit, -unit / 3, -unit / 3, -unit / 3]) / 2, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(dapo, -torch.tensor([unit, -unit, -unit, -unit]) / 4, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(rloo, -torch.tensor([2.0, -2.0, -2.0, -2.0]) / 4)


def test_lambda_zero_sees_one_value_ahead() -> None:
    cfg = config()
    batch = replace(make_batch([3, 1]), rewards_B=torch.tensor([1.0, -1.0]))
    values = {CRITIC: torch.tensor([[0.1], [0.3], [0.6], [0.5]])}
    found = token_weights(cfg, batch, fixed(cfg.algorithm, CRITIC, 0.0), values)
    torch.testing.assert_close(found, -torch.tensor([0.2, 0.3, 0.4, -1.5]) / 4)


def test_rows_without_groups_or_critic_are_left_out() -> None:
    algorithm = AlgorithmConfig(length_adaptive_alpha=0.5)
    names = [one.name for one in usual(algorithm, CRITIC, 8, (0.9, 1.0))]
    assert names == [
        "lambda 1", "as configured: alpha 0.5", "lambda 0.9", "lambda 1", "V = 0, alpha 0.5",
        "GRPO", "DAPO without resampling", "RLOO",
    ]  # fmt: skip
    assert [one.name for one in usual(algorithm, CRITIC, 1, (0.9,))][-1] == "V = 0, alpha 0.5"
    grpo = AlgorithmConfig(advantage=AdvantageEstimator.grpo, length_adaptive_alpha=None)
    assert [one.name for one in usual(grpo, None, 8, (0.9,))][:3] == ["RLOO", "as configured: grpo", "GRPO"]
    assert [one.fixed_lambda for one in usual(algorithm, CRITIC, 8, (0.9,))] == [1.0, None, 0.9, None, None, None, None]


ACTIONS = torch.tensor([3, 4, 5])  # of the bandit that token 0 stands for
REWARDS = torch.tensor([1.0, -1.0, 0.5])


def pulls(policy: TablePolicy, seed: int, groups: int = 4, group_size: int = 4) -> Batch:
    """Responses of one token to a prompt of token 0."""
    generator = torch.Generator().manual_seed(seed)
    num = groups * group_size
    drawn_B = torch.multinomial(policy.table[0].softmax(-1).detach(), num, replacement=True, generator=generator)
    rewards_V = torch.zeros(VOCAB).index_copy(0, ACTIONS, REWARDS)
    return replace(
        make_batch([1] * num, group_size=group_size),
        token_ids_S=torch.stack([torch.zeros(num, dtype=torch.int64), drawn_B], dim=1).reshape(-1),
        cu_seqlens_B1=boundaries(torch.full((num,), 2)),
        prompt_lengths_B=torch.ones(num, dtype=torch.int64),
        rewards_B=rewards_V[drawn_B],
    )


def test_a_softmax_bandit_has_the_signal_and_the_noise_that_can_be_computed() -> None:
    """d E[R] / d logit_a = pi_a (R_a - E R); with V = 0 one response's gradient is R (onehot - pi)."""
    policy, cfg, num = TablePolicy(), config(), 400
    zero = replace(unbiased(cfg.algorithm, None, has_groups=False), name="plain", is_truth=False)
    estimators = [unbiased(cfg.algorithm, None, has_groups=True), zero]
    found = gram(cfg, policy, {}, (pulls(policy, seed) for seed in range(num)), num, estimators)
    pi = policy.table[0].softmax(-1).detach().double()
    reward = torch.zeros(VOCAB).index_copy(0, ACTIONS, REWARDS).double()
    gradient = pi * (reward - pi @ reward)
    one = reward[:, None] * (torch.eye(VOCAB) - pi)  # of each action
    noise = float((pi * one.square().sum(-1)).sum() - gradient @ gradient) / 16
    moments = Moments(found, 0)
    assert moments.truth.value == pytest.approx(float(gradient @ gradient), abs=4 * (moments.truth.error or 0.0))
    ratio = Estimate.of(moments.signal_to_noise_KE[:, 1])
    assert ratio.value == pytest.approx(float(gradient @ gradient) / noise, abs=4 * (ratio.error or 0.0))
    assert (ratio.error or 1.0) < 0.2 * (ratio.value or 0.0)
    assert Estimate.of(moments.bias_KE[:, 1]).value == pytest.approx(1.0, abs=0.05)


def test_folded_gradients_have_the_same_products_within_the_error_that_is_said() -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((64, 96), (5,), (4_001,))]
    rows = [[torch.randn(p.shape, generator=generator) for p in parameters] for _ in range(6)]
    rows[1] = [a + b for a, b in zip(rows[0], rows[1], strict=True)]
    whole, folded = Sketch(parameters), Sketch(parameters, exact=0, places=1_009)
    assert (whole.is_exact, whole.size, folded.is_exact, folded.size) == (True, 10_150, False, 1_009)
    exact, near = (products(torch.stack([sketch(row) for row in rows])) for sketch in (whole, folded))
    lengths = np.sqrt(np.diag(exact))
    error = (near - exact) / np.outer(lengths, lengths) * np.sqrt(1_009)
    assert np.abs(error).max() < 5.0 and np.abs(error).mean() > 0.1
    parts = folded([None, *rows[0][1:]]) + folded([rows[0][0], None, None])
    torch.testing.assert_close(parts, folded(rows[0]))


def test_a_critic_that_is_named_is_the_one_that_is_asked() -> None:
    cfg, policy = config(), TablePolicy()
    batches = [on_policy(uneven_rewards(make_batch(LENGTHS, seed=seed)), policy) for seed in range(4)]
    trained = TableCritic()
    nn.init.constant_(trained.table, 0.7)
    base = configured(cfg.algorithm, None)
    rows = [
        unbiased(cfg.algorithm, None, has_groups=True),
        base,
        *(Estimator(name=name, algorithm=base.algorithm, critic=name) for name in ("new", "trained")),
    ]
    found = gram(cfg, policy, {"new": TableCritic(), "trained": trained}, batches, 4, rows)
    assert np.allclose(found[1], found[2]) and not np.allclose(found[1], found[3])


def test_of_several_critics_the_mean_counts_and_what_they_agree_on_is_left_out_where_it_is_configured() -> None:
    cfg = config(agreement_mask=0.5, length_adaptive_alpha=None, policy_lambda=1.0)
    batch = replace(make_batch([3, 1]), rewards_B=torch.tensor([1.0, -1.0]))
    values = {CRITIC: torch.tensor([[0.0, 0.2], [0.1, 0.5], [0.6, 0.6], [-0.5, 1.5]])}
    whole = -torch.tensor([0.9, 0.7, 0.4, -1.5]) / 4
    torch.testing.assert_close(token_weights(cfg, batch, fixed(cfg.algorithm, CRITIC, 1.0), values), whole)
    masked = token_weights(cfg, batch, configured(cfg.algorithm, CRITIC), values)
    torch.testing.assert_close(masked, whole * torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert token_weights(cfg, batch, configured(cfg.algorithm, None), {}).abs().min() > 0.0
    policy, pair = TablePolicy(), nn.ModuleList([TableCritic(), TableCritic()])
    nn.init.constant_(pair[1].table, 0.5)
    rows = [unbiased(cfg.algorithm, CRITIC, has_groups=True), configured(cfg.algorithm, CRITIC)]
    assert gram(cfg, policy, {CRITIC: pair}, [batch] * 4, 4, rows).shape == (2, 4, 2, 4)

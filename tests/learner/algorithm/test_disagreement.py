"""Several critics: who is trained on what, and what their disagreement does to the policy's loss."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.config import AlgorithmConfig, Config, ModelConfig
from learner.algorithm import disagreement
from learner.algorithm.experience import Experience, Scores, estimate
from learner.algorithm.objective import Counts, policy_terms, trust_region
from learner.algorithm.packing import partition, shard
from learner.algorithm.trainer import Trainer
from tests.learner.algorithm.test_trainer import LENGTHS, TableCritic, TablePolicy, config, make_batch, uneven_rewards

TEAM = {"length_adaptive_alpha": None, "policy_lambda": 0.5}


def test_the_value_is_the_mean_and_disagreement_the_standard_deviation() -> None:
    values = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    mean_T, sigma_T = disagreement.aggregate(torch.from_numpy(values))
    assert sigma_T is not None
    np.testing.assert_allclose(mean_T, values.mean(axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sigma_T, values.std(axis=1), rtol=1e-5)
    _, of_two_T = disagreement.aggregate(torch.tensor([[0.5, -0.1], [0.2, 0.2]]))
    assert of_two_T is not None and of_two_T.tolist() == pytest.approx([0.3, 0.0])  # half of the difference


def test_one_critic_is_its_own_mean_and_does_not_disagree() -> None:
    values_TM = torch.tensor([[0.3], [-0.7]])
    mean_T, sigma_T = disagreement.aggregate(values_TM)
    assert torch.equal(mean_T, values_TM[:, 0]) and sigma_T is None


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.99])
def test_least_and_most_are_the_ends_of_the_sorted_tokens(share: float) -> None:
    generator = torch.Generator().manual_seed(3)
    sigma_T, mask_T = torch.rand(50, generator=generator), torch.rand(50, generator=generator) < 0.7
    tokens = sorted((t for t in range(50) if mask_T[t]), key=lambda t: float(sigma_T[t]))
    number = int(share * len(tokens))
    least, most = disagreement.least(sigma_T, mask_T, share), disagreement.most(sigma_T, mask_T, share)
    assert set(least.nonzero()[:, 0].tolist()) == set(tokens[:number])
    assert set(most.nonzero()[:, 0].tolist()) == set(tokens[len(tokens) - number :])


def test_tokens_that_are_equal_at_the_edge_are_all_left_alone() -> None:
    every_T = torch.ones(5, dtype=torch.bool)
    assert not disagreement.least(torch.zeros(5), every_T, 0.6).any()
    sigma_T = torch.tensor([0.1, 0.2, 0.2, 0.2, 0.3])
    assert disagreement.least(sigma_T, every_T, 0.6).tolist() == [True, False, False, False, False]
    assert disagreement.most(sigma_T, every_T, 0.6).tolist() == [False, False, False, False, True]


def test_without_a_token_in_the_mask_there_is_nothing_to_choose() -> None:
    nothing_T = torch.zeros(3, dtype=torch.bool)
    assert not disagreement.least(torch.rand(3), nothing_T, 0.5).any()
    assert disagreement.metrics(AlgorithmConfig(), torch.rand(3), nothing_T) == {}


def test_shards_are_disjoint_and_have_an_equal_part_of_every_group() -> None:
    batch = make_batch(LENGTHS, group_size=4)
    mini = partition(batch, 1, 2, 20, seed=0)[0]
    shards = [shard(mini, m, 2) for m in (0, 1)]
    found = [torch.cat([indices for micros in part for indices in micros]) for part in shards]
    assert sorted(torch.cat(found).tolist()) == list(range(8))
    for indices in found:
        assert batch.group_index_B[indices].bincount().tolist() == [2, 2]
    for part in shards:  # collectives of a sharded critic: the same number on every rank
        assert [len(micros) for micros in part] == [len(micros) for micros in mini]


def test_one_shard_is_the_mini_batch() -> None:
    mini = partition(make_batch(LENGTHS), 2, 2, 20, seed=0)[1]
    for micros, same in zip(mini, shard(mini, 0, 1), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(micros, same, strict=True))


def team_of(cfg: Config, size: int = 2) -> Trainer:
    return Trainer(cfg, TablePolicy(), nn.ModuleList(TableCritic() for _ in range(size)), rank=0, world=1)


def tables(trainer: Trainer) -> list[Tensor]:
    assert trainer.critic is not None
    return [p.detach().clone() for p in trainer.critic.network.parameters()]


@pytest.mark.parametrize("size", [2, 3])
def test_each_critic_learns_the_mean_over_its_own_responses(size: int) -> None:
    """The gradients of the first update, from V = 0 and Monte-Carlo returns: d/dV mean over D_m of (V - R)^2 / 2."""
    batch = uneven_rewards(make_batch(LENGTHS))
    trainer = team_of(config(mini_batches=1, tokens_per_micro_batch=25), size)
    assert trainer.critic is not None
    gradients: list[Tensor] = []
    trainer.critic.optimizer.register_step_pre_hook(
        lambda optimizer, *_: gradients.extend(p.grad.clone() for p in optimizer.param_groups[0]["params"])
    )
    loss = trainer.step(batch, 0, is_warmup=True)["critic/value_loss"]
    starts, states = batch.response_cu_seqlens_B1.tolist(), batch.token_ids_S[batch.positions_T].tolist()
    expected, losses = torch.zeros(size, 11), []
    for m in range(size):
        own = [(b, t) for b in range(m, 8, size) for t in range(starts[b], starts[b + 1])]
        for b, t in own:
            expected[m, states[t]] -= batch.rewards_B[b] / len(own)
        losses.append(sum(float(batch.rewards_B[b]) ** 2 / 2 for b, _ in own) / len(own))
    torch.testing.assert_close(torch.stack(gradients), expected)
    assert loss == pytest.approx(sum(losses) / size, rel=1e-5)


def test_what_one_critic_is_trained_on_does_not_reach_the_other() -> None:
    batch = uneven_rewards(make_batch(LENGTHS))
    other = replace(batch, rewards_B=torch.where(torch.arange(8) % 2 == 1, 3.0, batch.rewards_B))
    one, two = team_of(config(critic_warmup_epochs=3)), team_of(config(critic_warmup_epochs=3))
    one.step(batch, 0, is_warmup=True)
    two.step(other, 0, is_warmup=True)
    assert torch.equal(tables(one)[0], tables(two)[0]) and not torch.equal(tables(one)[1], tables(two)[1])


def test_a_step_reports_the_mean_value_and_how_far_critics_differ() -> None:
    batch = uneven_rewards(make_batch(LENGTHS))
    trainer = team_of(config(agreement_mask=0.5, learning_rate=0.1))
    first = trainer.step(batch, 0, is_warmup=False)
    assert first["critic/disagreement_mean"] == first["critic/agreement_fraction"] == 0.0  # alike, and nothing masked
    one, two = (table[batch.token_ids_S[batch.positions_T]] for table in tables(trainer))
    second = trainer.step(batch, 0, is_warmup=False)
    assert second["critic/value_mean"] == pytest.approx(((one + two) / 2).mean().item(), rel=1e-5)
    assert second["critic/disagreement_mean"] == pytest.approx(((one - two).abs() / 2).mean().item(), rel=1e-4)
    assert 0.0 < second["critic/agreement_fraction"] <= 0.5


def experience(sigma: list[float] | None, is_warmup: bool = False, **algorithm: object) -> Experience:
    """Of three responses of 2, 3 and 1 tokens, the last token out of the mask, with values of 0.1, 0.2, ..."""
    batch = make_batch([2, 3, 1])
    batch = replace(batch, loss_mask_T=torch.tensor([True] * 5 + [False]))
    zeros_T = torch.zeros(6)
    scores = Scores(
        old_logprobs_T=zeros_T,
        entropy_T=zeros_T,
        values_T=torch.arange(1, 7) / 10,
        disagreement_T=None if sigma is None else torch.tensor(sigma),
        reference_logprobs_T=None,
    )
    settings = AlgorithmConfig(**TEAM | algorithm)  # type: ignore[arg-type]
    run = Config(model=ModelConfig(path="", num_critics=2), algorithm=settings)
    return estimate(run, batch, torch.arange(3), scores, 0, is_warmup, None)


SIGMA = [0.4, 0.1, 0.3, 0.2, 0.5, 0.0]  # the last one is not in the loss


@pytest.mark.parametrize("whiten", [False, True])
def test_advantages_are_left_out_where_critics_agree_and_nothing_else_changes(whiten: bool) -> None:
    plain = experience(SIGMA, whiten_advantages=whiten)
    masked = experience(SIGMA, whiten_advantages=whiten, agreement_mask=0.4)
    assert plain.advantages_T is not None and masked.advantages_T is not None
    kept_T = torch.tensor([True, False, True, False, True, True])
    assert torch.equal(masked.advantages_T, torch.where(kept_T, plain.advantages_T, 0.0))
    assert plain.advantages_T[~kept_T].all()
    for name in ("values_T", "value_targets_T", "mask_T", "lm_mask_T", "weights_T"):
        assert torch.equal(getattr(masked, name), getattr(plain, name)), name
    assert masked.entropy_mask_T is None


def test_warm_up_has_no_advantages_to_leave_out() -> None:
    assert experience(SIGMA, is_warmup=True, agreement_mask=0.4).advantages_T is None


def test_the_entropy_bonus_leaves_out_where_critics_differ_most() -> None:
    e = experience(SIGMA, entropy_filter=0.4, entropy_weight=0.5, positive_lm_weight=0.0)
    assert e.entropy_mask_T is not None
    assert e.entropy_mask_T.tolist() == [False, True, True, True, False, False]
    entropy_T = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    algorithm = AlgorithmConfig(entropy_filter=0.4, entropy_weight=0.5, positive_lm_weight=0.0)
    counts = Counts(tokens=5, lm_tokens=0, responses=2)
    region = trust_region(algorithm)
    terms = policy_terms(algorithm, make_batch([2, 3, 1]), e, torch.zeros(6), entropy_T, counts, region)
    assert terms["entropy_loss"].item() == pytest.approx(-0.5 * (2 + 3 + 4) / 5)  # the mean is still over all five

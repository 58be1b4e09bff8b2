"""algorithm.value_gate: a batch whose outcomes the critic does not explain is trained on reward minus mean reward."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from common.config import AdvantageEstimator, AlgorithmConfig, Config
from learner.algorithm.experience import Experience, Scores, estimate
from learner.algorithm.packing import Batch, boundaries
from tests.support.ranks import run_two_ranks

LENGTHS = [2, 3, 1]
REWARDS = [1.0, -1.0, 0.0]  # mean 0; over tokens 1 1 -1 -1 -1 0: mean -1/6, variance 5/6 - 1/36
CONSTANT = [0.25] * 6
TELLING = [0.5, 0.5, -0.5, -0.5, -0.5, 0.0]  # R - V: half of R, so a fourth of its variance
MISLEADING = [-x for x in TELLING]  # R - V: one and a half of R


def make_batch(rewards: list[float] = REWARDS) -> Batch:
    """Three responses of 2, 3 and 1 tokens under prompts of one token."""
    response_lengths_B, one_B = torch.tensor(LENGTHS), torch.ones(3, dtype=torch.int64)
    num_tokens = sum(LENGTHS)
    return Batch(
        token_ids_S=torch.zeros(num_tokens + 3, dtype=torch.int64),
        cu_seqlens_B1=boundaries(response_lengths_B + one_B),
        prompt_lengths_B=one_B,
        response_lengths_B=response_lengths_B,
        behavior_logprobs_T=torch.zeros(num_tokens),
        versions_T=torch.zeros(num_tokens, dtype=torch.int64),
        rewards_B=torch.tensor(rewards),
        is_correct_B=torch.tensor(rewards) > 0,
        is_truncated_B=torch.zeros(3, dtype=torch.bool),
        group_index_B=torch.zeros(3, dtype=torch.int64),
        loss_mask_T=torch.ones(num_tokens, dtype=torch.bool),
    )


def make_config(**algorithm: object) -> Config:
    settings = {"value_gate": True, "length_adaptive_alpha": None, "policy_lambda": 0.5} | algorithm
    return Config(algorithm=AlgorithmConfig(**settings))  # type: ignore[arg-type]


def experience(
    batch: Batch,
    values: list[float],
    mine: list[int] | None = None,
    group: dist.ProcessGroup | None = None,
    **algorithm: object,
) -> Experience:
    """What `estimate` makes of the responses at `mine` (None: all) when the critic says `values` (of all tokens)."""
    indices = torch.tensor(range(3) if mine is None else mine)
    values_T = torch.tensor(values)[batch.select_tokens(indices)]
    zeros_T = torch.zeros_like(values_T)
    scores = Scores(
        old_logprobs_T=zeros_T, entropy_T=zeros_T, values_T=values_T, disagreement_T=None, reference_logprobs_T=None
    )
    return estimate(make_config(**algorithm), batch, indices, scores, 0, False, group)


@pytest.mark.parametrize("values", [CONSTANT, MISLEADING])
def test_values_that_explain_nothing_leave_reward_minus_mean_at_every_token(values: list[float]) -> None:
    e = experience(make_batch([1.0, -1.0, 0.6]), values)
    mean = 0.2
    assert e.uses_values is False
    assert e.advantages_T.tolist() == pytest.approx([1 - mean] * 2 + [-1 - mean] * 3 + [0.6 - mean])


def test_values_that_explain_something_give_gae() -> None:
    e = experience(make_batch(), TELLING)
    # lambda 1/2, deltas: 0 and 1 - 1/2; 0, 0 and -1 + 1/2; 0
    assert e.uses_values is True
    assert e.advantages_T.tolist() == pytest.approx([0.25, 0.5, -0.125, -0.25, -0.5, 0.0])


def test_without_the_gate_a_misleading_critic_is_used_all_the_same() -> None:
    e = experience(make_batch(), MISLEADING, value_gate=False)
    assert e.uses_values is None
    assert e.advantages_T.tolist() == pytest.approx([0.75, 1.5, -0.375, -0.75, -1.5, 0.0])


def test_a_shut_gate_discounts_the_outcome() -> None:
    e = experience(make_batch(), CONSTANT, gamma=0.5)
    assert e.advantages_T.tolist() == pytest.approx([0.5, 1.0, -0.25, -0.5, -1.0, 0.0])


def test_a_shut_gate_changes_neither_values_nor_their_targets() -> None:
    shut, without = experience(make_batch(), MISLEADING), experience(make_batch(), MISLEADING, value_gate=False)
    assert shut.values_T is not None and without.values_T is not None
    assert shut.value_targets_T is not None and without.value_targets_T is not None
    assert torch.equal(shut.values_T, without.values_T)
    assert torch.equal(shut.value_targets_T, without.value_targets_T)


def test_equal_rewards_shut_the_gate_and_give_no_advantage() -> None:
    e = experience(make_batch([1.0, 1.0, 1.0]), TELLING)
    assert e.uses_values is False
    assert torch.equal(e.advantages_T, torch.zeros(6))


def test_masked_tokens_do_not_judge_the_critic() -> None:
    batch, values = make_batch(), [*TELLING[:2], 9.0, *TELLING[3:]]
    assert experience(batch, values).uses_values is False
    mask_T = torch.tensor([True, True, False, True, True, True])
    assert experience(replace(batch, loss_mask_T=mask_T), values).uses_values is True


def test_the_shut_gate_is_reward_minus_mean_whatever_lambda_is() -> None:
    adaptive = experience(make_batch(), CONSTANT, length_adaptive_alpha=0.4)
    assert adaptive.advantages_T.tolist() == [1.0, 1.0, -1.0, -1.0, -1.0, 0.0]


def test_group_estimators_know_no_gate() -> None:
    e = experience(make_batch(), CONSTANT, value_gate=False, advantage=AdvantageEstimator.rloo)
    assert e.uses_values is None
    assert e.advantages_T.tolist() == pytest.approx([1.5, 1.5, -1.5, -1.5, -1.5, 0.0])


SHARES = ([0], [1, 2])  # of the two ranks


def _estimate_shares(rank: int, address: str, answers: Tensor) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    for i, values in enumerate((TELLING, MISLEADING)):
        e = experience(make_batch(), values, SHARES[rank], dist.group.WORLD)
        answers[rank, i, 0] = float(bool(e.uses_values))
        answers[rank, i, 1:] = e.advantages_T
    dist.destroy_process_group()


def test_two_ranks_decide_alike_and_like_one(tmp_path: Path) -> None:
    """Rank 0 has one outcome only, so its own share would say that any critic explains nothing."""
    answers = torch.zeros(2, 2, 7).share_memory_()
    run_two_ranks(_estimate_shares, f"file://{tmp_path}/rendezvous", answers)
    for i, values in enumerate((TELLING, MISLEADING)):
        alone = experience(make_batch(), values)
        assert answers[:, i, 0].tolist() == [float(bool(alone.uses_values))] * 2
        for rank in range(2):
            torch.testing.assert_close(answers[rank, i, 1:], alone.advantages_T)

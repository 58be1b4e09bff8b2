"""Metrics against numbers worked out by hand."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from learner.algorithm.diagnostics import (
    Totals,
    add_policy_totals,
    area_under_curve,
    batch_metrics,
    critic_metrics,
    explained_variance,
    gae_metrics,
    token_metrics,
    update_metrics,
)
from learner.algorithm.losses import TrustRegion
from tests.learner.algorithm.test_trainer import make_batch

CPU = torch.device("cpu")


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_explained_variance_is_one_for_perfect_values_zero_for_constant_ones_and_negative_for_worse() -> None:
    outcomes = tensor(1.0, -1.0, 1.0, -1.0)
    assert explained_variance(outcomes, outcomes) == 1.0
    assert explained_variance(tensor(0.3, 0.3, 0.3, 0.3), outcomes) == pytest.approx(0.0, abs=1e-4)
    assert explained_variance(-outcomes, outcomes) == pytest.approx(-3.0, abs=1e-4)


def test_area_under_curve_counts_ordered_pairs_and_ties_as_half() -> None:
    """Pairs: 3>1, 3>2, 2>1, 2=2: 3.5 of 4."""
    assert area_under_curve(tensor(3.0, 2.0), tensor(1.0, 2.0)) == 3.5 / 4
    assert area_under_curve(tensor(1.0), tensor(2.0)) == 0.0


def test_batch_metrics_by_hand() -> None:
    metrics = batch_metrics(make_batch([1, 2, 3, 10], group_size=2))  # responses 0 and 3 are correct
    assert metrics["reward/mean"] == 0.0 and metrics["reward/correct_fraction"] == 0.5
    assert metrics["length/mean"] == 4.0 and metrics["length/max"] == 10.0
    assert metrics["length/p50"] == 2.5
    assert (metrics["length/mean_correct"], metrics["length/mean_wrong"]) == (5.5, 2.5)
    assert metrics["reward/solved_group_fraction"] == metrics["reward/unsolved_group_fraction"] == 0.0
    uneven = batch_metrics(make_batch([1, 2, 3, 10], group_size=1))
    assert uneven["reward/solved_group_fraction"] == uneven["reward/unsolved_group_fraction"] == 0.5


def test_lambda_metrics_count_the_clamped() -> None:
    metrics = gae_metrics(tensor(0.0, 0.5, 1.0, 0.0))
    assert metrics == {"gae/lambda_mean": 0.375, "gae/lambda_min": 0.0, "gae/lambda_clamped_fraction": 0.5}


def test_critic_metrics_by_position_and_verdict() -> None:
    """Two responses of three tokens; values move from 0 to the outcome."""
    values_T = tensor(0.0, 0.5, 1.0, 0.0, -0.5, -1.0)
    rewards_B, is_correct_B = tensor(1.0, -1.0), torch.tensor([True, False])
    mask_T, cu_seqlens_B1 = torch.ones(6, dtype=torch.bool), torch.tensor([0, 3, 6])
    metrics = critic_metrics(values_T, rewards_B, is_correct_B, mask_T, cu_seqlens_B1, (-1.0, 1.0))
    assert metrics["critic/explained_variance_first"] == pytest.approx(0.0, abs=1e-4)
    assert metrics["critic/explained_variance_p50"] == pytest.approx(0.75, abs=1e-4)
    assert metrics["critic/explained_variance_last"] == pytest.approx(1.0)
    assert metrics["critic/value_correct_last"] == 1.0 and metrics["critic/value_wrong_p50"] == -0.5
    assert metrics["critic/auc_first"] == 0.5 and metrics["critic/auc_last"] == 1.0
    assert metrics["critic/brier"] == pytest.approx((0.25 + 0.0625 + 0.0) / 3)
    assert metrics["critic/explained_variance"] == pytest.approx(1 - (1 + 0.25 + 0) / 3, abs=1e-4)


def test_means_over_nothing_are_left_out() -> None:
    x_T, none_T = torch.zeros(3), torch.zeros(3, dtype=torch.bool)
    cu_seqlens_B1 = torch.tensor([0, 3])
    assert token_metrics("x", x_T, none_T) == {}
    assert critic_metrics(x_T, torch.ones(1), torch.ones(1).bool(), none_T, cu_seqlens_B1, (0.0, 1.0)) == {}


def test_outside_a_band_tokens_of_both_signs_count_as_clipped() -> None:
    """u = 7 and 0.6 are outside (0.7, 6), whatever the sign of A; a clip would count one of each pair."""
    u, advantages = tensor(7.0, 7.0, 0.6, 0.6, 1.0), tensor(1.0, -1.0, 1.0, -1.0, 1.0)
    fractions = {}
    for is_band in (True, False):
        totals, region = Totals(CPU), TrustRegion(low=0.3, high=5.0, is_band=is_band)
        inputs = (u.log(), tensor(0, 0, 0, 0, 0), advantages, torch.zeros(5, dtype=torch.int64), torch.ones(5).bool())
        add_policy_totals(totals, *inputs, num_gaps=1, region=region)
        metrics = update_metrics(*totals.reduce(None))
        fractions[is_band] = (metrics["policy/clip_fraction_high"], metrics["policy/clip_fraction_low"])
    assert fractions == {True: (0.4, 0.4), False: (0.2, 0.2)}


def test_update_totals_of_pieces_are_those_of_the_whole() -> None:
    """u = 1.5 (A > 0, beyond the upper edge), 0.5 (A < 0, beyond the lower), 12 (A < 0: dual), 1, and one masked."""
    u = tensor(1.5, 0.5, 12.0, 1.0, 99.0)
    logprobs_T, old_T = u.log() - 3.0, torch.full((5,), -3.0, dtype=torch.float64)
    advantages_T, gap_T = tensor(1.0, -1.0, -1.0, 1.0, 1.0), torch.tensor([0, 1, 1, 0, 0])
    mask_T = torch.tensor([True, True, True, True, False])
    results = []
    for cuts in ([0, 5], [0, 0, 2, 5]):
        totals = Totals(CPU)
        for start, end in pairwise(cuts):
            piece = slice(start, end)
            add_policy_totals(
                totals, logprobs_T[piece], old_T[piece], advantages_T[piece], gap_T[piece], mask_T[piece],
                num_gaps=2, region=TrustRegion(low=0.2, high=0.28, dual=10.0),
            )  # fmt: skip
        totals.add("policy/pg_loss", tensor(3.0).sum())
        totals.add_shared("policy/updates", torch.tensor(2.0))
        results.append(update_metrics(*totals.reduce(None)))
    expected = {
        "policy/clip_fraction_high": 0.25,
        "policy/clip_fraction_low": 0.25,
        "policy/clip_fraction_dual": 0.25,
        "policy/ratio_mean": 15 / 4,
        "policy/ratio_max": 12.0,
        "policy/ratio_min": 0.5,
        "policy/kl_k1": -math.log(1.5 * 0.5 * 12) / 4,
        "policy/clipped_high_prob": 1.5 * math.exp(-3),
        "offpolicy/gap_0/clip_fraction": 0.5,
        "offpolicy/gap_1/clip_fraction": 0.5,
        "policy/pg_loss": 1.5,
    }
    for metrics in results:
        assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_outcomes_that_are_all_alike_say_nothing_about_a_critic() -> None:
    """A fresh critic (V = 0) on responses that are all wrong: 1 - 0 / 1e-5 would open the gate of the warm-up."""
    mask_T, cu_seqlens_B1 = torch.ones(4, dtype=torch.bool), torch.tensor([0, 2, 4])
    wrong_B = torch.tensor([False, False])
    metrics = critic_metrics(torch.zeros(4), tensor(-1.0, -1.0), wrong_B, mask_T, cu_seqlens_B1, (-1.0, 1.0))
    assert not [name for name in metrics if name.startswith("critic/explained_variance")]
    assert metrics["critic/value_mean"] == 0.0 and metrics["critic/brier"] == 0.25

"""View 8, what the correction takes of the advantages away: against the gradient, and against a loop over tokens."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from common.config import AlgorithmConfig, Correction
from learner.algorithm import losses
from learner.algorithm.diagnostics import Totals
from learner.algorithm.experience import Experience
from learner.algorithm.losses import correction_weights
from learner.algorithm.objective import Counts, lost_advantage, policy_terms, trust_region
from learner.algorithm.views import add_lost_totals, update_views
from tests.learner.algorithm.test_trainer import make_batch

CPU = torch.device("cpu")


def experience(algorithm: AlgorithmConfig, seed: int, num_tokens: int = 200) -> Experience:
    """Every kind of token: ratios on both sides of every edge, both signs, four gaps, some masked."""
    generator = torch.Generator().manual_seed(seed)
    behavior_T = -3 * torch.rand(num_tokens, generator=generator)
    old_T = behavior_T + torch.randn(num_tokens, generator=generator)
    weights_T = correction_weights(
        old_T,
        behavior_T,
        algorithm.correction,
        truncation=algorithm.truncation,
        mask_low=algorithm.mask_low,
        mask_high=algorithm.mask_high,
        dis_low=algorithm.dis_low,
        dis_high=algorithm.dis_high,
    )
    return Experience(
        mask_T=torch.rand(num_tokens, generator=generator) < 0.8,
        lm_mask_T=torch.zeros(num_tokens, dtype=torch.bool),
        gap_T=torch.randint(0, 4, (num_tokens,), generator=generator),
        behavior_logprobs_T=behavior_T,
        old_logprobs_T=old_T,
        entropy_T=None,
        weights_T=weights_T,
        advantages_T=torch.randn(num_tokens, generator=generator),
        values_T=None,
        value_targets_T=None,
        disagreement_T=None,
        entropy_mask_T=None,
        reference_logprobs_T=None,
        uses_values=None,
    )


def region(algorithm: AlgorithmConfig) -> losses.TrustRegion:
    return trust_region(algorithm, m2_edge=0.3)


def moved(e: Experience, seed: int) -> Tensor:
    """The policy after some updates, of the experience's tokens."""
    assert e.old_logprobs_T is not None
    noise_T = torch.randn(len(e.gap_T), generator=torch.Generator().manual_seed(seed + 1))
    return e.old_logprobs_T + noise_T


@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("correction", list(Correction))
def test_lost_are_the_tokens_without_gradient_and_those_whose_weight_is_cut(
    correction: Correction, dual_clip: float | None
) -> None:
    algorithm = AlgorithmConfig(correction=correction, dual_clip=dual_clip, positive_lm_weight=0.0)
    e = experience(algorithm, seed=3)
    e = replace(e, mask_T=torch.ones_like(e.mask_T))
    logprobs_T = moved(e, seed=3).requires_grad_()
    batch = make_batch([len(e.gap_T)], group_size=1)
    counts = Counts(tokens=1, lm_tokens=0, responses=1)
    policy_terms(algorithm, batch, e, logprobs_T, None, counts, region(algorithm))["pg_loss"].backward()
    lost = lost_advantage(algorithm, e, logprobs_T, region(algorithm))
    assert logprobs_T.grad is not None
    kinds = {
        Correction.none: {"clipped"},
        Correction.behavior: {"clipped"},
        Correction.decoupled: {"clipped", "truncated"},
        Correction.tis: {"clipped", "truncated"},
        Correction.icepop: {"masked", "clipped"},
        Correction.dis: {"masked"},
        Correction.m2: {"clipped"},
    }
    assert lost.keys() == kinds[correction] and all(bool(x.any()) for x in lost.values())
    assert torch.stack(list(lost.values())).sum(0).max() == 1, "a token is lost in one way"
    without_T = torch.zeros(len(e.gap_T), dtype=torch.bool)
    for kind in lost.keys() - {"truncated"}:
        without_T |= lost[kind]
    assert torch.equal(logprobs_T.grad == 0.0, without_T)
    if "truncated" in lost:
        assert e.weights_T is not None and e.old_logprobs_T is not None
        is_cut_T = e.weights_T < losses.ratio(e.old_logprobs_T, e.behavior_logprobs_T)
        assert torch.equal(lost["truncated"], is_cut_T & ~without_T)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("correction", list(Correction))
def test_lost_shares_are_those_of_a_loop_however_the_tokens_are_split(correction: Correction, seed: int) -> None:
    algorithm = AlgorithmConfig(correction=correction)
    e = experience(algorithm, seed)
    assert e.advantages_T is not None
    lost = lost_advantage(algorithm, e, moved(e, seed), region(algorithm))
    expected: dict[str, float] = {}
    for gap in range(4):
        for sign, factor in (("positive", 1.0), ("negative", -1.0)):
            sizes = [factor * a for a in e.advantages_T.tolist()]
            chosen = [t for t in range(len(sizes)) if sizes[t] > 0 and e.mask_T[t] and e.gap_T[t] == gap]
            for kind, is_lost_T in lost.items():
                share = sum(sizes[t] for t in chosen if is_lost_T[t]) / sum(sizes[t] for t in chosen)
                expected[f"offpolicy/gap_{gap}/lost_{kind}_{sign}"] = share
    for cuts in ([0, 200], [0, 0, 70, 200]):
        totals = Totals(CPU)
        for start, end in pairwise(cuts):
            piece = slice(start, end)
            parts = {kind: is_lost_T[piece] for kind, is_lost_T in lost.items()}
            add_lost_totals(totals, e.advantages_T[piece], e.gap_T[piece], e.mask_T[piece], parts, num_gaps=4)
        sums, _ = totals.reduce(None)
        assert update_views(sums) == pytest.approx(expected)

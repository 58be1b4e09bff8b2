"""The policy's objective on one micro-batch: the terms of learner/algorithm/losses.py that are configured."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config import Aggregation, AlgorithmConfig, Correction
from learner.algorithm import losses
from learner.algorithm.experience import Experience
from learner.algorithm.packing import Batch, MicroBatches, boundaries

AROUND_BEHAVIOR = (Correction.behavior, Correction.dis, Correction.m2)  # their trust region is around pi_behavior


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Denominators of one mini-batch, over all its micro-batches and ranks."""

    tokens: int  # in the loss mask
    lm_tokens: int  # in the LM loss's mask
    responses: int  # with at least one token in the loss mask


def count(batch: Batch, experience: Experience, mini: list[MicroBatches]) -> Counts:
    """Denominators of a mini-batch [rank][micro_batch], from the whole batch: no rank has to ask another."""
    indices = torch.cat([indices for micros in mini for indices in micros])
    tokens = batch.select_tokens(indices).to(experience.mask_T.device)
    mask_T = experience.mask_T[tokens]
    cu_seqlens_B1 = boundaries(batch.response_lengths_B[indices]).to(mask_T.device)
    return Counts(
        tokens=int(mask_T.sum()),
        lm_tokens=int(experience.lm_mask_T[tokens].sum()),
        responses=int((losses.tokens_per_response(mask_T, cu_seqlens_B1) > 0).sum()),
    )


def ess_factor(batch: Batch, experience: Experience, mini: list[MicroBatches]) -> float:
    """sqrt(ESS / n) of a mini-batch [rank][micro_batch], like `count` from the whole batch.

    What VCPO (arXiv 2602.17616, section 3.2) multiplies the policy's learning rate with: AdamW's step is scaled like
    the square root of the batch, and stale samples with a few heavy weights are worth a smaller batch. The weights are
    those of whole responses, pi_old / pi_behavior untruncated, whatever the correction. The paper divides by the ratio
    of on-policy samples, which is 1 here.
    """
    indices = torch.cat([indices for micros in mini for indices in micros])
    e = experience.select(batch.select_tokens(indices).to(experience.mask_T.device))
    assert e.old_logprobs_T is not None
    cu_seqlens_B1 = boundaries(batch.response_lengths_B[indices]).to(e.mask_T.device)
    return math.sqrt(losses.sequence_ess(e.old_logprobs_T - e.behavior_logprobs_T, e.mask_T, cu_seqlens_B1))


def policy_terms(
    algorithm: AlgorithmConfig,
    micro: Batch,
    e: Experience,
    logprobs_T: Tensor,
    entropy_T: Tensor | None,
    counts: Counts,
    region: losses.TrustRegion,
) -> dict[str, Tensor]:
    """The weighted terms of the policy's loss by name; their sum is minimised (VAPO eq. 10 by default).

    `micro` and `e` hold the same responses; logprobs_T and entropy_T (T,) are the policy's on them, now;
    the entropy is None where it is not in the loss. `region` is the mini-batch's `trust_region`.
    """
    if algorithm.aggregation is Aggregation.token:
        scale_T = losses.token_scale(e.mask_T, counts.tokens)
    else:
        cu_seqlens_B1 = micro.response_cu_seqlens_B1.to(e.mask_T.device)
        scale_T = losses.sequence_scale(e.mask_T, cu_seqlens_B1, counts.responses)
    terms = {"pg_loss": _surrogate(algorithm, e, logprobs_T, scale_T, region)}
    if algorithm.positive_lm_weight != 0.0:
        lm_loss = losses.positive_lm_loss(logprobs_T, e.weights_T, e.lm_mask_T, counts.lm_tokens)
        terms["lm_loss"] = algorithm.positive_lm_weight * lm_loss
    if algorithm.entropy_weight != 0.0:
        assert entropy_T is not None
        entropy_scale_T = scale_T if e.entropy_mask_T is None else scale_T * e.entropy_mask_T
        terms["entropy_loss"] = algorithm.entropy_weight * losses.entropy_loss(entropy_T, entropy_scale_T)
    if e.reference_logprobs_T is not None:
        kl_loss = losses.kl_loss(logprobs_T, e.reference_logprobs_T, scale_T)
        terms["kl_loss"] = algorithm.kl_weight * kl_loss
    return terms


def trust_region(algorithm: AlgorithmConfig, m2_edge: float = math.inf) -> losses.TrustRegion:
    """Of the ratio to the policy of `proximal_logprobs`. `m2_edge` is that of `losses.second_moment`, for m2 alone."""
    if algorithm.correction is Correction.m2:
        return losses.TrustRegion(low=-math.expm1(-m2_edge), high=math.expm1(m2_edge), dual=algorithm.dual_clip)
    if algorithm.correction is Correction.dis:
        return losses.TrustRegion(low=algorithm.dis_low, high=algorithm.dis_high, is_band=True)
    return losses.TrustRegion(low=algorithm.clip_low, high=algorithm.clip_high, dual=algorithm.dual_clip)


def proximal_logprobs(algorithm: AlgorithmConfig, e: Experience) -> Tensor:
    """Log-probs of the policy that the trust region is around, (T,): pi_behavior or pi_old."""
    if algorithm.correction in AROUND_BEHAVIOR:
        return e.behavior_logprobs_T
    assert e.old_logprobs_T is not None
    return e.old_logprobs_T


@torch.no_grad()
def lost_advantage(
    algorithm: AlgorithmConfig, e: Experience, logprobs_T: Tensor, region: losses.TrustRegion
) -> dict[str, Tensor]:
    """Which tokens the correction takes from the policy's loss, or a part of them, by kind; bool (T,), disjoint.

    masked: without any gradient, whatever the sign of A; clipped: without one, because the ratio is beyond the edge
    that stops this sign; truncated: with less weight than pi_old / pi_behavior. Only kinds that the correction has.
    """
    u_T = losses.ratio(logprobs_T, proximal_logprobs(algorithm, e))
    above_T, below_T = u_T > 1.0 + region.high, u_T < 1.0 - region.low
    if region.is_band:
        return {"masked": (u_T >= 1.0 + region.high) | (u_T <= 1.0 - region.low)}
    beyond_dual_T = u_T > region.dual if region.dual is not None else torch.zeros_like(above_T)
    clipped_T = torch.where(e.advantages_T > 0.0, above_T, below_T | beyond_dual_T)
    if algorithm.correction is Correction.icepop:
        masked_T = e.weights_T == 0.0
        return {"masked": masked_T, "clipped": clipped_T & ~masked_T}
    if algorithm.correction in (Correction.decoupled, Correction.tis):
        assert e.old_logprobs_T is not None
        is_cut_T = losses.ratio(e.old_logprobs_T, e.behavior_logprobs_T) > algorithm.truncation
        return {"clipped": clipped_T, "truncated": is_cut_T & ~clipped_T}
    return {"clipped": clipped_T}


def _surrogate(
    algorithm: AlgorithmConfig, e: Experience, logprobs_T: Tensor, scale_T: Tensor, region: losses.TrustRegion
) -> Tensor:
    """PPO's clipped loss, or that of DIS. Around pi_behavior the ratio is the whole correction: no weights."""
    proximal_T = proximal_logprobs(algorithm, e)
    if algorithm.correction is Correction.dis:
        return losses.dis_loss(
            logprobs_T,
            proximal_T,
            e.advantages_T,
            scale_T,
            dis_low=region.low,
            dis_high=region.high,
        )
    return losses.policy_loss(
        logprobs_T,
        proximal_T,
        e.advantages_T,
        torch.ones_like(e.weights_T) if algorithm.correction in AROUND_BEHAVIOR else e.weights_T,
        scale_T,
        clip_low=region.low,
        clip_high=region.high,
        dual_clip=region.dual,
    )

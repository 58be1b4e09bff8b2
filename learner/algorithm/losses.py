"""Losses of the policy and the critic on packed streams: tensors and numbers in, a scalar out.

Axes: T response tokens laid end to end, B sequences, B1 boundaries of the sequences in T.

Three log-probs of the same token: `behavior_logprobs` (recorded when it was drawn), `old_logprobs` (the
policy at the start of the step), `logprobs` (the policy now; the only one with a gradient). The policy that a
loss holds on to, pi_old or pi_behavior, is called proximal.

Normalisation. A loss is SUM_t scale_t * loss_t, and the scale already holds the denominator: the count of
tokens (or of responses) of the whole optimizer mini-batch, over all its micro-batches and all ranks. The
sum of the losses of any split of a mini-batch is therefore the loss of the mini-batch, and so are the
gradients. Tokens outside the mask have scale 0. Tokens that a correction rejects stay in the mask and in
the denominator.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config import Correction

LOG_RATIO_LIMIT = 20.0  # log-ratios are clamped to +-this before exp: e^20 is large, and finite in float32


@dataclass(frozen=True, kw_only=True)
class TrustRegion:
    """Where the ratio pi / pi_proximal ends to push: 1 - low and 1 + high.

    PPO's clip stops A > 0 above and A < 0 below, and A < 0 beyond `dual` where there is one. A band (DIS) stops
    both signs on both sides.
    """

    low: float
    high: float
    dual: float | None = None
    is_band: bool = False


def ratio(logprobs_T: Tensor, reference_logprobs_T: Tensor) -> Tensor:
    """exp of the clamped difference of log-probs, (T,)."""
    return (logprobs_T - reference_logprobs_T).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def token_scale(mask_T: Tensor, num_tokens: int) -> Tensor:
    """mask / num_tokens, float32 (T,): every token of the mini-batch weighs the same (VAPO eq. 7).

    `num_tokens` is the count of masked tokens of the whole mini-batch, on all ranks. With none, all zeros.
    """
    return mask_T.float() / max(num_tokens, 1)


def tokens_per_response(mask_T: Tensor, cu_seqlens_B1: Tensor) -> Tensor:
    """Masked tokens of each response, int64 (B,)."""
    before_T1 = torch.nn.functional.pad(mask_T.long().cumsum(0), (1, 0))
    return before_T1[cu_seqlens_B1[1:]] - before_T1[cu_seqlens_B1[:-1]]


def sequence_scale(mask_T: Tensor, cu_seqlens_B1: Tensor, num_sequences: int) -> Tensor:
    """mask / (masked tokens of the token's response * num_sequences), float32 (T,).

    Every response of the mini-batch weighs the same (VAPO eq. 6, vanilla PPO). `num_sequences` counts the
    responses of the whole mini-batch, on all ranks, that have a token in the mask.
    """
    count_B = tokens_per_response(mask_T, cu_seqlens_B1)
    weight_B = 1.0 / (count_B.clamp(min=1).float() * max(num_sequences, 1))
    lengths_B = cu_seqlens_B1.diff()
    return mask_T.float() * torch.repeat_interleave(weight_B, lengths_B, output_size=mask_T.numel())


@torch.no_grad()
def correction_weights(
    old_logprobs_T: Tensor,
    behavior_logprobs_T: Tensor,
    correction: Correction,
    *,
    truncation: float,
    mask_low: float,
    mask_high: float,
    dis_low: float,
    dis_high: float,
) -> Tensor:
    """Weight of each token for having been drawn by another policy, from rho = pi_old / pi_behavior, (T,).

    none       1
    behavior   min(rho, truncation). Its policy loss is `policy_loss` around pi_behavior, whose ratio holds all of
               pi / pi_behavior, and takes no weight: one would count rho twice. These are for the
               language-model loss, which has no ratio of its own; they are those of decoupled, so that the two
               differ only in where the clip is
    decoupled  min(rho, truncation): AReaL's decoupled PPO (arXiv 2505.24298), where the clip is around pi_old
               and rho accounts for the rest, truncated
    tis        the same weights under the name of truncated importance sampling
    icepop     rho where mask_low <= rho <= mask_high, else 0
    dis        rho where 1 - dis_low < rho < 1 + dis_high, else 0 (SAO, arXiv 2607.07508). Its policy loss is
               `dis_loss`, which has the ratio to pi_behavior inside and takes no weight; these are for the
               language-model loss
    m2         those of behavior, from which it differs in the edges of the clip (`second_moment`)

    With behavior_logprobs = old_logprobs every weight is exactly 1.
    """
    rho_T = ratio(old_logprobs_T, behavior_logprobs_T)
    match correction:
        case Correction.none:
            return torch.ones_like(rho_T)
        case Correction.behavior | Correction.decoupled | Correction.tis | Correction.m2:
            return rho_T.clamp(max=truncation)
        case Correction.icepop:
            return torch.where((rho_T >= mask_low) & (rho_T <= mask_high), rho_T, 0.0)
        case Correction.dis:
            return _in_dis_band(rho_T, dis_low, dis_high)


@torch.no_grad()
def sequence_ess(log_ratio_T: Tensor, mask_T: Tensor, cu_seqlens_B1: Tensor) -> Tensor:
    """Effective sample size of the responses as a share of their number n: (SUM w)^2 / (n SUM w^2), float64 scalar.

    w is the product of e^log_ratio over a response's tokens in the mask, untruncated. Between 1/n and 1, and 1 where
    all weights are equal. n counts the responses with a token in the mask; there must be one.
    """
    kept_T = torch.where(mask_T, log_ratio_T.double().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), 0.0)
    log_weight_B = torch.segment_reduce(kept_T, "sum", lengths=cu_seqlens_B1.diff())
    counted_B = tokens_per_response(mask_T, cu_seqlens_B1) > 0
    share_B = log_weight_B[counted_B].softmax(0)  # w / SUM w
    return 1.0 / (share_B.square().sum() * counted_B.sum())


@dataclass(frozen=True, kw_only=True)
class SecondMoment:
    """M2 of a mini-batch: the mean of (log pi / pi_behavior)^2 over the tokens that a clip can stop, nats^2."""

    before: float  # over all of them; 0 without any, like `after`
    after: float  # over those that stay, at most the threshold
    edge: float  # nats: a token stays when |log pi / pi_behavior| is below; inf when all do


@torch.no_grad()
def second_moment(log_ratio_T: Tensor, advantages_T: Tensor, mask_T: Tensor, threshold: float) -> SecondMoment:
    """Where M2PO (arXiv 2510.01161, section 5.2) cuts: the most extreme tokens go until M2 of the others <= threshold.

    Only tokens that PPO's clip can stop are counted and can go: A > 0 and ratio > 1, or A < 0 and ratio < 1.
    Algorithm 1 takes out the largest square again and again, so it leaves a prefix of the squares in ascending order;
    the means of prefixes ascend too, and the one it leaves is the longest with a mean of at most the threshold. Where
    equal squares are on both sides of its end, all of them go. A clip of the ratio at e^-edge and e^edge has the
    gradient of that mask: it stops the same signs, and those tokens alone. The edge is halfway between the last that
    stays and the first that goes, where rounding moves neither.
    """
    is_pushed_T = mask_T & (log_ratio_T.sign() * advantages_T.sign() > 0.0)
    size_N = log_ratio_T[is_pushed_T].double().abs().sort().values
    num_tokens = size_N.numel()
    size_N1 = torch.nn.functional.pad(size_N, (1, 0))  # a 0 in front: nothing stays
    count_N1 = torch.arange(num_tokens + 1, device=size_N.device).clamp(min=1)
    mean_N1 = size_N1.square().cumsum(0) / count_N1
    last = int((mean_N1 <= threshold).sum()) - 1
    if last == num_tokens:
        return SecondMoment(before=mean_N1[-1].item(), after=mean_N1[-1].item(), edge=math.inf)
    first_gone = size_N1[last + 1]
    last = int((size_N1 < first_gone).sum()) - 1
    edge = (size_N1[last] + first_gone) / 2.0
    return SecondMoment(before=mean_N1[-1].item(), after=mean_N1[last].item(), edge=edge.item())


def _in_dis_band(ratio_T: Tensor, dis_low: float, dis_high: float) -> Tensor:
    """The ratio where 1 - dis_low < ratio < 1 + dis_high, else 0."""
    return torch.where((ratio_T > 1.0 - dis_low) & (ratio_T < 1.0 + dis_high), ratio_T, 0.0)


def policy_loss(
    logprobs_T: Tensor,
    proximal_logprobs_T: Tensor,
    advantages_T: Tensor,
    weights_T: Tensor,
    scale_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """Clipped policy loss: -SUM_t scale_t w_t min(u_t A_t, clip(u_t, 1 - clip_low, 1 + clip_high) A_t).

    u = pi / pi_proximal, where the proximal policy is pi_old, and the weights w are `correction_weights`,
    constants; or it is pi_behavior, and they are 1. VAPO eq. 8 (clip-higher) has 0.2 and 0.28.
    Exactly at an edge of the clip the gradient is that of the inside. `dual_clip` = c > 1 bounds the term
    from below by c A where A < 0 (arXiv 1912.09729): a token with a huge ratio then has no gradient.
    """
    u_T = ratio(logprobs_T, proximal_logprobs_T)
    clipped_T = u_T.clamp(1.0 - clip_low, 1.0 + clip_high)
    surrogate_T = torch.minimum(u_T * advantages_T, clipped_T * advantages_T)
    if dual_clip is not None:
        floor_T = dual_clip * advantages_T
        surrogate_T = torch.where(advantages_T < 0.0, torch.maximum(surrogate_T, floor_T), surrogate_T)
    return -(scale_T * weights_T * surrogate_T).sum()


def dis_loss(
    logprobs_T: Tensor,
    behavior_logprobs_T: Tensor,
    advantages_T: Tensor,
    scale_T: Tensor,
    *,
    dis_low: float,
    dis_high: float,
) -> Tensor:
    """-SUM_t scale_t sg[f(r_t) A_t] log pi(y_t), with r = pi / pi_behavior (SAO, arXiv 2607.07508).

    f(r) = r where 1 - dis_low < r < 1 + dis_high, else 0, for both signs of A: there is no pi_old and no
    clip.
    """
    weight_T = _in_dis_band(ratio(logprobs_T.detach(), behavior_logprobs_T), dis_low, dis_high)
    return -(scale_T * weight_T * advantages_T * logprobs_T).sum()


def positive_lm_loss(logprobs_T: Tensor, weights_T: Tensor, lm_mask_T: Tensor, num_tokens: int) -> Tensor:
    """-1/num_tokens SUM_t w_t log pi(y_t) over the tokens of correct responses that are not truncated (VAPO
    eq. 9).

    `num_tokens` counts `lm_mask_T` over the whole mini-batch, on all ranks: dividing by a micro-batch's own
    count would make the loss's weight depend on the split. With none, the loss is 0. "Correct" is the
    verdict, not a reward above 0. The paper does not discuss stale samples: they are weighted like in the
    policy loss.
    """
    return -(token_scale(lm_mask_T, num_tokens) * weights_T * logprobs_T).sum()


def entropy_loss(entropy_T: Tensor, scale_T: Tensor) -> Tensor:
    """-SUM_t scale_t H_t, to be minimised: the entropy bonus."""
    return -(scale_T * entropy_T).sum()


def kl_loss(logprobs_T: Tensor, reference_logprobs_T: Tensor, scale_T: Tensor) -> Tensor:
    """SUM_t scale_t k3_t, the estimate k3 = e^x - 1 - x, x = log pi_ref - log pi, of KL(pi || pi_ref).

    Non-negative, and 0 with zero gradient at pi = pi_ref (as in GRPO, arXiv 2402.03300 eq. 4).
    """
    log_ratio_T = (reference_logprobs_T - logprobs_T).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return (scale_T * (torch.expm1(log_ratio_T) - log_ratio_T)).sum()


def value_loss(
    values_T: Tensor,
    old_values_T: Tensor,
    targets_T: Tensor,
    scale_T: Tensor,
    value_clip: float | None = None,
) -> Tensor:
    """SUM_t scale_t 1/2 (V_t - G_t)^2.

    With `value_clip` = c the larger of that and the same of old V + clip(V - old V, -c, c), as in PPO's
    code. The paper does not mention it, and during value pretraining it holds on to wrong values: leave it
    off there.
    """
    error_T = (values_T - targets_T).square()
    if value_clip is not None:
        clipped_T = old_values_T + (values_T - old_values_T).clamp(-value_clip, value_clip)
        error_T = torch.maximum(error_T, (clipped_T - targets_T).square())
    return 0.5 * (scale_T * error_T).sum()

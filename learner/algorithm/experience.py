"""From scores to experience: everything the updates of one step need of every response token, computed once.

Each rank estimates its own share, because advantages run along whole responses and a response is on one
rank; then the shares are put together on all ranks, so that later passes may split the batch differently.

Axes: B responses, T response tokens of the batch laid end to end; a share has the same axes, fewer of each.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from common.config import AdvantageEstimator, AlgorithmConfig, Config, ValueTarget
from learner.algorithm import advantages as adv
from learner.algorithm import disagreement
from learner.algorithm.losses import correction_weights
from learner.algorithm.packing import Batch

# Relative: below it a difference of variances says nothing, so that a constant value explains nothing.
ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Outputs of the networks before they change, (T,) of a share, float32 on the device."""

    old_logprobs_T: Tensor | None  # None where the policy was not scored, like the entropy
    entropy_T: Tensor | None
    values_T: Tensor | None  # None without a critic; of several the mean
    disagreement_T: Tensor | None  # standard deviation of several critics' values; None of one
    reference_logprobs_T: Tensor | None  # None without a KL term

    @property
    def device(self) -> torch.device:
        """Of whatever was scored: the policy, or in warm-up at least the critic."""
        scored = self.values_T if self.old_logprobs_T is None else self.old_logprobs_T
        assert scored is not None
        return scored.device


@dataclass(frozen=True, kw_only=True)
class Experience:
    """What the updates need of every response token: (T,) each, on the device, the same on every rank."""

    mask_T: Tensor  # bool, tokens that enter the losses
    lm_mask_T: Tensor  # bool, those of them in correct responses that are not truncated
    gap_T: Tensor  # int64, learner version - version that drew the token
    behavior_logprobs_T: Tensor  # as recorded
    old_logprobs_T: Tensor | None  # None where the policy was not scored, like entropy and weights
    entropy_T: Tensor | None
    weights_T: Tensor | None  # off-policy correction (losses.correction_weights)
    advantages_T: Tensor | None  # None in warm-up
    values_T: Tensor | None  # None without a critic, like the targets
    value_targets_T: Tensor | None
    disagreement_T: Tensor | None  # standard deviation of several critics' values; None of one
    entropy_mask_T: Tensor | None  # bool, tokens whose entropy enters the loss; None: all of mask_T
    reference_logprobs_T: Tensor | None  # None without a KL term
    uses_values: bool | None  # whether algorithm.value_gate let the values into the advantages; None without it

    def select(self, tokens: Tensor) -> "Experience":
        """The tokens at these places in T."""
        streams = {field.name: getattr(self, field.name) for field in fields(self)}
        return Experience(**{name: x[tokens] if isinstance(x, Tensor) else x for name, x in streams.items()})


@torch.no_grad()
def estimate(
    config: Config,
    batch: Batch,
    mine: Tensor,
    scores: Scores,
    version: int,
    is_warmup: bool,
    process_group: dist.ProcessGroup | None,
) -> Experience:
    """The experience of the whole batch, from this rank's scores of the responses at `mine` (int64).

    The behavior's log-probs are the recorded ones, at max_staleness 0 too: the engine that samples rounds
    otherwise than the learner (about 1e-6 nats a token in float32, 0.04 in bfloat16), so a correction has
    something to correct even when no weights have changed. Warm-up needs no advantages. A collective: every
    rank calls it, also with nothing in its share.
    """
    device, algorithm, share = scores.device, config.algorithm, batch.select(mine)
    tokens, behavior_T = batch.select_tokens(mine).to(device), share.behavior_logprobs_T.to(device)
    uses_values, advantages_T = None, None
    if not is_warmup:
        uses_values = value_gate(algorithm, share, scores.values_T, process_group)
        advantages_T = policy_advantages(algorithm, batch, mine, scores.values_T, uses_values is not False).to(device)
        if algorithm.whiten_advantages:
            advantages_T = adv.whiten(advantages_T, share.loss_mask_T.to(device), process_group)
    mine_T = {
        "old_logprobs_T": scores.old_logprobs_T,
        "entropy_T": scores.entropy_T,
        "weights_T": _weights(algorithm, scores.old_logprobs_T, behavior_T),
        "advantages_T": advantages_T,
        "values_T": scores.values_T,
        "value_targets_T": critic_targets(algorithm, share, scores, behavior_T, is_warmup),
        "disagreement_T": scores.disagreement_T,
        "reference_logprobs_T": scores.reference_logprobs_T,
    }
    together_T = _put_together(mine_T, tokens, batch.num_response_tokens, process_group)
    mask_T, sigma_T = batch.loss_mask_T.to(device), together_T["disagreement_T"]
    together_T["advantages_T"] = disagreement.masked(algorithm, together_T["advantages_T"], sigma_T, mask_T)
    return Experience(
        mask_T=mask_T,
        lm_mask_T=mask_T & is_lm_token(batch).to(device),
        gap_T=(version - batch.versions_T).to(device),
        behavior_logprobs_T=batch.behavior_logprobs_T.to(device),
        entropy_mask_T=disagreement.entropy_mask(algorithm, sigma_T, mask_T),
        uses_values=uses_values,
        **together_T,
    )


def _weights(algorithm: AlgorithmConfig, old_T: Tensor | None, behavior_T: Tensor) -> Tensor | None:
    """Correction weights of a share, (T,), or None where the policy was not scored."""
    if old_T is None:
        return None
    return correction_weights(
        old_T,
        behavior_T,
        algorithm.correction,
        truncation=algorithm.truncation,
        mask_low=algorithm.mask_low,
        mask_high=algorithm.mask_high,
        dis_low=algorithm.dis_low,
        dis_high=algorithm.dis_high,
    )


def is_lm_token(batch: Batch) -> Tensor:
    """Tokens of responses that are correct and not truncated, bool (T,)."""
    is_lm_B = batch.is_correct_B & ~batch.is_truncated_B
    return adv.expand(is_lm_B, batch.response_cu_seqlens_B1, batch.num_response_tokens)


def policy_lambda(algorithm: AlgorithmConfig, lengths_B: Tensor, uses_values: bool = True) -> Tensor:
    """The policy's GAE lambda of each response: length-adaptive or fixed, and 1 without values; float32 (B,)."""
    if not uses_values:
        return torch.ones(lengths_B.shape, device=lengths_B.device)
    if algorithm.length_adaptive_alpha is None:
        return torch.full(lengths_B.shape, algorithm.policy_lambda, device=lengths_B.device)
    return adv.length_adaptive_lambda(lengths_B, algorithm.length_adaptive_alpha)


def segment_starts(algorithm: AlgorithmConfig, behavior_logprobs_T: Tensor) -> Tensor | None:
    """Tokens that algorithm.segment_probability makes the first of a segment, bool (T,); None without it.

    Those that were drawn with less than that probability, by the policy that drew them: where it did not know how to
    go on, a value is worth more than within a phrase that goes on by itself. Their response's first token is one too.
    """
    if algorithm.segment_probability is None:
        return None
    return behavior_logprobs_T.exp() < algorithm.segment_probability


def value_gate(
    algorithm: AlgorithmConfig, share: Batch, values_T: Tensor | None, process_group: dist.ProcessGroup | None
) -> bool | None:
    """Whether the advantages of this batch use the critic's values; None without algorithm.value_gate.

    They do when Var(R - V) < Var(R) over the batch's trainable tokens, R being the outcome of a token's response,
    which is an explained variance above 0: otherwise the values add more variance to the advantages than they
    take away (EVPO, arXiv 2604.19485). One decision for all ranks: a collective.
    """
    if not algorithm.value_gate:
        return None
    assert values_T is not None, "the gate judges a critic"
    device, cu_seqlens_B1 = values_T.device, share.response_cu_seqlens_B1
    outcome_T = adv.expand(share.rewards_B, cu_seqlens_B1, share.num_response_tokens).to(device)
    mask_T = share.loss_mask_T.to(device)
    _, unexplained = adv.moments(outcome_T - values_T, mask_T, process_group)
    _, variance = adv.moments(outcome_T, mask_T, process_group)
    return bool(unexplained < variance * (1.0 - ROUNDING))


def policy_advantages(
    algorithm: AlgorithmConfig, batch: Batch, mine: Tensor, values_T: Tensor | None, uses_values: bool = True
) -> Tensor:
    """Advantages of the share at `mine` before whitening, (T,): from `values_T`, or from its groups' rewards.

    With `uses_values` False (see `value_gate`) the value is the mean reward of the batch everywhere and lambda
    is 1, so that every token of a response gets its outcome minus that mean: under a smaller lambda a constant
    value would leave nothing for all but the last tokens.

    With V-trace targets the advantages stay GAE: the correction weight of the loss already accounts for the
    policy that sampled, and V-trace's own advantage would count it twice.
    """
    share = batch.select(mine)
    if algorithm.advantage is AdvantageEstimator.gae:
        assert values_T is not None, "GAE needs values"
        cu_seqlens_B1 = share.response_cu_seqlens_B1.to(values_T.device)
        lambda_B = policy_lambda(algorithm, cu_seqlens_B1.diff(), uses_values)
        if not uses_values:
            values_T = torch.full_like(values_T, batch.rewards_B.mean().item())
        starts_T = segment_starts(algorithm, share.behavior_logprobs_T.to(values_T.device))
        rewards_B = share.rewards_B.to(values_T.device)
        return adv.gae(values_T, rewards_B, cu_seqlens_B1, lambda_B, algorithm.gamma, starts_T)
    is_grpo = algorithm.advantage is AdvantageEstimator.grpo
    estimator = adv.group_normalised_advantages if is_grpo else adv.leave_one_out_advantages
    advantages_B = estimator(batch.rewards_B, batch.group_index_B)[mine]
    return adv.expand(advantages_B, share.response_cu_seqlens_B1, share.num_response_tokens)


def critic_targets(
    algorithm: AlgorithmConfig, share: Batch, scores: Scores, behavior_logprobs_T: Tensor, is_warmup: bool
) -> Tensor | None:
    """The critic's targets for a share, (T,), or None without a critic.

    In warm-up they are Monte-Carlo returns, whatever is configured for later: a critic that knows nothing has
    nothing to bootstrap from, and with lambda < 1 the outcome would hardly reach the first tokens (VAPO section 4.1,
    VC-PPO arXiv 2503.01491).
    """
    values_T = scores.values_T
    if values_T is None:
        return None
    cu_seqlens_B1 = share.response_cu_seqlens_B1.to(values_T.device)
    rewards_B = share.rewards_B.to(values_T.device)
    if is_warmup or algorithm.value_target is ValueTarget.gae:
        gae_lambda = 1.0 if is_warmup else algorithm.critic_lambda
        return adv.value_targets(values_T, rewards_B, cu_seqlens_B1, gae_lambda, algorithm.gamma)
    assert scores.old_logprobs_T is not None
    targets_T, _ = adv.vtrace(
        values_T,
        rewards_B,
        scores.old_logprobs_T - behavior_logprobs_T,
        cu_seqlens_B1,
        gamma=algorithm.gamma,
        gae_lambda=algorithm.critic_lambda,
        rho_bar=algorithm.vtrace_rho_bar,
        c_bar=algorithm.vtrace_c_bar,
    )
    return targets_T


def _put_together(
    mine_T: Mapping[str, Tensor | None],
    tokens: Tensor,
    num_tokens: int,
    process_group: dist.ProcessGroup | None,
) -> dict[str, Tensor | None]:
    """The streams of all ranks' shares at their places in T, in one all-reduce.

    Every token is in exactly one share, so the sum over ranks adds zeros to it and is exact.
    """
    present = {name: x for name, x in mine_T.items() if x is not None}
    streams = torch.zeros(len(present), num_tokens, device=tokens.device)
    streams[:, tokens] = torch.stack([x.to(tokens.device) for x in present.values()])
    if process_group is not None:
        dist.all_reduce(streams, group=process_group)
    absent: dict[str, Tensor | None] = dict.fromkeys(mine_T)
    return absent | dict(zip(present, streams.unbind(0), strict=True))

"""The estimators of the policy gradient that are compared, as settings of the algorithm, and what they make of a batch.

At the policy that has sampled, where every ratio is 1 and no clip is active, the gradient of the policy's loss is

    g = SUM_t c_t grad log pi(y_t),   c_t = -scale_t A_t

so an estimator is a weight for every token, and nothing else: advantages and scale are the trainer's own
(experience.estimate, objective.policy_terms). Left out are the off-policy correction, whose weights are 1 but for the
engine's rounding, and all terms of the loss that are no policy gradient (language-model loss, entropy, KL).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.config import AdvantageEstimator, Aggregation, AlgorithmConfig, Config, Correction
from learner.algorithm.disagreement import aggregate
from learner.algorithm.experience import Scores, estimate
from learner.algorithm.objective import count, policy_terms, trust_region
from learner.algorithm.packing import Batch

CRITIC = "critic"  # the name of the only critic, where there are not several
GRID = (0.8, 0.9, 0.95, 0.97, 0.99, 0.995, 1.0)  # of lambda


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """`critic` names the values that GAE reads, None for V = 0 everywhere; other estimators read none."""

    name: str
    algorithm: AlgorithmConfig
    critic: str | None = None
    is_truth: bool = False  # its mean is the true gradient; see `unbiased`

    @property
    def uses_critic(self) -> bool:
        return self.critic is not None and self.algorithm.advantage is AdvantageEstimator.gae

    @property
    def fixed_lambda(self) -> float | None:
        """Of GAE with a critic; None where lambda follows the length, or there is neither."""
        is_fixed = self.uses_critic and self.algorithm.length_adaptive_alpha is None
        return self.algorithm.policy_lambda if is_fixed else None


def usual(algorithm: AlgorithmConfig, critic: str | None, group_size: int, grid: Sequence[float]) -> list[Estimator]:
    """What `run.py signal` compares, the unbiased one first. `critic` is None where there is none to be had."""
    has_groups = group_size > 1
    rows = [unbiased(algorithm, critic, has_groups), configured(algorithm, critic)]
    if critic is not None:
        rows += [fixed(algorithm, critic, gae_lambda) for gae_lambda in grid]
    if critic is not None and algorithm.advantage is AdvantageEstimator.gae:
        rows.append(replace(configured(algorithm, None), name=f"V = 0, {trace(algorithm)}"))
    return rows + (critic_free(algorithm) if has_groups else [])


def unbiased(algorithm: AlgorithmConfig, critic: str | None, has_groups: bool) -> Estimator:
    """The gradient of the expected reward: reward minus a baseline that the token does not change, all tokens alike.

    The baseline is the critic's value (GAE at lambda 1), the mean of the group's other members without a critic, and 0
    with neither. Nothing is whitened, and the sum over tokens is divided by the number of responses, which is no random
    number: dividing by the batch's tokens would weigh batches of short responses more.
    """
    settings = replace(
        algorithm,
        gamma=1.0,
        length_adaptive_alpha=None,
        policy_lambda=1.0,
        value_gate=False,
        agreement_mask=None,
        whiten_advantages=False,
        aggregation=Aggregation.token,
    )
    is_group_relative = critic is None and has_groups
    advantage = AdvantageEstimator.rloo if is_group_relative else AdvantageEstimator.gae
    name = "RLOO" if is_group_relative else "lambda 1" if critic is not None else "lambda 1, V = 0"
    return Estimator(name=name, algorithm=replace(settings, advantage=advantage), critic=critic, is_truth=True)


def configured(algorithm: AlgorithmConfig, critic: str | None) -> Estimator:
    if algorithm.advantage is not AdvantageEstimator.gae:
        return Estimator(name=f"as configured: {algorithm.advantage}", algorithm=algorithm)
    values = "" if critic is not None else ", V = 0"
    if critic is None:
        algorithm = replace(algorithm, agreement_mask=None)
    return Estimator(name=f"as configured: {trace(algorithm)}{values}", algorithm=algorithm, critic=critic)


def fixed(algorithm: AlgorithmConfig, critic: str, gae_lambda: float) -> Estimator:
    """GAE with one lambda for all responses; whitened and aggregated as configured."""
    settings = replace(
        algorithm,
        advantage=AdvantageEstimator.gae,
        length_adaptive_alpha=None,
        policy_lambda=gae_lambda,
        value_gate=False,
        agreement_mask=None,
    )
    return Estimator(name=f"lambda {gae_lambda:g}", algorithm=settings, critic=critic)


def critic_free(algorithm: AlgorithmConfig) -> list[Estimator]:
    """Those of configs/grpo.yaml and configs/dapo.yaml, the latter on batches as they come, and RLOO."""
    kinds = (
        ("GRPO", AdvantageEstimator.grpo, Aggregation.sequence),
        ("DAPO without resampling", AdvantageEstimator.grpo, Aggregation.token),
        ("RLOO", AdvantageEstimator.rloo, Aggregation.token),
    )
    plain = replace(algorithm, whiten_advantages=False, value_gate=False, agreement_mask=None)
    return [
        Estimator(name=name, algorithm=replace(plain, advantage=advantage, aggregation=aggregation))
        for name, advantage, aggregation in kinds
    ]


def trace(algorithm: AlgorithmConfig) -> str:
    """How far advantages look ahead, in words."""
    alpha = algorithm.length_adaptive_alpha
    return f"lambda {algorithm.policy_lambda:g}" if alpha is None else f"alpha {alpha:g}"


def token_weights(config: Config, batch: Batch, estimator: Estimator, values: Mapping[str, Tensor]) -> Tensor:
    """c_t of the header, (T,), on the CPU; `values` has those of each critic, (T, M), of M that are averaged."""
    algorithm = replace(
        estimator.algorithm,
        correction=Correction.none,
        positive_lm_weight=0.0,
        entropy_weight=0.0,
        entropy_filter=None,
        kl_weight=0.0,
    )
    logprobs_T = batch.behavior_logprobs_T  # of whatever value: at a ratio of 1 it is of no consequence
    values_TM = torch.zeros_like(logprobs_T)[:, None] if estimator.critic is None else values[estimator.critic]
    values_T, disagreement_T = aggregate(values_TM)
    everything = torch.arange(batch.num_sequences)
    scores = Scores(
        old_logprobs_T=logprobs_T,
        entropy_T=None,
        values_T=values_T,
        disagreement_T=disagreement_T,
        reference_logprobs_T=None,
    )
    settings, version = replace(config, algorithm=algorithm), int(batch.versions_T.max())
    experience = estimate(settings, batch, everything, scores, version, False, None)
    counts = count(batch, experience, [[everything]])
    now_T = logprobs_T.clone().requires_grad_()
    loss = policy_terms(algorithm, batch, experience, now_T, None, counts, trust_region(algorithm))["pg_loss"]
    (weights_T,) = torch.autograd.grad(loss, now_T)
    return weights_T * (counts.tokens / batch.num_sequences) if estimator.is_truth else weights_T

"""Limits of health: what learner/alarm.py judges while a run trains, and what it and docs/metrics.md say of it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One limit of one metric. The number is a setting of its own (`alarm.*`, AlarmConfig); null switches it off."""

    metric: str
    setting: str  # the field of AlarmConfig with the limit
    is_lowest: bool  # the metric should not fall below it; else not rise above it
    is_relative: bool = False  # the limit is a multiple of the median of the run's first alarm.window policy steps
    meaning: str
    remedy: str


_LEARN_SLOWER = "lower learner.policy.learning_rate or staleness.max_staleness"
_CORRECT = "set algorithm.correction to decoupled or behavior if it is none"

LIMITS: tuple[Limit, ...] = (
    Limit(
        metric="offpolicy/ess",
        setting="min_ess",
        is_lowest=True,
        meaning="a few tokens carry the weight of all",
        remedy=f"{_LEARN_SLOWER}, or algorithm.truncation",
    ),
    Limit(
        metric="offpolicy/sequence_ess",
        setting="min_sequence_ess_factor",
        is_lowest=True,
        is_relative=True,
        meaning="the responses are no longer samples of this policy, which token ESS does not show",
        remedy=f"{_LEARN_SLOWER}; {_CORRECT}",
    ),
    Limit(
        metric="offpolicy/weight_mean",
        setting="min_weight_mean",
        is_lowest=True,
        meaning="the correction takes most of the signal away",
        remedy=f"{_LEARN_SLOWER}, or widen its band or truncation",
    ),
    Limit(
        metric="offpolicy/weight_mean",
        setting="max_weight_mean",
        is_lowest=False,
        meaning="old tokens pull harder than new ones",
        remedy="lower algorithm.truncation or algorithm.mask_high",
    ),
    Limit(
        metric="offpolicy/chi2_token",
        setting="max_chi2",
        is_lowest=False,
        meaning="the variance of the ratios exceeds their mean: the estimate of the gradient is mostly noise",
        remedy=_LEARN_SLOWER,
    ),
    Limit(
        metric="offpolicy/m2",
        setting="max_m2",
        is_lowest=False,
        meaning="the policy has moved far from what sampled its data: without a correction runs collapse from here, "
        "with one they learn slower",
        remedy=f"{_LEARN_SLOWER}; {_CORRECT}",
    ),
    Limit(
        metric="policy/grad_norm",
        setting="max_grad_norm_factor",
        is_lowest=False,
        is_relative=True,
        meaning="gradients have grown: updates no longer fit the data",
        remedy=f"{_LEARN_SLOWER}, or learner.policy.max_grad_norm",
    ),
    Limit(
        metric="policy/entropy",
        setting="min_entropy_factor",
        is_lowest=True,
        is_relative=True,
        meaning="the policy has all but stopped exploring",
        remedy="raise algorithm.clip_high, lower algorithm.positive_lm_weight or learner.policy.learning_rate",
    ),
    Limit(
        metric="critic/explained_variance",
        setting="min_explained_variance",
        is_lowest=True,
        meaning="the critic is worse than a constant: the advantages are noise",
        remedy="set algorithm.value_gate=true, or raise algorithm.critic_updates_per_step or critic_warmup_steps",
    ),
    Limit(
        metric="offpolicy/mismatch_abs_mean",
        setting="max_mismatch_factor",
        is_lowest=False,
        is_relative=True,
        meaning="engine and learner drift apart on the same version, which is no staleness",
        remedy="look at weights/probe_difference, and for tensors that the learner's log names",
    ),
)

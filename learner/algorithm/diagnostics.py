"""What one step reports about itself, under the names that the logs use.

    reward/* length/*      the batch             critic/*     the critic before and during its updates
    gae/*                  lambdas, advantages   policy/*     the policy's updates
    staleness/*            versions of tokens, and offpolicy/*, what that does to them: learner/algorithm/views.py

Unless a name says otherwise a mean is over the tokens in the loss mask of the whole batch, all ranks. A
mean over nothing is left out instead of being a made-up number, and so is what warm-up does not need:
`offpolicy/*` and `policy/entropy` after the first step of a run, `gae/advantage_*` in all of them. Axes: B
responses, T their tokens laid end to end.

Statistics of the batch and of the start of the step are computed from streams that every rank holds in
full. Those of the updates exist in pieces (per micro-batch and rank): `Totals` adds them up and reduces
them once.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from learner.algorithm.losses import LOG_RATIO_LIMIT, TrustRegion
from learner.algorithm.packing import Batch

Metrics = dict[str, float]

POSITIONS = {"first": 0.0, "p25": 0.25, "p50": 0.5, "p75": 0.75, "last": 1.0}  # of a response

_TOKEN_MEANS = (
    "clip_fraction_high",
    "clip_fraction_low",
    "clip_fraction_dual",
    "ratio_mean",
    "kl_k1",
    "kl_k2",
    "kl_k3",
)


class Totals:
    """Sums and extremes over micro-batches, kept on the device, reduced over the ranks once.

    Invariant: every rank uses the same names in the same order, or the reduction would mix them up. That
    holds because every rank goes through the same micro-batches, empty ones included.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._by_gap: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}
        self._shared: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """A part: the total is the sum over micro-batches and ranks."""
        self._sums[name] = self._sums.get(name, 0.0) + value.detach().double()

    def add_by_gap(self, name: str, x_T: Tensor, gap_T: Tensor, num_gaps: int) -> None:
        """Parts by version gap, below `num_gaps`: the totals are `gap_0/name`, `gap_1/name` and so on."""
        zeros = torch.zeros(num_gaps, dtype=torch.float64, device=self._device)
        self._by_gap[name] = self._by_gap.get(name, zeros).index_add(0, gap_T, x_T.detach().double())

    def add_shared(self, name: str, value: Tensor) -> None:
        """A number that every rank has already, such as a gradient norm: one rank's sum is the total."""
        self._shared[name] = self._shared.get(name, 0.0) + value.detach().double()

    def keep_max(self, name: str, values: Tensor) -> None:
        """The largest of `values` (any number of them), -inf when there never is one."""
        lowest = torch.full((1,), -torch.inf, dtype=torch.float64, device=self._device)
        known = self._maxima.get(name, lowest)
        self._maxima[name] = torch.cat([values.detach().double().flatten(), known]).max().reshape(1)

    def merge(self, other: "Totals") -> None:
        """Adds all that `other` has."""
        pairs = ((self._sums, other._sums), (self._by_gap, other._by_gap), (self._shared, other._shared))
        for mine, parts in pairs:
            for name, value in parts.items():
                mine[name] = mine.get(name, 0.0) + value
        for name, value in other._maxima.items():
            self.keep_max(name, value)

    def reduce(self, process_group: dist.ProcessGroup | None) -> tuple[Metrics, Metrics]:
        """(sums, maxima) over all ranks. A collective when there is a process group."""
        names = [*self._sums, *(f"gap_{gap}/{name}" for name, x in self._by_gap.items() for gap in range(len(x)))]
        zero = torch.zeros(1, dtype=torch.float64, device=self._device)
        sums = torch.cat([*(x.reshape(1) for x in self._sums.values()), *self._by_gap.values(), zero])
        maxima = torch.cat([*self._maxima.values(), zero])
        if process_group is not None:
            dist.all_reduce(sums, group=process_group)
            dist.all_reduce(maxima, dist.ReduceOp.MAX, group=process_group)
        shared = {name: value.item() for name, value in self._shared.items()}
        return (
            dict(zip(names, sums.tolist(), strict=False)) | shared,
            dict(zip(self._maxima, maxima.tolist(), strict=False)),
        )


def named(values: Mapping[str, Tensor]) -> Metrics:
    """Single numbers that are on one device, fetched at once."""
    if not values:
        return {}
    numbers = torch.stack([value.double() for value in values.values()]).tolist()
    return dict(zip(values, numbers, strict=True))


def batch_metrics(batch: Batch) -> Metrics:
    """Rewards, lengths (response tokens) and groups. Means are over responses."""
    lengths_B = batch.response_lengths_B.double()
    is_correct_B = batch.is_correct_B
    quantiles = torch.quantile(lengths_B, torch.tensor([0.5, 0.9, 0.95, 0.99], dtype=torch.float64)).tolist()
    metrics = {
        "reward/mean": batch.rewards_B.double().mean().item(),
        "reward/correct_fraction": is_correct_B.double().mean().item(),
        "length/mean": lengths_B.mean().item(),
        "length/max": lengths_B.max().item(),
        "length/truncated_fraction": batch.is_truncated_B.double().mean().item(),
    }
    metrics |= dict(zip(("length/p50", "length/p90", "length/p95", "length/p99"), quantiles, strict=True))
    for name, chosen_B in (("correct", is_correct_B), ("wrong", ~is_correct_B)):
        if chosen_B.any():
            metrics[f"length/mean_{name}"] = lengths_B[chosen_B].mean().item()
    return metrics | _group_metrics(batch)


def _group_metrics(batch: Batch) -> Metrics:
    """Groups that are all right or all wrong: no signal for group-relative estimators."""
    _, group_B, size_G = torch.unique(batch.group_index_B, return_inverse=True, return_counts=True)
    correct_G = torch.zeros_like(size_G).index_add_(0, group_B, batch.is_correct_B.long())
    solved = (correct_G == size_G).double().mean().item()
    unsolved = (correct_G == 0).double().mean().item()
    return {"reward/solved_group_fraction": solved, "reward/unsolved_group_fraction": unsolved}


def gae_metrics(gae_lambda_B: Tensor) -> Metrics:
    """The policy's lambdas, over responses. Clamped means lambda = 0: pure one-step TD."""
    gae_lambda_B = gae_lambda_B.double()
    return {
        "gae/lambda_mean": gae_lambda_B.mean().item(),
        "gae/lambda_min": gae_lambda_B.min().item(),
        "gae/lambda_clamped_fraction": (gae_lambda_B == 0.0).double().mean().item(),
    }


def segment_metrics(starts_T: Tensor, cu_seqlens_B1: Tensor) -> Metrics:
    """Tokens of a segment (experience.segment_starts) on average, over all segments of all responses."""
    is_first_T = starts_T.clone()
    is_first_T[cu_seqlens_B1[:-1]] = True
    return {"gae/segment_length": starts_T.numel() / int(is_first_T.sum())}


def token_metrics(name: str, x_T: Tensor, mask_T: Tensor) -> Metrics:
    """Mean, standard deviation and largest magnitude of a stream, as name_mean, name_std, name_abs_max."""
    if not mask_T.any():
        return {}
    kept_T = x_T[mask_T].double()
    return {
        f"{name}_mean": kept_T.mean().item(),
        f"{name}_std": kept_T.std(correction=0).item(),
        f"{name}_abs_max": kept_T.abs().max().item(),
    }


def critic_metrics(
    values_T: Tensor,
    rewards_B: Tensor,
    is_correct_B: Tensor,
    mask_T: Tensor,
    cu_seqlens_B1: Tensor,
    reward_range: tuple[float, float],
) -> Metrics:
    """Quality of the values at the start of the step, against the outcome.

    Explained variance is 1 - Var(R - V) / (Var(R) + 1e-5) with the outcome R, not a bootstrapped return,
    which would tend to 1 whatever the values are worth; it is left out where all outcomes are alike. `brier` maps
    values to probabilities of being correct with `reward_range` = (reward of a wrong response, of a correct one).
    """
    if not mask_T.any():
        return {}
    lengths_B = cu_seqlens_B1.diff()
    outcome_T = torch.repeat_interleave(rewards_B.double(), lengths_B)[mask_T]
    correct_T = torch.repeat_interleave(is_correct_B.double(), lengths_B)[mask_T]
    kept_T = values_T[mask_T].double()
    low, high = reward_range
    probability_T = ((kept_T - low) / max(high - low, 1e-8)).clamp(0.0, 1.0)
    metrics = {
        "critic/value_mean": kept_T.mean().item(),
        "critic/value_min": kept_T.min().item(),
        "critic/value_max": kept_T.max().item(),
        "critic/brier": (probability_T - correct_T).square().mean().item(),
    } | _explained("critic/explained_variance", kept_T, outcome_T)
    for name, fraction in POSITIONS.items():
        at_B = cu_seqlens_B1[:-1] + (fraction * (lengths_B - 1)).long()
        metrics |= _value_metrics_at(name, values_T[at_B].double(), rewards_B.double(), is_correct_B)
    return metrics


def _value_metrics_at(name: str, values_B: Tensor, rewards_B: Tensor, is_correct_B: Tensor) -> Metrics:
    """One token of each response: explained variance, mean value by verdict, and ranking of the verdicts."""
    metrics = _explained(f"critic/explained_variance_{name}", values_B, rewards_B)
    right, wrong = values_B[is_correct_B], values_B[~is_correct_B]
    if right.numel():
        metrics[f"critic/value_correct_{name}"] = right.mean().item()
    if wrong.numel():
        metrics[f"critic/value_wrong_{name}"] = wrong.mean().item()
    if right.numel() and wrong.numel():
        metrics[f"critic/auc_{name}"] = area_under_curve(right, wrong)
    return metrics


def _explained(name: str, values: Tensor, outcomes: Tensor) -> Metrics:
    """Nothing where all outcomes are alike: there is nothing to explain, and any constant value would do it fully."""
    return {} if outcomes.min() == outcomes.max() else {name: explained_variance(values, outcomes)}


def explained_variance(values: Tensor, outcomes: Tensor) -> float:
    """1 - Var(outcome - value) / (Var(outcome) + 1e-5)."""
    variance = outcomes.var(correction=0) + 1e-5
    return (1.0 - (outcomes - values).var(correction=0) / variance).item()


def area_under_curve(positives: Tensor, negatives: Tensor) -> float:
    """P(a positive's score > a negative's) + P(equal) / 2, in n log n. Both must be non-empty."""
    ranked = negatives.sort().values
    below = torch.searchsorted(ranked, positives, right=False)
    not_above = torch.searchsorted(ranked, positives, right=True)
    return ((below + not_above).double().mean() / (2 * ranked.numel())).item()


@torch.no_grad()
def add_policy_totals(
    totals: Totals,
    logprobs_T: Tensor,
    proximal_logprobs_T: Tensor,
    advantages_T: Tensor,
    gap_T: Tensor,
    mask_T: Tensor,
    *,
    num_gaps: int,
    region: TrustRegion,
) -> None:
    """Adds what the trust region did on one micro-batch; `update_metrics` makes means of it."""
    logprobs_T, proximal_logprobs_T = logprobs_T[mask_T], proximal_logprobs_T[mask_T]
    advantages_T, gap_T = advantages_T[mask_T], gap_T[mask_T]
    log_ratio_T = (logprobs_T - proximal_logprobs_T).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    u_T = log_ratio_T.exp()
    high_T = (u_T > 1.0 + region.high) & ((advantages_T > 0.0) | region.is_band)
    low_T = (u_T < 1.0 - region.low) & ((advantages_T < 0.0) | region.is_band)
    totals.add("tokens", mask_T.sum())
    totals.add("clip_fraction_high", high_T.sum())
    totals.add("clip_fraction_low", low_T.sum())
    if region.dual is not None:
        totals.add("clip_fraction_dual", ((advantages_T < 0.0) & (u_T > region.dual)).sum())
    totals.add("ratio_mean", u_T.sum())
    totals.add("kl_k1", -log_ratio_T.sum())
    totals.add("kl_k2", 0.5 * log_ratio_T.square().sum())
    totals.add("kl_k3", (torch.expm1(log_ratio_T) - log_ratio_T).sum())
    totals.add("clipped_high_prob", logprobs_T.exp()[high_T].sum())
    totals.keep_max("ratio_max", u_T)
    totals.keep_max("-ratio_min", -u_T)
    totals.add_by_gap("tokens", torch.ones_like(u_T), gap_T, num_gaps)
    totals.add_by_gap("clipped", high_T | low_T, gap_T, num_gaps)


def update_metrics(sums: Mapping[str, float], maxima: Mapping[str, float]) -> Metrics:
    """What the updates did, from the reduced totals: losses and gradient norms as means over mini-batches.

    Mini-batches whose update was skipped are in `skipped_updates` and nowhere else.
    """
    metrics = _clip_metrics(sums, maxima)
    for network in ("critic", "policy"):
        updates = sums.get(f"{network}/updates", 0.0)
        per_update = (name for name in sums if name.startswith(f"{network}/") and not name.endswith("updates"))
        metrics |= {name: sums[name] / updates for name in per_update} | {f"{network}/updates": updates}
        metrics[f"{network}/skipped_updates"] = sums.get(f"{network}/skipped_updates", 0.0)
    return metrics


def _clip_metrics(sums: Mapping[str, float], maxima: Mapping[str, float]) -> Metrics:
    """Means over the tokens of all policy updates.

    The ratio is pi / pi_proximal, the one that is clipped: pi_proximal is pi_behavior under the corrections
    `behavior`, `dis` and `m2`, pi_old under the others. k1, k2, k3 estimate KL(pi_proximal || pi): with
    x = log pi - log pi_proximal they are -x, x^2 / 2 and e^x - 1 - x. `clipped_high_prob` is the mean
    probability of the tokens beyond the upper edge.
    """
    tokens = sums.get("tokens", 0.0)
    if not tokens:
        return {}
    metrics = {f"policy/{name}": sums[name] / tokens for name in _TOKEN_MEANS if name in sums}
    metrics["policy/ratio_max"] = maxima["ratio_max"]
    metrics["policy/ratio_min"] = -maxima["-ratio_min"]
    if sums["clip_fraction_high"]:
        metrics["policy/clipped_high_prob"] = sums["clipped_high_prob"] / sums["clip_fraction_high"]
    for name in sums:
        gap, _, what = name.partition("/")
        if what == "clipped" and sums[f"{gap}/tokens"]:
            metrics[f"offpolicy/{gap}/clip_fraction"] = sums[name] / sums[f"{gap}/tokens"]
    return metrics

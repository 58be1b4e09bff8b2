"""Views of staleness: how old the tokens of a step are, where that comes from, and what it does to them.

docs/metrics.md has all fifteen, and the decision that each of them serves. Those that one step can compute:

    2       where the age comes from                    staleness_metrics, update_views
    3 to 6  pi_old against what sampled, by gap         offpolicy_metrics: quantiles, ESS, sequence ESS, M2, TV
    7       what the two engines differ by              offpolicy_metrics
    8       what the correction takes away              add_lost_totals, update_views
    9       age in nats                                 VersionDistances
    11      what the critic is worth by age             critic_views

The gap g of a token is the learner's version at consumption minus the version that drew it. Sums by gap are segment
sums: no loop over tokens, and none over gaps but to name the numbers. Axes: B responses, T their tokens laid end to
end, N the tokens in the loss mask, G the gaps that occur, ascending.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from learner.algorithm.advantages import expand
from learner.algorithm.diagnostics import Metrics, Totals, named
from learner.algorithm.losses import LOG_RATIO_LIMIT

QUANTILES = {"ratio_p01": 0.01, "ratio_p50": 0.5, "ratio_p99": 0.99}  # of rho, by gap
MIN_TOKENS = 64  # one version old: on fewer the distance of two versions is not worth noting


class Segments:
    """Sums and the like of a stream by key. `keys` are those that occur, ascending; int64 (G,), like `counts`."""

    def __init__(self, key_N: Tensor) -> None:
        self.keys, self._place_N, self.counts = torch.unique(key_N, return_inverse=True, return_counts=True)

    def sum(self, x_N: Tensor) -> Tensor:
        """float64 (G,), like all that follow."""
        zeros_G = torch.zeros(len(self.keys), dtype=torch.float64, device=x_N.device)
        return zeros_G.index_add_(0, self._place_N, x_N.double())

    def mean(self, x_N: Tensor) -> Tensor:
        return self.sum(x_N) / self.counts

    def variance(self, x_N: Tensor) -> Tensor:
        """Without Bessel's correction."""
        return self.mean((x_N.double() - self.mean(x_N)[self._place_N]).square())

    def max(self, x_N: Tensor) -> Tensor:
        lowest_G = torch.full((len(self.keys),), -torch.inf, dtype=torch.float64, device=x_N.device)
        return lowest_G.scatter_reduce_(0, self._place_N, x_N.double(), "amax")

    def ess(self, log_weight_N: Tensor) -> Tensor:
        """Effective sample size as a fraction: (SUM w)^2 / (n SUM w^2), whatever the scale of the weights."""
        weight_N = (log_weight_N.double() - self.max(log_weight_N)[self._place_N]).exp()
        return self.mean(weight_N).square() / self.mean(weight_N.square())

    def quantiles(self, x_N: Tensor, fractions: Sequence[float]) -> list[Tensor]:
        """One (G,) for each fraction, interpolated linearly like torch.quantile."""
        order_N = x_N.argsort()
        order_N = order_N[self._place_N[order_N].argsort(stable=True)]
        sorted_N, first_G = x_N[order_N].double(), self.counts.cumsum(0) - self.counts
        results = []
        for fraction in fractions:
            place_G = fraction * (self.counts - 1).double()
            below_G = place_G.long()
            above_G = torch.minimum(below_G + 1, self.counts - 1)
            low_G, high_G = sorted_N[first_G + below_G], sorted_N[first_G + above_G]
            results.append(low_G + (place_G - below_G) * (high_G - low_G))
        return results


def staleness_metrics(gap_T: Tensor, mask_T: Tensor, cu_seqlens_B1: Tensor) -> Metrics:
    """Version gaps over all response tokens, masked or not, and view 2, over responses.

    Versions never decrease within a response, so its first token has the largest gap and its last one the smallest:
    the last gap is what it waited after its end (`queue_mean`), the rest came up while it was sampled (`flight_mean`).
    """
    gap_T = gap_T.double()
    newest_B = gap_T[cu_seqlens_B1[1:] - 1]
    flight_B = gap_T[cu_seqlens_B1[:-1]] - newest_B
    return named(
        {
            "staleness/token_mean": gap_T.mean(),
            "staleness/token_max": gap_T.max(),
            "staleness/versions_per_response": flight_B.mean() + 1,
            "staleness/flight_mean": flight_B.mean(),
            "staleness/queue_mean": newest_B.mean(),
            "staleness/masked_fraction": 1.0 - mask_T.double().mean(),
        }
    )


def offpolicy_metrics(
    old_logprobs_T: Tensor,
    behavior_logprobs_T: Tensor,
    weights_T: Tensor,
    gap_T: Tensor,
    mask_T: Tensor,
    cu_seqlens_B1: Tensor,
    truncation: float,
    is_published: bool,
) -> Metrics:
    """rho = pi_old / pi_behavior before any correction, the weights that the correction makes of it, and views 3 to 7.

    ess is (SUM rho)^2 / (n SUM rho^2). k1 and k3 estimate KL(pi_behavior || pi_old) from the behavior's samples:
    k1 = -log rho, k3 = rho - 1 - log rho. m2 is the mean of (log rho)^2, tv that of |pi_old - pi_behavior| of the
    tokens that were drawn. A response's ratio is the product over its tokens in the mask, and it belongs to the gap of
    the oldest of them; those without any do not count.

    `mismatch_abs_mean` is mean |log rho| over the tokens of responses that the current version drew whole, where only
    the two engines differ (in a response that spans versions even its newest tokens may be drawn from a key-value
    cache of older weights); `mismatch_prob_error` is mean e^|log rho| over the same. Neither they nor gap_0 are
    measured unless `is_published`, that pi_old is the current version: with weights.publish_every > 1 it has moved on
    in most steps, which is drift and not the engines'.
    """
    if not mask_T.any():
        return {}
    log_rho_T = (old_logprobs_T - behavior_logprobs_T).double().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    log_rho_N, gap_N = log_rho_T[mask_T], gap_T[mask_T]
    moved_N = (old_logprobs_T[mask_T].double().exp() - behavior_logprobs_T[mask_T].double().exp()).abs()
    counted_B, log_rho_B, oldest_B = _by_response(log_rho_T, gap_T, mask_T, cu_seqlens_B1)
    log_rho_B, oldest_B = log_rho_B[counted_B], oldest_B[counted_B]

    everything = _ratio_views(torch.zeros_like(gap_N), log_rho_N, moved_N)
    sequences = _sequence_views(torch.zeros_like(oldest_B), log_rho_B)
    metrics = {f"offpolicy/{name}": values[0] for name, values in (everything[1] | sequences[1]).items()}
    metrics |= _correction_metrics(log_rho_N.exp(), weights_T[mask_T].double(), log_rho_B, truncation)
    gaps, by_gap = _ratio_views(gap_N, log_rho_N, moved_N, with_quantiles=True)
    metrics |= _name_gaps("offpolicy", gaps, by_gap, is_published)
    metrics |= _name_gaps("offpolicy", *_sequence_views(oldest_B, log_rho_B, with_count=True), is_published)
    if is_published:
        metrics |= _mismatch_metrics(log_rho_T, gap_T, mask_T, cu_seqlens_B1)
    return named(metrics)


def _by_response(
    log_rho_T: Tensor, gap_T: Tensor, mask_T: Tensor, cu_seqlens_B1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each response, over its tokens in the mask: whether there are any, the sum of log rho, the largest gap."""
    log_rho_B = _sum_by_response(torch.where(mask_T, log_rho_T, 0.0), cu_seqlens_B1)
    num_B = _sum_by_response(mask_T.long(), cu_seqlens_B1)
    num_responses = len(cu_seqlens_B1) - 1
    response_T = expand(torch.arange(num_responses, device=gap_T.device), cu_seqlens_B1, len(gap_T))
    oldest_B = torch.full((num_responses,), -1, dtype=gap_T.dtype, device=gap_T.device)
    oldest_B.scatter_reduce_(0, response_T, torch.where(mask_T, gap_T, -1), "amax")
    return num_B > 0, log_rho_B, oldest_B


def _ratio_views(
    key_N: Tensor, log_rho_N: Tensor, moved_N: Tensor, with_quantiles: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """(keys, numbers by key) of tokens."""
    segments, rho_N = Segments(key_N), log_rho_N.exp()
    ratio_mean_G, log_mean_G = segments.mean(rho_N), segments.mean(log_rho_N)
    views = {
        "tokens": segments.counts.double(),
        "ratio_mean": ratio_mean_G,
        "ess": segments.ess(log_rho_N),
        "kl_k1": -log_mean_G,
        "kl_k3": segments.mean(torch.expm1(log_rho_N) - log_rho_N),
        "m2": segments.mean(log_rho_N.square()),
        "tv": segments.mean(moved_N),
    }
    if with_quantiles:
        views |= dict(zip(QUANTILES, segments.quantiles(rho_N, list(QUANTILES.values())), strict=True))
    return segments.keys, views


def _sequence_views(key_B: Tensor, log_rho_B: Tensor, with_count: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """(keys, numbers by key) of whole responses."""
    segments = Segments(key_B)
    views = {"sequence_ess": segments.ess(log_rho_B)}
    return segments.keys, views | ({"sequences": segments.counts.double()} if with_count else {})


def _correction_metrics(rho_N: Tensor, weights_N: Tensor, log_rho_B: Tensor, truncation: float) -> dict[str, Tensor]:
    """The spread of the ratios, and what the correction makes of them."""
    rho_B = log_rho_B.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    return {
        "offpolicy/ratio_std": rho_N.std(correction=0),
        "offpolicy/ratio_min": rho_N.min(),
        "offpolicy/ratio_max": rho_N.max(),
        "offpolicy/ratio_above_fraction": (rho_N > truncation).double().mean(),
        "offpolicy/ratio_below_fraction": (rho_N < 1.0 / truncation).double().mean(),
        "offpolicy/weight_mean": weights_N.mean(),
        "offpolicy/rejected_fraction": (weights_N == 0.0).double().mean(),
        "offpolicy/chi2_token": rho_N.square().mean() - 1.0,
        "offpolicy/chi2_sequence": rho_B.square().mean() - 1.0,
    }


def _mismatch_metrics(log_rho_T: Tensor, gap_T: Tensor, mask_T: Tensor, cu_seqlens_B1: Tensor) -> dict[str, Tensor]:
    """View 7; nothing where the current version drew no response whole."""
    is_whole_B = _sum_by_response((gap_T != 0).long(), cu_seqlens_B1) == 0
    current_N = log_rho_T[mask_T & expand(is_whole_B, cu_seqlens_B1, len(gap_T))].abs()
    if not current_N.numel():
        return {}
    return {
        "offpolicy/mismatch_abs_mean": current_N.mean(),
        "offpolicy/mismatch_prob_error": current_N.exp().mean(),
    }


def critic_views(values_T: Tensor, rewards_B: Tensor, gap_T: Tensor, mask_T: Tensor, cu_seqlens_B1: Tensor) -> Metrics:
    """View 11, by gap: explained variance of the outcome R as in critic_metrics, left out where all outcomes of a gap
    are alike, and the bias, mean V - R."""
    if not mask_T.any():
        return {}
    value_N = values_T[mask_T].double()
    outcome_N = expand(rewards_B.double(), cu_seqlens_B1, len(mask_T))[mask_T]
    segments = Segments(gap_T[mask_T])
    explained_G = 1.0 - segments.variance(outcome_N - value_N) / (segments.variance(outcome_N) + 1e-5)
    differ_G = segments.max(outcome_N) > -segments.max(-outcome_N)
    metrics = _name_gaps("critic", segments.keys, {"bias": segments.mean(value_N - outcome_N)})
    metrics |= _name_gaps("critic", segments.keys[differ_G], {"explained_variance": explained_G[differ_G]})
    return named(metrics)


def add_lost_totals(
    totals: Totals, advantages_T: Tensor, gap_T: Tensor, mask_T: Tensor, lost: Mapping[str, Tensor], num_gaps: int
) -> None:
    """Adds |A| of one micro-batch by gap and sign, and what of it each kind of `lost` takes away (bool (T,) each)."""
    advantages_N, gap_N = advantages_T[mask_T].double(), gap_T[mask_T]
    for sign, size_N in (("positive", advantages_N.clamp(min=0.0)), ("negative", (-advantages_N).clamp(min=0.0))):
        totals.add_by_gap(f"advantage_{sign}", size_N, gap_N, num_gaps)
        for kind, is_lost_T in lost.items():
            totals.add_by_gap(f"lost_{kind}_{sign}", size_N * is_lost_T[mask_T], gap_N, num_gaps)


def update_views(sums: Mapping[str, float]) -> Metrics:
    """The third part of view 2, and view 8, of all policy updates, from the reduced totals.

    `staleness/updates_mean` is the mean over tokens of the updates that the step had made before that of the token.
    `offpolicy/gap_G/lost_*` are shares of SUM |A| of that gap and sign, see objective.lost_advantage. `masked`:
    rejected, whatever the sign, by icepop or outside the band of dis; `clipped`: beyond the edge of the clip that stops
    the sign; `truncated`: of less weight than its ratio, so that the token keeps truncation / rho of its pull. A token
    counts once, and what the correction cannot do is left out.
    """
    metrics = {}
    if tokens := sums.get("tokens"):
        metrics["staleness/updates_mean"] = sums["updates_before"] / tokens
    for name in sums:
        gap, _, what = name.partition("/")
        if what.startswith("lost_") and (whole := sums[f"{gap}/advantage_{what.rsplit('_', 1)[1]}"]):
            metrics[f"offpolicy/{name}"] = sums[name] / whole
    return metrics


class VersionDistances:
    """View 9: KL(pi_v || pi_{v+1}) of the latest published versions, in nats a token.

    What version v drew and v + 1 trains on is a sample of pi_v, scored by pi_{v+1} before it changes: the mean k3 of
    these tokens (`offpolicy/gap_1/kl_k3`) is an unbiased estimate that costs nothing. It holds the two engines'
    rounding, too. It is not there for versions of which no token is trained one version later: at max_staleness 0,
    and with staleness.exact beyond an age of 1, where `offpolicy/gap_G/kl_k3` has the distance over all G versions.

    A checkpoint keeps them: the sums after a resume are those of an undisturbed run.
    """

    def __init__(self, max_staleness: int) -> None:
        self._max_staleness = max_staleness
        self._nats: dict[int, float] = {}  # v -> the distance to v + 1

    def observe(self, version: int, metrics: Metrics, gap_T: Tensor, mask_T: Tensor, is_published: bool) -> Metrics:
        """Of a step at `version` with these `offpolicy_metrics`. Ages are means over the tokens in the mask, left out
        where one of the versions that they sum over was not measured."""
        views: Metrics = {}
        if is_published and metrics.get("offpolicy/gap_1/tokens", 0.0) >= MIN_TOKENS:
            views["policy/kl_version"] = metrics["offpolicy/gap_1/kl_k3"]
            self._nats[version - 1] = views["policy/kl_version"]
        self._nats = {v: nats for v, nats in self._nats.items() if v >= version - self._max_staleness}
        if not mask_T.any():
            return views
        gap_N = gap_T[mask_T]
        back = [self._nats.get(version - k) for k in range(1, int(gap_N.max()) + 1)]
        if None in back:
            return views
        age_N = pad(torch.tensor(back, dtype=torch.float64).cumsum(0), (1, 0)).to(gap_N.device)[gap_N]
        return views | named({"staleness/nats_mean": age_N.mean(), "staleness/nats_max": age_N.max()})

    def state_dict(self) -> list[list[float]]:
        return [[version, nats] for version, nats in self._nats.items()]

    def load_state_dict(self, state: list[list[float]]) -> None:
        self._nats = {int(version): nats for version, nats in state}


def _name_gaps(section: str, gaps: Tensor, views: Mapping[str, Tensor], is_published: bool = True) -> dict[str, Tensor]:
    """`section/gap_G/name` of each gap and view; without gap 0 unless `is_published`."""
    return {
        f"{section}/gap_{gap}/{name}": values[place]
        for place, gap in enumerate(gaps.tolist())
        if gap > 0 or is_published
        for name, values in views.items()
    }


def _sum_by_response(x_T: Tensor, cu_seqlens_B1: Tensor) -> Tensor:
    before_T1 = pad(x_T.cumsum(0), (1, 0))
    return before_T1[cu_seqlens_B1[1:]] - before_T1[cu_seqlens_B1[:-1]]

"""How good a model is, from K responses to each of P prompts: avg@K, pass@k, maj@K, and 95% intervals.

The interval answers for the prompts: what other prompts of the same kind would give. Responses to one prompt are alike,
so prompts are the clusters (Miller, arXiv 2411.00640): 30 prompts with 32 responses each are nearer to 30
observations than to 960. Arrays are numpy's.

Axes: P prompts, K responses to each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from common.types import Prompt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]

LEVEL = 0.95
ABSTAINS = -1  # the vote of a response without an answer
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A share and its 95% interval over prompts: 0 <= low <= value <= high <= 1."""

    value: float
    low: float
    high: float


def estimate(totals: npt.ArrayLike, counts: npt.ArrayLike) -> Estimate:
    """The share sum(totals) / sum(counts), with its interval.

    The variance is that of a ratio by the delta method, clustered by prompt,

        var = P / (P - 1) * sum_i (totals_i - value * counts_i)^2 / sum(counts)^2

    which is the usual s^2 / P when all counts are equal. The interval is Wilson's (1927) for as many independent
    observations as would have this variance, n = value * (1 - value) / var (Korn and Graubard, Survey Methodology 24,
    1998), with the quantile of Student's t for P - 1 degrees of freedom. So it stays inside 0..1, and does not vanish
    when all prompts have the same result: n is at most sum(counts), and P where the value is 0 or 1, because responses
    that all agree do not tell how much prompts differ. One prompt tells nothing about others: 0..1.

    Args:
        totals: [P], in 0..counts: of each prompt its right responses, or a score times its responses.
        counts: [P], its responses, at least one.

    Raises ValueError when there is no prompt.
    """
    of_prompt, weights = np.asarray(totals, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    num_prompts, num_responses = len(of_prompt), float(weights.sum())
    if num_prompts == 0:
        raise ValueError("there is no share of no prompts")
    value = float(np.clip(of_prompt.sum() / num_responses, 0.0, 1.0))
    if num_prompts == 1:
        return Estimate(value=value, low=0.0, high=1.0)
    residuals = of_prompt - value * weights
    variance = num_prompts / (num_prompts - 1) * float(residuals @ residuals) / num_responses**2
    effective: float = num_prompts
    if 0.0 < value < 1.0:
        effective = min(num_responses, value * (1 - value) / max(variance, 1e-300))
    low, high = _wilson(value, effective, _student(num_prompts - 1))
    return Estimate(value=value, low=low, high=high)


def clusters(prompts: Sequence[Prompt]) -> Integers:
    """[P]: the same number for those that ask the same. What a file has twice tells no more of other prompts than
    once, so that one observation of `estimate` is all of a cluster."""
    numbers: dict[str, int] = {}
    asked = (repr(prompt.messages or prompt.text) for prompt in prompts)
    return np.array([numbers.setdefault(text, len(numbers)) for text in asked], dtype=np.int64)


def _wilson(value: float, num_observations: float, quantile: float) -> tuple[float, float]:
    """Wilson's score interval, which always holds the value."""
    weight = quantile**2 / num_observations
    centre = (value + weight / 2) / (1 + weight)
    half = (value * (1 - value) * weight + weight**2 / 4) ** 0.5 / (1 + weight)
    return max(0.0, min(value, centre - half)), min(1.0, max(value, centre + half))


def _student(degrees: int) -> float:
    """The quantile of Student's t that 95% lie within: Abramowitz and Stegun 26.7.5, to 0.005 from 5 degrees on."""
    z = _Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return float(z + sum(term / degrees**power for power, term in enumerate(terms, start=1)))


def pass_at(num_correct: npt.ArrayLike, num_samples: int, k: int) -> Floats:
    """Of each prompt the probability that one of k responses is right, [P]; without bias.

    1 - C(n - c, k) / C(n, k) for c of n responses right (Chen et al., arXiv 2107.03374, eq. 1), as the product over
    j = 0..k-1 of (n - c - j) / (n - j).

    Raises ValueError unless 1 <= k <= num_samples.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs at least {k} responses to a prompt, not {num_samples}")
    wrong = num_samples - np.asarray(num_correct, dtype=np.float64)
    drawn = np.arange(k)
    none_right = np.clip(wrong[:, None] - drawn, 0.0, None) / (num_samples - drawn)
    return np.asarray(1.0 - none_right.prod(axis=1), dtype=np.float64)


def majority(votes: Integers, is_correct: Booleans) -> Floats:
    """Of each prompt the probability that its most frequent answer is right, [P] (Wang et al., arXiv 2203.11171).

    Of several that are equally frequent each is taken with the same probability, so that the score is an expectation
    and does not depend on the order of the responses. Without any answer it is 0.

    Args:
        votes: [P, K], equal numbers for equal answers to one prompt; ABSTAINS: the response gives none.
        is_correct: [P, K]; equal answers are all right or all wrong.
    """
    return np.array([_elected(*prompt) for prompt in zip(votes, is_correct, strict=True)], dtype=np.float64)


def _elected(votes: Integers, is_correct: Booleans) -> float:
    answers, counts = np.unique(votes[votes != ABSTAINS], return_counts=True)
    if not len(answers):
        return 0.0
    elected = answers[counts == counts.max()]
    return float(np.mean([is_correct[votes == answer].mean() for answer in elected]))


def powers_up_to(num_samples: int) -> list[int]:
    """The k of pass@k that are shown: 1, 2, 4, ... and `num_samples` itself."""
    return sorted({2**i for i in range(num_samples.bit_length())} | {num_samples})


def quantile_edges(values: Sequence[int], num_bins: int) -> list[int]:
    """The largest value of each of at most `num_bins` bins of about equal size; equal values are in one bin."""
    shares = np.arange(1, num_bins + 1) / num_bins
    return [int(edge) for edge in np.unique(np.quantile(values, shares, method="inverted_cdf"))]

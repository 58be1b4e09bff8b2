"""Signal, noise, bias and aim of gradient estimators, from dot products of their gradients alone.

Let g_i^a be the gradient that estimator a makes of batch i = 1..N, the batches drawn independently by one policy, and
r the estimator whose mean is the true gradient G = E g^r. With

    S_ab = 1 / (N (N - 1)) SUM_{i != j} g_i^a . g_j^b        unbiased for E g^a . E g^b: two batches share no noise
    P_a  = 1 / N SUM_i |g_i^a|^2                             unbiased for E |g^a|^2

    signal / noise   S_aa / (P_a - S_aa)          the power of the mean against the variance of one batch's gradient
    bias             S_ar / sqrt(S_aa S_rr)       cos(E g^a, G): 1 is an estimator of which the mean is right
    aim              S_ar / sqrt(P_a S_rr)        E g^a . G / (|G| rms |g^a|): the cosine of ONE batch's gradient with G

and aim = bias sqrt(s / (1 + s)) with s = signal / noise. Noise enters none of them: a cosine of two means over the same
batches would be near 1 for any two estimators, and one with the measured mean in the place of G too small. A cosine may
come out above 1, within its error, and is None where a power that it is divided by is not positive.

Errors are the jackknife's over batches: with x_k the value without batch k, sqrt((N - 1) / N SUM_k (x_k - mean x)^2).

Axes: E estimators, N batches, K = N + 1 replicates, of which the first is of all batches and the others lack one each.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
MIN_BATCHES = 4  # of which a jackknife says something


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error; None where it is not known."""

    value: float | None
    error: float | None

    @classmethod
    def of(cls, replicates_K: Array) -> "Estimate":
        """By the jackknife."""
        value, without = replicates_K[0], replicates_K[1:]
        if not np.isfinite(value):
            return cls(None, None)
        if not np.isfinite(without).all():
            return cls(float(value), None)
        spread = np.square(without - without.mean()).sum()
        return cls(float(value), float(np.sqrt(spread * (len(without) - 1) / len(without))))

    def __str__(self) -> str:
        if self.value is None:
            return "not seen"
        return f"{self.value:.2f}" if self.error is None else f"{self.value:.2f} ± {self.error:.2f}"


class Moments:
    """S and P of the header, of all batches and without each."""

    def __init__(self, gram_ENEN: Array, reference: int) -> None:
        """`gram_ENEN` are the dot products of all gradients, `reference` the estimator whose mean is the true one."""
        num_batches = gram_ENEN.shape[1]
        assert num_batches >= MIN_BATCHES, f"{num_batches} batches"
        self.reference = reference
        cross_NEE = np.einsum("aibi->iab", gram_ENEN)  # of a batch with itself
        row_NEE = np.einsum("aibj->iab", gram_ENEN) - cross_NEE  # batch i under a with all others under b
        column_NEE = np.einsum("aibj->jab", gram_ENEN) - cross_NEE
        total_EE = row_NEE.sum(axis=0)
        without_NEE = (total_EE - row_NEE - column_NEE) / ((num_batches - 1) * (num_batches - 2))
        self._s_KEE = np.concatenate([total_EE[None] / (num_batches * (num_batches - 1)), without_NEE])
        power_NE = np.einsum("iaa->ia", cross_NEE)
        rest_NE = (power_NE.sum(axis=0) - power_NE) / (num_batches - 1)
        self._p_KE = np.concatenate([power_NE.mean(axis=0)[None], rest_NE])

    @cached_property
    def signal_KE(self) -> Array:
        """S_aa: the power of the mean."""
        signal_KE: Array = np.einsum("kaa->ka", self._s_KEE)
        return signal_KE

    @property
    def truth(self) -> Estimate:
        """S_rr: how far the true gradient itself stands out."""
        return Estimate.of(self.signal_KE[:, self.reference])

    @cached_property
    def signal_to_noise_KE(self) -> Array:
        noise_KE = self._p_KE - self.signal_KE
        ratio_KE: Array = self.signal_KE / np.where(noise_KE > 0.0, noise_KE, np.nan)
        return ratio_KE

    @cached_property
    def bias_KE(self) -> Array:
        return np.divide(self._along_KE, _root(self.signal_KE))

    @cached_property
    def aim_KE(self) -> Array:
        return np.divide(self._along_KE, _root(self._p_KE))

    @cached_property
    def _along_KE(self) -> Array:
        """E g^a . G / |G|."""
        along_KE: Array = self._s_KEE[:, :, self.reference] / _root(self.signal_KE[:, self.reference, None])
        return along_KE


def _root(power: Array) -> Array:
    """NaN where it is not positive."""
    root: Array = np.sqrt(np.where(power > 0.0, power, np.nan))
    return root

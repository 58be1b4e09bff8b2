"""Signal, noise, bias and aim against closed forms and slow references, their errors against many repetitions."""

import numpy as np
import pytest

from learner.signal.moments import Array, Estimate, Moments

TRUTH, BIASED = 0, 1


def gram(gradients_END: Array) -> Array:
    return np.einsum("aid,bjd->aibj", gradients_END, gradients_END)


def test_noise_of_its_own_direction_in_every_batch_leaves_exact_numbers() -> None:
    """g_i = G + n e_i, the e_i orthogonal to each other and all means: |G| = 2, n = 4; the second is 60 degrees off."""
    gradients_END = np.zeros((2, 5, 12))
    gradients_END[TRUTH, :, 0] = 2.0
    gradients_END[BIASED, :, 0], gradients_END[BIASED, :, 1] = 3.0, 3.0 * np.sqrt(3.0)
    for batch in range(5):
        gradients_END[:, batch, 2 + batch] = (4.0, 6.0)
    moments = Moments(gram(gradients_END), TRUTH)
    assert moments.truth == Estimate(pytest.approx(4.0), pytest.approx(0.0))
    ratios = [Estimate.of(moments.signal_to_noise_KE[:, one]) for one in (TRUTH, BIASED)]
    assert ratios == [Estimate(pytest.approx(value), pytest.approx(0.0)) for value in (4 / 16, 36 / 36)]
    biases = [Estimate.of(moments.bias_KE[:, one]).value for one in (TRUTH, BIASED)]
    assert biases == pytest.approx([1.0, 0.5])
    aims = [Estimate.of(moments.aim_KE[:, one]).value for one in (TRUTH, BIASED)]
    assert aims == pytest.approx([np.sqrt(1 / 5), 0.5 * np.sqrt(1 / 2)]), "bias sqrt(s / (1 + s))"


def slow(gradients_END: Array, one: int) -> tuple[float, float, float]:
    """(signal / noise, bias, aim) by the formulas, pair by pair."""

    def cross(a: int, b: int) -> float:
        pairs = [(i, j) for i in range(num) for j in range(num) if i != j]
        return float(np.mean([gradients_END[a, i] @ gradients_END[b, j] for i, j in pairs]))

    num = gradients_END.shape[1]
    power = float(np.mean([g @ g for g in gradients_END[one]]))
    signal, truth, both = cross(one, one), cross(TRUTH, TRUTH), cross(one, TRUTH)
    return signal / (power - signal), both / np.sqrt(signal * truth), both / np.sqrt(power * truth)


def test_values_and_errors_are_those_of_the_formulas() -> None:
    gradients_END = np.random.default_rng(3).normal(size=(3, 6, 9)) + 1.0
    moments = Moments(gram(gradients_END), TRUTH)
    for one in range(3):
        without = np.array([slow(np.delete(gradients_END, k, axis=1), one) for k in range(6)])
        errors = np.sqrt(5 / 6 * np.square(without - without.mean(axis=0)).sum(axis=0))
        found = [Estimate.of(x[:, one]) for x in (moments.signal_to_noise_KE, moments.bias_KE, moments.aim_KE)]
        assert [one.value for one in found] == pytest.approx(slow(gradients_END, one))
        assert [one.error for one in found] == pytest.approx(errors)


def drawn(seed: int, num_batches: int = 24, dims: int = 60) -> Array:
    """Two estimators of G = (1, 0, ...): one right and noisy, one turned by acos 0.8 and less noisy; related noise."""
    rng = np.random.default_rng(seed)
    means = np.zeros((2, 1, dims))
    means[TRUTH, 0, 0], means[BIASED, 0, 0], means[BIASED, 0, 1] = 1.0, 0.8, 0.6
    common, own = rng.normal(size=(1, num_batches, dims)), rng.normal(size=(2, num_batches, dims))
    return means + (0.2 * common + 0.2 * own) * np.array([2.0, 1.0])[:, None, None]


def test_estimates_are_right_on_average_and_errors_cover() -> None:
    """Noise power 60 x 0.08 x (4, 1), so that the aims are sqrt(1 / 20.2) and 0.8 sqrt(1 / 5.8)."""
    aims, covered, gains = [], [], []
    for seed in range(200):
        moments = Moments(gram(drawn(seed)), TRUTH)
        estimate = Estimate.of(moments.aim_KE[:, BIASED])
        assert estimate.value is not None and estimate.error is not None
        aims.append([estimate.value, moments.aim_KE[0, TRUTH]])
        covered.append(abs(estimate.value - 0.8 / np.sqrt(5.8)) < 2 * estimate.error)
        gain = Estimate.of(moments.aim_KE[:, BIASED] - moments.aim_KE[:, TRUTH])
        gains.append((gain.value, gain.error))
    assert np.mean(aims, axis=0) == pytest.approx([0.8 / np.sqrt(5.8), np.sqrt(1 / 20.2)], abs=0.015)
    assert 0.88 < np.mean(covered) <= 1.0
    spread, errors = np.std([value for value, _ in gains]), np.mean([error for _, error in gains])
    assert errors == pytest.approx(spread, rel=0.25), "of a difference between two rows of the same batches, too"


def test_the_cosine_of_plain_means_would_have_been_wrong() -> None:
    """What is measured here is not what two means over the same batches share."""
    found = [drawn(seed, num_batches=8).mean(axis=1) for seed in range(50)]
    naive = np.mean([a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in found])
    assert naive < 0.75, "0.8 is right"


def test_a_power_that_is_not_positive_gives_no_cosine() -> None:
    gradients_END = np.zeros((2, 4, 2))
    gradients_END[TRUTH, :, 0], gradients_END[BIASED, :, 1] = 1.0, (1.0, -1.0, 1.0, -1.0)
    moments = Moments(gram(gradients_END), TRUTH)
    assert Estimate.of(moments.bias_KE[:, BIASED]) == Estimate(None, None)
    assert str(Estimate.of(moments.bias_KE[:, BIASED])) == "not seen"
    assert Estimate.of(moments.aim_KE[:, BIASED]).value == pytest.approx(0.0)
    assert str(Estimate.of(moments.signal_to_noise_KE[:, TRUTH])) == "not seen", "without noise there is no ratio"

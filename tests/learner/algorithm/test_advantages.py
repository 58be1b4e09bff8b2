"""Advantages and value targets against hand-worked vectors, the formulas written out, and identities."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.algorithm.advantages import (
    discounted_scan,
    gae,
    group_normalised_advantages,
    leave_one_out_advantages,
    length_adaptive_lambda,
    monte_carlo_returns,
    value_targets,
    vtrace,
    whiten,
)

VALUES = torch.tensor([0.1, -0.2, 0.3, 0.0, 0.5], dtype=torch.float64)
REWARD = torch.tensor([1.0], dtype=torch.float64)
CU = torch.tensor([0, 5])
RATIOS = torch.tensor([1.2, 0.5, 0.9, 2.0, 0.8], dtype=torch.float64)


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def one_lambda(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def slow_gae(values: Tensor, reward: float, gae_lambda: float, gamma: float) -> Tensor:
    """A_t = SUM_k (gamma lambda)^k delta_{t+k} of one response, term by term."""
    v = [*values.tolist(), 0.0]
    length = len(v) - 1
    delta = [(reward if t == length - 1 else 0.0) + gamma * v[t + 1] - v[t] for t in range(length)]
    sums = [sum((gamma * gae_lambda) ** k * delta[t + k] for k in range(length - t)) for t in range(length)]
    return torch.tensor(sums, dtype=torch.float64)


def slow_vtrace(
    values: Tensor,
    reward: float,
    ratios: Tensor,
    gae_lambda: float,
    gamma: float,
    rho_bar: float,
    c_bar: float,
) -> tuple[Tensor, Tensor]:
    """v_s = V_s + SUM_{t>=s} gamma^(t-s) (PROD_{i=s}^{t-1} c_i) rho_t delta_t of one response, as written."""
    v, length = [*values.tolist(), 0.0], len(values)
    rewards = [0.0] * (length - 1) + [reward]
    rho = [min(rho_bar, r) for r in ratios.tolist()]
    c = [gae_lambda * min(c_bar, r) for r in ratios.tolist()]
    delta = [rewards[t] + gamma * v[t + 1] - v[t] for t in range(length)]
    targets = [
        v[s] + sum(gamma ** (t - s) * math.prod(c[s:t]) * rho[t] * delta[t] for t in range(s, length))
        for s in range(length)
    ]
    after = [*targets[1:], 0.0]
    advantages = [rho[s] * (rewards[s] + gamma * after[s] - v[s]) for s in range(length)]
    return torch.tensor(targets, dtype=torch.float64), torch.tensor(advantages, dtype=torch.float64)


@pytest.mark.parametrize(
    ("gae_lambda", "expected"),
    [
        (0.0, [-0.3, 0.5, -0.3, 0.5, 0.5]),
        (0.5, [-0.03125, 0.5375, 0.075, 0.75, 0.5]),
        (13 / 15, [0.515565, 0.941037, 0.508889, 0.933333, 0.5]),
        (0.95, [0.740191, 1.094937, 0.62625, 0.975, 0.5]),
        (1.0, [0.9, 1.2, 0.7, 1.0, 0.5]),
    ],
)
def test_gae_gives_the_hand_worked_vectors(gae_lambda: float, expected: list[float]) -> None:
    advantages = gae(VALUES, REWARD, CU, one_lambda(gae_lambda))
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("alpha", "expected"), [(0.05, 0.0), (0.4, 0.5), (1.5, 13 / 15)])
def test_length_adaptive_lambda_of_five_tokens(alpha: float, expected: float) -> None:
    assert length_adaptive_lambda(torch.tensor([5]), alpha).item() == pytest.approx(expected, abs=1e-7)


def test_length_adaptive_lambda_is_clamped_up_to_twenty_tokens_and_positive_from_twenty_one() -> None:
    lengths = torch.tensor([1, 20, 21, 100, 1000, 16000])
    expected = torch.tensor([0.0, 0.0, 1 / 21, 0.8, 0.98, 0.99875])
    torch.testing.assert_close(length_adaptive_lambda(lengths, 0.05), expected, atol=1e-7, rtol=0)
    with pytest.raises(ValueError, match=r"length_adaptive_alpha is 0\.0"):
        length_adaptive_lambda(lengths, 0.0)


def test_policy_signal_of_the_first_token_does_not_depend_on_the_length() -> None:
    """The weight of the last TD error at the first token tends to exp(-1/alpha) (VAPO eq. 4)."""
    for length in (1000, 4000):
        gae_lambda = length_adaptive_lambda(torch.tensor([length]), 1.5).double()
        values = torch.zeros(length, dtype=torch.float64)
        advantages = gae(values, REWARD, torch.tensor([0, length]), gae_lambda)
        assert advantages[0].item() == pytest.approx(math.exp(-1 / 1.5), rel=2e-3)


def test_monte_carlo_target_is_the_outcome_bit_for_bit() -> None:
    values = torch.tensor([1e7, -3.3, 0.1, 7.7, 2.2])
    rewards = torch.tensor([0.7, -1.0])
    targets = value_targets(values, rewards, torch.tensor([0, 3, 5]), critic_lambda=1.0)
    assert targets.tolist() == torch.tensor([0.7, 0.7, 0.7, -1.0, -1.0]).tolist()


def test_discounted_return_counts_the_tokens_that_remain() -> None:
    returns = monte_carlo_returns(torch.tensor([1.0, -2.0]), torch.tensor([0, 3, 5]), 5, gamma=0.5)
    assert returns.tolist() == [0.25, 0.5, 1.0, -1.0, -2.0]


def test_lambda_return_below_one_is_advantage_plus_value() -> None:
    targets = value_targets(VALUES, REWARD, CU, critic_lambda=0.5)
    torch.testing.assert_close(targets, VALUES + slow_gae(VALUES, 1.0, 0.5, 1.0))


def test_vtrace_gives_the_hand_worked_vectors() -> None:
    targets, advantages = vtrace(VALUES, REWARD, RATIOS.log(), CU)
    assert targets.tolist() == pytest.approx([0.32, 0.32, 0.84, 0.9, 0.9], abs=1e-12)
    assert advantages.tolist() == pytest.approx([0.22, 0.52, 0.54, 0.9, 0.4], abs=1e-12)


def test_vtrace_on_policy_is_the_monte_carlo_return_and_lambda_one_gae() -> None:
    targets, advantages = vtrace(VALUES, REWARD, torch.zeros(5, dtype=torch.float64), CU)
    torch.testing.assert_close(targets, torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(advantages, gae(VALUES, REWARD, CU, one_lambda(1.0)))


def test_vtrace_refuses_a_rho_bar_below_c_bar() -> None:
    with pytest.raises(ValueError, match="vtrace_rho_bar"):
        vtrace(VALUES, REWARD, RATIOS.log(), CU, rho_bar=0.5, c_bar=1.0)


def test_a_perfect_critic_gives_zero_advantage_at_any_lambda() -> None:
    lengths = [1, 20, 21, 300]
    rewards = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    values = monte_carlo_returns(rewards, boundaries(lengths), sum(lengths))
    for gae_lambda in (0.0, 0.37, 1.0):
        advantages = gae(values, rewards, boundaries(lengths), torch.full((4,), gae_lambda).double())
        assert advantages.abs().max() == 0.0


def test_a_response_of_one_token_gets_reward_minus_value() -> None:
    advantages = gae(torch.tensor([0.25]), torch.tensor([-1.0]), torch.tensor([0, 1]), torch.tensor([0.95]))
    assert advantages.tolist() == [-1.25]


def test_no_responses_give_no_advantages() -> None:
    none, cu = torch.zeros(0), torch.tensor([0])
    assert gae(none, none, cu, none).shape == (0,)
    assert value_targets(none, none, cu, 1.0).shape == (0,)
    assert vtrace(none, none, none, cu)[0].shape == (0,)
    assert whiten(none, none.bool()).shape == (0,)


lengths_strategy = st.lists(st.one_of(st.integers(1, 6), st.integers(60, 70), st.integers(120, 200)), max_size=6)
unit = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 1.0))


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_strategy, gamma=unit, seed=st.integers(0, 2**31), data=st.data())
def test_packed_gae_equals_the_formula_response_by_response(
    lengths: list[int], gamma: float, seed: int, data: st.DataObject
) -> None:
    lambdas = data.draw(st.lists(unit, min_size=len(lengths), max_size=len(lengths)))
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(n, generator=generator, dtype=torch.float64) for n in lengths]
    rewards = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    stream = torch.cat([torch.zeros(0, dtype=torch.float64), *values])
    packed = gae(stream, rewards, boundaries(lengths), torch.tensor(lambdas, dtype=torch.float64), gamma)
    parts = packed.split(lengths) if lengths else []
    for part, v, r, gae_lambda in zip(parts, values, rewards.tolist(), lambdas, strict=True):
        torch.testing.assert_close(part, slow_gae(v, r, gae_lambda, gamma), atol=1e-10, rtol=1e-10)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    gamma=unit,
    gae_lambda=unit,
    bars=st.tuples(st.floats(0.1, 3.0), st.floats(0.1, 3.0)),
    seed=st.integers(0, 2**31),
)
def test_packed_vtrace_equals_the_formula_response_by_response(
    lengths: list[int], gamma: float, gae_lambda: float, bars: tuple[float, float], seed: int
) -> None:
    rho_bar, c_bar = max(bars), min(bars)
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randn(2, sum(lengths), generator=generator, dtype=torch.float64)
    rewards = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    got = vtrace(
        stream[0],
        rewards,
        stream[1],
        boundaries(lengths),
        gamma=gamma,
        gae_lambda=gae_lambda,
        rho_bar=rho_bar,
        c_bar=c_bar,
    )
    responses = zip(stream[0].split(lengths), rewards.tolist(), stream[1].exp().split(lengths), strict=True)
    parts = [slow_vtrace(v, r, x, gae_lambda, gamma, rho_bar, c_bar) for v, r, x in responses]
    for packed, slow in zip(got, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(packed, torch.cat(slow), atol=1e-9, rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 150), min_size=2, max_size=5), seed=st.integers(0, 2**31))
def test_order_of_the_responses_changes_nothing(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(n, generator=generator, dtype=torch.float64) for n in lengths]
    rewards = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    lambdas = length_adaptive_lambda(torch.tensor(lengths), 0.4).double()
    forward = gae(torch.cat(values), rewards, boundaries(lengths), lambdas).split(lengths)
    backward = gae(torch.cat(values[::-1]), rewards.flip(0), boundaries(lengths[::-1]), lambdas.flip(0))
    for a, b in zip(forward, reversed(backward.split(lengths[::-1])), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_float32_stays_close_to_float64_over_long_responses_at_lambda_zero_near_one_and_one() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths, lambdas = [9000, 8192, 12345], torch.tensor([0.0, 0.9999, 1.0])
    values = torch.rand(sum(lengths), generator=generator, dtype=torch.float64) * 2 - 1
    rewards = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    exact = gae(values, rewards, boundaries(lengths), lambdas.double())
    single = gae(values.float(), rewards.float(), boundaries(lengths), lambdas)
    torch.testing.assert_close(single.double(), exact, atol=2e-5, rtol=0)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 63, 64, 65, 127, 128, 4096, 4097, 70000])
def test_scan_is_exact_at_every_block_boundary(num_tokens: int) -> None:
    """With decay 1 and integers the scan is a reversed cumulative sum without rounding."""
    x = torch.randint(-9, 10, (num_tokens,), generator=torch.Generator().manual_seed(num_tokens)).double()
    assert torch.equal(discounted_scan(x, torch.ones_like(x)), x.flip(0).cumsum(0).flip(0))
    assert torch.equal(discounted_scan(x, torch.zeros_like(x)), x)


def test_scan_leaves_its_arguments_alone() -> None:
    x, decay = torch.ones(200), torch.full((200,), 0.5)
    discounted_scan(x, decay)
    assert torch.equal(x, torch.ones(200)) and torch.equal(decay, torch.full((200,), 0.5))


def test_group_normalised_advantages_by_hand() -> None:
    """Rewards 1, 0, 0, 1: mean 1/2, variance 4 * 1/4 / 3 = 1/3; members need not be neighbours."""
    rewards = torch.tensor([1.0, 5.0, 0.0, 5.0, 0.0, 1.0], dtype=torch.float64)
    groups = torch.tensor([7, 2, 7, 2, 7, 7])
    half = 0.5 * math.sqrt(3)
    expected = torch.tensor([half, 0.0, -half, 0.0, -half, half], dtype=torch.float64)
    torch.testing.assert_close(group_normalised_advantages(rewards, groups, eps=1e-12), expected)


def test_leave_one_out_advantages_by_hand() -> None:
    rewards = torch.tensor([3.0, 0.0, 1.0, 2.0, -2.0], dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 1, 1])
    expected = torch.tensor([3 - 0.5, 0 - 2.0, 1 - 1.5, 4.0, -4.0], dtype=torch.float64)
    torch.testing.assert_close(leave_one_out_advantages(rewards, groups), expected)


@pytest.mark.parametrize("estimator", [group_normalised_advantages, leave_one_out_advantages])
def test_group_estimators_refuse_a_group_of_one_and_sum_to_zero(
    estimator: Callable[[Tensor, Tensor], Tensor],
) -> None:
    with pytest.raises(ValueError, match=r"rollout\.group_size"):
        estimator(torch.ones(3), torch.tensor([0, 0, 1]))
    rewards = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert estimator(rewards, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))[:4].sum().abs() < 1e-12


def test_whitened_tokens_have_mean_zero_and_variance_one_and_masked_ones_do_not_count() -> None:
    x = torch.tensor([1e4 + 1, 1e4 - 1, 1e4 + 1, 1e4 - 1, 1e9])
    mask = torch.tensor([True, True, True, True, False])
    assert whiten(x, mask).tolist() == pytest.approx([1.0, -1.0, 1.0, -1.0, 0.0], abs=1e-6)


def test_whitening_a_constant_gives_zeros_and_nothing_gives_nothing() -> None:
    assert whiten(torch.full((3,), 2.0), torch.ones(3, dtype=torch.bool)).abs().max() == 0.0
    assert whiten(torch.full((3,), 2.0), torch.zeros(3, dtype=torch.bool)).abs().max() == 0.0

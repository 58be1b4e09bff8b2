"""Losses against hand-derived gradients, identities between corrections, and invariance to splitting."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.config import Correction
from learner.algorithm.losses import (
    correction_weights,
    dis_loss,
    entropy_loss,
    kl_loss,
    policy_loss,
    positive_lm_loss,
    ratio,
    sequence_scale,
    token_scale,
    value_loss,
)

BANDS = {"truncation": 2.0, "mask_low": 0.5, "mask_high": 5.0, "dis_low": 0.3, "dis_high": 5.0}
CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def policy_gradient(u: float, advantage: float, dual_clip: float | None = None) -> tuple[float, float]:
    """Loss and d loss / d logprob of one token with ratio u, weight 1 and scale 1."""
    logprobs = tensor(math.log(u)).requires_grad_()
    one = tensor(1.0)
    loss = policy_loss(logprobs, tensor(0.0), tensor(advantage), one, one, **CLIP, dual_clip=dual_clip)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.item(), gradient.item()


@pytest.mark.parametrize(
    ("u", "advantage", "loss", "gradient"),
    [
        # Inside the clip, L = -u A and dL/dlogp = -u A, whatever the sign of A.
        (1.0, 2.0, -2.0, -2.0),
        (1.27, 2.0, -2.54, -2.54),
        (0.81, -2.0, 1.62, 1.62),
        (0.81, 2.0, -1.62, -1.62),
        (1.27, -2.0, 2.54, 2.54),
        # A > 0 beyond the upper edge and A < 0 beyond the lower one: constant, no gradient.
        (1.29, 2.0, -2.56, 0.0),
        (5.0, 2.0, -2.56, 0.0),
        (0.79, -2.0, 1.6, 0.0),
        (0.1, -2.0, 1.6, 0.0),
        # The pessimistic sides are not clipped.
        (0.5, 2.0, -1.0, -1.0),
        (3.0, -2.0, 6.0, 6.0),
        # No advantage, no gradient.
        (3.0, 0.0, 0.0, 0.0),
    ],
)
def test_policy_gradient_inside_and_outside_both_clip_edges(
    u: float, advantage: float, loss: float, gradient: float
) -> None:
    assert policy_gradient(u, advantage) == pytest.approx((loss, gradient), abs=1e-12)


@pytest.mark.parametrize(("edge", "advantage"), [(1.25, 3.0), (0.75, -3.0)])
def test_exactly_at_a_clip_edge_the_gradient_is_that_of_the_inside(edge: float, advantage: float) -> None:
    logprobs = tensor(0.0).requires_grad_()
    old, one = -tensor(edge).log(), tensor(1.0)
    width = abs(ratio(logprobs, old).item() - 1.0)  # the edge lies on the ratio to the last bit
    loss = policy_loss(logprobs, old, tensor(advantage), one, one, clip_low=width, clip_high=width)
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(-edge * advantage)


def test_clip_higher_widens_the_upper_edge_only() -> None:
    assert policy_gradient(1.25, 1.0)[1] == pytest.approx(-1.25)  # a clip of 0.2 would have no gradient here
    assert policy_gradient(0.75, -1.0)[1] == 0.0


@pytest.mark.parametrize(
    ("u", "advantage", "loss", "gradient"),
    [
        (2.9, -1.0, 2.9, 2.9),  # below c = 3: as without dual clip
        (4.0, -1.0, 3.0, 0.0),  # beyond: the term is c A, a constant
        (4.0, 1.0, -1.28, 0.0),  # positive advantages are not touched
        (0.5, 1.0, -0.5, -0.5),
    ],
)
def test_dual_clip_bounds_negative_advantages_only(u: float, advantage: float, loss: float, gradient: float) -> None:
    assert policy_gradient(u, advantage, dual_clip=3.0) == pytest.approx((loss, gradient), abs=1e-12)


def test_weights_and_scale_multiply_loss_and_gradient() -> None:
    logprobs = tensor(0.0, 0.1, -0.1).requires_grad_()
    loss = policy_loss(logprobs, tensor(0, 0, 0), tensor(1, -1, 2), tensor(2, 0.5, 0), tensor(0.1, 0.2, 0.3), **CLIP)
    loss.backward()
    expected = [-0.2, 0.1 * math.exp(0.1), 0.0]
    assert loss.item() == pytest.approx(sum(expected))
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx(expected)


def test_huge_log_ratios_stay_finite() -> None:
    logprobs = torch.tensor([0.0, -500.0, 0.0], requires_grad=True)
    old = torch.tensor([-500.0, 0.0, -500.0])
    ones = torch.ones(3)
    loss = policy_loss(logprobs, old, torch.tensor([-1.0, 1.0, 1.0]), ones, ones, **CLIP)
    loss.backward()
    assert torch.isfinite(loss) and logprobs.grad is not None and logprobs.grad.isfinite().all()
    for correction in Correction:
        assert correction_weights(logprobs.detach(), old, correction, **BANDS).isfinite().all()


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        (Correction.none, [1.0, 1.0, 1.0, 1.0, 1.0]),
        (Correction.behavior, [0.25, 0.6, 1.0, 2.0, 2.0]),
        (Correction.decoupled, [0.25, 0.6, 1.0, 2.0, 2.0]),
        (Correction.tis, [0.25, 0.6, 1.0, 2.0, 2.0]),
        (Correction.icepop, [0.0, 0.6, 1.0, 3.0, 0.0]),
        (Correction.dis, [0.0, 0.0, 1.0, 3.0, 0.0]),
        (Correction.m2, [0.25, 0.6, 1.0, 2.0, 2.0]),
    ],
)
def test_correction_weights_by_hand(correction: Correction, expected: list[float]) -> None:
    rho = tensor(0.25, 0.6, 1.0, 3.0, 7.0)
    weights = correction_weights(rho.log(), torch.zeros_like(rho), correction, **BANDS)
    assert weights.tolist() == pytest.approx(expected)
    assert not weights.requires_grad


@pytest.mark.parametrize("correction", list(Correction))
def test_on_policy_every_correction_weighs_exactly_one(correction: Correction) -> None:
    logprobs = -torch.rand(100, generator=torch.Generator().manual_seed(0)) * 30
    assert correction_weights(logprobs, logprobs.clone(), correction, **BANDS).eq(1.0).all()


def test_weights_carry_no_gradient_to_the_policy() -> None:
    logprobs = tensor(-0.3).requires_grad_()
    weights = correction_weights(logprobs, tensor(-0.5), Correction.decoupled, **BANDS)
    assert not weights.requires_grad


def test_dis_gradient_is_the_banded_ratio_times_the_advantage_for_both_signs() -> None:
    """r = 0.6 and 7 are outside (0.7, 6); 0.8, 1 and 5 inside; d loss / d logprob = -f(r) A."""
    r = tensor(0.6, 0.8, 1.0, 5.0, 7.0, 5.0)
    advantages = tensor(1.0, 1.0, 1.0, 1.0, 1.0, -2.0)
    logprobs = r.log().requires_grad_()
    dis_loss(logprobs, torch.zeros_like(r), advantages, torch.ones_like(r), dis_low=0.3, dis_high=5.0).backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0.0, -0.8, -1.0, -5.0, 0.0, 10.0])


def test_on_policy_dis_has_the_gradient_of_ppo() -> None:
    old = tensor(-1.0, -2.0, -0.1)
    advantages, scale = tensor(0.5, -1.0, 2.0), tensor(0.2, 0.2, 0.2)
    a, b = old.clone().requires_grad_(), old.clone().requires_grad_()
    dis_loss(a, old, advantages, scale, dis_low=0.3, dis_high=5.0).backward()
    policy_loss(b, old, advantages, torch.ones_like(old), scale, **CLIP).backward()
    assert a.grad is not None and b.grad is not None
    torch.testing.assert_close(a.grad, b.grad)


def test_positive_lm_loss_is_the_mean_negative_logprob_of_the_masked_tokens() -> None:
    logprobs = tensor(-1.0, -2.0, -4.0).requires_grad_()
    mask = torch.tensor([True, False, True])
    loss = positive_lm_loss(logprobs, torch.ones(3), mask, num_tokens=2)
    loss.backward()
    assert loss.item() == pytest.approx(2.5)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-0.5, 0.0, -0.5])


def test_without_a_correct_response_the_lm_loss_is_zero_and_still_has_a_graph() -> None:
    logprobs = tensor(-1.0, -2.0).requires_grad_()
    loss = positive_lm_loss(logprobs, torch.ones(2), torch.zeros(2, dtype=torch.bool), num_tokens=0)
    loss.backward()
    assert loss.item() == 0.0
    assert logprobs.grad is not None and logprobs.grad.eq(0.0).all()


def test_entropy_and_kl_by_hand() -> None:
    assert entropy_loss(tensor(1.0, 3.0), tensor(0.5, 0.5)).item() == -2.0
    logprobs = tensor(-1.0, -1.0).requires_grad_()
    loss = kl_loss(logprobs, tensor(-1.0, -0.5), tensor(1.0, 1.0))
    loss.backward()
    assert loss.item() == pytest.approx(math.exp(0.5) - 1 - 0.5)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0.0, 1 - math.exp(0.5)])


def test_value_loss_is_half_the_squared_error_and_clipping_is_pessimistic() -> None:
    values, old, targets = tensor(0.5, 1.0).requires_grad_(), tensor(0.0, 1.0), tensor(1.0, -1.0)
    scale = tensor(0.5, 0.5)
    assert value_loss(values, old, targets, scale).item() == pytest.approx(0.5 * (0.125 + 2.0))
    clipped = value_loss(values, old, targets, scale, value_clip=0.2)
    clipped.backward()
    assert clipped.item() == pytest.approx(0.5 * 0.5 * (0.8**2 + 4.0))  # V is held at 0.2 of the way to 1
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([0.0, 1.0])


def test_token_scale_weighs_tokens_and_sequence_scale_weighs_responses() -> None:
    mask = torch.tensor([True, True, True, True, False, True, False])
    cu = torch.tensor([0, 3, 5, 7])
    assert token_scale(mask, 5).tolist() == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.0, 0.2, 0.0])
    expected = [1 / 9, 1 / 9, 1 / 9, 1 / 3, 0.0, 1 / 3, 0.0]
    assert sequence_scale(mask, cu, 3).tolist() == pytest.approx(expected)


def test_scales_of_nothing_are_zero() -> None:
    none = torch.zeros(0, dtype=torch.bool)
    assert token_scale(none, 0).shape == sequence_scale(none, torch.tensor([0]), 0).shape == (0,)
    mask = torch.zeros(3, dtype=torch.bool)
    assert token_scale(mask, 0).eq(0).all() and sequence_scale(mask, torch.tensor([0, 3]), 0).eq(0).all()


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    cut=st.integers(0, 8),
    seed=st.integers(0, 2**31),
)
def test_losses_of_any_split_add_up_to_the_loss_of_the_whole(lengths: list[int], cut: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)
    logprobs, old, advantages = torch.randn(3, num_tokens, generator=generator, dtype=torch.float64)
    mask = torch.rand(num_tokens, generator=generator) > 0.3
    responses = [part.any().item() for part in mask.split(lengths)]
    at = sum(lengths[:cut])

    def total(piece: slice, sizes: list[int]) -> Tensor:
        cu = torch.tensor([0, *sizes]).cumsum(0)
        x, old_x, a, m = logprobs[piece], old[piece], advantages[piece], mask[piece]
        weights = correction_weights(old_x, x, Correction.decoupled, **BANDS)
        by_token, by_response = token_scale(m, int(mask.sum())), sequence_scale(m, cu, sum(responses))
        losses = [policy_loss(x, old_x, a, weights, s, **CLIP, dual_clip=3.0) for s in (by_token, by_response)]
        return torch.stack([*losses, value_loss(x, old_x, a, by_token, 0.2), kl_loss(x, old_x, by_token)])

    whole = total(slice(None), lengths)
    parts = total(slice(0, at), lengths[:cut]) + total(slice(at, None), lengths[cut:])
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-6)


def test_rejected_tokens_stay_in_the_denominator() -> None:
    """Two tokens, one rejected: the other one's gradient is halved, not whole."""
    rho = tensor(1.0, 100.0)
    logprobs = tensor(0.0, 0.0).requires_grad_()
    weights = correction_weights(rho.log(), tensor(0.0, 0.0), Correction.icepop, **BANDS)
    scale = token_scale(torch.ones(2, dtype=torch.bool), 2)
    policy_loss(logprobs, logprobs.detach(), tensor(1.0, 1.0), weights, scale, **CLIP).backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-0.5, 0.0]

"""The policy's objective by hand, with three different policies: the one that sampled, the old one, the one now.

One token a response; u_b = pi / pi_behavior, u_o = pi / pi_old, rho = pi_old / pi_behavior = u_b / u_o.
"""

import math
from dataclasses import replace

import pytest
import torch

from common.config import AlgorithmConfig, Correction
from learner.algorithm.experience import Experience
from learner.algorithm.losses import correction_weights
from learner.algorithm.objective import Counts, policy_terms, trust_region
from learner.algorithm.packing import Batch
from tests.learner.algorithm.test_trainer import (
    LENGTHS,
    TablePolicy,
    config,
    make_batch,
    make_trainer,
    on_policy,
    parameters,
    uneven_rewards,
)


def one_token_each(
    u_b: list[float], u_o: list[float], advantages: list[float], *, m2_edge: float = math.inf, **algorithm: object
) -> tuple[dict[str, float], list[float]]:
    """(terms by name, d sum of the terms / d logprob) of responses of one token, all correct."""
    settings = AlgorithmConfig(**{"positive_lm_weight": 0.0, **algorithm})  # type: ignore[arg-type]
    n = len(u_b)
    logprobs_T = torch.full((n,), -1.0).requires_grad_()
    old_T, behavior_T = (logprobs_T.detach() - torch.tensor(u).log() for u in (u_o, u_b))
    zeros_T, all_T = torch.zeros(n), torch.ones(n, dtype=torch.bool)
    e = Experience(
        mask_T=all_T,
        lm_mask_T=all_T,
        gap_T=zeros_T.long(),
        old_logprobs_T=old_T,
        entropy_T=zeros_T,
        behavior_logprobs_T=behavior_T,
        weights_T=correction_weights(
            old_T, behavior_T, settings.correction, truncation=settings.truncation, mask_low=settings.mask_low,
            mask_high=settings.mask_high, dis_low=settings.dis_low, dis_high=settings.dis_high,
        ),
        advantages_T=torch.tensor(advantages),
        values_T=None,
        value_targets_T=None,
        disagreement_T=None,
        entropy_mask_T=None,
        reference_logprobs_T=None,
        uses_values=None,
    )  # fmt: skip
    counts = Counts(tokens=n, lm_tokens=n, responses=n)
    terms = policy_terms(settings, make_batch([1] * n), e, logprobs_T, zeros_T, counts, trust_region(settings, m2_edge))
    torch.stack(list(terms.values())).sum().backward()
    assert logprobs_T.grad is not None
    return {name: term.item() for name, term in terms.items()}, (logprobs_T.grad * n).tolist()


def test_behavior_clips_the_ratio_to_what_sampled_and_knows_no_old_policy() -> None:
    """Clip 0.8..1.28. Gradient -u_b A inside and on the pessimistic side, 0 beyond; pi_old is far off and unused."""
    u_b = [1.27, 1.29, 0.81, 0.79, 1.29, 0.79]
    advantages = [2.0, 2.0, -2.0, -2.0, -2.0, 2.0]
    expected = [-2.54, 0.0, 1.62, 0.0, 2.58, -1.58]
    for u_o in ([1.0] * 6, [3.0] * 6, [0.1] * 6):
        terms, gradient = one_token_each(u_b, u_o, advantages, correction=Correction.behavior)
        assert gradient == pytest.approx(expected, abs=1e-5)
        # -1/6 SUM min(u A, clip(u) A)
        assert terms["pg_loss"] == pytest.approx(-(2.54 + 2.56 - 1.62 - 1.6 - 2.58 + 1.58) / 6, abs=1e-5)


def test_none_and_decoupled_clip_the_ratio_to_the_old_policy() -> None:
    """u_o = 1.1 is inside the clip for tokens whose u_b is far outside; decoupled weighs by rho, at most 2."""
    u_b, u_o, advantages = [2.2, 0.55, 4.4], [1.1, 1.1, 1.1], [1.0, -1.0, 1.0]
    _, none = one_token_each(u_b, u_o, advantages, correction=Correction.none)
    _, decoupled = one_token_each(u_b, u_o, advantages, correction=Correction.decoupled)
    _, behavior = one_token_each(u_b, u_o, advantages, correction=Correction.behavior)
    assert none == pytest.approx([-1.1, 1.1, -1.1])
    assert decoupled == pytest.approx([-2.2, 0.55, -2.2])  # rho = 2, 0.5, 4
    assert behavior == [0.0, 0.0, 0.0]


def test_dual_clip_under_behavior_bounds_the_ratio_to_what_sampled() -> None:
    _, gradient = one_token_each([2.9, 3.1], [1.0, 1.0], [-1.0, -1.0], correction=Correction.behavior, dual_clip=3.0)
    assert gradient == pytest.approx([2.9, 0.0])


def test_m2_stops_what_is_pushed_beyond_its_edge_and_nothing_else() -> None:
    """Edge log 2: gradient -u_b A, 0 where A > 0 and u_b > 2 or A < 0 and u_b < 1/2; without an edge it never ends."""
    u_b, advantages = [1.9, 2.1, 0.55, 0.45, 9.0, 0.1], [1.0, 1.0, -1.0, -1.0, -1.0, 1.0]
    _, gradient = one_token_each(u_b, [5.0] * 6, advantages, correction=Correction.m2, m2_edge=math.log(2.0))
    assert gradient == pytest.approx([-1.9, 0.0, 0.55, 0.0, 9.0, -0.1])
    _, gradient = one_token_each(u_b, [5.0] * 6, advantages, correction=Correction.m2)
    assert gradient == pytest.approx([-1.9, -2.1, 0.55, 0.45, 9.0, -0.1])


@pytest.mark.parametrize("correction", [Correction.behavior, Correction.m2, Correction.decoupled])
def test_the_lm_loss_has_truncated_weights_wherever_the_clip_is(correction: Correction) -> None:
    """No advantage: all gradient is of the LM loss, -mu min(rho, C) a token, with rho = 0.5, 1, 3 and C = 2."""
    algorithm = {"correction": correction, "positive_lm_weight": 0.1}
    terms, gradient = one_token_each([0.5, 1.0, 3.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], **algorithm)
    assert gradient == pytest.approx([-0.05, -0.1, -0.2])
    assert terms["lm_loss"] == pytest.approx(0.1 * (0.5 + 1.0 + 2.0) / 3)


def test_where_the_old_policy_sampled_behavior_is_none_to_the_bit() -> None:
    batch = uneven_rewards(on_policy(make_batch(LENGTHS), TablePolicy()))
    trainers = [make_trainer(config(correction=c, mini_batches=4)) for c in (Correction.none, Correction.behavior)]
    metrics = [trainer.step(batch, 0, is_warmup=False) for trainer in trainers]
    for a, b in zip(*map(parameters, trainers), strict=True):
        assert torch.equal(a, b)
    measured = [{k: v for k, v in m.items() if not k.startswith(("time/", "throughput/", "memory/"))} for m in metrics]
    assert measured[0] == measured[1]


def shifted(batch: Batch, log_rho: float) -> Batch:
    """The batch as if what sampled it had given each token a log-prob lower by log_rho."""
    return replace(batch, behavior_logprobs_T=batch.behavior_logprobs_T - log_rho)


@pytest.mark.parametrize("correction", [Correction.none, Correction.behavior, Correction.dis, Correction.m2])
def test_clip_fraction_and_kl_are_of_the_ratio_that_the_loss_holds_on_to(correction: Correction) -> None:
    """Nothing is learned (rate 0), so pi = pi_old, and pi / pi_behavior = e^2 = 7.4 everywhere: beyond every edge."""
    batch = shifted(on_policy(make_batch([1, 1, 1, 1]), TablePolicy()), 2.0)  # rewards +1, -1, -1, +1
    metrics = make_trainer(config(correction=correction, learning_rate=0.0)).step(batch, 0, is_warmup=False)
    ratio, kl = (1.0, 0.0) if correction is Correction.none else (torch.tensor(2.0).exp().item(), -2.0)
    clipped = {Correction.none: 0.0, Correction.dis: 1.0}.get(correction, 0.5)  # A > 0: half of them
    assert metrics["policy/ratio_mean"] == pytest.approx(ratio, rel=1e-5)
    assert metrics["policy/kl_k1"] == pytest.approx(kl, abs=1e-5)
    assert metrics["policy/clip_fraction_high"] == metrics["offpolicy/gap_0/clip_fraction"] == clipped
    assert metrics["offpolicy/kl_k1"] == pytest.approx(-2.0, abs=1e-5)  # of pi_old and pi_behavior, whatever the loss

"""Views of staleness: against loops over tokens written from their definitions, and numbers worked out by hand."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.config import AdvantageEstimator, OverAge, Schedule
from learner.algorithm.views import (
    MIN_TOKENS,
    VersionDistances,
    critic_views,
    offpolicy_metrics,
    staleness_metrics,
)
from tests.learner.algorithm.test_trainer import LENGTHS, config, make_batch, make_trainer, on_policy


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Ragged:
    """Responses of some lengths whose tokens never grow younger, some of them masked."""

    lengths: list[int]
    old_T: Tensor
    behavior_T: Tensor
    gap_T: Tensor
    mask_T: Tensor

    @property
    def cu_seqlens_B1(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0)

    def responses(self) -> list[list[int]]:
        """The places of each response's tokens."""
        ends = self.cu_seqlens_B1.tolist()
        return [list(range(start, end)) for start, end in pairwise(ends)]


@st.composite
def ragged(draw: st.DrawFn) -> Ragged:
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    largest, kept = draw(st.integers(0, 4)), draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    spread = draw(st.sampled_from([0.0, 0.1, 1.0, 8.0]))
    num_tokens = sum(lengths)
    gaps = [torch.randint(0, largest + 1, (n,), generator=generator).sort(descending=True).values for n in lengths]
    behavior_T = -3 * torch.rand(num_tokens, generator=generator, dtype=torch.float64)
    return Ragged(
        lengths=lengths,
        old_T=behavior_T + spread * torch.randn(num_tokens, generator=generator, dtype=torch.float64),
        behavior_T=behavior_T,
        gap_T=torch.cat(gaps),
        mask_T=torch.rand(num_tokens, generator=generator) < kept,
    )


def measure(x: Ragged, is_published: bool = True) -> dict[str, float]:
    ones_T = torch.ones(len(x.gap_T))
    return offpolicy_metrics(
        x.old_T, x.behavior_T, ones_T, x.gap_T, x.mask_T, x.cu_seqlens_B1, truncation=2.0, is_published=is_published
    )


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def ess(log_weights: list[float]) -> float:
    weights = [math.exp(x - max(log_weights)) for x in log_weights]
    return sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights))


def slow_offpolicy(x: Ragged) -> dict[str, float]:
    """Views 3 to 7 token by token."""
    log_rho = [min(max(o - b, -20.0), 20.0) for o, b in zip(x.old_T.tolist(), x.behavior_T.tolist(), strict=True)]
    moved = [abs(math.exp(o) - math.exp(b)) for o, b in zip(x.old_T.tolist(), x.behavior_T.tolist(), strict=True)]
    gap, mask = x.gap_T.tolist(), x.mask_T.tolist()
    kept = [t for t in range(len(gap)) if mask[t]]
    responses = [[t for t in response if mask[t]] for response in x.responses()]
    responses = [response for response in responses if response]
    found: dict[str, float] = {}
    for prefix, of_gap in [("offpolicy", None), *((f"offpolicy/gap_{g}", g) for g in set(gap))]:
        tokens = [t for t in kept if of_gap in (None, gap[t])]
        sequences = [sum(log_rho[t] for t in r) for r in responses if of_gap in (None, max(gap[t] for t in r))]
        if tokens:
            ratios = [math.exp(log_rho[t]) for t in tokens]
            found |= {
                f"{prefix}/tokens": len(tokens),
                f"{prefix}/ess": ess([log_rho[t] for t in tokens]),
                f"{prefix}/kl_k3": mean([math.exp(log_rho[t]) - 1 - log_rho[t] for t in tokens]),
                f"{prefix}/m2": mean([log_rho[t] ** 2 for t in tokens]),
                f"{prefix}/tv": mean([moved[t] for t in tokens]),
            }
            if of_gap is not None:
                quantiles = torch.quantile(tensor(*ratios), tensor(0.01, 0.5, 0.99)).tolist()
                found |= dict(zip((f"{prefix}/ratio_p{q}" for q in ("01", "50", "99")), quantiles, strict=True))
        if sequences:
            found[f"{prefix}/sequence_ess"] = ess(sequences)
            if of_gap is not None:
                found[f"{prefix}/sequences"] = len(sequences)
    whole = [t for r in x.responses() if all(gap[t] == 0 for t in r) for t in r if mask[t]]
    if whole:
        found["offpolicy/mismatch_abs_mean"] = mean([abs(log_rho[t]) for t in whole])
    return found


@given(x=ragged())
@settings(max_examples=150, deadline=None)
def test_the_ratios_by_gap_are_those_of_a_loop_over_tokens(x: Ragged) -> None:
    metrics, expected = measure(x), slow_offpolicy(x)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)
    by_gap = {name for name in metrics if "/gap_" in name}
    assert by_gap == {name for name in expected if "/gap_" in name} | {
        name.replace("/tokens", f"/{more}") for name in expected if "/gap_" in name and name.endswith("/tokens")
        for more in ("ratio_mean", "kl_k1")
    }  # fmt: skip


def test_sequence_ess_sees_what_token_ess_does_not() -> None:
    """Two responses of 100 tokens whose every ratio is 1.1 and 1/1.1: products e^9.5 and e^-9.5."""
    old_T = torch.cat([torch.full((100,), math.log(1.1)), torch.full((100,), -math.log(1.1))])
    ones_T = torch.ones(200)
    metrics = offpolicy_metrics(
        old_T, 0 * ones_T, ones_T, ones_T.long(), ones_T.bool(), torch.tensor([0, 100, 200]), 2.0, True
    )
    assert metrics["offpolicy/ess"] > 0.99
    assert metrics["offpolicy/sequence_ess"] == pytest.approx(0.5, abs=1e-6)


def test_sequence_ess_does_not_depend_on_the_scale_of_the_products() -> None:
    """Products of e^-300 and e^-299: clamped they would look alike, and as plain numbers they would be 0."""
    old_T = torch.cat([torch.full((300,), -1.0), torch.full((299,), -1.0)])
    ones_T = torch.ones(599)
    metrics = offpolicy_metrics(
        old_T, 0 * ones_T, ones_T, ones_T.long(), ones_T.bool(), torch.tensor([0, 300, 599]), 2.0, True
    )
    assert metrics["offpolicy/sequence_ess"] == pytest.approx((1 + math.e) ** 2 / (2 * (1 + math.e**2)), rel=1e-5)


@given(x=ragged())
@settings(max_examples=50, deadline=None)
def test_the_age_of_a_response_is_its_flight_and_its_wait(x: Ragged) -> None:
    metrics = staleness_metrics(x.gap_T, x.mask_T, x.cu_seqlens_B1)
    oldest = [max(x.gap_T[t].item() for t in response) for response in x.responses()]
    newest = [min(x.gap_T[t].item() for t in response) for response in x.responses()]
    assert metrics["staleness/flight_mean"] == pytest.approx(mean(oldest) - mean(newest))
    assert metrics["staleness/queue_mean"] == pytest.approx(mean(newest))
    assert metrics["staleness/token_max"] == max(oldest)


@given(x=ragged(), seed=st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_the_critic_by_gap_is_that_of_a_loop_over_tokens(x: Ragged, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values_T = torch.randn(len(x.gap_T), generator=generator)
    rewards_B = torch.randint(0, 2, (len(x.lengths),), generator=generator) * 2.0 - 1.0
    expected: dict[str, float] = {}
    for gap in set(x.gap_T[x.mask_T].tolist()):
        pairs = [
            (values_T[t].item(), rewards_B[b].item())
            for b, response in enumerate(x.responses())
            for t in response
            if x.mask_T[t] and x.gap_T[t] == gap
        ]
        errors, outcomes = [v - r for v, r in pairs], [r for _, r in pairs]
        expected[f"critic/gap_{gap}/bias"] = mean(errors)
        if len(set(outcomes)) > 1:
            unexplained = mean([(e - mean(errors)) ** 2 for e in errors])
            variance = mean([(r - mean(outcomes)) ** 2 for r in outcomes])
            expected[f"critic/gap_{gap}/explained_variance"] = 1 - unexplained / (variance + 1e-5)
    metrics = critic_views(values_T, rewards_B, x.gap_T, x.mask_T, x.cu_seqlens_B1)
    assert metrics == pytest.approx(expected, rel=1e-6, abs=1e-6)


# ---- view 9: age in nats


def observe(distances: VersionDistances, version: int, kl: float | None, gaps: list[int], **options: Any) -> Any:
    """A step at `version` with tokens of these gaps; `kl` is the mean k3 of the tokens of gap 1."""
    metrics = {} if kl is None else {"offpolicy/gap_1/kl_k3": kl, "offpolicy/gap_1/tokens": float(MIN_TOKENS)}
    gap_T = torch.tensor(gaps)
    options = {"mask_T": torch.ones(len(gaps)).bool(), "is_published": True} | options
    return distances.observe(version, metrics, gap_T, **options)


def test_an_age_in_nats_is_the_sum_over_the_versions_that_went_by() -> None:
    distances = VersionDistances(max_staleness=2)
    assert observe(distances, 0, None, [0, 0]) == {"staleness/nats_mean": 0.0, "staleness/nats_max": 0.0}
    assert observe(distances, 1, 0.1, [0, 1]) == pytest.approx(
        {"policy/kl_version": 0.1, "staleness/nats_mean": 0.05, "staleness/nats_max": 0.1}
    )
    third = observe(distances, 2, 0.3, [0, 1, 2, 2])  # 0, 0.3, and twice 0.3 + 0.1
    assert third == pytest.approx({"policy/kl_version": 0.3, "staleness/nats_mean": 1.1 / 4, "staleness/nats_max": 0.4})
    masked = observe(distances, 3, 0.2, [2, 1], mask_T=torch.tensor([False, True]))
    assert masked["staleness/nats_max"] == pytest.approx(0.2)
    assert observe(distances, 4, 0.2, [2], mask_T=torch.tensor([False])).keys() == {"policy/kl_version"}


def test_an_age_over_a_version_that_was_not_measured_is_left_out() -> None:
    distances = VersionDistances(max_staleness=2)
    assert observe(distances, 1, None, [1, 1]) == {}
    assert observe(distances, 2, 0.5, [1, 2]) == {"policy/kl_version": 0.5}
    assert observe(distances, 2, 0.5, [0, 1])["staleness/nats_mean"] == 0.25
    few = {"offpolicy/gap_1/kl_k3": 9.0, "offpolicy/gap_1/tokens": MIN_TOKENS - 1.0}
    assert distances.observe(3, few, torch.tensor([1]), torch.tensor([True]), is_published=True) == {}


def test_with_publish_every_2_a_version_is_measured_in_its_first_step_only() -> None:
    """Later the policy has moved on: the distance would be to no version."""
    distances = VersionDistances(max_staleness=2)
    observe(distances, 1, 0.1, [1])
    assert observe(distances, 1, 0.7, [1], is_published=False) == {
        "staleness/nats_mean": pytest.approx(0.1),
        "staleness/nats_max": pytest.approx(0.1),
    }


def test_the_distances_go_on_after_a_resume() -> None:
    distances, resumed = VersionDistances(max_staleness=2), VersionDistances(max_staleness=2)
    for version in range(1, 5):
        observe(distances, version, 0.1 * version, [1])
    assert len(distances.state_dict()) == 2  # as far back as a token may be
    resumed.load_state_dict(distances.state_dict())
    assert observe(resumed, 5, 0.9, [2, 1]) == observe(distances, 5, 0.9, [2, 1])


def test_the_distance_of_two_versions_is_that_of_their_distributions() -> None:
    """Tokens of a table policy, scored by another: k3 of many samples against the exact KL, which it is the mean of."""
    generator = torch.Generator().manual_seed(0)
    logp_V = torch.randn(11, generator=generator, dtype=torch.float64).log_softmax(0)
    new_V = (logp_V + 0.3 * torch.randn(11, generator=generator, dtype=torch.float64)).log_softmax(0)
    tokens = torch.multinomial(logp_V.exp(), 200_000, replacement=True, generator=generator)
    ones_T = torch.ones(len(tokens))
    metrics = offpolicy_metrics(
        new_V[tokens], logp_V[tokens], ones_T, ones_T.long(), ones_T.bool(), torch.tensor([0, len(tokens)]), 2.0, True
    )
    views = VersionDistances(1).observe(1, metrics, ones_T.long(), ones_T.bool(), is_published=True)
    assert views["policy/kl_version"] == pytest.approx((logp_V.exp() * (logp_V - new_V)).sum().item(), rel=0.02)


# ---- in a step


def test_the_gauge_takes_the_rate_that_the_step_used() -> None:
    """Of a linear schedule's last step as well, after which the rate is 0; without an update there is no gauge."""
    cfg = config(mini_batches=2, learning_rate=1e-3, critic_warmup_steps=0)
    linear = replace(cfg.learner.policy, schedule=Schedule.linear)
    trainer = make_trainer(replace(cfg, learner=replace(cfg.learner, steps=1, policy=linear)))
    assert "staleness/lr_gauge" not in trainer.step(make_batch([10] * 4, version=1), version=3, is_warmup=True)
    metrics = trainer.step(make_batch([10] * 4, version=1), version=3, is_warmup=False)
    assert metrics["policy/learning_rate"] == 0.0 and metrics["staleness/lr_gauge"] == 2 * 0.5e-3


def test_a_step_reports_the_views_by_gap_and_of_its_updates() -> None:
    """Four mini-batches of two responses each: 0 to 3 updates before them, weighted by their tokens."""
    batch = make_batch([10] * 8, version=2)
    versions_T = batch.versions_T.clone()
    versions_T[40:] = 1
    trainer = make_trainer(config(mini_batches=4, learning_rate=1e-3))
    metrics = trainer.step(replace(batch, versions_T=versions_T), version=3, is_warmup=False)
    assert metrics["staleness/updates_mean"] == 1.5
    assert metrics["staleness/queue_mean"] == 1.5 and metrics["staleness/flight_mean"] == 0.0
    assert metrics["staleness/lr_gauge"] == 2 * 1e-3
    by_gap = {
        *(f"offpolicy/gap_1/{name}" for name in ("ratio_p01", "ratio_p50", "ratio_p99", "ess", "m2", "tv")),
        *(f"offpolicy/gap_2/lost_clipped_{sign}" for sign in ("positive", "negative")),
        *(f"offpolicy/gap_2/lost_truncated_{sign}" for sign in ("positive", "negative")),
        *("offpolicy/gap_1/sequence_ess", "offpolicy/gap_2/sequences", "offpolicy/sequence_ess", "offpolicy/m2"),
        *("critic/gap_1/bias", "critic/gap_2/explained_variance", "offpolicy/tv"),
    }  # fmt: skip
    assert by_gap <= metrics.keys()
    assert not any("gap_0" in name or "masked" in name.rpartition("/")[2] for name in metrics if "offpolicy" in name)


def test_warm_up_and_steps_whose_tokens_are_all_masked_have_no_views_of_the_policy() -> None:
    warm = make_trainer(config()).step(make_batch(LENGTHS), 0, is_warmup=True)
    absent = ("staleness/updates", "staleness/lr", "staleness/nats", "policy/kl_version")
    assert not [name for name in warm if name.startswith(absent) or "lost_" in name]
    assert warm["critic/gap_0/bias"] == pytest.approx(1 / 4, abs=0.5)
    cfg = config(max_staleness=0, over_age=OverAge.mask)
    masked = make_trainer(cfg).step(make_batch(LENGTHS), version=1, is_warmup=False)
    assert masked["staleness/masked_fraction"] == 1.0 and not [name for name in masked if "gap_" in name]


def test_without_a_critic_there_is_no_view_of_one() -> None:
    cfg = config(advantage=AdvantageEstimator.grpo, critic_warmup_steps=0)
    metrics = make_trainer(cfg).step(make_batch(LENGTHS), version=1, is_warmup=False)
    assert not [name for name in metrics if name.startswith("critic/gap_")]
    assert 0.0 <= metrics["offpolicy/gap_1/lost_clipped_positive"] <= 1.0


def test_a_token_of_the_last_version_tells_how_far_the_last_step_went() -> None:
    trainer = make_trainer(config(learning_rate=1e-2))
    batch = on_policy(make_batch([30] * 8), trainer.policy.network)
    first = trainer.step(batch, version=0, is_warmup=False)
    assert first["staleness/nats_max"] == 0.0 and "policy/kl_version" not in first
    second = trainer.step(batch, version=1, is_warmup=False)
    assert second["policy/kl_version"] == second["staleness/nats_mean"] > 0.0
    state = trainer.state_dict()
    resumed = make_trainer(config(learning_rate=1e-2))
    resumed.load_state_dict(state)
    third = [t.step(batch, version=2, is_warmup=False, is_published=False) for t in (trainer, resumed)]
    assert "staleness/nats_mean" not in third[0]  # version 1 was not measured: no token of it came
    assert third[0].get("policy/kl_version") is third[1].get("policy/kl_version") is None


# ---- by hand


def test_staleness_by_hand() -> None:
    """Response 0 has versions 2, 2, 3 and response 1 version 4 throughout, read at version 4."""
    gap_T, mask_T = torch.tensor([2, 2, 1, 0, 0]), torch.tensor([False, False, True, True, True])
    assert staleness_metrics(gap_T, mask_T, torch.tensor([0, 3, 5])) == {
        "staleness/token_mean": 1.0,
        "staleness/token_max": 2.0,
        "staleness/versions_per_response": 1.5,
        "staleness/flight_mean": 0.5,
        "staleness/queue_mean": 0.5,
        "staleness/masked_fraction": pytest.approx(0.4),
    }


def test_offpolicy_ratios_by_hand() -> None:
    """rho = 1, 4 at gap 0 and 1/2 at gap 1; a fourth, masked token does not count."""
    old_T = tensor(0.0, math.log(4), -math.log(2), 5.0)
    mask_T = torch.tensor([True, True, True, False])
    metrics = offpolicy_metrics(
        old_T,
        torch.zeros(4),
        weights_T=tensor(1.0, 2.0, 0.0, 1.0),
        gap_T=torch.tensor([0, 0, 1, 1]),
        mask_T=mask_T,
        cu_seqlens_B1=torch.tensor([0, 2, 4]),
        truncation=1.5,
        is_published=True,
    )
    expected = {
        "offpolicy/tokens": 3.0,
        "offpolicy/ratio_mean": 5.5 / 3,
        "offpolicy/ratio_max": 4.0,
        "offpolicy/ratio_min": 0.5,
        "offpolicy/ess": 5.5**2 / (3 * 17.25),
        "offpolicy/chi2_token": 17.25 / 3 - 1,
        "offpolicy/chi2_sequence": (16 + 0.25) / 2 - 1,
        "offpolicy/kl_k1": -math.log(2) / 3,
        "offpolicy/weight_mean": 1.0,
        "offpolicy/rejected_fraction": 1 / 3,
        "offpolicy/ratio_above_fraction": 1 / 3,
        "offpolicy/ratio_below_fraction": 1 / 3,
        "offpolicy/mismatch_abs_mean": math.log(4) / 2,
        "offpolicy/mismatch_prob_error": 2.5,
        "offpolicy/gap_0/tokens": 2.0,
        "offpolicy/gap_0/ess": 25 / (2 * 17),
        "offpolicy/gap_1/ratio_mean": 0.5,
        "offpolicy/gap_1/ess": 1.0,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_mismatch_leaves_out_responses_that_span_versions() -> None:
    """The second response's newest token is of gap 0, but drawn from a cache that older weights filled."""
    metrics = offpolicy_metrics(
        tensor(math.log(2), 3.0, 4.0),
        torch.zeros(3),
        weights_T=torch.ones(3),
        gap_T=torch.tensor([0, 1, 0]),
        mask_T=torch.ones(3, dtype=torch.bool),
        cu_seqlens_B1=torch.tensor([0, 1, 3]),
        truncation=2.0,
        is_published=True,
    )
    assert metrics["offpolicy/mismatch_abs_mean"] == pytest.approx(math.log(2))
    assert metrics["offpolicy/gap_0/tokens"] == 2.0


def test_after_steps_that_were_not_published_nothing_is_said_about_the_engines() -> None:
    """The policy has moved on since version 4 was published: that is drift, of the older version's tokens too."""
    inputs = (tensor(math.log(2), 3.0), torch.zeros(2), torch.ones(2), torch.tensor([0, 1]), torch.ones(2).bool())
    published, later = (
        offpolicy_metrics(*inputs, torch.tensor([0, 1, 2]), truncation=2.0, is_published=is_published)
        for is_published in (True, False)
    )
    about_engines = {name for name in published if name.startswith(("offpolicy/gap_0/", "offpolicy/mismatch_"))}
    assert len(about_engines) == 14
    assert later == {name: value for name, value in published.items() if name not in about_engines}

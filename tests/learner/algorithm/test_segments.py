"""algorithm.segment_probability: GAE that bootstraps at the starts of segments alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.config import AlgorithmConfig
from learner.algorithm.advantages import gae, td_errors
from learner.algorithm.diagnostics import segment_metrics
from learner.algorithm.experience import segment_starts
from learner.algorithm.packing import boundaries
from tests.learner.algorithm.test_trainer import LENGTHS, config, make_batch, make_trainer

unit = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 1.0))


def slow_segmental(values: list[float], reward: float, starts: list[bool], gae_lambda: float, gamma: float) -> Tensor:
    """The mean over starts s > t of gamma^(s-t) V_s - V_t, weights (1 - lambda) lambda^j, and of the outcome's."""
    length, advantages = len(values), []
    for t in range(length):
        ahead = [s for s in range(t + 1, length) if starts[s]]
        total = gae_lambda ** len(ahead) * (gamma ** (length - 1 - t) * reward - values[t])
        for j, s in enumerate(ahead):
            total += (1 - gae_lambda) * gae_lambda**j * (gamma ** (s - t) * values[s] - values[t])
        advantages.append(total)
    return torch.tensor(advantages, dtype=torch.float64)


def float64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_by_hand() -> None:
    """Values 0.1, 0.4, 0.2, 0.6 and 0.5, reward 1, lambda 1/2; tokens 2 and 3 start segments.

    A_4 = 1 - 0.5 = 0.5; A_3 = 0.5 - 0.6 + A_4 = 0.4; A_2 = 0.6 - 0.2 + A_3 / 2 = 0.6;
    A_1 = 0.2 - 0.4 + A_2 / 2 = 0.1; A_0 = 0.4 - 0.1 + A_1 = 0.4.
    """
    values, starts = float64(0.1, 0.4, 0.2, 0.6, 0.5), torch.tensor([False, False, True, True, False])
    advantages = gae(values, float64(1.0), torch.tensor([0, 5]), float64(0.5), starts_T=starts)
    torch.testing.assert_close(advantages, float64(0.4, 0.1, 0.6, 0.4, 0.5))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(1, 6), st.integers(60, 70), st.integers(120, 150)), max_size=5),
    share=unit,
    gamma=unit,
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_packed_it_is_the_mean_over_starts_response_by_response(
    lengths: list[int], share: float, gamma: float, seed: int, data: st.DataObject
) -> None:
    lambdas = data.draw(st.lists(unit, min_size=len(lengths), max_size=len(lengths)))
    generator = torch.Generator().manual_seed(seed)
    values_T = torch.randn(sum(lengths), generator=generator, dtype=torch.float64)
    starts_T = torch.rand(sum(lengths), generator=generator) < share
    rewards_B = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    packed = gae(
        values_T, rewards_B, boundaries(torch.tensor(lengths, dtype=torch.int64)), float64(*lambdas), gamma, starts_T
    )
    parts = (x.split(lengths) if lengths else [] for x in (packed, values_T, starts_T))
    for part, v, s, r, gae_lambda in zip(*parts, rewards_B.tolist(), lambdas, strict=True):
        expected = slow_segmental(v.tolist(), r, s.tolist(), gae_lambda, gamma)
        torch.testing.assert_close(part, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.3, 0.95, 1.0])
def test_all_starts_are_gae_and_none_is_the_outcome(gae_lambda: float) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([70, 1, 5])
    values_T, rewards_B = torch.randn(76, generator=generator), torch.randn(3, generator=generator)
    inputs = (values_T, rewards_B, boundaries(lengths), torch.full((3,), gae_lambda))
    everywhere = gae(*inputs, starts_T=torch.ones(76, dtype=torch.bool))
    assert torch.equal(everywhere, gae(*inputs))
    nowhere = gae(*inputs, starts_T=torch.zeros(76, dtype=torch.bool))
    torch.testing.assert_close(nowhere, torch.repeat_interleave(rewards_B, lengths) - values_T, atol=1e-5, rtol=1e-5)


def test_at_lambda_zero_a_segment_is_one_action() -> None:
    """Then A_t is the sum of the TD errors to the end of its segment, telescoped: V at the next start less V_t."""
    values_T, starts_T = float64(0.1, 0.4, 0.2, 0.6), torch.tensor([True, False, True, False])
    inputs = (values_T, float64(1.0), torch.tensor([0, 4]))
    advantages = gae(*inputs, float64(0.0), starts_T=starts_T)
    torch.testing.assert_close(advantages, float64(0.2 - 0.1, 0.2 - 0.4, 1.0 - 0.2, 1.0 - 0.6))
    assert advantages[0] == pytest.approx(td_errors(*inputs, 1.0)[:2].sum().item())


def test_a_segment_starts_with_a_token_drawn_with_less_than_the_probability() -> None:
    logprobs_T = torch.tensor([0.9, 0.19, 0.21, 0.05, 1.0]).log()
    algorithm = AlgorithmConfig(segment_probability=0.2)
    starts_T = segment_starts(algorithm, logprobs_T)
    assert starts_T is not None and starts_T.tolist() == [False, True, False, True, False]
    assert segment_starts(AlgorithmConfig(), logprobs_T) is None
    # Two responses, of 3 and 2 tokens: segments of 1, 2, 2.
    assert segment_metrics(starts_T, torch.tensor([0, 3, 5])) == {"gae/segment_length": pytest.approx(5 / 3)}


def test_a_step_uses_the_probabilities_with_which_the_tokens_were_drawn() -> None:
    """Probability 1 makes every token a start: the step without segments; 0 makes none: lambda 1."""
    batch = make_batch(LENGTHS)
    settings_of = {
        "plain": {},
        "one": {"segment_probability": 1.0},
        "some": {"segment_probability": 0.2},
        "none": {"segment_probability": 0.0},
        "outcome": {"length_adaptive_alpha": None, "policy_lambda": 1.0},
    }
    metrics = {}
    for name, algorithm in settings_of.items():
        trainer = make_trainer(config(critic_warmup_steps=1, **algorithm))
        trainer.step(batch, 0, is_warmup=True)
        metrics[name] = trainer.step(batch, 0, is_warmup=False)
    std = {name: each["gae/advantage_std"] for name, each in metrics.items()}
    assert std["one"] == std["plain"] and std["none"] == pytest.approx(std["outcome"], rel=1e-5)
    assert len({round(std[name], 4) for name in ("plain", "some", "none")}) == 3
    num_tokens = batch.num_response_tokens
    starts_T = batch.behavior_logprobs_T.exp() < 0.2
    starts_T[batch.response_cu_seqlens_B1[:-1]] = True
    assert metrics["some"]["gae/segment_length"] == pytest.approx(num_tokens / int(starts_T.sum()))
    assert metrics["one"]["gae/segment_length"] == 1.0 and "gae/segment_length" not in metrics["plain"]
    for name in ("plain", "some"):
        assert metrics[name]["critic/value_loss"] == pytest.approx(metrics["outcome"]["critic/value_loss"])

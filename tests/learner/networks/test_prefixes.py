"""Shared prefixes: what is computed, and that nothing else than the cost changes."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from common.config import Config
from learner.algorithm.packing import boundaries
from learner.networks.model import load_critic, load_policy
from learner.networks.prefixes import NOWHERE, shared_prefixes
from tests.support.tiny_models import VOCAB, Packed, tiny_run, write_tiny_model

CPU = torch.device("cpu")


def stream(sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int] = ()) -> Packed:
    lengths_B = torch.tensor([len(tokens) for tokens in sequences])
    tokens = torch.tensor([token for tokens in sequences for token in tokens])
    return Packed(tokens, boundaries(lengths_B), torch.tensor(prompt_lengths))


def groups() -> Packed:
    """Three prompts, two of which begin alike, in mixed order: groups of 4, 3 and 1; responses that begin alike, one
    that is another's start, and one that is there twice."""
    torch.manual_seed(3)
    long, other = torch.randint(VOCAB, (2, 30)).tolist()
    a, b, c = long[:9], long[:5] + other[:2], other[:12]
    responses = [
        (a, long[20:26]),
        (b, long[10:13]),
        (a, long[20:23] + other[20:25]),
        (c, other[13:30]),
        (a, long[20:23]),
    ]
    responses += [(b, long[10:13]), (a, other[3:4]), (b, long[11:29])]
    return stream([p + r for p, r in responses], [len(p) for p, _ in responses])


def test_what_two_responses_have_in_common_is_computed_once() -> None:
    p, q, a, b, c, d = range(6)
    found = shared_prefixes(*stream([[p, q, a, b, c], [p, q, a, d, c]])[:2])
    assert found.kept_C.tolist() == [0, 1, 2, 3, 8]
    assert found.places_S.tolist() == [0, 1, 2, 3, NOWHERE, 0, 1, 2, 4, NOWHERE]
    assert (found.lengths, found.key_lengths) == ((4, 1), (4, 4))
    assert found.keys_K.tolist() == [0, 1, 2, 3, 0, 1, 2, 4]


@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=7), min_size=1, max_size=12))
def test_each_distinct_prefix_is_computed_exactly_once(sequences: list[list[int]]) -> None:
    inputs = stream(sequences)
    found = shared_prefixes(inputs.token_ids_S, inputs.cu_seqlens_B1)
    reads = [tuple(tokens[: n + 1]) for tokens in sequences for n in range(len(tokens))]  # what ends at each token of S
    is_last = found.places_S == NOWHERE
    assert is_last.nonzero()[:, 0].tolist() == (inputs.cu_seqlens_B1[1:] - 1).tolist()
    computed = [reads[s] for s in found.kept_C.tolist()]
    assert len(set(computed)) == len(computed)
    assert all(computed[c] == read for c, read in zip(found.places_S.tolist(), reads, strict=True) if c != NOWHERE)
    keys = iter(found.keys_K.tolist())
    ends = boundaries(torch.tensor(found.lengths)).tolist()[1:]
    for end, length, num_keys in zip(ends, found.lengths, found.key_lengths, strict=True):
        seen = [computed[next(keys)] for _ in range(num_keys)]
        assert seen == [computed[end - 1][: n + 1] for n in range(num_keys)]  # a sequence's last token sees all of them
        assert seen[-length:] == computed[end - length : end]


def outputs(config: Config, inputs: Packed) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Log-probs, entropies and values, and the gradients of a random function of them."""
    policy, critic = load_policy(config, CPU, None), load_critic(config, CPU, None)
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(2))
    found = [*policy(*inputs, 0.7, with_entropy=True), critic(*inputs)]
    weights = torch.randn(3, len(found[0]), generator=torch.Generator().manual_seed(1))
    sum(x @ w for x, w in zip(found, weights, strict=True)).backward()
    parameters = {**dict(policy.named_parameters()), **dict(critic.named_parameters())}
    return found, {name: p.grad for name, p in parameters.items() if p.grad is not None}


@pytest.mark.parametrize(
    ("architecture", "is_tied", "settings"),
    [("llama", True, {}), ("qwen3", False, {"activation_checkpointing": 1}), ("qwen2", False, {"window": 5})],
)
def test_log_probs_values_and_gradients_are_those_of_the_plain_stream(
    tmp_path: Path, architecture: str, is_tied: bool, settings: dict[str, int]
) -> None:
    path, learner = write_tiny_model(tmp_path, architecture, is_tied), dict(settings)
    window = learner.pop("window", None)
    if window is not None:
        written = json.loads((tmp_path / "config.json").read_text())
        written |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
        written["layer_types"] = ["full_attention", "sliding_attention"]
        (tmp_path / "config.json").write_text(json.dumps(written))
    plain, shared = (outputs(tiny_run(path, share_prefixes=on, **learner), groups()) for on in (False, True))
    torch.testing.assert_close(shared[0], plain[0], rtol=0, atol=1e-5)
    assert shared[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        assert float((shared[1][name] - gradient).norm() / gradient.norm()) < 1e-5, name

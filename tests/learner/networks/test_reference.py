"""Architectures that the packed forward pass would compute wrongly are refused when they are loaded, each in one
sentence; those that it computes are left as they were."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from common.config import Config, ConfigError, Device
from learner.networks import attention, reference
from learner.networks.attention import Packing, packed_attention
from learner.networks.model import load_critic, load_policy
from learner.networks.parallel import make_mesh, process_group
from tests.support.ranks import run_two_ranks
from tests.support.tiny_models import VOCAB, naive_logprobs, packed, tiny_run, write_tiny_model

CPU = torch.device("cpu")
LENGTHS = [9, 4, 17, 9, 3]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def write_model(folder: Path, model_type: str, **settings: Any) -> str:
    """A folder with a random model of any architecture, every parameter far from zero."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return str(folder)


def refusal(path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_policy(tiny_run(path), CPU, None)
    sentence = str(caught.value)
    assert path in sentence and "\n" not in sentence
    return sentence


EXPERTS = SIZES | {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": VOCAB}
OPT = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
KNOWN: list[tuple[str, dict[str, Any]]] = [
    ("mistral", SIZES | {"sliding_window": 5}),
    ("gemma3_text", SIZES | {"sliding_window": 5}),
    ("phi3", SIZES | {"sliding_window": None}),
    ("olmo2", SIZES),
    ("granite", SIZES | {"attention_multiplier": 0.2, "residual_multiplier": 0.7}),
    ("gpt_neox", {k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")}),
    ("gpt2", GPT2),
    ("opt", OPT | {"vocab_size": VOCAB, "max_position_embeddings": 256, "dropout": 0.3}),
    ("seed_oss", SIZES | {"residual_dropout": 0.3}),
    ("qwen3_moe", EXPERTS),
    ("qwen2_moe", EXPERTS),
    ("mixtral", EXPERTS),
]


@pytest.mark.parametrize(("model_type", "settings"), KNOWN, ids=[name for name, _ in KNOWN])
def test_these_architectures_train_with_the_log_probs_of_transformers(
    tmp_path: Path, model_type: str, settings: dict[str, Any]
) -> None:
    path = write_model(tmp_path, model_type, **settings)
    policy = load_policy(tiny_run(path), CPU, None)
    plain = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    inputs = packed(LENGTHS)
    expected, _ = naive_logprobs(plain, inputs, 1.0)
    torch.testing.assert_close(policy(*inputs, 1.0)[0], expected, rtol=0, atol=2e-5)
    load_critic(tiny_run(path), CPU, None)


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": VOCAB}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gemma2", SIZES | {"final_logit_softcapping": None}, "attn_logit_softcapping=50.0"),
    ("gpt_oss", SIZES | {"num_local_experts": 2}, "GptOssAttention asks for attention with s_aux"),
    ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB}, "differ from those of plain"),
    ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": VOCAB}, "differ from those"),
    ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": VOCAB}, "does not take packed sequences"),
    ("gptj", GPT2 | {"rotary_dim": 4}, "does not load: KeyError"),
    ("stablelm", SIZES, "does not tell its StableLmAttention where the packed sequences end"),
    ("phi", SIZES, "output layer with a bias"),
    ("cohere", SIZES, "logit_scale=0.0625"),
]


@pytest.mark.parametrize(("model_type", "settings", "words"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_these_architectures_are_refused_in_one_sentence(
    tmp_path: Path, model_type: str, settings: dict[str, Any], words: str
) -> None:
    assert words in refusal(write_model(tmp_path, model_type, **settings))


def test_a_setting_that_config_json_leaves_to_its_default_is_found(tmp_path: Path) -> None:
    path = write_model(tmp_path, "cohere", **SIZES)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["logit_scale"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert "logit_scale=0.0625" in refusal(path)


def test_a_critics_backbone_is_compared_as_well(tmp_path: Path) -> None:
    policy = write_tiny_model(tmp_path / "policy")
    path = write_model(tmp_path / "critic", "bloom", hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCAB)
    with pytest.raises(ConfigError, match=r"critic cannot be trained: the learner's hidden states .* differ"):
        load_critic(tiny_run(policy, critic_path=path), CPU, None)


def attend(**keywords: Any) -> Tensor:
    """Packed attention of two sequences, as a model's layer calls it."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 7, 8) for heads in (4, 2, 2))
    mask = keywords.pop("attention_mask", None)
    return packed_attention(nn.Identity(), q, k, v, mask, packing=Packing.from_lengths([4, 3], CPU), **keywords)[0]


@pytest.mark.parametrize(
    "keywords",
    [
        {"softcap": 50.0},
        {"s_aux": torch.zeros(4)},
        {"position_bias": torch.zeros(1, 4, 7, 7)},
        {"is_causal": False},
        {"attention_mask": torch.zeros(1, 1, 7, 7)},
        {"a_keyword_of_next_year": 0},
    ],
    ids=lambda keywords: next(iter(keywords)),
)
def test_a_keyword_that_attention_does_not_know_is_refused_by_name(keywords: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"Identity asks for attention with {next(iter(keywords))}"):
        attend(**keywords)


def test_keywords_without_effect_pass() -> None:
    neutral = {"softcap": None, "s_aux": None, "dropout": 0.5, "is_causal": True, "use_cache": False}
    assert torch.equal(attend(**neutral, position_ids=torch.arange(7)[None]), attend())


def test_values_may_be_wider_than_keys() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 12)
    found, _ = packed_attention(nn.Identity(), q, k, v, None, packing=Packing.from_lengths([4, 3], CPU))
    for span in (slice(0, 4), slice(4, 7)):
        one = [x[:, :, span] for x in (q, k, v)]
        expected = nn.functional.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(found[:, span], expected.transpose(1, 2), rtol=0, atol=1e-6)


def test_a_packed_path_that_forgets_the_window_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch crosses a window that is longer than its usual sequences."""
    path = write_model(tmp_path, "mistral", **SIZES | {"sliding_window": 40})
    right = attention._attend_batched
    monkeypatch.setattr(attention, "_attend_batched", lambda *args: right(*args[:5], None))
    assert "log-probs on packed sequences differ" in refusal(path)


def test_a_packed_path_that_lets_sequences_see_each_other_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Packing, "from_lengths", one_long_sequence(Packing.from_lengths))
    assert "log-probs on packed sequences differ" in refusal(write_tiny_model(tmp_path))


def one_long_sequence(right: Any) -> Any:
    """Positions as they should be, but attention over the whole stream."""

    def wrong(lengths: list[int], device: torch.device) -> Packing:
        whole, parts = right([sum(lengths)], device), right(lengths, device)
        return Packing(lengths=whole.lengths, position_ids_S=parts.position_ids_S, cu_seqlens_B1=whole.cu_seqlens_B1)

    return wrong


def test_the_comparison_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny_model(tmp_path)
    seen: list[tuple[Any, ...]] = []
    right = reference.check_logprobs

    def observed(model: PreTrainedModel, *arguments: Any) -> None:
        for _ in range(2):
            weights = [parameter.clone() for parameter in model.parameters()]
            seen.append((weights, model.training, model.config._attn_implementation, torch.get_rng_state().tolist()))
            right(model, *arguments)

    monkeypatch.setattr("learner.networks.model.check_logprobs", observed)
    policy = load_policy(tiny_run(path), CPU, None)
    (before, *state), (after, *state_after) = seen
    assert state == state_after and state[:2] == [True, "packed"]
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_a_weight_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    model.save_pretrained(path)
    assert "by nan nats" in refusal(path)


def _both_ranks_are_refused(rank: int, config: Config) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    with process_group(Device.cpu, timeout_s=60):
        mesh = make_mesh(config)
        for load in (load_policy, load_critic):
            with pytest.raises(ConfigError, match=r"cannot be trained: the learner's .* differ from those of plain"):
                load(config, CPU, mesh)
        dist.barrier()


@pytest.mark.slow
def test_what_rank_0_refuses_every_rank_refuses_in_the_same_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path, "bloom", hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCAB)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    run_two_ranks(_both_ranks_are_refused, tiny_run(path, ranks=2))

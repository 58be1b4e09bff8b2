"""Tiny random Hugging Face models and packed inputs for the learner's tests."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from common.config import CheckpointConfig, Config, LearnerConfig, ModelConfig
from learner.algorithm.packing import boundaries, spans

VOCAB = 37
ARCHITECTURES: dict[str, type[PreTrainedConfig]] = {
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "llama": LlamaConfig,
}


class Packed(NamedTuple):
    token_ids_S: Tensor
    cu_seqlens_B1: Tensor
    prompt_lengths_B: Tensor


def tiny_config(architecture: str = "qwen2", is_tied: bool = False, num_layers: int = 2) -> PreTrainedConfig:
    return ARCHITECTURES[architecture](
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        tie_word_embeddings=is_tied,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
    )


def write_tiny_model(folder: Path, architecture: str = "qwen2", is_tied: bool = False) -> str:
    """A folder with a random model and a stand-in for tokenizer files; returns its path."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, is_tied))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return str(folder)


def write_tiny_mixture(folder: Path, architecture: str = "qwen3_moe") -> str:
    """As write_tiny_model, a mixture of experts, which transformers fuses into one parameter a layer."""
    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCAB}
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.2}
    config = AutoConfig.for_model(architecture, **sizes, **heads, **experts)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return str(folder)


def tiny_run(path: str, critic_path: str | None = None, tie: bool | None = None, **learner: object) -> Config:
    return Config(
        model=ModelConfig(path=path, critic_path=critic_path, tie_word_embeddings=tie),
        learner=LearnerConfig(logprob_chunk_tokens=16, **learner),
        checkpoint=CheckpointConfig(),
    )


def packed(lengths: list[int], prompt_length: int = 2, seed: int = 0) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (sum(lengths),), generator=generator)
    lengths_B = torch.tensor(lengths, dtype=torch.int64)
    return Packed(tokens, boundaries(lengths_B), torch.full_like(lengths_B, prompt_length))


def pick(inputs: Packed, indices: list[int]) -> Packed:
    """The chosen sequences as a packed input of their own."""
    chosen = torch.tensor(indices, dtype=torch.int64)
    lengths_B = inputs.cu_seqlens_B1.diff()[chosen]
    tokens = inputs.token_ids_S[spans(inputs.cu_seqlens_B1[:-1][chosen], lengths_B)]
    return Packed(tokens, boundaries(lengths_B), inputs.prompt_lengths_B[chosen])


def naive_logprobs(model: PreTrainedModel, inputs: Packed, temperature: float) -> tuple[Tensor, Tensor]:
    """(logprobs_T, entropy_T) from the full logits of one sequence at a time."""
    logprobs, entropies = [], []
    ends = inputs.cu_seqlens_B1.tolist()
    for start, end, prompt in zip(ends, ends[1:], inputs.prompt_lengths_B.tolist(), strict=False):
        tokens = inputs.token_ids_S[start:end]
        logits = model(input_ids=tokens[None]).logits[0, prompt - 1 : -1] / temperature
        table = logits.log_softmax(-1)
        logprobs.append(table.gather(1, tokens[prompt:, None])[:, 0])
        entropies.append(-(table.exp() * table).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)

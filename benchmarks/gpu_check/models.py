"""The models that the check makes: random weights in the shapes of Qwen2.5, with a tokenizer of single characters."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from random import Random

import torch
from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM

from benchmarks.learner import batch_of
from common.loading import RECIPES as SHIPPED
from common.tasks import number_walk
from learner.algorithm.packing import Batch
from learner.prepare import RECIPES, build_tokenizer

DEMO = SHIPPED / "models" / "contrary_walk"  # what `make demo` starts from: 150,000 parameters, float32

SHAPES: Mapping[str, Mapping[str, int]] = {
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    },
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
    },
}


def model_folder(name: str, folder: Path, device: torch.device) -> Path:
    """A bfloat16 model of SHAPES[name] in `folder`, made on `device` unless it is there."""
    path = folder / name
    if path.is_dir():
        return path
    unfinished = folder / f"{name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    tokenizer = build_tokenizer(RECIPES["number_walk"].characters)
    config = Qwen2Config(
        **SHAPES[name],
        tie_word_embeddings=True,
        max_position_embeddings=32_768,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with device:
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(path)
    return path


def vocabulary(path: Path) -> int:
    """Tokens that the model knows."""
    return int(AutoConfig.from_pretrained(path).vocab_size)


def walks(num_sequences: int) -> Batch:
    """Walks of the kind that the demo's model makes. On tokens at random its log-probs are extreme, and say nothing."""
    tokenizer = build_tokenizer(number_walk.CHARACTERS)
    draw = Random(0)
    sequences = []
    for _ in range(num_sequences):
        prompt, response = number_walk.sample_demonstration(draw, 0.43, 0.6, 0.0)
        sequences.append((tokenizer(prompt).input_ids, [*tokenizer(response).input_ids, tokenizer.eos_token_id]))
    return batch_of(
        torch.tensor([token for prompt, response in sequences for token in (*prompt, *response)]),
        torch.tensor([len(prompt) for prompt, _ in sequences]),
        torch.tensor([len(response) for _, response in sequences]),
        torch.Generator().manual_seed(0),
    )

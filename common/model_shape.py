"""The sizes of a causal language model, from its config.json alone: what memory is planned from, without torch.

Sizes are those of decoders in the manner of Llama, Qwen2, Qwen3, Mistral and their mixtures of experts. Axes: D hidden
width, V vocabulary, L decoder layers, Q = heads x head width, K = key-value heads x head width, I width of the MLP.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import ConfigError
from common.model_folder import read_settings, text_settings

NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
BIASED = ("qwen2", "qwen2_moe")  # families whose query, key and value projections always have a bias
NORMED = ("qwen3", "qwen3_moe")  # families that normalise each head's query and key


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes in elements. For a mixture, `experts` of them are held and `active_experts` compute each token."""

    vocab: int  # V
    width: int  # D
    layers: int  # L
    query_width: int  # Q
    kv_width: int  # K
    kv_heads: int
    mlp_width: int  # I of one expert
    experts: int
    active_experts: int
    is_tied: bool
    has_bias: bool
    normed_width: int  # head width where queries and keys are normalised, else 0

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the output layer where it has its own."""
        return self.vocab * self.width

    @property
    def attention(self) -> int:
        """Parameters of one decoder layer's attention, with the norms of queries and keys."""
        bias = self.query_width + 2 * self.kv_width if self.has_bias else 0
        return self.width * (2 * self.query_width + 2 * self.kv_width) + bias + 2 * self.normed_width

    @property
    def layer(self) -> int:
        """Parameters of one decoder layer."""
        router = self.width * self.experts if self.experts > 1 else 0
        mlp = 3 * self.width * self.mlp_width * self.experts
        return self.attention + router + mlp + 2 * self.width

    @property
    def linear_widths(self) -> int:
        """Inputs and outputs of one decoder layer's linear layers, summed: r times as many parameters has an adapter of
        rank r. The experts of a mixture are none."""
        mlp = 3 * (self.width + self.mlp_width) if self.experts == 1 else 0
        return 4 * self.width + 2 * self.query_width + 2 * self.kv_width + mlp

    @property
    def backbone(self) -> int:
        """Parameters without an output layer: what a critic starts from."""
        return self.embedding + self.layers * self.layer + self.width

    @property
    def parameters(self) -> int:
        """Parameters of the whole language model."""
        return self.backbone + (0 if self.is_tied else self.embedding)


def read_shape(path: str, tie_word_embeddings: bool | None = None) -> ModelShape:
    """The sizes of the model in folder `path`. `tie_word_embeddings` as in the settings: None is as the folder says.

    Raises ConfigError when config.json does not give them.
    """
    name = f"the model {path}"
    settings = text_settings(read_settings(Path(path), name))
    missing = [key for key in NEEDED if not isinstance(settings.get(key), int)]
    if missing:
        raise ConfigError(f"{name} does not give {missing[0]} in its config.json, so its memory cannot be planned")
    return shape_of(settings, tie_word_embeddings)


def shape_of(settings: Mapping[str, Any], tie_word_embeddings: bool | None = None) -> ModelShape:
    """As read_shape, from the settings in config.json."""
    heads, width = settings["num_attention_heads"], settings["hidden_size"]
    head_width = settings.get("head_dim") or width // heads
    kv_heads = settings.get("num_key_value_heads") or heads
    family = settings.get("model_type", "")
    experts = settings.get("num_experts") or settings.get("num_local_experts") or 1
    is_tied = bool(settings.get("tie_word_embeddings", False)) if tie_word_embeddings is None else tie_word_embeddings
    return ModelShape(
        vocab=settings["vocab_size"],
        width=width,
        layers=settings["num_hidden_layers"],
        query_width=heads * head_width,
        kv_width=kv_heads * head_width,
        kv_heads=kv_heads,
        mlp_width=settings.get("moe_intermediate_size") or settings["intermediate_size"],
        experts=experts,
        active_experts=settings.get("num_experts_per_tok", 1) if experts > 1 else 1,
        is_tied=is_tied,
        has_bias=family in BIASED or bool(settings.get("attention_bias", False)),
        normed_width=head_width if family in NORMED else 0,
    )

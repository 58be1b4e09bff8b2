"""How many positions a model was made for, read from its config.json without transformers."""

from typing import Any

# What architectures call it; of several the smallest counts. The engine reads the same keys (vLLM,
# transformers_utils/model_arch_config_convertor.py), and like it, what Cohere says in model_max_length comes first.
_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "seq_len")
# Ways to stretch rotary embeddings whose models state the stretched length; any other multiplies it.
_STATED = ("default", "su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")


def num_positions(config: dict[str, Any]) -> int | None:
    """Tokens of prompt and response at most, or None when `config` (the language model's config.json) does not say."""
    lengths = [config["model_max_length"]] if config.get("model_max_length") else [config.get(key) for key in _KEYS]
    stated = min((length for length in lengths if isinstance(length, int | float)), default=None)
    if stated is None:
        return None
    return int(stated if "gemma3" in config.get("model_type", "") else stated * _factor(config))


def _factor(config: dict[str, Any]) -> float:
    """By how much the rotary embeddings stretch the stated length."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = [rope, *rope.values()]  # one for all layers, or one for each type of layer
    factors = [
        kind["factor"]
        for kind in kinds
        if isinstance(kind, dict)
        and isinstance(kind.get("factor"), int | float)
        and kind.get("rope_type", kind.get("type")) not in _STATED
    ]
    return float(factors[-1]) if factors else 1.0

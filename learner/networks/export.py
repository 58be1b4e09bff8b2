"""Trained networks as Hugging Face folders, the tokenizer's files included, or their adapters in PEFT's format.

The first two functions are collectives when the network is sharded; rank 0 writes. `base` is the model folder that
the network came from: tokenizer files and, where `dtype` is None, the stored weights' number type are taken from there.
"""

import copy
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from learner.networks.model import Critic, Policy
from learner.networks.pretrained import read_config, save_tensors, write_folder


def export_policy(policy: Policy, base: str | Path, out_dir: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes a causal language model that transformers and vLLM load."""
    config = _copy(policy.config)
    config.architectures = [type(policy.model).__name__]
    _export(policy, config, base, out_dir, dtype)


def export_critic(critic: Critic, base: str | Path, out_dir: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes a sequence classification with one label, the value, which model.critic_path and transformers read.

    Raises ValueError when transformers has none for the critic's architecture.
    """
    config = _copy(critic.backbone.config)
    config.num_labels = 1
    config.architectures = [_value_architecture(critic, config)]
    _export(critic, config, base, out_dir, dtype)


def export_adapter(network: Policy | Critic, base: str | Path, out_dir: str | Path, dtype: torch.dtype | None) -> None:
    """Writes what PEFT, and vLLM, load on top of `base`: of a critic, on top of its sequence classification.

    The network must not be sharded. Raises ValueError where `export_critic` does.
    """
    adapter, is_critic = network.adapter, isinstance(network, Critic)
    assert adapter is not None and adapter.name is not None
    peft_config = copy.copy(adapter.root.model.peft_config[adapter.name])
    peft_config.base_model_name_or_path, peft_config.inference_mode = str(base), True
    peft_config.task_type = "SEQ_CLS" if is_critic else "CAUSAL_LM"
    prefix = "base_model.model."
    if isinstance(network, Critic):
        _value_architecture(network, network.backbone.config)
        peft_config.modules_to_save = ["score"]
        prefix += f"{network.backbone.base_model_prefix}."
    tensors = {}
    for name, parameter in network.named_parameters():
        inner = name.partition(".")[2]  # without the network's own attribute
        key = f"{prefix}{inner}" if ".lora_" in name else "base_model.model.score.weight"
        tensors[key.replace(f".{adapter.name}.", ".")] = parameter.detach().to(dtype or parameter.dtype).contiguous()
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, Path(out_dir) / "adapter_model.safetensors")
    peft_config.save_pretrained(str(out_dir))


def _export(
    network: Policy | Critic, config: PreTrainedConfig, base: str | Path, out_dir: str | Path, dtype: torch.dtype | None
) -> None:
    is_remote = type(config).__module__.startswith("transformers_modules.")  # then its code already runs here
    config.dtype = dtype or read_config(str(base), is_remote).dtype or torch.float32
    tensors = network.named_hf_parameters(config.dtype)
    if dist.is_initialized() and dist.get_rank() != 0:
        for _ in tensors:
            pass
        return
    write_folder(Path(out_dir), config, ((name, tensor.cpu()) for name, tensor in tensors), Path(base))


def _copy(config: PreTrainedConfig) -> PreTrainedConfig:
    return type(config).from_dict(config.to_dict())


def _value_architecture(critic: Critic, config: PreTrainedConfig) -> str:
    """The class that transformers reads the folder with, which must have exactly the critic's parameters."""
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
        if {name for name, _ in model.named_parameters()} == {name for name, _ in critic.named_shards()}:
            return type(model).__name__
    raise ValueError(
        f"the critic's backbone {type(critic.backbone).__name__} cannot be exported: transformers has no sequence "
        "classification with just this backbone and one score layer; its checkpoints stay usable with --resume"
    )

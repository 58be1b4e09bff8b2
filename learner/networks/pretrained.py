"""Hugging Face folders in and out: loading causal language models for the learner, and writing them back.

Everything is loaded on the CPU in float32 (master weights); learner/networks/model.py then moves and shards it.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as hf_logging

from common.config import ConfigError
from common.model_folder import check_settings
from learner.networks.attention import IMPLEMENTATION

AutoClass = type[AutoModelForCausalLM] | type[AutoModelForSequenceClassification]
SHARD_BYTES = 4 << 30
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as Rust writes it


def load_causal_lm(
    path: str, tie_word_embeddings: bool | None, has_weights: bool, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of folder `path`, its attention packed, its embeddings shared or split as asked (None: as
    the folder says). Without `has_weights` the parameters are allocated but not read, for ranks that
    receive them.

    Raises ConfigError when the folder is missing, is no causal language model, lacks weights, or
    post-processes its logits.
    """
    config = read_config(path, trust_remote_code)
    model = _instantiate(AutoModelForCausalLM, path, config, has_weights, trust_remote_code)
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        raise ConfigError(f"model folder {path} cannot be trained: {type(model).__name__} has no output layer to find")
    if getattr(head, "bias", None) is not None:
        raise ConfigError(f"model folder {path} has an output layer with a bias, which the learner does not compute")
    tie = config.tie_word_embeddings if tie_word_embeddings is None else tie_word_embeddings
    set_tied(model, tie)
    return model


def load_value_model(
    path: str, has_weights: bool, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Tensor | None]:
    """(backbone, head weight [1, D]) of a critic's folder: a reward or value model (sequence classification
    with one label), or a causal language model, which has no head (None).
    """
    config = read_config(path, trust_remote_code)
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return load_causal_lm(path, None, has_weights, trust_remote_code).base_model, None
    if config.num_labels != 1:
        raise ConfigError(f"critic folder {path} has {config.num_labels} labels, a value model has one")
    model = _instantiate(AutoModelForSequenceClassification, path, config, has_weights, trust_remote_code)
    return model.base_model, model.score.weight.detach()


def read_config(path: str, trust_remote_code: bool) -> PreTrainedConfig:
    """The folder's configuration. Raises ConfigError when there is none or it is not supported."""
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(f"model folder {path} has no config.json, set model.path to a Hugging Face model folder")
    with _in_one_sentence(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    check_settings(config.to_dict(), f"model folder {path}")  # again: with the defaults that config.json leaves out
    return config


@contextmanager
def _in_one_sentence(path: str) -> Iterator[None]:
    """What transformers raises about a folder is the user's to mend, whatever its type."""
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        if "custom code" in reason:
            reason += "; set model.trust_remote_code=true if you trust it"
        raise ConfigError(f"model folder {path} does not load: {type(error).__name__}: {reason}") from error


def _instantiate(
    auto_class: AutoClass, path: str, config: PreTrainedConfig, has_weights: bool, trust_remote_code: bool
) -> PreTrainedModel:
    if has_weights:
        return _load(auto_class, path, config, trust_remote_code)
    return allocate(auto_class, config, trust_remote_code)


def _load(auto_class: AutoClass, path: str, config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    hf_logging.disable_progress_bar()  # logs are files
    with _in_one_sentence(path):
        model, report = auto_class.from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            attn_implementation=IMPLEMENTATION,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    if report["missing_keys"]:
        raise ConfigError(f"model folder {path} lacks the weights {sorted(report['missing_keys'])}")
    return model


def allocate(auto_class: AutoClass, config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """A model whose parameters are uninitialised: untouched pages cost no RAM until they are written."""
    with torch.device("meta"):
        model = auto_class.from_config(
            config,
            dtype=torch.float32,
            attn_implementation=IMPLEMENTATION,
            trust_remote_code=trust_remote_code,
        )
    model = model.to_empty(device="cpu")
    if config.tie_word_embeddings and model.get_output_embeddings() is not None:
        set_tied(model, True)  # to_empty allocates shared parameters twice
    return model


def set_tied(model: PreTrainedModel, is_tied: bool) -> None:
    """Makes the output layer share the input embedding, or gives it a copy of its own; config says so too."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_shared = head.weight is embedding.weight
    if is_tied and not is_shared:
        head.weight = embedding.weight
    if not is_tied and is_shared:
        head.weight = nn.Parameter(embedding.weight.detach().clone())
    model.config.tie_word_embeddings = is_tied


def stored_names(path: str) -> set[str] | None:
    """Names of the tensors in the folder's safetensors files; None when it has none of those."""
    names: set[str] = set()
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names |= set(tensors.keys())
    return names or None


def as_stored(model: PreTrainedModel, name: str, parameter: Tensor) -> dict[str, Tensor]:
    """A parameter as the checkpoint holds it: under its own name, or several tensors where transformers fuses them
    (the experts of a mixture). Views where possible; tensors on the meta device give shapes.
    """
    stored: dict[str, Tensor] = revert_weight_conversion(model, {name: parameter})
    return stored


def write_folder(
    out_dir: Path, config: PreTrainedConfig, tensors: Iterator[tuple[str, Tensor]], tokenizer_path: Path
) -> None:
    """A Hugging Face folder of `tensors` (kept in their dtype), with every file beside the weights and the
    configuration in `tokenizer_path` copied along. Tensors are written in shards as they come, so that at
    most one shard is in memory.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    for file in tokenizer_path.iterdir():
        is_weights = file.suffix in (".safetensors", ".bin", ".pt", ".gguf") or file.name.endswith(".index.json")
        if file.is_file() and not is_weights and file.name != "config.json":
            shutil.copy2(file, out_dir / file.name)
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            shards.append(_write_shard(out_dir, len(shards), shard))
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    shards.append(_write_shard(out_dir, len(shards), shard))
    _name_shards(out_dir, shards, total)
    config.save_pretrained(out_dir)
    for file in out_dir.glob("*.safetensors"):  # which safetensors makes for the owner's eyes only
        shutil.copymode(out_dir / "config.json", file)


def _write_shard(out_dir: Path, index: int, shard: dict[str, Tensor]) -> list[str]:
    save_tensors(shard, out_dir / _partial(index))
    return list(shard)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file. Raises OSError for one that cannot be written, which safetensors hides in its own error."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if (found := _OS_ERROR.search(str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def _partial(index: int) -> str:
    return f"shard-{index:05d}.partial"


def _name_shards(out_dir: Path, shards: list[list[str]], total: int) -> None:
    """Gives shards their customary names, which carry their number; several get an index."""
    if len(shards) == 1:
        (out_dir / _partial(0)).rename(out_dir / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file_name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (out_dir / _partial(index)).rename(out_dir / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    contents = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out_dir / "model.safetensors.index.json").write_text(json.dumps(contents, indent=2))

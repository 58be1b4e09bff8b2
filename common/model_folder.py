"""What can be known of a Hugging Face model folder without loading it, in milliseconds and without torch.

Read are config.json, the tokenizer's vocabulary and the headers of the safetensors files. What cannot be trained is
refused in one sentence before any process is started; what only a forward pass shows is left to
learner/networks/reference.py.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.config import ConfigError
from common.positions import num_positions

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
WEIGHTS = ("*.safetensors", "*.bin")
FINGERPRINT_BYTES = 1 << 20  # at either end of a file
NOT_A_CAP = (None, 0, 0.0)
NOT_A_FACTOR = (None, 1, 1.0)

# Settings of config.json that change attention or logits in ways that the learner does not compute: (what the model
# does, values without effect).
UNSUPPORTED: dict[str, tuple[str, tuple[object, ...]]] = {
    "attn_logit_softcapping": ("caps its attention scores", NOT_A_CAP),
    "final_logit_softcapping": ("caps its logits", NOT_A_CAP),
    "logit_scale": ("scales its logits", NOT_A_FACTOR),
    "logits_scaling": ("scales its logits", NOT_A_FACTOR),
    "lm_head_multiplier": ("scales its logits", NOT_A_FACTOR),
}
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
OUTPUT_BIASES = ("lm_head.bias", "embed_out.bias")


def check_model_folder(key: str, path: str, max_model_len: int) -> None:
    """Refuses a folder that no run can train. `key` is the setting that names it; `max_model_len` in tokens.

    Raises ConfigError in one sentence.
    """
    folder, name = Path(path), f"{key}={path}"
    settings = read_settings(folder, name)
    check_settings(settings, name)
    _check_positions(text_settings(settings), name, max_model_len)
    _check_weights(folder, name)
    if key == "model.path":
        _check_tokenizer_is_there(folder, name)
    _check_tokenizer(folder, text_settings(settings).get("vocab_size"), name)


def weights_fingerprint(*paths: str | None) -> str:
    """SHA-256 of sizes, starts and ends of the folders' weight files, in milliseconds. Training changes all weights, so
    other weights of the same architecture have another one; names and places of the files do not count."""
    digest = hashlib.sha256()
    for path in filter(None, paths):
        for pattern in WEIGHTS:
            for file in sorted(Path(path).glob(pattern)):
                size = file.stat().st_size
                digest.update(str(size).encode())
                with file.open("rb") as opened:
                    digest.update(opened.read(FINGERPRINT_BYTES))
                    opened.seek(max(0, size - FINGERPRINT_BYTES), os.SEEK_SET)
                    digest.update(opened.read())
    return digest.hexdigest()


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """config.json. Raises ConfigError when there is none or it is something else."""
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"{name} is not a Hugging Face model folder (no config.json there): give one or the OWNER/NAME of a model "
            "on the Hub, or make the base model of a built-in task with `run.py prepare MODEL`"
        )
    return _read_json(file, name)


def check_settings(settings: dict[str, Any], name: str) -> None:
    """Refuses what a configuration says of the model; `settings` as in config.json, or complete with defaults."""
    quantization = settings.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise ConfigError(
            f"{name} is quantised (quantization_config: {method}), and quantised weights cannot be trained: give "
            "the folder of the unquantised model"
        )
    for settings_of in (settings, text_settings(settings)):
        for setting, (deed, neutral) in UNSUPPORTED.items():
            value = settings_of.get(setting)
            if value not in neutral:
                raise ConfigError(
                    f"{name} {deed} ({setting}={value} in its config.json), which the learner does not compute: "
                    "train another model"
                )


def vocabulary_size(path: str) -> int | None:
    """Rows of the output layer of the model in folder `path`, padding included: what an engine can draw from. None when
    its config.json does not say. Raises ConfigError when there is none."""
    size = text_settings(read_settings(Path(path), f"model.path={path}")).get("vocab_size")
    return size if isinstance(size, int) else None


def text_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The part about the language model, where a configuration describes several models."""
    inner = settings.get("text_config")
    return inner if isinstance(inner, dict) else settings


def _check_positions(settings: dict[str, Any], name: str, max_model_len: int) -> None:
    """Too many, or LongRoPE: transformers and vLLM choose between short and long factors by different rules."""
    positions = num_positions(settings)
    if positions is not None and max_model_len > positions:
        raise ConfigError(
            f"model.max_model_len={max_model_len} is more than the {positions} positions of the model {name}: lower it"
        )
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type")) not in ("longrope", "su"):
        return
    original = settings.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    if original is not None and max_model_len > original:
        raise ConfigError(
            f"{name} has LongRoPE positions: with model.max_model_len={max_model_len} above its {original} original "
            "positions vLLM stretches every sequence, the learner only those that are longer: set "
            f"model.max_model_len to at most {original}"
        )


def _check_weights(folder: Path, name: str) -> None:
    files = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))
    if not files:
        raise ConfigError(f"{name} has no weights (no .safetensors file there): give a complete model folder")
    for index in folder.glob("*.safetensors.index.json"):
        needed = set(_read_json(index, name).get("weight_map", {}).values())
        missing = sorted(file for file in needed if not (folder / file).is_file())
        if missing:
            raise ConfigError(
                f"{name} is incomplete: {index.name} names {missing[0]}, which is not there ({len(missing)} of "
                f"{len(needed)} files are missing): fetch the folder again"
            )
    for file in files:
        _refuse_pointer(file, name)
        for tensor in _tensor_names(file, name) if file.suffix == ".safetensors" else ():
            if tensor in OUTPUT_BIASES:
                raise ConfigError(
                    f"{name} has an output layer with a bias ({tensor}), which the learner does not compute: "
                    "train another model"
                )


def _tensor_names(file: Path, name: str) -> list[str]:
    """From the header: 8 bytes with its length, little-endian, then JSON with type, shape and place of each tensor."""
    size = file.stat().st_size
    damaged = f"{name} has a damaged file: {file.name}"
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(length) if 8 + length <= size else b"")
            tensors = {tensor: entry["data_offsets"] for tensor, entry in header.items() if tensor != "__metadata__"}
            end = 8 + length + max((int(stop) for _, stop in tensors.values()), default=0)
        except (ValueError, AttributeError, TypeError, LookupError):
            raise ConfigError(f"{damaged} is no safetensors file or was cut off: fetch it again") from None
    if end > size:
        raise ConfigError(f"{damaged} has {size} bytes and should have {end}: fetch it again")
    return list(tensors)


def _check_tokenizer_is_there(folder: Path, name: str) -> None:
    """transformers makes an empty tokenizer of a folder that has none."""
    file = folder / "tokenizer_config.json"
    has_own_code = file.is_file() and "auto_map" in _read_json(file, name)
    if not has_own_code and not any(next(folder.glob(pattern), None) for pattern in TOKENIZERS):
        raise ConfigError(f"{name} has no tokenizer (no {TOKENIZERS[0]} there): copy the model's own into the folder")


def _check_tokenizer(folder: Path, vocab_size: int | None, name: str) -> None:
    """A token that prompts are made of and that the embedding has no row for ends a run when it comes.

    A special token that nothing in the folder uses may be beyond the embedding: some published models have such.
    """
    if vocab_size is None:
        return
    used = "\n".join(_texts_around_prompts(folder, name))
    for token, number, is_special in _vocabulary(folder, name):
        if number >= vocab_size and (not is_special or token in used):
            raise ConfigError(
                f"{name} has a tokenizer that is larger than the model: token {token!r} has id {number}, but the "
                f"embedding ends at id {vocab_size - 1}: enlarge the embedding (resize_token_embeddings) or give the "
                "model's own tokenizer"
            )


def _texts_around_prompts(folder: Path, name: str) -> Iterator[str]:
    """The chat template, and the special tokens that a tokenizer adds by itself."""
    template, file = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if template.is_file():
        yield template.read_text(errors="replace")
    settings = _read_json(file, name) if file.is_file() else {}
    yield str(settings.get("chat_template", ""))
    for key in ("bos_token", "eos_token"):
        token = settings.get(key)
        yield str(token.get("content") if isinstance(token, dict) else token)


def _vocabulary(folder: Path, name: str) -> Iterator[tuple[str, int, bool]]:
    """(token, id, whether it was added as a special one) of the tokenizer's files; nothing where there are none."""
    file = folder / "tokenizer.json"
    if file.is_file():
        contents = _read_json(file, name)
        vocabulary = (contents.get("model") or {}).get("vocab") or {}
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((v[0], i) for i, v in enumerate(vocabulary))
        added = {token["content"]: token for token in contents.get("added_tokens", ())}
        yield from ((token, number, False) for token, number in pairs if token not in added)
        yield from ((token, entry["id"], bool(entry.get("special"))) for token, entry in added.items())
    elif (folder / "vocab.json").is_file():
        yield from ((token, number, False) for token, number in _read_json(folder / "vocab.json", name).items())


def _read_json(file: Path, name: str) -> dict[str, Any]:
    _refuse_pointer(file, name)
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{name} has a damaged file: {file.name} is not JSON ({error}): fetch it again") from None
    if not isinstance(contents, dict):
        raise ConfigError(f"{name} has a damaged file: {file.name} holds no JSON object: fetch it again")
    return contents


def _refuse_pointer(file: Path, name: str) -> None:
    with file.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ConfigError(
                f"{name} was fetched without git-lfs: {file.name} is a pointer, not the file: run `git lfs pull` there"
            )

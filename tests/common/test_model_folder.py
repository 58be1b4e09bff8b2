"""What is refused of a model folder before any process starts: one sentence each, and nothing that works is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.config import ConfigError
from common.loading import RECIPES
from common.model_folder import check_model_folder

SETTINGS: dict[str, Any] = {"model_type": "llama", "vocab_size": 6, "max_position_embeddings": 512}
TOKENS = {"a": 0, "b": 1, "c": 2, "<eos>": 3}


def write_folder(folder: Path, **settings: Any) -> Path:
    """A folder whose files are as small as their formats allow."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SETTINGS | settings))
    write_tokenizer(folder)
    write_weights(folder / "model.safetensors", "model.embed_tokens.weight")
    return folder


def write_tokenizer(folder: Path, *added: dict[str, Any], vocabulary: Any = TOKENS) -> None:
    contents = {"model": {"vocab": vocabulary}, "added_tokens": list(added)}
    (folder / "tokenizer.json").write_text(json.dumps(contents))


def write_weights(file: Path, *names: str, num_bytes: int = 8) -> None:
    entries = {name: {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]} for i, name in enumerate(names)}
    header = json.dumps({"__metadata__": {"format": "pt"}} | entries).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(num_bytes * len(names)))


def refusal(folder: Path, max_model_len: int = 256) -> str:
    with pytest.raises(ConfigError) as caught:
        check_model_folder("model.path", str(folder), max_model_len)
    sentence = str(caught.value)
    assert sentence.startswith(f"model.path={folder} ") and "\n" not in sentence
    return sentence


def test_an_ordinary_folder_passes(tmp_path: Path) -> None:
    neutral = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1}
    check_model_folder("model.path", str(write_folder(tmp_path, **neutral)), 256)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("attn_logit_softcapping", 1.0),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 1.0),
        ("logit_scale", 0.0625),
        ("logits_scaling", 8),
        ("lm_head_multiplier", 0.5),
    ],
)
@pytest.mark.parametrize("is_inner", [False, True])
def test_settings_that_the_learner_does_not_compute_are_named(
    tmp_path: Path, setting: str, value: float, is_inner: bool
) -> None:
    settings = {"text_config": SETTINGS | {setting: value}} if is_inner else {setting: value}
    assert f"({setting}={value} in its config.json)" in refusal(write_folder(tmp_path, **settings))


def test_quantised_weights_are_named_with_their_method(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, quantization_config={"quant_method": "awq", "bits": 4})
    assert "is quantised (quantization_config: awq)" in refusal(folder)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", [{"rope_type": "longrope"}, {"type": "longrope"}, {"type": "su"}])
def test_longrope_is_refused_exactly_where_the_two_engines_choose_other_factors(
    tmp_path: Path, key: str, kind: dict[str, str]
) -> None:
    folder = write_folder(tmp_path, original_max_position_embeddings=128, **{key: kind})
    assert "set model.max_model_len to at most 128" in refusal(folder, max_model_len=129)
    check_model_folder("model.path", str(folder), 128)


def test_other_stretched_positions_pass(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 128}
    check_model_folder("model.path", str(write_folder(tmp_path, rope_scaling=yarn)), 256)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_is_called_by_its_name(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n")
    assert f"{name} is a pointer, not the file: run `git lfs pull`" in refusal(folder)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    assert "has no weights" in refusal(folder)


def test_a_shard_that_the_index_names_and_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    write_weights(folder / shards["a"], "a")
    assert f"names {shards['b']}, which is not there (1 of 2 files are missing)" in refusal(folder)


@pytest.mark.parametrize("kept", [0, 4, 20, -1])
def test_a_file_that_was_cut_off_is_damaged(tmp_path: Path, kept: int) -> None:
    file = write_folder(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "has a damaged file: model.safetensors" in refusal(tmp_path)


def test_a_configuration_that_is_not_json_is_damaged(tmp_path: Path) -> None:
    (write_folder(tmp_path) / "config.json").write_text("{")
    assert "has a damaged file: config.json is not JSON" in refusal(tmp_path)


def test_a_bias_of_the_output_layer_is_found_in_the_header(tmp_path: Path) -> None:
    write_weights(write_folder(tmp_path) / "model.safetensors", "lm_head.weight", "lm_head.bias")
    assert "has an output layer with a bias (lm_head.bias)" in refusal(tmp_path)


@pytest.mark.parametrize("vocabulary", [TOKENS | {"far": 6}, [[word, 0.0] for word in "abcdefg"]])
def test_a_word_beyond_the_embedding_is_refused(tmp_path: Path, vocabulary: Any) -> None:
    write_tokenizer(write_folder(tmp_path), vocabulary=vocabulary)
    assert "has id 6, but the embedding ends at id 5" in refusal(tmp_path)


def test_a_special_token_beyond_the_embedding_counts_when_something_uses_it(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    write_tokenizer(folder, {"content": "<image>", "id": 6, "special": True})
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    check_model_folder("model.path", str(folder), 256)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<image>"}}))
    assert "token '<image>' has id 6" in refusal(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ '<image>' + messages[0].content }}")
    assert "token '<image>' has id 6" in refusal(folder)


def test_an_added_word_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    write_tokenizer(write_folder(tmp_path), {"content": "lemma", "id": 6, "special": False})
    assert "token 'lemma' has id 6" in refusal(tmp_path)


def test_train_refuses_a_folder_with_code_2_and_leaves_no_run_behind(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", attn_logit_softcapping=50.0)
    command = ["train", "-c", "demo", f"model.path={folder}", f"runs_dir={tmp_path / 'runs'}"]
    done = subprocess.run(
        [sys.executable, "run.py", *command], cwd=RECIPES.parent, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: model.path={folder} caps its attention scores")
    assert done.stderr.count("\n") == 1 and done.stdout == ""
    assert not (tmp_path / "runs").exists()

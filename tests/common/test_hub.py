"""A model may be named as on the Hub; what cannot be fetched is one sentence that says how."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from common.config import ConfigError
from common.hub import fetch_model, is_hub_name
from common.loading import load_config


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the Hub's client answers with."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folder))
    return folder


def test_only_owner_slash_name_is_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("Qwen/Qwen2.5-0.5B")
    for path in ("model", "/models/qwen", "configs/models/chain_sum", "./models/qwen", "../x", "a b/c", "owner/"):
        assert not is_hub_name(path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert not is_hub_name("models/mine")


def test_the_configuration_holds_the_folder_of_a_model_of_the_hub(cached: Path) -> None:
    (cached / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")  # no tensors
    config = load_config(["number_walk"], ["model.path=Qwen/Qwen2.5-0.5B", "model.critic_path=owner/critic"])
    assert (config.model.path, config.model.critic_path) == (str(cached), str(cached))


def test_a_model_of_which_only_a_part_is_there_is_refused(cached: Path) -> None:
    with pytest.raises(ConfigError, match="lack the weights: run `hf download owner/name`"):
        fetch_model("owner/name", "model.path")


def test_offline_and_missing_says_how_to_fetch_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, **settings: Any) -> str:
        raise LocalEntryNotFoundError("no network\nand no cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    with pytest.raises(ConfigError) as caught:
        load_config([], ["model.path=owner/name"])
    message = str(caught.value)
    assert message.startswith("model.path=owner/name is neither a folder here nor in the cache of the Hub, and ")
    assert "run `hf download owner/name` where there is a network" in message and "\n" not in message


@pytest.mark.parametrize("error", [RuntimeError("403 Forbidden\nby the proxy"), OSError()])
def test_whatever_breaks_while_it_is_fetched_is_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, **settings: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(ConfigError, match=r"^model\.path=owner/name .*\((403 Forbidden|OSError)\)") as caught:
        fetch_model("owner/name", "model.path")
    assert "\n" not in str(caught.value)

"""A model that brings its own Python code runs it only where the user trusts it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import dynamic_module_utils

from common.config import ConfigError
from learner.networks.export import export_policy
from learner.networks.model import Policy
from learner.networks.pretrained import load_causal_lm
from tests.support.tiny_models import write_tiny_model

CODE = """
from transformers import Qwen2Config, Qwen2ForCausalLM

class OwnConfig(Qwen2Config):
    model_type = "own"

class OwnForCausalLM(Qwen2ForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = Path(write_tiny_model(tmp_path / "model"))
    (path / "own.py").write_text(CODE)
    settings = json.loads((path / "config.json").read_text())
    settings |= {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (path / "config.json").write_text(json.dumps(settings))
    return str(path)


def test_code_that_is_not_trusted_is_one_sentence(folder: str) -> None:
    with pytest.raises(ConfigError, match="trust_remote_code") as caught:
        load_causal_lm(folder, None, has_weights=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("has_weights", [True, False])
def test_trusted_code_makes_the_model_on_every_rank(folder: str, has_weights: bool) -> None:
    model = load_causal_lm(folder, None, has_weights, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"


def test_an_exported_model_brings_its_code_along(folder: str, tmp_path: Path) -> None:
    model = load_causal_lm(folder, None, True, trust_remote_code=True)
    export_policy(Policy(model, 64), folder, tmp_path / "out")
    again = load_causal_lm(str(tmp_path / "out"), None, True, trust_remote_code=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))

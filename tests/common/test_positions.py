"""How many positions a config.json gives a model, in the spellings of different architectures."""

from pathlib import Path
from typing import Any

import pytest

from common.config import ConfigError
from common.loading import load_config
from common.positions import num_positions


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024}, 1024),
        ({"max_position_embeddings": 4096, "seq_length": 2048}, 2048),
        ({"max_position_embeddings": 8192, "model_max_length": 131072}, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 8192),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 4096),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 131072),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 131072),
        (
            {
                "max_position_embeddings": 1024,
                "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}},
            },
            8192,
        ),
        ({"max_position_embeddings": 100, "rope_scaling": None}, 100),
        ({"model_type": "mamba"}, None),
    ],
)
def test_positions(config: dict[str, Any], positions: int | None) -> None:
    assert num_positions(config) == positions


@pytest.mark.parametrize("text", ["version https://git-lfs.github.com/spec/v1", "[1]", ""])
def test_a_config_that_is_none_is_refused_in_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        load_config([], [f"model.path={tmp_path}"])
    assert "\n" not in str(caught.value)

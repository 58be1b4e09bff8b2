"""The benchmark of publications, at the smallest size: real processes, and rows that say what they should."""

import json
from pathlib import Path

import pytest

from benchmarks.weights import SHAPES, main


@pytest.mark.slow
def test_a_publication_and_a_join_are_measured_and_the_join_costs_the_others_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--models", "tiny", "--repeats", "2", "--json", str(tmp_path / "rows.json")])
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["model"], row["engine"], row["publications"], row["buckets"]) == ("tiny", "receiver", 2, 1)
    assert row["join_stall_s"] == 0.0 < row["join_s"]
    assert 0.0 < row["pause_s"] < row["stall_s"] < row["publication_s"]
    assert row["ratio"] == pytest.approx(row["mib_per_s"] / row["bare_mib_per_s"])
    table = capsys.readouterr().out.splitlines()[1:]
    assert len({line.count("|") for line in table}) == 1 and len(table) == 3


@pytest.mark.parametrize(("model", "parameters"), [("150k", 0.15e6), ("3m", 3e6), ("135m", 134.5e6), ("500m", 494e6)])
def test_models_have_the_size_of_their_names(model: str, parameters: float) -> None:
    shape = SHAPES[model]()
    attention = 2 + 2 * shape.num_key_value_heads / shape.num_attention_heads
    layer = shape.hidden_size * (attention * shape.hidden_size + 3 * shape.intermediate_size)
    tables = (2 - shape.tie_word_embeddings) * shape.vocab_size * shape.hidden_size
    assert shape.num_hidden_layers * layer + tables == pytest.approx(parameters, rel=0.06)

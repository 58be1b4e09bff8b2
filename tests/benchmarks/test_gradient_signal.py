"""The benchmark's printing and drawing, on gradients that were made up; the mathematics has tests of its own."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks import gradient_signal
from common.loading import load_config
from learner.signal.estimators import CRITIC, usual
from learner.signal.table import Table, table


def made_up(seed: int, num_batches: int) -> Table:
    """All estimators are right, and the later ones noisier."""
    algorithm = load_config(["number_walk"], [gradient_signal.MODEL]).algorithm
    estimators = usual(algorithm, CRITIC, 8, (0.95, 1.0))
    rng = np.random.default_rng(seed)
    gradients = (
        rng.normal(size=(len(estimators), num_batches, 30)) * np.linspace(0.05, 0.2, len(estimators))[:, None, None]
    )
    gradients[:, :, 0] += 1.0
    return table(estimators, np.einsum("aid,bjd->aibj", gradients, gradients))


def test_the_tables_are_printed_written_and_drawn_with_what_they_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gradient_signal, "grouped", made_up)
    monkeypatch.setattr(gradient_signal, "single", made_up)
    files = {name: tmp_path / f"signal.{name}" for name in ("json", "svg")}
    gradient_signal.main(
        ["--batches", "12", *(word for name, file in files.items() for word in (f"--{name}", str(file)))]
    )
    said = capsys.readouterr().out
    assert "one batch of 16 x 8 responses, 12 batches" in said and "one batch of 128 x 1 responses" in said
    assert "The critic helps here: lambda 0.95 has the best aim of all lambdas" in said and "cost: " in said
    written = json.loads(files["json"].read_text())
    assert {row["name"] for row in written["tables"]["16 x 8"]["rows"]} >= {"lambda 0.95", "GRPO"}
    assert written["cost"]["cpu_s"] >= 0.0
    drawn = ElementTree.parse(files["svg"]).getroot()
    texts = [element.text for element in drawn.iter() if element.tag.endswith("text")]
    assert "1 as configured: alpha 0.45" in texts

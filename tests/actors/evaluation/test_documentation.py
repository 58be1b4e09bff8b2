"""Every command of docs/evaluation.md does what it says, with a scripted engine; those that need a GPU are left out."""

import json
import shlex
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import run
from actors.evaluation import main as command
from common.commandline import parse
from common.config import Config
from common.loading import load_config, save_config
from common.types import Lease
from learner.algorithm.trainer import Trainer
from learner.checkpoint import Checkpointer
from learner.networks.model import load_networks
from tests.support.runs import ROOT
from tests.support.scripted_engine import scripted

PAGE = ROOT / "docs" / "evaluation.md"
LINES = [line for line in PAGE.read_text().splitlines() if line.startswith("python run.py ")]
STEP = 32

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a run of the demo, its final export and a checkpoint of step 32, and a file of walks."""
    folder = tmp_path_factory.mktemp("documentation")
    config = load_config(["demo"], [f"runs_dir={folder}/runs", f"model.path={ROOT}/configs/models/contrary_walk"])
    config.run_dir.mkdir(parents=True)
    save_config(config, config.run_dir / "config.yaml")
    _save(config)
    walk = {"prompt": "10>14=", "answer": "14", "start": 10, "target": 14, "distance": 4}
    (folder / "walks.jsonl").write_text("".join(json.dumps(walk | {"distance": d}) + "\n" for d in (4, 4, 12)))
    return folder


def _save(config: Config) -> None:
    networks = load_networks(config, torch.device("cpu"), None)
    with Checkpointer(config.run_dir / "checkpoints", keep=2) as checkpointer:
        checkpointer.save(STEP, STEP, Trainer(config, networks.policy, networks.critic, 0, 1))
    (config.run_dir / "checkpoints" / "final").symlink_to(config.model.path)


def walk(lease: Lease, index: int) -> str:
    start, target = lease.row["start"], lease.row["target"]
    sign = "+" if target > start else "-"
    moves, position = "", start
    while position != target:
        step = min(9, abs(target - position))
        position += step if sign == "+" else -step
        moves += f"{sign}{step}{position:02d}"
    return moves + ("#" if index % 2 == 0 else "+")


@pytest.mark.parametrize("line", [line for line in LINES if "needs a GPU" not in line])
def test_a_command_of_the_page(
    line: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(command, "Engine", scripted(walk))
    monkeypatch.setattr(run, "_role", lambda name: nullcontext())
    words = shlex.split(line, comments=True)[2:]
    assert run.main(words) == 0
    said = capsys.readouterr().out
    is_greedy, samples = "--temperature" in words, words[words.index("--samples") + 1] if "--samples" in words else "1"
    if "--json" in words:
        found = json.loads(said)
        assert is_greedy and found["num_samples"] == 1 and found["avg"]["value"] == 1.0
        return
    assert f"avg@{samples}" in said and "0.500 [" in said
    if "--by" in words:
        assert "by distance\n            4 " in said and "2 prompts  avg@4 0.500 [" in said
    if "--step" in words:
        assert f"runs/demo, step {STEP}" in said
        assert list(folder.glob("runs/demo/eval/.*model*")) == [], "the export goes when it is not needed any more"


def test_the_page_has_a_command_for_gpus_that_is_parsed_here() -> None:
    (line,) = [line for line in LINES if "needs a GPU" in line]
    parsed = parse(shlex.split(line, comments=True)[2:])
    assert parsed.config == ["eval_aime24"] and parsed.data == "aime24.jsonl"

"""The check of a GPU does its own work: every part at tiny sizes on the CPU, limits, omissions, exit codes."""

import ast
import importlib
import json
import math
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import demo, machine, speed
from benchmarks.gpu_check.models import SHAPES, model_folder, vocabulary
from benchmarks.gpu_check.parts import PARTS
from benchmarks.gpu_check.report import Found, Report, read
from benchmarks.learner import make_batch
from common.config import AlgorithmConfig, Config, Device, ModelConfig
from common.loading import save_config
from learner.networks.parallel import World

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
EXPECTED = {
    "a": "demo bfloat16: policy gradient, relative error",
    "b": "bfloat16: dk, largest relative error",
    "c": "bfloat16: largest difference of the step after a resume",
    "d": "tiny padded, policy and critic: useful TFLOP/s",
    "f": "s until a peer that never comes is given up",
}


@pytest.mark.parametrize("part", EXPECTED)
def test_a_part_finds_nothing_wrong_with_the_cpu(part: str, tmp_path: Path) -> None:
    report = Report(tmp_path / "report.json")
    importlib.import_module(f"benchmarks.gpu_check.{PARTS[part].module}").run(report, CPU, tmp_path)
    assert not report.found.failures
    assert report.found.numbers.keys() >= {EXPECTED[part]}


@pytest.mark.parametrize("side", ["packed", "padded"])
@pytest.mark.parametrize("variant", speed.VARIANTS[1:], ids=lambda variant: variant.label)
def test_a_smaller_variant_takes_a_step_too(side: str, variant: speed.Variant, tmp_path: Path) -> None:
    report, load, path = Report(tmp_path / "report.json"), speed.LOADS["cpu"], model_folder("tiny", tmp_path, CPU)
    batch = make_batch(load.sequences, vocabulary(path), load.mean, load.longest)
    world = World(rank=0, size=1, device=CPU)
    with speed.alone(Device.cpu) if side == "packed" else nullcontext():
        speed.timed(report, variant.label, side, variant, path, batch, load.packed, world)
    assert report.found.numbers[f"{variant.label}: tokens/s"] > 0


def imports(module: str) -> set[str]:
    """Every module that importing `module` of this project brings along, by the text of the files."""
    found, to_do = set(), [module]
    while to_do:
        name = to_do.pop()
        path = ROOT.joinpath(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in found or not (file.is_file() or path.is_dir()):
            found.add(name)
            continue
        found.add(name)
        for node in ast.walk(ast.parse(file.read_text() if file.is_file() else "")):
            if isinstance(node, ast.Import):
                to_do += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                to_do += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


@pytest.mark.parametrize("part", sorted(EXPECTED.keys() - {"f"}))
def test_parts_but_the_demo_and_transfers_do_without_vllm(part: str) -> None:
    found = imports(f"benchmarks.gpu_check.{PARTS[part].module}")
    assert "learner.networks.model" in found or part == "b"
    assert not {name for name in found if name.split(".")[0] == "vllm" or name.startswith("learner.publication")}


def test_without_vllm_the_demo_is_left_out_and_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(sys.modules, "vllm.platforms", None)
    report = Report(tmp_path / "report.json")
    demo.run(report, torch.device("cuda"), tmp_path)
    assert [sentence.split(" (")[0] for sentence in report.found.not_run] == [
        "the demo was not run: vLLM cannot be imported here"
    ]
    outcome = gpu_check.Outcome(title="", found=report.found, seconds=0.0)
    assert outcome.result == "not run"


def test_the_demo_runs_twice_and_its_runs_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def train(command: list[str]) -> None:
        settings = dict(part.split("=") for part in command if "=" in part)
        commands.append(settings)
        if settings["name"] == "synchronous":
            raise RuntimeError("the run ended with exit code 1")
        Path(settings["runs_dir"]).mkdir()
        fake_run(Path(settings["runs_dir"]) / settings["name"], (0.2, 0.7))

    monkeypatch.setattr(demo, "train", train)
    monkeypatch.setattr(demo, "missing_engine", lambda device: None)
    report = Report(tmp_path / "report.json")
    demo.run(report, torch.device("cuda"), tmp_path / "work")
    assert [settings["staleness.max_staleness"] for settings in commands] == ["2", "0"]
    assert {settings["device"] for settings in commands} == {"cuda"}
    assert report.found.failures == ["the run ended with exit code 1"]
    assert report.found.numbers["overlapping: accuracy after"] == 0.7
    assert (tmp_path / "runs" / "overlapping" / "metrics.jsonl").is_file()


def fake_run(folder: Path, accuracies: tuple[float, float]) -> Path:
    """A run of one warm-up step and two policy steps."""
    folder.mkdir()
    config = Config(model=ModelConfig(path="m"), algorithm=AlgorithmConfig(critic_warmup_steps=1))
    save_config(config, folder / "config.yaml")
    before, after = ({"accuracy/heldout": a, "accuracy/version": v} for v, a in enumerate(accuracies))
    steps = [
        {"step": 1, "time/step_s": 50.0, "time/publish_s": 9.0},
        {"step": 2, "time/step_s": 1.0, "time/publish_s": 0.2, "weights/send_s": 0.1},
        {"step": 3, "time/step_s": 3.0, "time/publish_s": 0.4, "weights/send_s": 0.3},
    ]
    rows = [{"step": 0} | before, *steps, {"step": 3} | after]
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"time": 0.0} | row) + "\n" for row in rows))
    return folder


def test_the_demos_numbers_are_those_of_its_policy_steps(tmp_path: Path) -> None:
    report = Report(tmp_path / "report.json")
    median = demo.figures(report, "overlapping", fake_run(tmp_path / "run", (0.2, 0.7)), is_judged=True)
    assert median == 2.0
    assert not report.found.failures
    numbers = report.found.numbers
    assert numbers["overlapping: accuracy after"] == 0.7
    assert numbers["overlapping: time/publish_s, mean"] == pytest.approx(0.3)
    assert numbers["overlapping: weights/send_s, mean"] == pytest.approx(0.2)


def test_a_demo_that_learns_nothing_is_a_failure(tmp_path: Path) -> None:
    report = Report(tmp_path / "report.json")
    demo.figures(report, "overlapping", fake_run(tmp_path / "run", (0.2, 0.25)), is_judged=True)
    assert report.found.failures == ["overlapping: accuracy went from 0.200 to 0.250, at least 0.1 more was expected"]


@pytest.mark.parametrize(("value", "is_failure"), [(0.1, False), (0.2, True), (math.nan, True)])
def test_a_number_above_its_limit_or_none_at_all_is_a_failure(value: float, is_failure: bool, tmp_path: Path) -> None:
    report = Report(tmp_path / "report.json")
    report.at_most("error", value, 0.1)
    assert bool(report.found.failures) is is_failure
    assert not read(report.path).is_complete


def test_a_part_over_its_limit_is_ended_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is still importing then."""
    monkeypatch.setattr(gpu_check, "SHORTEST_S", 0.0)
    (tmp_path / "work").mkdir()
    outcome = gpu_check.run_part("b", "cpu", tmp_path, dict(os.environ), left_s=0.3)
    assert outcome.result == "FAILED"
    assert outcome.found.failures == ["took longer than its 0 s and was ended"]
    assert outcome.seconds < gpu_check.GRACE_S


def test_what_is_over_time_is_not_begun(tmp_path: Path) -> None:
    outcome = gpu_check.run_part("b", "cpu", tmp_path, dict(os.environ), left_s=5.0)
    assert outcome.result == "not run"
    assert outcome.found.not_run == ["the time of the whole check was over, 5 s were left"]


def test_one_failing_part_leaves_the_others_and_the_exit_code_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_part(name: str, *_: object) -> gpu_check.Outcome:
        failures = ["broken"] if name == "a" else []
        return gpu_check.Outcome(title=name, found=Found(numbers={"n": 1.0}, failures=failures), seconds=1.0)

    monkeypatch.setattr(gpu_check, "run_part", run_part)
    assert gpu_check.check(["a", "b"], "cpu", tmp_path, {"card": "none"}) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert {name: part["result"] for name, part in results["parts"].items()} == {"a": "FAILED", "b": "passed"}
    assert capsys.readouterr().out.splitlines()[-1].startswith("failed: a;")
    assert gpu_check.check(["b"], "cpu", tmp_path, {}) == 0


def test_a_crash_is_told_in_its_last_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Traceback\n  ...\nRuntimeError: no kernel image\n\n")
    assert gpu_check.how_it_ended(1, log) == "ended with exit code 1: RuntimeError: no kernel image"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["machine", "cuda"])
    assert machine.main() == 2
    sentence = capsys.readouterr().err.strip()
    assert sentence.startswith("there is no GPU to check")
    monkeypatch.setattr(gpu_check, "look", lambda device, environment: sentence)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--folder", str(tmp_path)])
    assert gpu_check.main() == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


CARDS = (
    ("NVIDIA H100 80GB HBM3", 989),
    ("NVIDIA H100 PCIe", 756),
    ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA L40S", 362),
    ("NVIDIA L4", 121),
    ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
    ("Some Card", None),
    (None, None),
)


@pytest.mark.parametrize(("name", "peak"), CARDS)
def test_a_peak_is_known_for_whole_cards_of_the_table_only(name: str | None, peak: float | None) -> None:
    assert machine.peak_tflops(name) == peak


def test_the_estimate_of_memory_by_hand() -> None:
    shape = SHAPES["tiny"]  # keys of width 32: layers of 2 x 64 x 96 + 3 x 64 x 96, 300 x 64 in the embedding
    parameters = 300 * 64 + 2 * 30_720
    activations = 2 * (2 * 100 * (13 * 64 + 4 * 96))
    logits = 8 * 1024 * 300
    full, recomputing, alone = (speed.estimated_gib(shape, v, 100, logits=1024) * 2**30 for v in speed.VARIANTS)
    assert full == pytest.approx(32 * parameters + activations + logits)
    assert recomputing == pytest.approx(full - activations / 2 + 2 * 2 * 100 * 64)
    assert recomputing - alone == pytest.approx(16 * parameters)


def test_the_larger_model_fits_a_card_of_80_gb_and_not_one_of_48() -> None:
    needed = [speed.estimated_gib(SHAPES["1.5B"], variant, 8192, logits=1024) for variant in speed.VARIANTS]
    assert needed[0] < 78 and needed[1] > 44.7
    assert needed[2] < 30

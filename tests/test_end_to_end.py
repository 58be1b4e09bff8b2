"""Whole runs through the command line: real vLLM, real learner, a few steps each."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from common.catalogue import find
from common.launcher import RUN_CONTENT
from common.runlock import LEARNER_LOCK
from common.samples import read_samples, sampled_steps
from tests.support.runs import ROOT, processes_of, rows

SMALL = [
    "model.path=configs/models/chain_sum",
    "model.max_model_len=160",
    "rollout.prompts_per_step=4",
    "rollout.group_size=4",
    "rollout.max_tokens=100",
    "algorithm.critic_warmup_steps=1",
    "algorithm.length_adaptive_alpha=0.45",
    "learner.steps=3",
    "learner.mini_batches=2",
    "learner.policy.learning_rate=1e-4",
    "learner.policy.warmup_steps=1",
    "eval.every=2",
    "eval.num_prompts=8",
    "eval.samples_per_prompt=2",
    "task.num_train=200",
    "task.num_heldout=16",
]


def command(tmp_path: Path, *overrides: str) -> list[str]:
    run = [sys.executable, str(ROOT / "run.py"), "train", f"runs_dir={tmp_path}", "name=run"]
    return [*run, *SMALL, *overrides]


def train(tmp_path: Path, *overrides: str, timeout_s: float = 240.0) -> subprocess.CompletedProcess[str]:
    """A run whose temporary files are its own; none of its engines' sockets may be left among them."""
    with TemporaryDirectory(prefix="run-") as temporary:  # not below `tmp_path`: a socket's path may not be long
        done = subprocess.run(
            command(tmp_path, *overrides),
            cwd=ROOT,
            env=os.environ | {"TMPDIR": temporary},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert [path for path in Path(temporary).rglob("*") if path.is_socket()] == []
    return done


def finished(tmp_path: Path, done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """The metrics of a run that ended well: four steps, three versions, nothing lost, nothing too old."""
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = rows(tmp_path / "run" / "metrics.jsonl")
    steps = [row for row in metrics if "time/step_s" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert steps[-1]["version"] == 3
    assert 0.0 <= steps[-1]["weights/probe_difference"] <= steps[-1]["weights/probe_max"] < 1e-3
    assert 0.0 < steps[-1]["weights/probe_floor"] < 1e-4
    assert metrics[-1]["accuracy/heldout"] is not None
    assert {name for row in metrics for name in row if find(name) is None} == {"step", "time"}
    ledger = rows(tmp_path / "run" / "ledger.jsonl")
    assert len(ledger) == 16
    assert len({row["lease_id"] for row in ledger}) == 16
    assert (tmp_path / "run" / "checkpoints" / "final" / "model.safetensors").is_file()
    page = tmp_path / "run" / "report.html"
    assert f"report     {page}\n" in done.stdout and "</html>" in page.read_text()
    assert {path.name for path in page.parent.iterdir()} <= {*RUN_CONTENT, "config.yaml", LEARNER_LOCK}, "all goes"
    assert processes_of(tmp_path) == []
    return steps


@dataclass(frozen=True)
class Run:
    """One that ended well, and that several tests look at."""

    run_dir: Path
    steps: list[dict[str, Any]]


@pytest.fixture(scope="module")
def two_of_each(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two learner ranks and two actors."""
    tmp_path = tmp_path_factory.mktemp("two_of_each")
    # Many more groups than one actor holds: the second has work to do as soon as it is there.
    settings = ["learner.ranks=2", "actors.count=2", "actors.groups_in_flight=2", "eval.num_prompts=16"]
    return Run(tmp_path / "run", finished(tmp_path, train(tmp_path, *settings)))


@pytest.mark.slow
@pytest.mark.vllm
def test_two_learner_ranks(two_of_each: Run) -> None:
    logs = {log.name for log in (two_of_each.run_dir / "logs").glob("learner-*")}
    assert logs == {"learner-0.log", "learner-1.log"}


@pytest.mark.slow
@pytest.mark.vllm
def test_two_actors_share_the_work(two_of_each: Run) -> None:
    assert max(row["actors/connected"] for row in two_of_each.steps) == 2


@pytest.mark.slow
@pytest.mark.vllm
def test_samples_of_every_step_are_what_was_sampled_and_trained(two_of_each: Run) -> None:
    assert sampled_steps(two_of_each.run_dir) == [1, 2, 3, 4]
    trained = {(row["step"], row["lease_id"]): row for row in rows(two_of_each.run_dir / "ledger.jsonl")}
    for sample in read_samples(two_of_each.run_dir):
        line = trained[sample.step, sample.lease_id]
        assert (sample.actor, sample.reward) == (line["actor"], line["rewards"][sample.index])
        assert len(sample.tokens) == len(sample.values) == line["lengths"][sample.index]
        assert len(sample.advantages) == (0 if sample.step == 1 else len(sample.tokens))  # step 1 is the warm-up
        assert "".join(sample.tokens) == sample.response and sample.response.endswith(
            "<eos>" * (sample.reason == "stop")
        )
        assert sample.prompt.endswith("=")


@pytest.fixture(scope="module")
def on_policy(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tied model, a data file and no staleness."""
    tmp_path = tmp_path_factory.mktemp("on_policy")
    data = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "id": a * 10 + b} for a in range(1, 10) for b in range(10)]
    for name, part in (("train", data[:60]), ("heldout", data[60:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    files = [f"task.train_file={tmp_path}/train.jsonl", f"task.heldout_file={tmp_path}/heldout.jsonl"]
    procedural = {"task.num_train=200", "task.num_heldout=16"}
    arguments = [argument for argument in command(tmp_path) if argument not in procedural]
    done = subprocess.run(
        [*arguments, "model.tie_word_embeddings=true", "task.name=file", *files, "staleness.max_staleness=0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240.0,
        check=False,
    )
    return Run(tmp_path / "run", finished(tmp_path, done))


@pytest.mark.slow
@pytest.mark.vllm
def test_max_staleness_0_is_on_policy(on_policy: Run) -> None:
    assert [row["staleness/token_max"] for row in on_policy.steps] == [0, 0, 0, 0]
    assert max(row["offpolicy/mismatch_abs_mean"] for row in on_policy.steps) < 1e-4
    assert all(row["versions"][0] == row["versions"][1] for row in rows(on_policy.run_dir / "ledger.jsonl"))


@pytest.mark.slow
@pytest.mark.vllm
def test_tied_embeddings_and_a_data_file(on_policy: Run) -> None:
    exported = json.loads((on_policy.run_dir / "checkpoints" / "final" / "config.json").read_text())
    assert exported["tie_word_embeddings"] is True
    uids = {row["prompt_uid"] for row in rows(on_policy.run_dir / "ledger.jsonl")}
    assert len(uids) == 16, "of 60 rows, in the first epoch: none twice"


@pytest.mark.slow
@pytest.mark.vllm
def test_nothing_changes_at_learning_rate_0(tmp_path: Path) -> None:
    steps = finished(tmp_path, train(tmp_path, "learner.policy.learning_rate=0", "learner.critic.learning_rate=0"))
    for row in steps:  # whatever the age of a token: every version is the same policy
        assert row["offpolicy/ratio_max"] == pytest.approx(1.0, abs=1e-4)
        assert row["offpolicy/ratio_min"] == pytest.approx(1.0, abs=1e-4)
    assert all(row["policy/kl_k1"] == pytest.approx(0.0, abs=1e-6) for row in steps[1:])
    before, after = (ROOT / "configs/models/chain_sum", tmp_path / "run" / "checkpoints" / "final")
    assert_same_weights(before / "model.safetensors", after / "model.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    from safetensors.torch import load_file

    old, new = load_file(first), load_file(second)
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert tensor.equal(new[name]), name


@pytest.mark.slow
@pytest.mark.vllm
def test_ctrl_c_saves_and_stops_everything_and_the_run_goes_on_on_two_ranks(tmp_path: Path) -> None:
    done = interrupted(tmp_path)
    more = [f"learner.steps={done + 1}", "learner.ranks=2"]  # step 1 was the warm-up
    resume = [sys.executable, str(ROOT / "run.py"), "train", "--resume", str(tmp_path / "run"), *more]
    ended = subprocess.run(resume, cwd=ROOT, capture_output=True, text=True, timeout=240.0, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    metrics = [row for row in rows(tmp_path / "run" / "metrics.jsonl") if "time/step_s" in row]
    assert [row["step"] for row in metrics] == list(range(1, done + 3))
    assert metrics[-1]["version"] == done + 1
    trained = rows(tmp_path / "run" / "ledger.jsonl")
    assert [sum(row["step"] == step for row in trained) for step in range(1, done + 3)] == [4] * (done + 2)
    assert len({row["prompt_uid"] for row in trained}) == len(trained), "of 200 prompts, in the first epoch: none twice"
    assert processes_of(tmp_path) == []


def interrupted(tmp_path: Path) -> int:
    """A run that Ctrl-C has ended after its first policy step or soon after: the steps that it did."""
    process = subprocess.Popen(
        command(tmp_path, "learner.steps=40"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("step"):
                break
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=75.0)  # learner.stop_timeout_s, and the actors' farewell
        assert process.returncode == 130
        assert processes_of(tmp_path) == []
        done = max(row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl"))
        assert f"interrupted by SIGINT after step {done}: go on with run.py train --resume" in rest
        assert (tmp_path / "run" / "checkpoints" / f"step_{done:08d}").is_dir()
    finally:
        process.kill()
    return int(done)


@pytest.mark.slow
@pytest.mark.vllm
def test_an_actor_that_dies_at_start_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    done = train(tmp_path, "actors.tensor_parallel_size=3")  # the model has two heads
    assert done.returncode != 0
    warning, error = done.stderr.strip().splitlines()
    assert warning.startswith("warning: actor-0 ended with exit code 1") and "before it was ready" in warning
    assert error.startswith("error: learner-0 ended with exit code 1: no actor takes part") and "actor-0" in error
    assert processes_of(tmp_path) == []


def refused(tmp_path: Path, *overrides: str) -> str:
    """The one sentence with which a run ends that cannot start."""
    done = train(tmp_path, *overrides, timeout_s=120.0)
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert processes_of(tmp_path) == []
    return lines[0]


def test_a_misspelt_key_is_one_sentence(tmp_path: Path) -> None:
    assert "learner.stepz" in refused(tmp_path, "learner.stepz=3")


def test_a_missing_model_folder_is_one_sentence(tmp_path: Path) -> None:
    assert "no/such/folder" in refused(tmp_path, "model.path=no/such/folder")


@pytest.mark.slow
@pytest.mark.vllm
def test_a_model_that_the_learner_would_compute_wrongly_is_one_sentence(tmp_path: Path) -> None:
    """vLLM runs a BLOOM; its code gives packed attention no chance. The actors are sent home while they start."""
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    from tests.support.vllm_support import VOCABULARY, write_tokenizer

    torch.manual_seed(0)
    write_tokenizer(tmp_path / "model")
    BloomForCausalLM(BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=VOCABULARY)).save_pretrained(
        tmp_path / "model"
    )
    done = train(tmp_path, f"model.path={tmp_path / 'model'}")
    assert done.returncode == 2
    assert "learner-0 ended with exit code 2" in done.stderr and "cannot be trained" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert processes_of(tmp_path) == []


@pytest.mark.slow
def test_an_empty_data_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    files = [f"task.train_file={tmp_path}/empty.jsonl", f"task.heldout_file={tmp_path}/empty.jsonl"]
    arguments = [argument for argument in command(tmp_path) if not argument.startswith("task.")]
    done = subprocess.run(
        [*arguments, "task.name=file", *files], cwd=ROOT, capture_output=True, text=True, timeout=120.0, check=False
    )
    assert done.returncode != 0
    assert "empty.jsonl" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert processes_of(tmp_path) == []


@pytest.mark.slow
def test_a_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert str(port) in refused(tmp_path, f"transport.port={port}")

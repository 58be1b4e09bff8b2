"""`run.py signal`: its mistakes in one sentence, and on a run with a checkpoint, with the real engine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import run
from benchmarks.miniature.sampler import Sampler
from common.config import Config
from common.loading import load_config, save_config
from common.tasks import load_task
from learner.algorithm.packing import Batch
from learner.algorithm.trainer import Trainer
from learner.checkpoint import Checkpointer, complete_steps
from learner.networks.model import load_networks
from learner.rollouts.prompts import PromptStream
from learner.rollouts.record import Record, Recorder
from learner.signal import command
from learner.signal.command import Request, planned
from tests.support.runs import ROOT, processes_of

MODEL = str(ROOT / "configs" / "models" / "contrary_walk")
STEP, NUM_BATCHES, LIMIT_S = 3, 4, 200.0
SMALL = ("rollout.prompts_per_step=4", "rollout.group_size=4", "learner.mini_batches=1")

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def a_run(folder: Path, *settings: str) -> Config:
    """A run of the walk with a checkpoint, whose critic is not zero."""
    config = load_config(["number_walk"], [f"runs_dir={folder}", "name=walk", f"model.path={MODEL}", *SMALL, *settings])
    config.run_dir.mkdir(parents=True)
    save_config(config, config.run_dir / "config.yaml")
    networks = load_networks(config, torch.device("cpu"), None)
    if networks.critic is not None:
        torch.nn.init.normal_(networks.critic.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    with Checkpointer(config.run_dir / "checkpoints", keep=2) as checkpointer:
        checkpointer.save(STEP, 0, Trainer(config, networks.policy, networks.critic, 0, 1))
    return config


def request(model: str, **changes: object) -> Request:
    usual: dict[str, object] = {
        "model": model, "step": None, "num_batches": NUM_BATCHES, "pretrain_steps": None, "lambdas": (0.9, 1.0),
        "out": None, "files": (), "overrides": (),
    }  # fmt: skip
    return Request(**(usual | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere"], "model.path=nowhere is not a Hugging Face model folder"),
        ([MODEL, "--step", "3"], "is no run directory: leave it out"),
        ([MODEL, "--batches", "3"], "--batches 3 are too few for an error: give at least 4"),
        ([MODEL, "--pretrain-steps", "0"], "--pretrain-steps 0 must be at least 1"),
        ([MODEL, "--lambda", "1.5"], "--lambda 1.5 must be between 0 and 1"),
        ([MODEL, "actors.count=0"], "actors.count=0: responses are sampled here"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run.main(["signal", *words, "-c", "number_walk", f"runs_dir={tmp_path}"]) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [], "nothing is begun"


def test_a_run_without_that_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = a_run(tmp_path)
    assert run.main(["signal", str(config.run_dir), "--step", "9"]) == 2
    assert "has no checkpoint of step 9: choose --step among 3" in capsys.readouterr().err


def test_the_sampling_run_trains_no_policy_and_is_no_repetition_of_the_run(tmp_path: Path) -> None:
    config = a_run(tmp_path, "rollout.prompts_per_step=6")
    plan = planned(request(str(config.run_dir), pretrain_steps=2))
    assert (plan.sampling.learner.steps, plan.sampling.algorithm.critic_warmup_steps) == (0, 2 + NUM_BATCHES)
    assert plan.sampling.seed != config.seed and plan.sampling.learner.record
    assert plan.sampling.rollout == config.rollout and plan.config.algorithm == config.algorithm
    assert plan.has_critic and planned(request(str(config.run_dir))).has_critic
    other = planned(request(str(config.run_dir), pretrain_steps=2, overrides=("rollout.temperature=0.9",)))
    assert other.out != plan.out, "other settings have another folder"


def test_there_is_a_critic_only_where_one_was_trained_or_is_to_be(tmp_path: Path) -> None:
    critic_free = (
        "algorithm.advantage=grpo",
        "algorithm.critic_warmup_steps=0",
        "algorithm.length_adaptive_alpha=null",
    )
    grpo = a_run(tmp_path / "grpo", *critic_free, "algorithm.dynamic_sampling=true")
    plan = planned(request(str(grpo.run_dir)))
    assert not plan.has_critic and not plan.sampling.algorithm.dynamic_sampling
    assert planned(request(str(grpo.run_dir), pretrain_steps=1)).has_critic
    files = ("number_walk",)
    assert not planned(request(MODEL, files=files)).has_critic, "a new critic knows nothing"
    assert planned(request(MODEL, files=files, overrides=(f"model.critic_path={MODEL}",))).has_critic


def test_what_an_interrupted_call_has_sampled_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And its exit code is the call's."""
    config, calls = a_run(tmp_path), []

    def interrupted(sampling: Config, earlier: command.EarlierRun, settle: object) -> command.Outcome:
        calls.append(earlier)
        sampling.run_dir.mkdir(parents=True, exist_ok=True)
        save_config(sampling, sampling.run_dir / "config.yaml")
        return command.Outcome(exit_code=130, message="interrupted by SIGINT")

    monkeypatch.setattr(command, "train", interrupted)
    words = ["signal", str(config.run_dir), "--batches", str(NUM_BATCHES), "--out", str(tmp_path / "out")]
    assert [run.main(words), run.main(words)] == [130, 130]
    assert calls == [command.EarlierRun.REFUSE, command.EarlierRun.RESUME]
    assert "error: interrupted by SIGINT" in capsys.readouterr().err
    assert run.main([*words, "rollout.temperature=0.9"]) == 2
    assert "has batches of other settings: choose another --out" in capsys.readouterr().err


def sampled_here(sampling: Config, earlier: command.EarlierRun, settle: object) -> command.Outcome:
    """In the place of `train`: the record and the checkpoints that its value pretraining would leave."""
    torch.manual_seed(sampling.seed)
    sampling.run_dir.mkdir(parents=True)
    save_config(sampling, sampling.run_dir / "config.yaml")
    networks = load_networks(sampling, torch.device("cpu"), None)
    trainer = Trainer(sampling, networks.policy, networks.critic, 0, 1)
    sampler, recorder = Sampler(sampling), Recorder(sampling.run_dir, {})
    stream = PromptStream(load_task(sampling.task).train, sampling.seed)
    rollout, checkpoint = sampling.rollout, sampling.checkpoint
    with Checkpointer(sampling.run_dir / "checkpoints", checkpoint.keep) as checkpointer:
        for step in range(1, sampling.algorithm.critic_warmup_steps + 1):
            prompts = [stream.next() for _ in range(rollout.prompts_per_step)]
            groups = sampler.groups(prompts, rollout.group_size, 0, seed=step)
            recorder.write(step, groups)
            trainer.step(Batch.from_groups(groups), 0, is_warmup=True)
            if checkpoint.every and step % checkpoint.every == 0:
                checkpointer.save(step, 0, trainer)
    return command.Outcome(exit_code=0, message=None)


@pytest.mark.parametrize("settings", [(), ("lora.rank=2", "model.critic=shared_backbone")])
def test_a_pretrained_critic_is_that_of_its_last_step_and_other_batches_are_measured(
    settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = a_run(tmp_path, *settings)
    monkeypatch.setattr(command, "train", sampled_here)
    seen: list[int] = []
    monkeypatch.setattr(
        Record, "groups", lambda record, step, read=Record.groups: (seen.append(step), read(record, step))[1]
    )
    words = ["signal", str(config.run_dir), "--batches", str(NUM_BATCHES), "--pretrain-steps", "2", "--lambda", "0.9"]
    assert run.main([*words, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "2 steps of value pretraining, then 4 batches of 4 x 4 responses are sampled" in said
    assert seen == [3, 4, 5, 6], "the critic has seen the two before"
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "signal.json").read_text())["rows"]}
    assert rows["lambda 0.9"]["signal_to_noise"] != rows["V = 0, alpha 0.45"]["signal_to_noise"]
    assert complete_steps(tmp_path / "out" / "sampling" / "checkpoints") == [2, 4, 6]


@pytest.mark.slow
@pytest.mark.vllm
def test_the_table_of_a_run_and_again_without_sampling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = a_run(tmp_path)
    out = tmp_path / "out"
    words = ["signal", str(config.run_dir), "--batches", str(NUM_BATCHES), "--out", str(out), "--lambda", "0.9"]
    first = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *words], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert first.returncode == 0, first.stdout + first.stderr
    table = first.stdout.partition(f"step {STEP}: the gradient of one batch, from 4 batches of 4 x 4 responses")[2]
    names = [row["name"] for row in json.loads((out / "signal.json").read_text())["rows"]]
    assert names[:3] == ["as configured: alpha 0.45", "lambda 0.9", "V = 0, alpha 0.45"] and "GRPO" in names
    assert all(name in table for name in names)
    record = Record(out / "sampling")
    assert record.last_step == NUM_BATCHES
    uids = {group.lease.prompt_uid for step in range(1, NUM_BATCHES + 1) for group in record.groups(step)}
    assert len(uids) == 4 * NUM_BATCHES
    assert run.main(words) == 0
    again = capsys.readouterr().out
    assert table.split() and again.split()[-len(table.split()) :] == table.split(), "the same, from what was sampled"
    assert processes_of(config.run_dir) == []

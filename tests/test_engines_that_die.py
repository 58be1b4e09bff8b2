"""Real vLLM engines are killed and stopped: amid the responses of a run, and in publications.

What they had drawn is gone on from, and the weights reach the actor that is left.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from common.config import ActorsConfig, RolloutConfig, TransportConfig, WeightsConfig
from common.types import WeightsPhase
from learner.networks.model import load_policy
from learner.publication.buckets import plan
from learner.publication.probe import probe_token_ids
from tests.support.faulty_actors import Fault, Strike, act_with_vllm
from tests.support.played_learner import BUCKET_BYTES, Outcome, played_learner
from tests.support.runs import ROOT, processes_of, rows
from tests.support.tiny_models import tiny_run

pytestmark = [pytest.mark.long, pytest.mark.vllm, pytest.mark.timeout(420)]

UPDATE = WeightsPhase.UPDATE
SETTINGS = [
    "model.path=configs/models/chain_sum",
    "model.max_model_len=160",
    "rollout.prompts_per_step=8",
    "rollout.group_size=8",
    "rollout.max_tokens=100",
    "algorithm.critic_warmup_steps=1",
    "algorithm.length_adaptive_alpha=0.45",
    "learner.steps=12",
    "learner.mini_batches=2",
    "actors.count=2",
    "actors.groups_in_flight=4",
    "eval.every=0",
    "eval.num_prompts=4",
    "task.num_train=200",
    "task.num_heldout=8",
    "transport.heartbeat_s=0.2",
    "transport.heartbeat_timeout_s=4",
    "transport.grace_s=1",
    "transport.lease_timeout_s=4",
]


def engine_of(process: psutil.Process, actor: str) -> psutil.Process:
    """The engine core of this actor of the run."""
    (owner,) = [child for child in process.children(recursive=True) if actor in child.cmdline()]
    return next(child for child in owner.children(recursive=True) if child.name().startswith("VLLM::EngineCor"))


def wait_for_step(lines: list[str], step: int) -> None:
    deadline = time.monotonic() + 200.0
    while not any(line.startswith(f"step  {step}/") or line.startswith(f"step {step}/") for line in lines):
        assert time.monotonic() < deadline, "".join(lines)
        time.sleep(0.05)


def test_a_run_outlives_an_engine_that_is_killed_and_one_that_is_stopped(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "run.py"), "train", f"runs_dir={tmp_path}", "name=run", *SETTINGS]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(iter(process.stdout.readline, "")), daemon=True)
    reader.start()
    stopped: psutil.Process | None = None
    try:
        wait_for_step(lines, 2)
        engine_of(psutil.Process(process.pid), "actor-0").kill()
        wait_for_step(lines, 4)
        stopped = engine_of(psutil.Process(process.pid), "actor-1")
        os.kill(stopped.pid, signal.SIGSTOP)
        assert process.wait(240.0) == 0, "".join(lines)
    finally:
        if stopped is not None and stopped.is_running():
            stopped.send_signal(signal.SIGCONT)
        process.kill()
    steps = [row for row in rows(tmp_path / "run" / "metrics.jsonl") if "time/step_s" in row]
    assert steps[-1]["version"] == 12
    assert steps[-1]["tokens/prefix"] > 0, "another engine went on from what was known"
    assert steps[-1]["drops/actor_lost"] + steps[-1]["drops/hung"] > 0
    trained = rows(tmp_path / "run" / "ledger.jsonl")
    assert len({row["prompt_uid"] for row in trained}) == len(trained) == 13 * 8, "none twice, none lost"
    assert max(row["staleness/token_max"] for row in steps[1:]) <= 2
    assert processes_of(tmp_path) == []


def test_a_publication_outlives_an_engine_that_is_killed_in_it_and_one_that_is_stopped() -> None:
    config = replace(
        tiny_run(str(ROOT / "configs" / "models" / "chain_sum")),
        rollout=RolloutConfig(prompts_per_step=2, group_size=4, max_tokens=100),
        actors=ActorsConfig(groups_in_flight=2),
        weights=WeightsConfig(timeout_s=15.0),
        transport=TransportConfig(lease_timeout_s=600.0, reconnect_s=60.0, curve=False),
    )
    config = replace(config, model=replace(config.model, max_model_len=160))
    num_buckets = len(plan(load_policy(config, torch.device("cpu"), None).hf_specs(), BUCKET_BYTES))
    killed_in = Strike(Fault.DIES, UPDATE, num_buckets + 2)
    stopped_in = Strike(Fault.STOPS, UPDATE, killed_in.at + 1 + num_buckets + 2)  # after the attempt that is repeated
    with played_learner(config, probe_token_ids(config).tolist()) as learner:
        good = learner.start_actor("good", main=act_with_vllm)
        killed = learner.start_actor("killed", killed_in, act_with_vllm)
        stopped = learner.start_actor("stopped", stopped_in, act_with_vllm)

        def publish(*members: str) -> Outcome:
            learner.begin("publish", *members)
            outcome = learner.outcome()
            assert outcome.probe_difference is not None and outcome.probe_difference < 1e-4, outcome
            return outcome

        assert publish("good", "killed", "stopped").reached == ("good", "killed", "stopped")
        assert publish("good", "killed", "stopped").reached == ("good", "stopped")
        assert killed.exit_code() == 1
        outcome = publish("good", "stopped")
        assert outcome.reached == ("good",) and outcome.parted == [("stopped", "dismissed")]
        assert "did not answer within 15 s in phase update of version 3" in outcome.partings[0]
        assert stopped.exit_code() == 1
        assert publish("good").reached == ("good",)
        good.leave()

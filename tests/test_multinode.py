"""A run on four hosts: two learner ranks under torchrun and two actors, each with an address of its own.

Learner, actors, sockets and weight transfer are the real ones; only the engine is not vLLM. No environment variable
says which interface to use.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any

import psutil
import pytest

from common.loading import load_config, save_config
from common.processtree import family, kill
from tests.support.hosts import Hosts, network
from tests.support.runs import ROOT, rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

START_S = 180.0  # until the first step, with two ranks and two actors importing torch on two busy cores
STEP_S = 60.0
PORT = 29500  # of the ranks' rendezvous; the namespaces are this test's own, so it is free
SETTINGS = [
    "name=run",
    "model.path=configs/models/chain_sum",
    "model.max_model_len=128",
    "task.name=chain_sum",
    "task.num_train=64",
    "task.num_heldout=4",
    "rollout.prompts_per_step=4",
    "rollout.group_size=2",
    "rollout.max_tokens=40",
    "algorithm.critic_warmup_steps=1",
    "learner.ranks=2",
    "learner.mini_batches=2",
    "learner.tokens_per_micro_batch=128",
    "learner.policy.learning_rate=1e-5",
    "actors.count=0",
    "actors.groups_in_flight=2",
    "transport.host=0.0.0.0",
    "eval.every=0",
    "eval.num_prompts=2",
    "eval.samples_per_prompt=1",
]


@dataclass
class Run:
    """The four processes. `end` kills what is left of them."""

    hosts: Hosts
    run_dir: Path
    processes: dict[str, "Popen[bytes]"] = field(default_factory=dict)

    def start_learner(self) -> None:
        for rank in (0, 1):
            name, master = f"learner-{rank}", self.hosts.addresses["learner-0"]
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}"]
            torchrun += ["--nproc-per-node=1", f"--master-addr={master}", f"--master-port={PORT}"]
            self._start(name, [*torchrun, "run.py", "learner", "--config", str(self.run_dir / "config.yaml")])

    def start_actors(self) -> None:
        connect = ["--connect", f"file:{self.run_dir / 'endpoint'}", "-c", str(self.run_dir / "config.yaml")]
        for name in ("actor-0", "actor-1"):
            actor = [sys.executable, "-m", "tests.support.actor_without_engine", "actor", *connect, "--name", name]
            self._start(name, actor)

    def _start(self, name: str, command: list[str]) -> None:
        self.processes[name] = self.hosts.start(name, command, self.run_dir / f"{name}.log", ROOT)

    def log(self, name: str) -> str:
        return (self.run_dir / f"{name}.log").read_text()

    def steps(self) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        return [row for row in rows(path) if "time/step_s" in row] if path.is_file() else []

    def trained(self, actor: str, after: int = 0) -> int:
        """Groups of this actor that were trained in steps later than that."""
        path = self.run_dir / "ledger.jsonl"
        ledger = rows(path) if path.is_file() else []
        return sum(row["actor"] == actor and row["step"] > after for row in ledger)

    def has_ended(self, name: str) -> bool:
        return self.processes[name].poll() is not None

    def wait_until(self, what: str, is_so: Any, timeout_s: float) -> None:
        """Fails when the learner ends first, or after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not is_so():
            tails = "\n".join(f"{name}: {self.log(name)[-1500:]}" for name in self.processes)
            assert not self.has_ended("learner-0"), f"the learner ended before {what}\n{tails}"
            assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}\n{tails}"
            time.sleep(0.1)

    def end(self) -> None:
        """torchrun's workers are in sessions of their own, and outlive it when it is killed."""
        members = family(process.pid for process in self.processes.values())
        kill(psutil.Process(pid) for pid in members if psutil.pid_exists(pid))
        for process in self.processes.values():
            process.wait()


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with network("learner-0", "learner-1", "actor-0", "actor-1") as made:
        yield made


def begin(hosts: Hosts, tmp_path: Path, *overrides: str) -> Run:
    config = load_config([], [*SETTINGS, f"runs_dir={tmp_path}", *overrides])
    config.run_dir.mkdir()
    save_config(config, config.run_dir / "config.yaml")
    run = Run(hosts, config.run_dir)
    run.start_learner()
    run.start_actors()
    return run


def test_two_ranks_and_two_actors_on_four_hosts(hosts: Hosts, tmp_path: Path) -> None:
    with ExitStack() as stack:
        run = begin(hosts, tmp_path, "learner.steps=6")
        stack.callback(run.end)
        codes = {name: process.wait(START_S + STEP_S) for name, process in run.processes.items()}
        assert codes == dict.fromkeys(codes, 0), run.log("learner-0")[-3000:]
        assert (run.run_dir / "endpoint").read_text().startswith(f"tcp://{hosts.addresses['learner-0']}:")
        assert [row["step"] for row in run.steps()] == [1, 2, 3, 4, 5, 6, 7]
        assert run.steps()[-1]["weights/probe_difference"] < 1e-3, "both actors hold what the learner has"
        assert min(run.trained("actor-0"), run.trained("actor-1")) > 0

"""A run on four hosts: two learner ranks under torchrun and two actors, each with an address of its own.

Learner, actors, sockets and weight transfer are the real ones; only the engine is not vLLM. No environment variable
says which interface to use.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from subprocess import Popen
from typing import Any

import psutil
import pytest

from common.loading import load_config, save_config
from common.processtree import family, kill
from learner.checkpoint import complete_steps
from tests.support.hosts import Hosts, network
from tests.support.roles import start_role
from tests.support.runs import ROOT, rows

pytestmark = [pytest.mark.long, pytest.mark.timeout(420)]

START_S = 240.0  # until the first step; torchrun and its workers all import torch
STEPS_S = 120.0  # of a few steps
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
    """The four processes, by name."""

    hosts: Hosts
    run_dir: Path
    torchruns: dict[str, "Popen[bytes]"] = field(default_factory=dict)
    roles: dict[str, ForkServerProcess] = field(default_factory=dict)

    def start_torchruns(self) -> None:
        """The learner as a user starts it, one torchrun a host."""
        for rank in (0, 1):
            name, master = f"learner-{rank}", self.hosts.addresses["learner-0"]
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}"]
            torchrun += ["--nproc-per-node=1", f"--master-addr={master}", f"--master-port={PORT}"]
            command = [*torchrun, "run.py", "learner", "--config", str(self.run_dir / "config.yaml")]
            self.torchruns[name] = self.hosts.start(name, command, self.run_dir / f"{name}.log", ROOT)

    def start_ranks(self) -> None:
        """The learner with torchrun's variables, in a fraction of its time."""
        arguments = ["learner", "--config", str(self.run_dir / "config.yaml")]
        for rank in (0, 1):
            ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            master = {"MASTER_ADDR": self.hosts.addresses["learner-0"], "MASTER_PORT": str(PORT)}
            self._start_role(f"learner-{rank}", arguments, **ranks, **master)

    def start_actors(self) -> None:
        connect = ["--connect", f"file:{self.run_dir / 'endpoint'}", "-c", str(self.run_dir / "config.yaml")]
        for name in ("actor-0", "actor-1"):
            self._start_role(name, ["actor", *connect, "--name", name])

    def _start_role(self, name: str, arguments: list[str], **environment: str) -> None:
        host, log = self.hosts.namespace(name), self.run_dir / f"{name}.log"
        self.roles[name] = start_role(host, log, arguments, **environment)

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

    def exit_code(self, name: str) -> int | None:
        return self.torchruns[name].poll() if name in self.torchruns else self.roles[name].exitcode

    def wait_until(self, what: str, is_so: Callable[[], bool], timeout_s: float) -> None:
        """Fails when the learner ends first, or after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not is_so():
            if self.exit_code("learner-0") is not None or time.monotonic() > deadline:
                tails = [f"{name}: {self.log(name)[-1500:]}" for name in self.hosts.addresses]
                pytest.fail("\n".join([f"waited {timeout_s:g} s for {what}", *tails]))
            time.sleep(0.1)

    def end(self) -> None:
        """torchrun's workers are in sessions of their own, and outlive it when it is killed."""
        members = family(process.pid for process in [*self.torchruns.values(), *self.roles.values()])
        kill(psutil.Process(pid) for pid in members if psutil.pid_exists(pid))
        for torchrun in self.torchruns.values():
            torchrun.wait()
        for role in self.roles.values():
            role.join()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Four hosts on which nothing runs yet."""
    with network("learner-0", "learner-1", "actor-0", "actor-1") as hosts:
        made = Run(hosts, tmp_path / "run")
        made.run_dir.mkdir()
        try:
            yield made
        finally:
            made.end()


def configure(run: Run, *overrides: str) -> None:
    config = load_config([], [*SETTINGS, f"runs_dir={run.run_dir.parent}", *overrides])
    save_config(config, config.run_dir / "config.yaml")


def test_two_ranks_and_two_actors_on_four_hosts(run: Run) -> None:
    configure(run, "learner.steps=6")
    run.start_torchruns()
    run.start_actors()
    run.wait_until("the first step", lambda: len(run.steps()) > 0, START_S)
    for torchrun in run.torchruns.values():
        assert torchrun.wait(STEPS_S) == 0, run.log("learner-0")[-3000:]
    for role in run.roles.values():
        role.join(STEPS_S)
        assert role.exitcode == 0
    assert (run.run_dir / "endpoint").read_text().startswith(f"tcp://{run.hosts.addresses['learner-0']}:")
    assert [row["step"] for row in run.steps()] == [1, 2, 3, 4, 5, 6, 7]
    assert run.steps()[-1]["weights/probe_difference"] < 1e-3, "both actors hold what the learner has"
    assert min(run.trained("actor-0"), run.trained("actor-1")) > 0


def begin(run: Run, *overrides: str) -> None:
    """A run without an end, in which both actors have had groups trained."""
    configure(run, "learner.steps=100000", *overrides)
    run.start_ranks()
    run.start_actors()
    run.wait_until("groups of both actors", lambda: run.trained("actor-0") > 2 and run.trained("actor-1") > 2, START_S)


def cut_for(run: Run, host: str, seconds: float) -> None:
    run.hosts.cut(host)
    time.sleep(seconds)  # how long the cable is out, not a wait for anything
    run.hosts.mend(host)


def wait_for_both(run: Run, when: str) -> None:
    step = len(run.steps()) + 2  # groups of an earlier step were sampled before
    run.wait_until(
        f"groups of both actors {when}",
        lambda: min(run.trained("actor-0", step), run.trained("actor-1", step)) > 0,
        STEPS_S,
    )


def dropped(run: Run) -> dict[str, float]:
    """By reason, since the start."""
    return {name: count for name, count in run.steps()[-1].items() if name.startswith("drops/") and count}


def test_a_cable_that_is_out_for_less_than_the_time_out_costs_nothing_but_time(run: Run) -> None:
    begin(run, "transport.heartbeat_timeout_s=20")
    for host in ("actor-1", "learner-1"):
        cut_for(run, host, 3.0)  # TCP tries again at intervals that double, 3 to 6 s after the cut
        wait_for_both(run, f"after the cable of {host} was back")
    last = run.steps()[-1]
    assert dropped(run) == {}
    leases = [row["lease_id"] for row in rows(run.run_dir / "ledger.jsonl")]
    assert len(leases) == len(set(leases))
    assert last["actors/connected"] == 2


def test_a_cable_that_stays_out_takes_one_actor_away_until_it_is_back(run: Run) -> None:
    """Three times the time-out, in the middle of publications: the run goes on with the other actor."""
    begin(run, "transport.heartbeat_timeout_s=6", "weights.timeout_s=10")
    cut_for(run, "actor-1", 18.0)
    step = len(run.steps())
    run.wait_until("groups of the other actor", lambda: run.trained("actor-0", step + 2) > 0, STEPS_S)
    run.wait_until("groups of actor-1 again", lambda: run.trained("actor-1", step + 2) > 0, STEPS_S)
    assert run.exit_code("actor-1") is None and run.steps()[-1]["actors/dismissed"] == 0


@pytest.mark.timeout(600)
def test_cables_that_are_out_for_20_and_for_90_s_at_the_default_time_outs(run: Run) -> None:
    """20 s cost nothing but time; 90 s of an actor's cost it its leases, 90 s of a rank's only time."""
    begin(run)
    cut_for(run, "actor-1", 20.0)
    wait_for_both(run, "after 20 s without actor-1")
    assert dropped(run) == {} and run.steps()[-1]["actors/connected"] == 2
    cut_for(run, "actor-1", 90.0)
    wait_for_both(run, "after 90 s without actor-1")
    before = dropped(run)
    cut_for(run, "learner-1", 90.0)
    wait_for_both(run, "after 90 s without a rank")
    assert dropped(run) == before
    leases = [row["lease_id"] for row in rows(run.run_dir / "ledger.jsonl")]
    assert len(leases) == len(set(leases))
    assert run.steps()[-1]["actors/dismissed"] == 0


def test_a_request_to_stop_that_reaches_every_process_twice_is_one_request(run: Run) -> None:
    """Slurm tells torchrun, ranks and whatever they have started; torchrun then tells its ranks."""
    begin(run, "checkpoint.every=0")
    ranks = [run.roles["learner-0"], run.roles["learner-1"]]
    learner = family(rank.pid for rank in ranks if rank.pid is not None)
    assert len(learner) == 4, "each rank has a guardian"
    for _ in range(2):
        for pid in learner:
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.1)  # two at once would be one
    for name, role in run.roles.items():
        role.join(STEPS_S)
        assert role.exitcode == (143 if role in ranks else 0), run.log(name)[-3000:]
    assert max(complete_steps(run.run_dir / "checkpoints")) == run.steps()[-1]["step"]

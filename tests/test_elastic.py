"""Actors that come and go while `train` goes on: by command, from elsewhere, and over the learner's death.

Whole runs of processes through the command line; only the engines are not vLLM (tests/support/forked_train.py). The
learning rate is high: weights of another version than the one that an actor stamps on its tokens would be found out.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
import pytest

import run
from common.metrics import read_jsonl
from learner.checkpoint import complete_steps
from learner.rollouts.leases import LEASES_PER_LIFE
from tests.support.roles import start_role
from tests.support.runs import ROOT, processes_of
from tests.test_replay import numbers

pytestmark = pytest.mark.slow

LIMIT_S = 90.0
BATCH_S = 8.0  # learner.batch_timeout_s; on a free machine a batch takes half a second
EVERY = 3  # steps between two checkpoints
SETTINGS = [
    "name=run",
    "model.path=configs/models/chain_sum",
    "model.max_model_len=128",
    "task.name=chain_sum",
    "task.num_train=4000",
    "task.num_heldout=4",
    "rollout.prompts_per_step=4",
    "learner.record=true",
    "rollout.group_size=2",
    "rollout.max_tokens=8",
    "staleness.max_staleness=0",
    "staleness.batching=first_finished",
    "algorithm.critic_warmup_steps=1",
    "learner.steps=900",
    "learner.mini_batches=1",
    "learner.policy.learning_rate=1e-3",
    "learner.policy.warmup_steps=0",
    "actors.count=1",
    "actors.groups_in_flight=2",
    "actors.start_timeout_s=60",
    f"checkpoint.every={EVERY}",
    f"learner.batch_timeout_s={BATCH_S}",
    "transport.heartbeat_s=0.2",
    "eval.every=0",
    "eval.num_prompts=2",
    "eval.samples_per_prompt=1",
]


@dataclass
class Running:
    """A run under way in `run_dir`, and the process of `train`."""

    run_dir: Path
    train: "subprocess.Popen[bytes]"

    def steps(self) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        return [row for row in read_jsonl(path) if "time/step_s" in row] if path.is_file() else []

    def trained(self) -> list[dict[str, Any]]:
        """The groups of all steps, in order."""
        path = self.run_dir / "ledger.jsonl"
        return list(read_jsonl(path)) if path.is_file() else []

    def num_trained(self, actor: str, first_lease: int = 0, after: int = 0) -> int:
        """Groups of this actor, of leases from that one on, in later steps than that."""
        found = (row for row in self.trained() if row["actor"] == actor)
        return sum(row["lease_id"] >= first_lease and row["step"] > after for row in found)

    def children(self) -> dict[str, psutil.Process]:
        """The processes that `train` has started and that live, by name."""
        found = {}
        for child in psutil.Process(self.train.pid).children():
            with suppress(psutil.NoSuchProcess):  # it ends just now
                if child.name().startswith(("actor-", "learner-")) and child.status() != psutil.STATUS_ZOMBIE:
                    found[child.name()] = child
        return found

    def output(self) -> str:
        return (self.run_dir.parent / "train.log").read_text()

    def wait_until(self, what: str, is_so: Callable[[], object]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not is_so():
            assert time.monotonic() < deadline and self.train.poll() is None, f"waited for {what}: {self.output()}"
            time.sleep(0.02)

    def stop(self) -> int:
        self.train.send_signal(signal.SIGINT)
        return self.train.wait(LIMIT_S)


@contextmanager
def training(tmp_path: Path, *overrides: str) -> Iterator[Running]:
    """Returns when the run has done its first step."""
    command = [sys.executable, "-m", "tests.support.forked_train", "train", f"runs_dir={tmp_path}"]
    with (tmp_path / "train.log").open("wb") as output:
        train = subprocess.Popen([*command, *SETTINGS, *overrides], cwd=ROOT, stdout=output, stderr=output)
    try:
        running = Running(tmp_path / "run", train)
        running.wait_until("the first step", running.steps)
        yield running
    finally:
        train.kill()  # its guardian ends the rest
        train.wait()


@contextmanager
def remote_actor(running: Running, *words: str) -> Iterator[ForkServerProcess]:
    """`run.py actor WORDS`, which `train` does not know."""
    words = ("actor", *words, "-c", str(running.run_dir / "config.yaml"), "--name", "remote")
    started = start_role(None, running.run_dir.parent / "remote.log", list(words))
    try:
        yield started
    finally:
        started.kill()  # its guardian ends the rest
        started.join()


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A run that several tests do something to, one after the other; each leaves it with one local actor."""
    with training(tmp_path_factory.mktemp("one_rank")) as running:
        yield running


def actors(running: Running, *words: str) -> str:
    """What `run.py actors RUN WORDS` says."""
    command = [sys.executable, str(ROOT / "run.py"), "actors", str(running.run_dir), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_actors_are_added_and_removed_by_command_and_without_any_a_run_waits_for_the_next(one_rank: Running) -> None:
    running = one_rank
    assert actors(running) == "1 of 1 local actor(s) take part\n"
    assert actors(running, "--count", "2").startswith("actor-1 is started on cores ")
    running.wait_until("groups of actor-1", lambda: running.num_trained("actor-1"))
    assert actors(running, "--count", "2") == f"{running.run_dir} has 2 local actor(s) already\n"

    both_leave = actors(running, "--count", "0").splitlines()
    assert [line.partition(";")[0] for line in both_leave] == ["actor-0 leaves", "actor-1 leaves"]
    waiting = "waiting for actors: run.py actor --connect tcp://"
    running.wait_until("the learner to say that it waits", lambda: waiting in running.output())
    running.wait_until("their processes to end", lambda: set(running.children()) == {"learner-0"})
    assert actors(running) == "0 of 0 local actor(s) take part\n"
    step = running.steps()[-1]["step"]
    time.sleep(1.2 * BATCH_S)  # how long nobody is there, not a wait for anything
    assert running.steps()[-1]["step"] == step and running.train.poll() is None

    assert actors(running, "--count", "1").startswith("actor-0 is started on cores ")
    running.wait_until("groups of the new one", lambda: running.num_trained("actor-0", after=step + 1) > 4)
    assert "warning" not in running.output()


def test_actors_of_here_and_from_elsewhere_outlive_the_learner_and_go_on_with_the_next(one_rank: Running) -> None:
    kill_the_learner(one_rank, 0, "--connect", f"file:{one_rank.run_dir / 'endpoint'}")


def test_what_that_run_has_trained_is_replayed_by_command_bit_for_bit(one_rank: Running) -> None:
    if one_rank.train.poll() is None:  # no other test has ended it
        one_rank.stop()
    recorded, num_steps = one_rank.run_dir, len(one_rank.steps())
    command = [sys.executable, str(ROOT / "run.py"), "train", "--replay", str(recorded)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{recorded} has recorded the steps 1 to {num_steps}: 1 to {num_steps} are trained again" in done.stdout
    assert "the numbers are other ones" not in done.stdout
    again = recorded.parent / "run-replay"
    assert len(numbers(again)) == num_steps and {"policy/pg_loss", "critic/value_loss"} <= set(numbers(again)[-1])
    assert numbers(again) == numbers(recorded)
    assert processes_of(recorded.parent) == []


def test_actors_outlive_the_death_of_one_of_two_ranks_too(tmp_path: Path) -> None:
    """From elsewhere by address, with keys that were made before the run."""
    keys = tmp_path / "keys"
    assert run.main(["keygen", str(keys)]) == 0
    with training(tmp_path, "learner.ranks=2", f"transport.keys={keys}") as running:
        endpoint = (running.run_dir / "endpoint").read_text()
        kill_the_learner(running, 1, "--connect", endpoint, "--keys", str(keys))


def kill_the_learner(running: Running, victim: int, *connect: str) -> None:
    """That rank of it dies, amid steps that no checkpoint holds; `connect` is how an actor from elsewhere finds it."""
    with remote_actor(running, *connect) as remote:
        running.wait_until("groups of both", lambda: running.num_trained("remote") and is_past_checkpoint(running))
        before, newest = running.children(), max(complete_steps(running.run_dir / "checkpoints"))
        before[f"learner-{victim}"].kill()
        for name in ("remote", "actor-0"):
            running.wait_until(
                f"groups of {name} from the next learner",
                lambda name=name: running.num_trained(name, 2 * LEASES_PER_LIFE) > 4,
            )
        assert remote.is_alive()
        after = running.children()
        assert after["actor-0"] == before["actor-0"], "the same process, as of the remote one"
        ranks = [name for name in before if name.startswith("learner")]
        assert not {after[rank] for rank in ranks} & set(before.values())
        assert running.stop() == 128 + signal.SIGINT
        remote.join(LIMIT_S)
        assert remote.exitcode == 0
    assert_trained_once(running)
    for rank in ranks:
        assert_restored(running, rank, newest)


def is_past_checkpoint(running: Running) -> bool:
    """There is one, and a version after it, which will be lost."""
    newest = max(complete_steps(running.run_dir / "checkpoints"), default=0)
    return EVERY <= newest < running.steps()[-1]["step"] < newest + EVERY


def assert_trained_once(running: Running) -> None:
    done, trained = running.steps(), running.trained()
    assert [row["step"] for row in done] == list(range(1, len(done) + 1))
    assert len({row["prompt_uid"] for row in trained}) == len(trained) == 4 * len(done), "none twice, none lost"
    assert max(row["staleness/token_max"] for row in done) == 0
    assert max(row["offpolicy/mismatch_abs_mean"] for row in done) < 1e-4, "the weights were those of the version"
    assert processes_of(running.run_dir.parent) == []


def assert_restored(running: Running, rank: str, newest: int) -> None:
    """It went on, once, from the checkpoint `newest` or from one that was being written."""
    log = (running.run_dir / "logs" / f"{rank}.log").read_text()
    (said,) = [line for line in log.splitlines() if "the learner was started again: it goes on after step " in line]
    step = int(said.split("after step ")[1].split(",")[0])
    assert step in (newest, newest + EVERY)
    first_lives, later_lives = (
        {row["lease_id"] // LEASES_PER_LIFE for row in running.trained() if (row["step"] > step) is late}
        for late in (False, True)
    )
    assert first_lives == {1} and 2 in later_lives

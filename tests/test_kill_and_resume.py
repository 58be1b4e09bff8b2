"""SIGKILL at random moments of whole learner processes: what they resume is the run that nobody disturbed.

The learner, its sockets, its checkpoints and its data state are real; the actors are fakes whose responses depend on
nothing but the prompt, so that every run of the same configuration sees the same data.
"""

import json
import random
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import run
from common.config import Config
from common.keys import actor_keys
from common.launcher import rank_environment, reserve_port
from common.loading import load_config, save_config
from common.transport import model_fingerprints
from common.types import CompletedGroup, FinishReason, Lease, Purpose, Verdict
from learner.checkpoint import complete_steps
from tests.support import learner_without_transfer
from tests.support.fake_actors import FakeActor
from tests.support.runs import rows

ROOT = Path(__file__).resolve().parent.parent
START_S = 90.0
STEPS = 14  # two of them warm-up
SETTINGS = [
    "model.path=configs/models/chain_sum",
    "model.max_model_len=128",
    "task.name=chain_sum",
    "task.num_train=64",
    "task.num_heldout=4",
    "rollout.prompts_per_step=4",
    "rollout.group_size=2",
    "rollout.max_tokens=40",
    "staleness.max_staleness=0",
    "algorithm.critic_warmup_steps=2",
    "algorithm.positive_lm_weight=0.1",
    f"learner.steps={STEPS - 2}",
    "learner.mini_batches=2",
    "learner.tokens_per_micro_batch=128",
    "learner.policy.learning_rate=1e-4",
    "checkpoint.every=1",
    "checkpoint.keep=2",
    "eval.every=0",
    "eval.num_prompts=2",
    "eval.samples_per_prompt=1",
]


def replayed(lease: Lease, version: int) -> CompletedGroup:
    """Random responses of random length, the same whenever and by whomever this prompt is answered."""
    draw = np.random.default_rng(zlib.crc32(lease.prompt_uid.encode()))
    n = lease.num_samples
    lengths = draw.integers(1, 30, n).astype(np.int32)
    total = int(lengths.sum())
    is_correct = draw.random(n) < 0.5
    return CompletedGroup(
        lease_id=lease.lease_id,
        lengths=lengths,
        token_ids=draw.integers(3, 12, total).astype(np.int32),
        behavior_logprobs=(-3.0 * draw.random(total)).astype(np.float32),
        versions=np.full(total, version, np.int32),
        rewards=np.where(is_correct, 1.0, -1.0).astype(np.float32),
        verdicts=tuple(Verdict.CORRECT if right else Verdict.WRONG for right in is_correct),
        verifier_error=None,
        finish_reasons=(FinishReason.STOP,) * n,
        generation_s=0.0,
        verification_s=0.0,
    )


@dataclass
class LearnerProcesses:
    """The ranks of one learner over the run in `config.run_dir`, and one actor."""

    config: Config
    ranks: list[ForkServerProcess] = field(default_factory=list)
    actor: FakeActor = field(init=False)
    delay_s: Callable[[Lease], float] = lambda lease: 0.0  # of the actor

    def start(self, stack: ExitStack) -> None:
        """Returns when the learner's socket is open."""
        run_dir, num_ranks = self.config.run_dir, self.config.learner.ranks
        (run_dir / "endpoint").unlink(missing_ok=True)
        port = stack.enter_context(reserve_port())
        for rank in range(num_ranks):
            environment = rank_environment(rank, num_ranks, port)
            process = learner_without_transfer.start(run_dir / "config.yaml", environment, run_dir / "learner.log")
            stack.callback(self._end, process)
            self.ranks.append(process)
        deadline = time.monotonic() + START_S
        while not (run_dir / "endpoint").is_file():
            assert time.monotonic() < deadline and self.is_running(), self.log()
            time.sleep(0.02)

    def join(self, stack: ExitStack) -> None:
        """Returns when the actor is a member, just before the first step."""
        self.actor = FakeActor(
            (self.config.run_dir / "endpoint").read_text(),
            "actor",
            fingerprints=model_fingerprints(self.config.model.path),
            complete=replayed,
            delay_s=self.delay_s,
            keys=actor_keys(self.config, "actor"),
        )
        stack.enter_context(self.actor)

    def wait_for_step(self, step: int) -> None:
        """Until `step` was trained, counted from the start of the run."""
        deadline = time.monotonic() + START_S
        while not any(row["step"] >= step for row in steps(self.config.run_dir)):
            assert time.monotonic() < deadline and self.is_running(), self.log()
            time.sleep(0.005)

    def is_running(self) -> bool:
        return all(process.is_alive() for process in self.ranks)

    def wait(self, timeout_s: float) -> list[int | None]:
        """Exit codes of all ranks, None of one that still runs."""
        deadline = time.monotonic() + timeout_s
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.ranks]

    def kill(self, first: int) -> None:
        """One rank dies; the others follow, as under `run.py train`."""
        for process in sorted(self.ranks, key=lambda process: process is not self.ranks[first]):
            process.kill()
        assert None not in self.wait(10.0)

    def log(self) -> str:
        return (self.config.run_dir / "learner.log").read_text(errors="replace")[-4000:]

    def _end(self, process: ForkServerProcess) -> None:
        process.kill()
        process.join(10.0)


@contextmanager
def learner(
    tmp_path: Path,
    name: str,
    num_ranks: int = 1,
    *others: str,
    delay_s: Callable[[Lease], float] = lambda lease: 0.0,
    until: Callable[[LearnerProcesses], None] = lambda processes: None,
) -> Iterator[LearnerProcesses]:
    """A learner and its actor, which joins when `until` returns."""
    overrides = [*SETTINGS, f"runs_dir={tmp_path}", f"name={name}", f"learner.ranks={num_ranks}", *others]
    config = load_config([], overrides)
    config = replace(config, model=replace(config.model, path=str(ROOT / config.model.path)))
    config.run_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, config.run_dir / "config.yaml")
    with ExitStack() as stack:
        processes = LearnerProcesses(config, delay_s=delay_s)
        processes.start(stack)
        until(processes)
        processes.join(stack)
        yield processes


def undisturbed(tmp_path: Path) -> float:
    """Runs to the end; the seconds that the steps took."""
    with learner(tmp_path, "undisturbed") as processes:
        started = time.monotonic()
        assert processes.wait(START_S) == [0], processes.log()
        return time.monotonic() - started


def steps(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of training steps; of a run under way, those that are written completely."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [row for row in (json.loads(line) for line in lines if line.endswith("\n")) if "time/step_s" in row]


def assert_same_run(expected: Path, found: Path) -> None:
    """Losses, gradient norms, rewards and statistics of every step; the same prompts in the same steps."""
    compared = ("policy/", "critic/", "reward/", "offpolicy/", "length/", "version", "tokens/trained")
    for one, other in zip(steps(expected), steps(found), strict=True):
        names = [name for name in one if name.startswith(compared) and "/auc" not in name]  # a rank jumps at a tie
        losses = (
            {"critic/value_loss"} if one["step"] <= 2 else {"policy/pg_loss", "policy/lm_loss", "critic/value_loss"}
        )
        assert losses <= set(names)
        for name in names:
            assert other[name] == pytest.approx(one[name], rel=2e-3, abs=2e-5), (one["step"], name)
    ledgers = [
        [(row["step"], row["prompt_uid"]) for row in map(json.loads, (run / "ledger.jsonl").read_text().splitlines())]
        for run in (expected, found)
    ]
    assert sorted(ledgers[0]) == sorted(ledgers[1])


@pytest.mark.slow
def test_killed_at_random_and_resumed_on_one_or_two_ranks(tmp_path: Path) -> None:
    duration_s = undisturbed(tmp_path)
    generator = random.Random(7)
    resumed, num_ranks = [], 1
    while len(resumed) < 3:
        with learner(tmp_path, "killed", num_ranks) as processes:
            processes.wait_for_step((resumed or [0])[-1] + 3)  # by then a checkpoint newer than the last is complete
            time.sleep(generator.uniform(0.0, 0.3) * duration_s)  # waits for nothing: the moment is what is tested
            if not processes.is_running():
                break
            processes.kill(generator.randrange(num_ranks))
        resumed.append(max(complete_steps(tmp_path / "killed" / "checkpoints"), default=0))
        num_ranks = 3 - num_ranks
    assert len(set(resumed) - {0}) >= 2, f"resumed after steps {resumed}: too few"
    with learner(tmp_path, "killed", num_ranks) as processes:
        assert processes.wait(START_S) == [0] * num_ranks, processes.log()
    assert_same_run(tmp_path / "undisturbed", tmp_path / "killed")


@pytest.mark.slow
def test_a_finished_run_goes_on_with_more_steps_and_another_batch_size_staleness_and_publish_interval(
    tmp_path: Path,
) -> None:
    with learner(tmp_path, "run", 1, "learner.steps=4") as processes:
        assert processes.wait(START_S) == [0], processes.log()
    changed = ("prompts_per_step=6", "group_size=3", "max_staleness=2", "publish_every=2")
    sections = ("rollout", "rollout", "staleness", "weights")
    overrides = [f"{section}.{setting}" for section, setting in zip(sections, changed, strict=True)]
    with learner(tmp_path, "run", 1, "learner.steps=10", *overrides) as processes:
        assert processes.wait(START_S) == [0], processes.log()
    found, ledger = steps(tmp_path / "run"), rows(tmp_path / "run" / "ledger.jsonl")
    assert [row["step"] for row in found] == list(range(1, 13))
    assert [row["version"] for row in found] == [0, 0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7]
    assert max(row["staleness/token_max"] for row in found[6:]) <= 2
    assert [sum(row["step"] == step for row in ledger) for step in range(1, 13)] == [4] * 6 + [6] * 6
    assert len({row["prompt_uid"] for row in ledger}) == len(ledger) == 60, "within the epoch no prompt comes twice"


@pytest.mark.slow
def test_an_evaluation_under_way_when_the_learner_is_killed_goes_on_with_what_it_had(tmp_path: Path) -> None:
    """The actor answers two of the four held-out prompts, and the others not before it is gone itself."""
    prompts: list[str] = []

    def slow_from_the_third_on(lease: Lease) -> float:
        if lease.purpose is Purpose.TRAIN:
            return 0.0
        prompts.append(lease.prompt_uid)
        return 0.0 if len(prompts) <= 2 else 1000.0

    settings = ("eval.num_prompts=4", "learner.steps=4")
    with learner(tmp_path, "run", 1, *settings, delay_s=slow_from_the_third_on) as processes:
        processes.wait_for_step(4)
        processes.kill(0)
    with learner(tmp_path, "run", 1, *settings) as processes:
        assert processes.wait(START_S) == [0], processes.log()
        asked = [lease.prompt_uid for lease in processes.actor.leases() if lease.purpose is Purpose.EVAL]
    assert sorted(asked[:2]) == sorted(prompts[2:]) and len(asked) == 2 + 4, "the rest of one, and the last evaluation"
    found = [row for row in rows(tmp_path / "run" / "metrics.jsonl") if "accuracy/heldout" in row]
    assert [(row["accuracy/version"], row["eval/num_prompts"]) for row in found] == [(0, 4), (4, 4)]
    assert found[0]["accuracy/version_newest"] > 0, "and says that the rest was sampled by a later version"


@pytest.mark.slow
def test_a_critic_is_trained_alone_exported_and_started_from(tmp_path: Path) -> None:
    with learner(tmp_path, "critic", 1, "learner.steps=0", "algorithm.critic_warmup_steps=3") as processes:
        assert processes.wait(START_S) == [0], processes.log()
    run_dir, folder = tmp_path / "critic", tmp_path / "exported"
    assert [row["step"] for row in steps(run_dir)] == [1, 2, 3]
    evaluations = [row["accuracy/version"] for row in rows(run_dir / "metrics.jsonl") if "accuracy/heldout" in row]
    assert evaluations == [0], "the policy has not changed: it is evaluated once"
    assert run.main(["export", str(run_dir), "--critic", "--out", str(folder)]) == 0
    started = ("learner.steps=2", "algorithm.critic_warmup_steps=0", f"model.critic_path={folder}")
    with learner(tmp_path, "policy", 1, *started) as processes:
        assert processes.wait(START_S) == [0], processes.log()
    assert steps(tmp_path / "policy")[0]["critic/value_mean"] != 0.0
    assert steps(run_dir)[0]["critic/value_mean"] == 0.0


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with learner(tmp_path, "run", 1, "learner.steps=1") as processes:
        assert processes.wait(START_S) == [0], processes.log()
        before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    moved = (tmp_path / "run").rename(tmp_path / "moved")  # a run is found where it is
    assert run.main(["train", "--resume", str(moved)]) == 0
    out = capfd.readouterr().out
    assert f"{moved} is complete, 1 policy steps are done: raise learner.steps to train on" in out
    assert "accuracy" in out
    assert {
        tmp_path / "run" / path.relative_to(moved): path.read_bytes() for path in moved.rglob("*") if path.is_file()
    } == before
    assert run.main(["learner", "--config", str(moved / "config.yaml"), f"runs_dir={tmp_path}", "name=moved"]) == 0
    assert (moved / "metrics.jsonl").read_bytes() == before[tmp_path / "run" / "metrics.jsonl"]

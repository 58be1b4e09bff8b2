"""Whole learner processes that are asked to stop: what they save, whom they tell, and that no rank hangs.

The learner, its sockets and its checkpoints are real; the actor is a fake (see tests/test_kill_and_resume.py).
"""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import run
from common.types import Stop
from learner.checkpoint import complete_steps
from tests.test_kill_and_resume import START_S, LearnerProcesses, learner, steps


def stop(processes: LearnerProcesses, rank: int, number: int) -> float:
    """Sends the signal to one rank, and returns how long all of them took to end."""
    pid = processes.ranks[rank].pid
    assert pid is not None
    began = time.monotonic()
    os.kill(pid, number)
    assert processes.wait(START_S) == [128 + number] * len(processes.ranks), processes.log()
    return time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "rank"), [(1, 0), (2, 1)])
def test_a_learner_that_is_asked_to_stop_finishes_its_step_saves_and_sends_actors_home(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], num_ranks: int, rank: int
) -> None:
    """With two ranks only the second one hears of it. Before that somebody looks at the run."""
    settings = ("learner.steps=1000", "checkpoint.every=0")
    with learner(tmp_path, "run", num_ranks, *settings) as processes:
        processes.wait_for_step(1)
        assert run.main(["top", str(tmp_path / "run"), "--json"]) == 0
        status = json.loads(capsys.readouterr().out)
        assert status["step"] >= 1 and status["member_names"] == ["actor"] and len(status["rewards"]) >= 1
        stop(processes, rank, signal.SIGTERM)
        assert processes.actor.received_any(Stop) is not None
        done = steps(tmp_path / "run")[-1]["step"]
        assert max(complete_steps(tmp_path / "run" / "checkpoints")) == done
        assert f"interrupted by SIGTERM after step {done}: go on with run.py train --resume" in processes.log()


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "rank"), [(1, 0), (2, 1)])
def test_a_batch_that_does_not_come_is_not_waited_for(tmp_path: Path, num_ranks: int, rank: int) -> None:
    settings = ("learner.steps=1000", "learner.batch_timeout_s=1000")
    with learner(tmp_path, "run", num_ranks, *settings, delay_s=lambda lease: 1000.0) as processes:
        wait_until(processes.actor.commands)  # version 0 is published: next is the wait for a batch, on all ranks
        stop(processes, rank, signal.SIGINT)
        assert processes.actor.received_any(Stop) is not None
        assert steps(tmp_path / "run") == [] and complete_steps(tmp_path / "run" / "checkpoints") == []


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)

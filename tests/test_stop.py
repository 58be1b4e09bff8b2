"""Whole learner processes that are asked to stop: what they save, whom they tell, and that no rank hangs.

The learner, its sockets and its checkpoints are real; the actor is a fake (see tests/test_kill_and_resume.py).
"""

import os
import signal
import time
from pathlib import Path

import pytest

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
    tmp_path: Path, num_ranks: int, rank: int
) -> None:
    """With two ranks only the second one hears of it."""
    settings = ("learner.steps=1000", "checkpoint.every=0")
    with learner(tmp_path, "run", num_ranks, *settings) as processes:
        processes.wait_for_step(4)
        stop(processes, rank, signal.SIGTERM)
        assert processes.actor.received_any(Stop) is not None
        done = steps(tmp_path / "run")[-1]["step"]
        assert max(complete_steps(tmp_path / "run" / "checkpoints")) == done
        assert f"interrupted by SIGTERM after step {done}: go on with run.py train --resume" in processes.log()


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "rank"), [(1, 0), (2, 1)])
def test_a_batch_that_does_not_come_is_not_waited_for(tmp_path: Path, num_ranks: int, rank: int) -> None:
    with learner(tmp_path, "run", num_ranks, "learner.steps=1000", "checkpoint.every=0") as processes:
        processes.wait_for_step(3)
        processes.actor.delay_s = lambda lease: 1000.0
        wait_until_idle(tmp_path / "run")
        stop(processes, rank, signal.SIGINT)
        done = steps(tmp_path / "run")[-1]["step"]
        assert max(complete_steps(tmp_path / "run" / "checkpoints")) == done


def wait_until_idle(run_dir: Path) -> None:
    """Until no step has come for some seconds, in which many would."""
    deadline, before = time.monotonic() + START_S, -1
    while (now := len(steps(run_dir))) != before:
        assert time.monotonic() < deadline
        before = now
        time.sleep(3.0)

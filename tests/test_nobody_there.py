"""A learner of which no actor is started: the whole process waits for one from elsewhere, longer than any time-out."""

import time
from pathlib import Path

import pytest

from tests.test_kill_and_resume import START_S, LearnerProcesses, learner, steps

FIRST_ACTOR_S = 2.0  # actors.start_timeout_s


def alone_for_three_time_outs(processes: LearnerProcesses) -> None:
    deadline = time.monotonic() + START_S
    while "waiting for actors: run.py actor --connect tcp://" not in processes.log():
        assert time.monotonic() < deadline and processes.is_running(), processes.log()
        time.sleep(0.02)
    time.sleep(3 * FIRST_ACTOR_S)  # how long nobody comes, not a wait for anything
    assert processes.is_running(), processes.log()


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_learner_without_actors_of_its_own_waits_for_one_without_end(tmp_path: Path, num_ranks: int) -> None:
    settings = ("actors.count=0", f"actors.start_timeout_s={FIRST_ACTOR_S}", "learner.steps=1")
    with learner(tmp_path, "run", num_ranks, *settings, until=alone_for_three_time_outs) as processes:
        assert processes.wait(START_S) == [0] * num_ranks, processes.log()
    assert steps(tmp_path / "run")[-1]["step"] == 3, "two steps of warm-up and one of the policy"

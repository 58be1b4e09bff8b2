"""The Slurm scripts, run by bash without a Slurm; deploy/slurm/try_locally.sh runs them with one."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.deployments import Programs, actor_of, learner_of
from tests.support.runs import ROOT

LEARNER = ROOT / "deploy" / "slurm" / "learner.sbatch"
ACTORS = ROOT / "deploy" / "slurm" / "actors.sbatch"
NODES = {"SLURM_JOB_ID": "1234", "SLURM_JOB_NODELIST": "gpu[7-8]", "SLURM_NNODES": "2"}
UNTIL_STOPPED = "trap 'exit 143' TERM; echo $$ > pid; while true; do sleep 0.05; done"


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    made = Programs(tmp_path / "bin")
    made.add_srun()
    made.add("scancel", 'kill -TERM "$(cat pid)"')
    made.add("scontrol", 'if [[ $1 == show ]]; then printf "gpu7\\ngpu8\\n"; fi')
    return made


@pytest.fixture
def run_dir(programs: Programs) -> Path:
    """One whose learner is there."""
    folder = programs.folder / "runs" / "trial"
    folder.mkdir(parents=True)
    for name in ("endpoint", "config.yaml"):
        (folder / name).touch()
    return folder


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Exit code and standard error."""
    _, errors = process.communicate(timeout=30.0)
    return process.returncode, errors


def running(programs: Programs) -> int:
    """The pid of the stand-in that runs until it is stopped, once it does."""
    deadline, path = time.monotonic() + 30.0, programs.folder / "pid"
    while not path.is_file() or not path.read_text().endswith("\n"):
        assert time.monotonic() < deadline, "nothing was started"
        time.sleep(0.02)
    return int(path.read_text())


def test_the_learners_ranks_are_those_of_all_nodes(programs: Programs) -> None:
    programs.add("torchrun")
    run = programs.folder / "runs" / "trial"
    for node in ("0", "1"):
        environment = {**NODES, "RANKS": "4", "SLURM_NODEID": node}
        assert finish(programs.start(LEARNER, str(run), "demo", "learner.steps=7", **environment)) == (0, "")
    first, second = (learner_of(call) for call in programs.calls("torchrun"))
    assert (first.nodes, first.ranks_per_node, first.config.learner.ranks) == (2, 4, 8)
    assert (first.node_rank, second.node_rank) == (0, 1)
    assert (first.master, first.master_port) == (second.master, second.master_port) == ("gpu7", 21234)
    assert first.config == second.config
    assert first.config.run_dir == run
    assert first.config.learner.steps == 7
    assert first.config.transport.host == "0.0.0.0"


@pytest.mark.parametrize("stop_s", [None, "600"])
def test_torchrun_and_the_learner_have_the_same_time_to_stop(programs: Programs, stop_s: str | None) -> None:
    """The shorter of the two would be what counts."""
    programs.add("torchrun")
    given = {} if stop_s is None else {"STOP_S": stop_s}
    assert finish(programs.start(LEARNER, "runs/trial", "demo", SLURM_NODEID="0", **NODES, **given)) == (0, "")
    (learner,) = (learner_of(call) for call in programs.calls("torchrun"))
    assert learner.shutdown_s == learner.config.learner.stop_timeout_s == int(stop_s or 120)
    (warning,) = re.findall(r"^#SBATCH --signal=B:USR1@(\d+)$", LEARNER.read_text(), re.MULTILINE)
    assert int(warning) >= 120 + 60, "time is left to queue it again"


def test_a_learner_whose_time_is_up_stops_and_is_queued_again(programs: Programs, run_dir: Path) -> None:
    programs.add("torchrun", UNTIL_STOPPED)
    job = programs.start(LEARNER, str(run_dir), "demo", SLURM_NODEID="0", **NODES)
    running(programs)
    job.send_signal(signal.SIGUSR1)
    assert finish(job)[0] == 143
    assert programs.calls("scancel") == [["--signal=TERM", "1234.0"]]
    assert ["requeue", "1234"] in programs.calls("scontrol")
    assert not (run_dir / "endpoint").exists(), "actors wait for the address of the next one"
    assert (run_dir / "queued_again").exists(), "those that it sent home are to know"


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_slurm_that_fails_for_a_moment_or_for_good_does_not_keep_a_learner_from_being_queued_again(
    programs: Programs, run_dir: Path, is_gone: bool
) -> None:
    fails_once = "[[ -e {0}.failed ]] || {{ touch {0}.failed; exit 1; }}; "
    programs.add("sleep")
    programs.add("torchrun", UNTIL_STOPPED)
    programs.add("scancel", "exit 1" if is_gone else fails_once.format("scancel") + 'kill -TERM "$(cat pid)"')
    shows = 'if [[ $1 == show ]]; then printf "gpu7\\n"; exit; fi; '
    programs.add("scontrol", shows + fails_once.format("scontrol"))
    job = programs.start(LEARNER, str(run_dir), "demo", SLURM_NODEID="0", **NODES)
    running(programs)
    job.send_signal(signal.SIGUSR1)
    code, errors = finish(job)
    assert code == 143
    assert len(programs.calls("scancel")) == (3 if is_gone else 2)
    assert ("failed 3 times: scancel" in errors) is is_gone
    assert programs.calls("scontrol")[-2:] == [["requeue", "1234"]] * 2


def test_a_learner_that_is_done_when_its_time_is_up_is_not_queued_again(programs: Programs, run_dir: Path) -> None:
    programs.add("torchrun", UNTIL_STOPPED.replace("143", "0"))
    job = programs.start(LEARNER, str(run_dir), "demo", SLURM_NODEID="0", **NODES)
    running(programs)
    job.send_signal(signal.SIGUSR1)
    assert finish(job)[0] == 0
    assert ["requeue", "1234"] not in programs.calls("scontrol")
    assert not (run_dir / "queued_again").exists()


def test_a_learner_that_is_cancelled_stops_and_is_not_queued_again(programs: Programs) -> None:
    programs.add("torchrun", UNTIL_STOPPED)
    job = programs.start(LEARNER, "runs/trial", "demo", SLURM_NODEID="0", **NODES)
    learner = running(programs)
    for pid in (job.pid, learner):  # as Slurm does it
        os.kill(pid, signal.SIGTERM)
    assert finish(job)[0] == 143
    assert programs.calls("scancel") == []
    assert ["requeue", "1234"] not in programs.calls("scontrol")


def test_a_learner_that_fails_fails_its_job(programs: Programs) -> None:
    programs.add("torchrun", "exit 2")
    assert finish(programs.start(LEARNER, "runs/trial", "demo", SLURM_NODEID="0", **NODES))[0] == 2
    assert ["requeue", "1234"] not in programs.calls("scontrol")


@pytest.mark.parametrize(("script", "arguments"), [(LEARNER, ["runs/trial"]), (ACTORS, [])])
def test_a_call_that_lacks_an_argument_says_what_it_takes(
    programs: Programs, script: Path, arguments: list[str]
) -> None:
    code, errors = finish(programs.start(script, *arguments, **NODES))
    assert code == 2
    assert errors.startswith(f"error: {script.name} takes RUN")


def test_each_index_of_the_array_is_an_actor_of_its_own_name(programs: Programs, run_dir: Path) -> None:
    programs.add("python")
    for index in ("0", "1"):
        array = {"SLURM_ARRAY_JOB_ID": "99", "SLURM_ARRAY_TASK_ID": index}
        assert finish(programs.start(ACTORS, str(run_dir), SLURM_JOB_ID="100", **array)) == (0, "")
    assert finish(programs.start(ACTORS, str(run_dir), SLURM_JOB_ID="101")) == (0, "")
    found = [actor_of(call) for call in programs.calls("python")]
    assert [actor.name for actor in found] == ["actor-99-0", "actor-99-1", "actor-101-0"]
    assert {actor.connect for actor in found} == {f"file:{run_dir}/endpoint"}
    assert [actor.config_files for actor in found] == [[f"{run_dir}/config.yaml"]] * 3


def test_an_actor_that_lost_its_learner_starts_again_until_its_starts_are_used_up(
    programs: Programs, run_dir: Path
) -> None:
    programs.add("python", "exit 1")
    programs.add("sleep")
    code, errors = finish(programs.start(ACTORS, str(run_dir), SLURM_JOB_ID="7", STARTS="3"))
    assert code == 1
    assert len(programs.calls("python")) == 3
    assert "actor-7-0 ended with exit code 1 (start 3 of 3)" in errors


def test_an_actor_whose_learner_is_queued_again_waits_for_it_and_goes_on(programs: Programs, run_dir: Path) -> None:
    """Its starts count anew: a long run is queued more often than an actor may fail."""
    programs.add("python", "[[ -e first ]] && exit 1; touch first runs/trial/queued_again; rm runs/trial/endpoint")
    programs.add("sleep", "touch runs/trial/endpoint")
    code, errors = finish(programs.start(ACTORS, str(run_dir), SLURM_JOB_ID="7", STARTS="2"))
    assert code == 1
    assert len(programs.calls("python")) == 3
    assert errors.splitlines() == [
        "actor-7-0 waits for its learner, which is queued again",
        "actor-7-0 ended with exit code 1 (start 1 of 2)",
        "actor-7-0 ended with exit code 1 (start 2 of 2)",
    ]


def test_what_says_that_a_learner_is_queued_again_does_not_hold_for_the_next_one(
    programs: Programs, run_dir: Path
) -> None:
    """However that was started."""
    (run_dir / "queued_again").touch()
    os.utime(run_dir / "queued_again", (1.0, 1.0))
    programs.add("python")
    assert finish(programs.start(ACTORS, str(run_dir), SLURM_JOB_ID="7")) == (0, "")
    assert len(programs.calls("python")) == 1


def test_an_actor_whose_run_was_over_after_all_leaves(programs: Programs, run_dir: Path) -> None:
    programs.add("python", "touch runs/trial/queued_again; rm runs/trial/endpoint")
    programs.add("sleep", "rm runs/trial/queued_again")
    code, errors = finish(programs.start(ACTORS, str(run_dir), SLURM_JOB_ID="7"))
    assert (code, errors) == (0, "actor-7-0 waits for its learner, which is queued again\n")
    assert len(programs.calls("python")) == 1


def test_an_actor_that_is_cancelled_while_its_learner_is_queued_again_leaves(programs: Programs, run_dir: Path) -> None:
    leaves = "trap 'touch runs/trial/queued_again; exit 0' TERM"
    programs.add("python", f"{leaves}; echo $$ > pid; while true; do sleep 0.05; done")
    job = programs.start(ACTORS, str(run_dir), SLURM_JOB_ID="7")
    actor = running(programs)
    for pid in (job.pid, actor):  # as Slurm does it
        os.kill(pid, signal.SIGTERM)
    assert finish(job) == (0, "")
    assert len(programs.calls("python")) == 1


@pytest.mark.parametrize("code", [0, 2, 130, 143])
def test_an_actor_that_is_done_or_mistaken_or_cancelled_is_not_started_again(
    programs: Programs, run_dir: Path, code: int
) -> None:
    programs.add("python", f"exit {code}")
    assert finish(programs.start(ACTORS, str(run_dir), SLURM_JOB_ID="7"))[0] == code
    assert len(programs.calls("python")) == 1


def test_actors_wait_for_a_learner_and_say_when_none_came(programs: Programs) -> None:
    programs.add("python")
    code, errors = finish(programs.start(ACTORS, "runs/trial", SLURM_JOB_ID="7", WAIT_S="0"))
    assert (code, errors) == (1, "error: no learner wrote its address to runs/trial/endpoint within 0 s\n")
    assert programs.calls("python") == []


def test_an_actor_that_is_cancelled_has_time_to_leave(programs: Programs, run_dir: Path) -> None:
    programs.add("python", "trap 'sleep 0.3; exit 0' TERM; echo $$ > pid; while true; do sleep 0.05; done")
    job = programs.start(ACTORS, str(run_dir), SLURM_JOB_ID="7")
    actor = running(programs)
    for pid in (job.pid, actor):  # as Slurm does it
        os.kill(pid, signal.SIGTERM)
    assert finish(job) == (0, "")

"""The SkyPilot group: its commands, run by bash with stand-ins for torchrun and python, parse and fit each other."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.loading import load_config
from tests.support.deployments import Programs, actor_of, check_keys_fit, learner_of
from tests.support.runs import ROOT

HEADER, LEARNER, ACTORS = yaml.safe_load_all((ROOT / "deploy" / "skypilot.yaml").read_text())
GROUP = {"SKYPILOT_JOBGROUP_NAME": HEADER["name"]}


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    made = Programs(tmp_path)
    for name in ("torchrun", "python"):
        made.add(f".venv/bin/{name}")
    return made


def run_task(
    programs: Programs, task: dict[str, Any], node_rank: int, group: dict[str, str] = GROUP, **environment: str
) -> None:
    """The task's `run` on one of its nodes, with the variables that SkyPilot sets, and those of --env."""
    assert environment.keys() <= task["envs"].keys(), "SkyPilot takes no others"
    script = programs.folder / "run.sh"
    script.write_text(f"set -u\n{task['run']}")
    process = programs.start(
        script,
        **group,
        SKYPILOT_NUM_NODES=str(task["num_nodes"]),
        SKYPILOT_NUM_GPUS_PER_NODE=task["resources"]["accelerators"].partition(":")[2],
        SKYPILOT_NODE_RANK=str(node_rank),
        **task["envs"] | environment,
    )
    _, errors = process.communicate(timeout=30.0)
    assert (process.returncode, errors) == (0, "")


def test_the_group_ends_with_its_learner() -> None:
    assert HEADER["execution"] == "parallel"
    assert HEADER["primary_tasks"] == [LEARNER["name"]] == ["learner"]


def keys_volume(task: dict[str, Any]) -> dict[str, Any]:
    spec = task["config"]["kubernetes"]["pod_config"]["spec"]
    assert spec["containers"] == [{"volumeMounts": [{"name": "keys", "mountPath": "/keys", "readOnly": True}]}]
    (volume,) = spec["volumes"]
    assert volume["name"] == "keys"
    return dict(volume)


def test_learner_and_actors_fit_each_other(programs: Programs, tmp_path: Path) -> None:
    run_task(programs, LEARNER, 1)
    for rank in range(ACTORS["num_nodes"]):
        run_task(programs, ACTORS, rank)
    (call,) = programs.calls(".venv/bin/torchrun")
    learner = learner_of(call)
    head = f"{LEARNER['name']}-0.{HEADER['name']}"
    assert (learner.master, learner.node_rank) == (head, 1)
    assert learner.nodes == LEARNER["num_nodes"]
    assert learner.config.learner.ranks == learner.nodes * learner.ranks_per_node
    assert learner.config.runs_dir in LEARNER["volumes"]
    assert learner.shutdown_s == learner.config.learner.stop_timeout_s == 120
    actors = [actor_of(call) for call in programs.calls(".venv/bin/python")]
    assert {actor.connect for actor in actors} == {f"tcp://{head}:{learner.config.transport.port}"}
    assert len({actor.name for actor in actors}) == ACTORS["num_nodes"]
    volumes = {"learner": keys_volume(LEARNER), "actor": keys_volume(ACTORS)}
    check_keys_fit(learner, actors[0], volumes, tmp_path / "keys")
    theirs = load_config(actors[0].config_files, actors[0].overrides)
    assert (theirs.model, theirs.device, theirs.reward) == (
        learner.config.model,
        learner.config.device,
        learner.config.reward,
    )


def test_more_actors_are_a_job_of_their_own_as_the_page_says(programs: Programs) -> None:
    """Outside the group, so that they do not know its name, with node ranks that begin at 0 again."""
    page = (ROOT / "docs" / "cluster.md").read_text()
    (command,) = re.findall(r"^sky jobs launch more\.yaml (.*)$", page, re.MULTILINE)
    settings = dict(re.findall(r"--env (\w+)=(\S+)", command.replace("ADDRESS", "10.0.0.7")))
    for rank in range(2):
        run_task(programs, ACTORS, rank)
        run_task(programs, ACTORS, rank, group={}, **settings)
    inside, outside, *_ = actors = [actor_of(call) for call in programs.calls(".venv/bin/python")]
    assert len({actor.name for actor in actors}) == 4
    assert outside.connect == "tcp://10.0.0.7:5555" != inside.connect
    assert (outside.keys, outside.config_files) == (inside.keys, inside.config_files)


def test_what_is_installed_can_be_installed() -> None:
    assert LEARNER["setup"] == ACTORS["setup"] == "make install-gpu"
    assert "\ninstall-gpu:" in (ROOT / "Makefile").read_text()

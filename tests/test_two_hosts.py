"""Publication between processes, on one host and on two: network namespaces with addresses of their own.

No environment variable says which interface to use; the addresses alone do.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.types import WeightsPhase
from tests.support.tiny_models import write_tiny_model
from tests.support.transfer_actors import KILLED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parent.parent
LEARNER, ACTOR = "10.213.7.1", "10.213.7.2"


def start(module: str, *arguments: object, host: str | None = None) -> "subprocess.Popen[str]":
    """A module of tests.support, in the namespace `host` if one is named."""
    inside = ["ip", "netns", "exec", host] if host is not None else []
    command = [*inside, sys.executable, "-m", f"tests.support.{module}", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if "SOCKET_IFNAME" not in name}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, text=True, stdout=subprocess.PIPE
    )


def endpoint_of(folder: Path, learner: "subprocess.Popen[str]") -> str:
    deadline = time.monotonic() + 240.0
    while not (folder / "endpoint").exists():
        assert learner.poll() is None and time.monotonic() < deadline, "the learner did not come up"
        time.sleep(0.05)
    return (folder / "endpoint").read_text()


def reached(learner: "subprocess.Popen[str]") -> list[str]:
    output, _ = learner.communicate(timeout=300)
    assert learner.returncode == 0
    return output.splitlines()


@pytest.fixture
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two namespaces that reach each other and nothing else; their host name is not an address of either."""
    names = (f"learner{os.getpid()}", f"actor{os.getpid()}")
    steps = [f"ip netns add {name}" for name in names]
    steps += [f"ip link add veth0 netns {names[0]} type veth peer name veth0 netns {names[1]}"]
    for name, address in zip(names, (LEARNER, ACTOR), strict=True):
        steps += [
            f"ip -n {name} address add {address}/24 dev veth0",
            f"ip -n {name} link set veth0 up",
            f"ip -n {name} link set lo up",
        ]
    try:
        for step in steps:
            made = subprocess.run(step.split(), capture_output=True, text=True, check=False)
            if made.returncode != 0:
                pytest.skip(f"no network namespaces here: {step}: {made.stderr.strip()}")
        yield names
    except FileNotFoundError:
        pytest.skip("no network namespaces here: there is no ip command")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def test_actors_on_another_host_get_the_weights_without_any_variable_set(
    two_hosts: tuple[str, str], tmp_path: Path
) -> None:
    """The learner binds every interface; the address that actors are given is never 0.0.0.0."""
    learner_host, actor_host = two_hosts
    folder = write_tiny_model(tmp_path / "model")
    learner = start("transfer_learner", folder, "0.0.0.0", 1, tmp_path, host=learner_host)
    endpoint = endpoint_of(tmp_path, learner)
    assert endpoint.startswith(f"tcp://{LEARNER}:")
    actor = start("transfer_process", endpoint, "remote", folder, host=actor_host)
    assert reached(learner) == ["1 remote", "2 remote"]
    assert actor.wait(60) == 0


def test_an_actor_that_is_killed_in_a_bucket_leaves_the_others_with_the_weights(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    learner = start("transfer_learner", folder, "127.0.0.1", 2, tmp_path)
    endpoint = endpoint_of(tmp_path, learner)
    good = start("transfer_process", endpoint, "good", folder)
    killed = start("transfer_process", endpoint, "killed", folder, KILLED, WeightsPhase.UPDATE, 2)
    assert reached(learner) == ["1 good", "2 good"]
    assert (good.wait(60), killed.wait(60)) == (0, -9)

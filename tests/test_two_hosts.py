"""Publication between processes, on one host and on two: network namespaces with addresses of their own.

No environment variable says which interface to use; the addresses alone do.
"""

import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from common.types import WeightsPhase
from tests.support.hosts import Hosts, network
from tests.support.tiny_models import write_tiny_model
from tests.support.transfer_actors import KILLED
from tests.support.transfer_process import act, publish_twice, start

pytestmark = pytest.mark.slow


def endpoint_of(folder: Path, learner: ForkServerProcess) -> str:
    await_file(folder / "endpoint", learner)
    return (folder / "endpoint").read_text()


def await_file(file: Path, learner: ForkServerProcess) -> None:
    deadline = time.monotonic() + 240.0
    while not file.exists():
        assert learner.is_alive() and time.monotonic() < deadline, f"the learner did not write {file.name}"
        time.sleep(0.05)


def exit_code(process: ForkServerProcess) -> int | None:
    process.join(240.0)
    return process.exitcode


@pytest.fixture
def two_hosts() -> Iterator[Hosts]:
    with network("learner", "actor") as hosts:
        yield hosts


def test_actors_on_another_host_get_the_weights_without_any_variable_set(two_hosts: Hosts, tmp_path: Path) -> None:
    """The learner binds every interface; the address that actors are given is never 0.0.0.0."""
    folder = write_tiny_model(tmp_path / "model")
    learner = start(publish_twice, folder, "0.0.0.0", 1, tmp_path, host=two_hosts.namespace("learner"))
    endpoint = endpoint_of(tmp_path, learner)
    assert endpoint.startswith(f"tcp://{two_hosts.addresses['learner']}:")
    actor = start(act, endpoint, "remote", folder, host=two_hosts.namespace("actor"))
    assert (exit_code(learner), exit_code(actor)) == (0, 0)
    assert (tmp_path / "reached").read_text() == "remote\nremote"


def test_an_actor_that_is_killed_in_a_bucket_leaves_the_others_with_the_weights(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    learner = start(publish_twice, folder, "127.0.0.1", 2, tmp_path)
    endpoint = endpoint_of(tmp_path, learner)
    good = start(act, endpoint, "good", folder)
    killed = start(act, endpoint, "killed", folder, KILLED, WeightsPhase.UPDATE, 2)
    assert (exit_code(learner), exit_code(good), exit_code(killed)) == (0, 0, -9)
    assert (tmp_path / "reached").read_text() == "good\ngood"


def test_joiners_are_served_while_the_others_hear_nothing_and_one_that_is_killed_costs_only_itself(
    tmp_path: Path,
) -> None:
    folder = write_tiny_model(tmp_path / "model")
    learner = start(publish_twice, folder, "127.0.0.1", 1, tmp_path, 2)
    endpoint = endpoint_of(tmp_path, learner)
    first = start(act, endpoint, "first", folder)
    await_file(tmp_path / "published", learner)
    late = start(act, endpoint, "late", folder)
    killed = start(act, endpoint, "killed", folder, KILLED, WeightsPhase.UPDATE, 2)
    assert (exit_code(learner), exit_code(first), exit_code(late), exit_code(killed)) == (0, 0, 0, -9)
    assert (tmp_path / "reached").read_text() == "first\nlate\ntold killed late\nfirst late"

"""Joiners are served over a group of their own, in several buckets; nobody who holds the version hears of it.

What a joiner that fails in any phase costs is in test_faults.py.
"""

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from common.config import Device
from common.launcher import rank_environment, reserve_port
from common.types import MemberId, WeightsPhase
from learner.networks.parallel import process_group
from learner.publication.control import PublishError
from learner.publication.publisher import FRUITLESS_ATTEMPTS, Publisher
from tests.learner.publication.test_publisher import actor, has_arrived, make_publisher, make_run, train
from tests.support.ranks import run_ranks
from tests.support.tiny_models import write_tiny_model
from tests.support.transfer_actors import BREAKS, FAILS, FORGETS, KILLED, LocalActors, TransferActor

FIRST, LATE = MemberId("first", 1), MemberId("late", 2)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def running(path: str, **settings: Any) -> tuple[LocalActors, TransferActor, Publisher]:
    """A run at version 1, which its one actor holds; from now on it hears of nothing."""
    actors = LocalActors()
    first = actors.add("first", 1, actor(path))
    publisher = make_publisher(make_run(path, **settings), actors)
    publisher.publish(0)
    train(publisher.policy)
    assert publisher.publish(1).members == (FIRST,)
    first.received.clear()
    return actors, first, publisher


def assert_next_version_reaches(actors: LocalActors, publisher: Publisher, *members: MemberId) -> None:
    train(publisher.policy)
    publication = publisher.publish(2)
    assert publication.members == members and publication.probe_difference < 1e-6
    assert has_arrived(publisher, actors)
    publisher.shutdown()


def test_two_joiners_are_served_together_and_belong_to_the_next_publication(path: str) -> None:
    actors, first, publisher = running(path)
    late = [actors.add("late", 2, actor(path)), actors.add("later", 3, actor(path))]
    served = publisher.serve(1)
    assert served.members == (LATE, MemberId("later", 3)) and served.probe_difference < 1e-6
    assert first.received == [] and actors.waiting_ids() == () and has_arrived(publisher, actors)
    for one in late:
        assert [one.received.count(phase) for phase in (WeightsPhase.PAUSE, WeightsPhase.INIT)] == [1, 1]
        assert one.received[-1] is WeightsPhase.RESUME
    assert_next_version_reaches(actors, publisher, FIRST, *served.members)
    assert [one.received.count(WeightsPhase.INIT) for one in (first, *late)] == [1, 2, 2]


@pytest.mark.parametrize(("fault", "phase"), [(KILLED, WeightsPhase.UPDATE), (FAILS, WeightsPhase.FINISH)])
def test_when_the_only_joiner_is_lost_the_group_of_the_others_goes_on(
    path: str, fault: str, phase: WeightsPhase
) -> None:
    actors, first, publisher = running(path)
    actors.add("lost", 2, actor(path, fault, phase))
    assert publisher.serve(1).members == ()
    assert first.received == []
    assert_next_version_reaches(actors, publisher, FIRST)
    assert WeightsPhase.INIT not in first.received


def test_a_member_that_comes_back_without_weights_leaves_the_group_of_the_others(path: str) -> None:
    actors, first, publisher = running(path)
    late = actors.add("late", 2, actor(path))
    publisher.publish(1)
    first.received.clear()
    actors.served.discard(LATE)  # it was lost from sight in the middle of an update
    assert publisher.serve(1).members == (LATE,)
    assert first.received == []
    assert_next_version_reaches(actors, publisher, FIRST, LATE)
    assert actors.dismissed == {}
    assert [one.received.count(WeightsPhase.INIT) for one in (first, late)] == [1, 3]


def test_a_joiner_that_loads_nothing_is_dismissed_by_the_probe(path: str) -> None:
    actors, first, publisher = running(path)
    actors.add("forgets", 2, actor(path, FORGETS))
    actors.add("late", 3, actor(path))
    served = publisher.serve(1)
    assert served.members == (MemberId("late", 3),) and first.received == []
    assert served.probe_difference is not None and served.probe_difference > publisher.probe.limit
    assert "never agreed" in actors.dismissed["forgets"] and actors.quarantined == {"forgets": 1}
    publisher.shutdown()


def test_what_one_joiner_breaks_for_the_others_with_nobody_to_blame_is_found_by_serving_each_alone(path: str) -> None:
    actors, first, publisher = running(path)
    actors.add("breaks", 2, actor(path, BREAKS))
    late = actors.add("late", 3, actor(path))
    assert publisher.serve(1).members == ()  # it may be either's fault
    assert late.received.count(WeightsPhase.PAUSE) == FRUITLESS_ATTEMPTS and actors.dismissed == {}
    while actors.waiting_ids():
        publisher.serve(1)
    assert "others hold the weights" in actors.dismissed["breaks"]
    assert late.received[-1] is WeightsPhase.RESUME and first.received == []
    assert_next_version_reaches(actors, publisher, FIRST, MemberId("late", 3))


def test_a_doubt_about_a_joiner_ends_with_what_reaches_it(path: str) -> None:
    """What fails later is not the second time in a row, after which it would have to leave."""
    actors, _, publisher = running(path)
    late = actors.add("late", 2, actor(path))
    for bring in (publisher.serve, publisher.publish, None):
        late.fault, late.at = BREAKS, late.received.count(WeightsPhase.UPDATE)
        assert publisher.serve(1).members == () and actors.dismissed == {}
        late.fault = None
        assert bring is None or LATE in bring(1).members
        actors.served.discard(LATE)  # it was lost from sight, and is back
    publisher.shutdown()


def test_joiners_that_break_the_publication_to_all_are_left_out_and_found_one_by_one(path: str) -> None:
    """One can be reached alone, but not together with the others: as from behind a firewall between actors."""
    actors, _, publisher = running(path)
    late, breaks = actors.add("late", 2, actor(path)), actors.add("breaks", 3, actor(path))
    for version in (2, 3):
        breaks.fault, breaks.at = BREAKS, breaks.received.count(WeightsPhase.UPDATE)
        train(publisher.policy)
        assert publisher.publish(version).members == (FIRST,)
        assert set(actors.dismissed) == ({"breaks"} if version == 3 else set()), "it may have been either's fault"
        breaks.fault, actors.served = None, {FIRST}
        while actors.waiting_ids():
            publisher.serve(version)
        assert has_arrived(publisher, actors)
    for version in (4, 5):
        train(publisher.policy)
        assert publisher.publish(version).members == (FIRST, LATE) and has_arrived(publisher, actors)
    assert set(actors.dismissed) == {"breaks"} and late.received[-1] is WeightsPhase.RESUME
    publisher.shutdown()


def test_a_joiner_that_cannot_be_served_ends_a_run_in_which_nobody_holds_the_version(path: str) -> None:
    actors = LocalActors()
    publisher = make_publisher(make_run(path), actors)
    assert publisher.publish(1).members == ()
    actors.add("breaks", 1, actor(path, BREAKS))
    with pytest.raises(PublishError, match="no actor is to blame"):
        publisher.serve(1)
    assert actors.dismissed == {}


@pytest.mark.parametrize("name", ["a", "z"])
def test_a_joiner_that_can_be_served_is_found_beside_one_that_cannot_where_nobody_holds_the_version(
    path: str, name: str
) -> None:
    actors = LocalActors()
    publisher = make_publisher(make_run(path), actors)
    assert publisher.publish(1).members == ()
    actors.add("k", 1, actor(path))
    actors.add(name, 2, actor(path, BREAKS))
    reached = [publisher.serve(1).members for _ in range(3)]
    assert (MemberId("k", 1),) in reached
    while actors.waiting_ids():
        publisher.serve(1)
    assert set(actors.dismissed) == {name} and "others hold the weights" in actors.dismissed[name]
    publisher.shutdown()


def test_a_joiner_that_fails_alone_twice_ends_the_run_also_when_another_is_started_again_and_again(path: str) -> None:
    actors = LocalActors()
    publisher = make_publisher(make_run(path), actors)
    assert publisher.publish(1).members == ()
    actors.add("breaks", 1, actor(path, BREAKS))
    with pytest.raises(PublishError, match="no actor is to blame"):
        for number in range(2, 12):
            if number % 2:  # a new process of that name, as long as it takes to start
                actors.add("dies", number, actor(path, KILLED, WeightsPhase.PAUSE))
            publisher.serve(1)
    assert actors.dismissed == {}


def test_a_run_ends_when_none_of_several_joiners_can_be_served(path: str) -> None:
    actors = LocalActors()
    publisher = make_publisher(make_run(path), actors)
    assert publisher.publish(1).members == ()
    for number, name in enumerate("abc", 1):
        actors.add(name, number, actor(path, BREAKS))
    with pytest.raises(PublishError, match="no actor is to blame"):
        for _ in range(9):
            publisher.serve(1)
    assert actors.dismissed == {}


def test_only_the_version_that_is_held_can_be_served(path: str) -> None:
    _, _, publisher = running(path)
    with pytest.raises(AssertionError, match="version 2 is not the one that is held, which is 1"):
        publisher.serve(2)
    publisher.shutdown()


# ---- several learner ranks


@dataclass(frozen=True)
class Scene:
    """Joiners beside a good one, whether the policy has moved on since the version, and whether the next is published
    before they are served."""

    fault: str | None
    phase: WeightsPhase = WeightsPhase.UPDATE
    at: int = 0
    moves_on: bool = False
    is_published: bool = False


SCENES = [
    Scene(None, moves_on=True),
    Scene(KILLED, at=2),
    Scene(FAILS, WeightsPhase.FINISH),
    Scene(BREAKS, WeightsPhase.START),
    Scene(BREAKS, is_published=True),
]


def _serve_in_ranks(rank: int, size: int, path: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= rank_environment(rank, size, port)
    with process_group(Device.cpu, timeout_s=60):
        for scene in SCENES:
            _play(scene, rank, size, path)


def _play(scene: Scene, rank: int, size: int, path: str) -> None:
    """All ranks return from each call, and the next collective of theirs is in step."""
    actors = LocalActors() if rank == 0 else None
    if actors is not None:
        actors.add("first", 1, actor(path))
    publisher = make_publisher(make_run(path, size, weights={"publish_every": 2}), actors, rank)
    train(publisher.policy)
    publisher.publish(1)
    expected = dict(publisher.policy.named_hf_parameters())  # a collective
    if scene.moves_on:
        train(publisher.policy)
    if actors is not None:
        actors.actors[FIRST].received.clear()
        actors.add("late", 2, actor(path))
        actors.add("other", 3, actor(path, scene.fault, scene.phase, scene.at))
    if scene.is_published:
        publisher.publish(2)
    while _anybody_waits(actors):
        publisher.serve(1 + scene.is_published)
    if actors is not None:
        left = {FIRST, LATE} if scene.fault else {FIRST, LATE, MemberId("other", 3)}
        assert set(actors.actors) == left, (scene, actors.dismissed)
        assert scene.is_published or actors.actors[FIRST].received == [], scene
        for one in actors.actors.values():
            assert all(one.weights()[name].equal(tensor) for name, tensor in expected.items()), scene
    publisher.shutdown()
    dist.barrier()


def _anybody_waits(actors: LocalActors | None) -> bool:
    """Rank 0's answer on all of them."""
    flag = torch.tensor([actors is not None and bool(actors.waiting_ids())])
    dist.broadcast(flag, src=0)
    return bool(flag.item())


def test_all_ranks_serve_joiners_and_none_is_left_behind(path: str) -> None:
    with reserve_port() as port:
        run_ranks(2, _serve_in_ranks, 2, path, port)

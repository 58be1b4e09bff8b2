"""Publication over real gloo groups, in several buckets, to actors of which some are lost on the way.

The whole table of phases and faults, with processes, is in test_faults.py.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from common.config import Config, Device, StalenessConfig, WeightsConfig
from common.launcher import rank_environment, reserve_port
from common.types import MemberId, WeightsPhase
from learner.networks.model import Policy, load_policy
from learner.networks.parallel import make_mesh, process_group
from learner.publication.buckets import plan
from learner.publication.control import Channel, PublishError
from learner.publication.publisher import FRUITLESS_ATTEMPTS, LOST_IN_A_ROW, Publisher
from learner.publication.transfer import GlooTransfer
from tests.support.ranks import run_ranks
from tests.support.tiny_models import VOCAB, tiny_run, write_tiny_model
from tests.support.transfer_actors import CUT, FAILS, FORGETS, KILLED, SILENT, LocalActors, TransferActor

CPU = torch.device("cpu")
PROBE = torch.arange(9) % VOCAB
BUCKET_BYTES = 12_000  # of the tiny model: several buckets
TIMEOUT_S = 60.0  # not reached where connections close, but where nobody comes to a meeting
SHORT_S = 6.0  # where it is
METRICS = {f"weights/{n}" for n in ("probe_difference", "probe_max", "probe_floor", "gather_s", "send_s", "wait_s")}


def make_run(path: str, ranks: int = 1, timeout_s: float = TIMEOUT_S, **settings: Any) -> Config:
    weights = WeightsConfig(timeout_s=timeout_s, **settings.pop("weights", {}))
    return replace(tiny_run(path, ranks=ranks), weights=weights, **settings)


def make_publisher(config: Config, control: LocalActors | None, rank: int = 0, **settings: Any) -> Publisher:
    policy = load_policy(config, CPU, make_mesh(config))
    return Publisher(config, policy, control, rank, PROBE, bucket_bytes=BUCKET_BYTES, **settings)


def actor(path: str, fault: str | None = None, phase: WeightsPhase = WeightsPhase.UPDATE, at: int = 0) -> TransferActor:
    return TransferActor(load_policy(tiny_run(path), CPU, None), PROBE, fault, phase, at)


@torch.no_grad()
def train(policy: Policy) -> None:
    """Away from where it was; the same on every rank, whatever it holds."""
    for index, parameter in enumerate(policy.parameters()):
        parameter.mul_(1.0 + 0.01 * (index + 1))


def has_arrived(publisher: Publisher, actors: LocalActors) -> bool:
    """Whether every actor has the learner's bytes (of one rank)."""
    expected = dict(publisher.policy.named_hf_parameters())
    return all(
        tensor.equal(expected[name]) for actor in actors.actors.values() for name, tensor in actor.weights().items()
    )


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write_tiny_model(tmp_path)


def num_buckets(path: str) -> int:
    return len(plan(load_policy(tiny_run(path), CPU, None).hf_specs(), BUCKET_BYTES))


def test_several_buckets_reach_several_actors_and_the_group_is_kept(path: str) -> None:
    actors = LocalActors()
    first, second = actors.add("a", 1, actor(path)), actors.add("b", 2, actor(path))
    publisher = make_publisher(make_run(path), actors)
    for version in range(3):
        train(publisher.policy)
        publication = publisher.publish(version)
        assert publication.members == (MemberId("a", 1), MemberId("b", 2))
        assert publication.probe_difference < 1e-6 and has_arrived(publisher, actors)
    for one in (first, second):
        assert one.received.count(WeightsPhase.INIT) == 1
        assert one.received.count(WeightsPhase.UPDATE) == 3 * num_buckets(path) > 9
    assert set(publication.metrics()) == METRICS
    publisher.shutdown()


FAULTS = [
    *((KILLED, WeightsPhase.UPDATE, bucket) for bucket in range(5)),
    (KILLED, WeightsPhase.START, 0),
    (KILLED, WeightsPhase.FINISH, 0),
    (FAILS, WeightsPhase.UPDATE, 2),
    (FAILS, WeightsPhase.FINISH, 0),
]


@pytest.mark.parametrize(("fault", "phase", "at"), FAULTS)
def test_one_is_lost_and_the_others_get_the_weights_in_the_same_publication(
    path: str, fault: str, phase: WeightsPhase, at: int
) -> None:
    assert num_buckets(path) >= 5
    actors = LocalActors()
    actors.add("a", 1, actor(path))
    actors.add("lost", 2, actor(path, fault, phase, at))
    actors.add("z", 3, actor(path))
    publisher = make_publisher(make_run(path), actors)
    train(publisher.policy)
    assert [member.name for member in publisher.publish(1).members] == ["a", "z"]
    assert has_arrived(publisher, actors) and set(actors.dismissed) == ({"lost"} if fault == FAILS else set())
    train(publisher.policy)
    assert publisher.publish(2).probe_difference < 1e-6
    assert has_arrived(publisher, actors)
    publisher.shutdown()


@pytest.mark.parametrize("phase", list(WeightsPhase)[:6])
def test_one_whose_connection_is_cut_in_any_phase_keeps_its_place_and_is_served_when_it_is_back(
    path: str, phase: WeightsPhase
) -> None:
    actors = LocalActors()
    actors.add("a", 1, actor(path))
    cut = actors.add("cut", 2, actor(path, CUT, phase))
    publisher = make_publisher(make_run(path, timeout_s=SHORT_S if phase is WeightsPhase.INIT else TIMEOUT_S), actors)
    train(publisher.policy)
    assert [member.name for member in publisher.publish(1).members] == ["a"]
    assert actors.waiting_ids() == (MemberId("cut", 2),)
    cut.fault = None
    assert [member.name for member in publisher.serve(1).members] == ["cut"]
    assert has_arrived(publisher, actors) and actors.dismissed == {}
    train(publisher.policy)
    assert len(publisher.publish(2).members) == 2 and has_arrived(publisher, actors)
    publisher.shutdown()


def test_who_is_alone_and_cut_off_is_served_later(path: str) -> None:
    actors = LocalActors()
    only = actors.add("a", 1, actor(path, CUT, at=1))
    publisher = make_publisher(make_run(path), actors)
    assert publisher.publish(1).members == ()
    only.fault = None
    assert publisher.serve(1).members == (MemberId("a", 1),) and has_arrived(publisher, actors)
    publisher.shutdown()


@pytest.mark.parametrize("phase", list(WeightsPhase)[:6])
def test_who_is_cut_off_in_every_publication_leaves(path: str, phase: WeightsPhase) -> None:
    actors = LocalActors()
    actors.add("a", 1, actor(path))
    cut = actors.add("cut", 2, actor(path, CUT, phase))
    publisher = make_publisher(make_run(path, timeout_s=SHORT_S if phase is WeightsPhase.INIT else TIMEOUT_S), actors)
    for version in range(1, LOST_IN_A_ROW + 1):
        assert actors.dismissed == {}
        cut.received.clear()  # it strikes again
        train(publisher.policy)
        assert publisher.publish(version).members == (MemberId("a", 1),)
    assert actors.dismissed == {"cut": f"its connection was lost in {LOST_IN_A_ROW} publications in a row"}
    publisher.shutdown()


def test_a_lonely_actor_that_dies_in_a_bucket_leaves_a_publication_to_nobody(path: str) -> None:
    actors = LocalActors()
    actors.add("a", 1, actor(path, KILLED, at=1))
    publisher = make_publisher(make_run(path), actors)
    assert publisher.publish(1).members == ()
    actors.add("b", 2, actor(path))
    assert publisher.publish(1).members == (MemberId("b", 2),)
    assert has_arrived(publisher, actors)
    publisher.shutdown()


def test_however_many_fail_one_after_the_other_the_last_gets_the_weights(path: str) -> None:
    actors = LocalActors()
    for number in range(5):
        actors.add(f"bad{number}", number, actor(path, FAILS, at=number))
    actors.add("good", 9, actor(path))
    publisher = make_publisher(make_run(path), actors)
    assert publisher.publish(1).members == (MemberId("good", 9),)
    assert has_arrived(publisher, actors)
    publisher.shutdown()


def test_a_restarted_actor_of_the_same_name_is_invited_anew(path: str) -> None:
    actors = LocalActors()
    actors.add("a", 1, actor(path))
    publisher = make_publisher(make_run(path), actors)
    publisher.publish(1)
    del actors.actors[MemberId("a", 1)]
    restarted = actors.add("a", 2, actor(path))
    train(publisher.policy)
    assert publisher.publish(2).members == (MemberId("a", 2),)
    assert restarted.received.count(WeightsPhase.INIT) == 1 and actors.dismissed == {}
    assert has_arrived(publisher, actors)
    publisher.shutdown()


class CutWires(GlooTransfer):
    """Its group breaks in every first bucket, and no peer is at fault."""

    def meet(self, channel: Channel) -> None:
        super().meet(channel)
        self.close()

    def send(self, channel: Channel, bucket: Any) -> None:
        raise PublishError("the wires are cut")


def test_failures_without_anybody_to_blame_end_the_run_in_the_end(path: str) -> None:
    actors = LocalActors()
    only = actors.add("a", 1, actor(path))
    publisher = make_publisher(make_run(path), actors, new_transfer=CutWires)
    with pytest.raises(PublishError, match="no actor is to blame: the wires are cut"):
        publisher.publish(1)
    assert only.received.count(WeightsPhase.PAUSE) == FRUITLESS_ATTEMPTS
    assert list(actors.actors) == [MemberId("a", 1)]


SETTINGS = [
    {"weights": {"publish_every": 3}},
    {"staleness": StalenessConfig(exact=True)},  # the next version waits although the policy is trained
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["publish_every", "exact"])
def test_a_late_joiner_gets_the_weights_that_were_published_not_todays(path: str, settings: dict[str, Any]) -> None:
    actors = LocalActors()
    first = actors.add("first", 1, actor(path))
    publisher = make_publisher(make_run(path, **settings), actors)
    publisher.publish(0)
    train(publisher.policy)
    publisher.publish(1)
    published = {name: tensor.clone() for name, tensor in first.weights().items()}

    train(publisher.policy)  # the version under way is not over
    late = actors.add("late", 2, actor(path))
    served = publisher.serve(1)
    assert [member.name for member in served.members] == ["late"] and served.probe_difference < 1e-5
    assert actors.dismissed == {}
    for member in (first, late):
        assert all(tensor.equal(published[name]) for name, tensor in member.weights().items())
    publisher.publish(2)
    assert has_arrived(publisher, actors)
    publisher.shutdown()


def test_no_copy_is_kept_where_the_policy_cannot_move_on_within_a_version(path: str) -> None:
    actors = LocalActors()
    actors.add("a", 1, actor(path))
    publisher = make_publisher(make_run(path), actors)
    publisher.publish(0)
    assert publisher._source._held is None
    publisher.shutdown()


def test_an_actor_that_loads_nothing_is_dismissed_and_the_publication_says_by_how_much(path: str) -> None:
    actors = LocalActors()
    actors.add("loads", 1, actor(path))
    actors.add("forgets", 2, actor(path, FORGETS))
    publisher = make_publisher(make_run(path), actors)
    first = publisher.publish(0)
    assert len(first.members) == 2 and first.probe_floor == first.probe_difference
    train(publisher.policy)
    second = publisher.publish(1)
    assert second.members == (MemberId("loads", 1),) and second.probe_floor == first.probe_floor
    assert second.probe_max is not None and second.probe_difference is not None
    assert second.probe_max > second.probe_difference > publisher.probe.limit
    assert f"differ by {second.probe_difference:.3g} nats a token after version 1" in actors.dismissed["forgets"]
    publisher.shutdown()


# ---- several learner ranks


@dataclass(frozen=True)
class Scene:
    """One publication with a fault, and one after it."""

    fault: str
    phase: WeightsPhase
    at: int


SCENES = [Scene(*fault) for fault in FAULTS] + [Scene(SILENT, WeightsPhase.UPDATE, 1)]


def _publish_in_ranks(rank: int, size: int, path: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= rank_environment(rank, size, port)
    with process_group(Device.cpu, timeout_s=60):
        for scene in SCENES:
            _play(scene, rank, size, path)


def _play(scene: Scene, rank: int, size: int, path: str) -> None:
    """All ranks return from both publications, and the next collective of theirs is in step."""
    timeout_s = 9.0 if scene.fault == SILENT else TIMEOUT_S
    actors = LocalActors() if rank == 0 else None
    if actors is not None:
        actors.add("a", 1, actor(path))
        actors.add("lost", 2, actor(path, scene.fault, scene.phase, scene.at))
    publisher = make_publisher(make_run(path, size, timeout_s), actors, rank)
    for version in (1, 2):
        train(publisher.policy)
        publisher.publish(version)
        expected = dict(publisher.policy.named_hf_parameters())  # a collective
        if actors is not None:
            assert [member.name for member in actors.member_ids()] == ["a"], (scene, actors.dismissed)
            found = actors.actors[MemberId("a", 1)].weights()
            assert all(found[name].equal(tensor) for name, tensor in expected.items()), scene
    publisher.shutdown()
    dist.barrier()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_no_rank_is_left_behind_when_an_actor_is_lost_at_any_bucket(path: str, size: int) -> None:
    with reserve_port() as port:
        run_ranks(size, _publish_in_ranks, size, path, port)

"""The table "phase x {dies, silent, reports an error}", with learners of one rank and of two.

Learners and actors are processes. In each cell one actor is guilty: the others get the weights, to the bit, in the same
publication, all of them stay, and the learner says who is gone. A publication goes to members that have met before,
except where the fault is in their meeting; the guilty one is the first of them by name, which hands buckets on to
others. Both learners play a cell at the same time.
"""

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

import pytest
import torch

from common.config import Config, TransportConfig, WeightsConfig
from common.types import MemberId, WeightsPhase
from learner.networks.model import load_policy
from learner.publication.buckets import plan
from tests.support.faulty_actors import Fault, Strike
from tests.support.played_learner import BUCKET_BYTES, ActorProcess, Outcome, PlayedLearner, played_learner
from tests.support.tiny_models import VOCAB, tiny_run, write_tiny_model

pytestmark = pytest.mark.slow

TIMEOUT_S = 4.5  # of a phase; a third of it is that of a collective
PROBE = [token % VOCAB for token in range(9)]
PHASES = list(WeightsPhase)[:6]
PUBLISHED = [(fault, phase) for fault in (Fault.DIES, Fault.STOPS, Fault.ERRS) for phase in PHASES]
SERVED = [(fault, phase) for fault in (Fault.DIES, Fault.HANGS, Fault.ERRS) for phase in PHASES]
A_LATER_BUCKET = 2


def config_of(folder: str, ranks: int) -> Config:
    """Only a phase's time-out finds a silent actor: the clocks of heartbeats and leases are slower."""
    return replace(
        tiny_run(folder, ranks=ranks),
        weights=WeightsConfig(timeout_s=TIMEOUT_S),
        transport=TransportConfig(heartbeat_s=0.2, lease_timeout_s=600.0, reconnect_s=60.0, curve=False),
    )


@dataclass
class Scene:
    """A learner with two innocent actors, which take part in every cell."""

    learner: PlayedLearner
    innocents: tuple[ActorProcess, ...]
    ids: tuple[MemberId, ...] = ()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def num_buckets(folder: str) -> int:
    num = len(plan(load_policy(tiny_run(folder), torch.device("cpu"), None).hf_specs(), BUCKET_BYTES))
    assert num > A_LATER_BUCKET + 2
    return num


@pytest.fixture(scope="module")
def scenes(folder: str) -> Iterator[list[Scene]]:
    with ExitStack() as stack:
        learners = [stack.enter_context(played_learner(config_of(folder, ranks), PROBE)) for ranks in (1, 2)]
        scenes = [Scene(learner, tuple(map(learner.start_actor, ("n", "z")))) for learner in learners]
        for scene, outcome in play(scenes, "publish", "n", "z"):
            assert_holds(outcome, *scene.innocents)
            scene.ids = outcome.left
        yield scenes


def play(scenes: list[Scene], what: str, *members: str) -> list[tuple[Scene, Outcome]]:
    """The same in all of them, at the same time."""
    for scene in scenes:
        scene.learner.begin(what, *members)
    return [(scene, scene.learner.outcome()) for scene in scenes]


def assert_holds(outcome: Outcome, *actors: ActorProcess) -> None:
    """They were reached, and nobody else; each samples again, with the learner's weights."""
    assert outcome.reached == tuple(actor.name for actor in actors), outcome
    for actor in actors:
        assert actor.news()[-1] == (WeightsPhase.RESUME, outcome.held), (actor.name, outcome)


def assert_guilty(outcome: Outcome, guilty: ActorProcess, strike: Strike) -> None:
    """It alone is gone, for the true reason, and in time: a deadline is waited for once, and only for a silent one."""
    assert outcome.parted == [(guilty.name, "lost" if strike.fault is Fault.DIES else "dismissed")], outcome
    is_silent = strike.fault in (Fault.STOPS, Fault.HANGS)
    if strike.fault is not Fault.DIES:
        where = "after version" if strike.phase is WeightsPhase.RESUME else f"phase {strike.phase} of version"
        what = "did not answer" if is_silent else "RuntimeError: no such tensor"
        assert where in outcome.partings[0] and what in outcome.partings[0], outcome
    assert outcome.seconds < TIMEOUT_S * (2 if is_silent else 1), outcome
    if strike.fault is Fault.STOPS:
        guilty.kill()
    assert guilty.exit_code() == (1 if strike.fault in (Fault.ERRS, Fault.HANGS) else -signal.SIGKILL)


@pytest.mark.parametrize(("fault", "phase"), PUBLISHED)
def test_a_publication_reaches_every_innocent_and_costs_the_guilty_alone_its_place(
    scenes: list[Scene], num_buckets: int, fault: Fault, phase: WeightsPhase
) -> None:
    meets = phase is WeightsPhase.INIT
    before = 0 if meets else num_buckets + A_LATER_BUCKET if phase is WeightsPhase.UPDATE else 1
    name, strike = f"g-{fault}-{phase}", Strike(fault, phase, before)
    guilty = [scene.learner.start_actor(name, strike) for scene in scenes]
    if not meets:
        for (scene, outcome), one in zip(play(scenes, "publish", name, "n", "z"), guilty, strict=True):
            assert_holds(outcome, one, *scene.innocents)
    for (scene, outcome), one in zip(play(scenes, "publish", name, "n", "z"), guilty, strict=True):
        assert_holds(outcome, *scene.innocents)
        assert outcome.left == scene.ids, "both stay, as the processes that they were"
        assert_guilty(outcome, one, strike)


@pytest.mark.parametrize(("fault", "phase"), SERVED)
def test_a_guilty_joiner_loses_its_own_place_while_others_join_and_the_rest_hear_nothing(
    scenes: list[Scene], fault: Fault, phase: WeightsPhase
) -> None:
    name, strike = f"g-{fault}-{phase}-late", Strike(fault, phase, A_LATER_BUCKET * (phase is WeightsPhase.UPDATE))
    late = [scene.learner.start_actor("late") for scene in scenes]
    guilty = [scene.learner.start_actor(name, strike) for scene in scenes]
    served = play(scenes, "serve", name, "late", "n", "z")
    for (scene, outcome), innocent, one in zip(served, late, guilty, strict=True):
        assert_holds(outcome, innocent)
        assert {member.name for member in outcome.left} == {"late", "n", "z"} and set(scene.ids) < set(outcome.left)
        assert outcome.told == {"late", name} and [actor.news() for actor in scene.innocents] == [[], []]
        assert_guilty(outcome, one, strike)
    for (scene, outcome), innocent in zip(play(scenes, "publish", "late", "n", "z"), late, strict=True):
        assert_holds(outcome, innocent, *scene.innocents)
        assert outcome.partings == ()
        innocent.leave()

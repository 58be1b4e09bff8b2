"""The service over real sockets, with actors that are fakes (tests/fake_actors.py)."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from common.config import (
    ActorsConfig,
    AlgorithmConfig,
    Config,
    LearnerConfig,
    RolloutConfig,
    StalenessConfig,
    TransportConfig,
)
from common.types import Prompt, TrajectoryGroup, WeightsPhase
from learner.service import LearnerService
from tests.fake_actors import FINGERPRINTS, FakeActor

PROMPTS = [Prompt(uid=f"p{i}", text=str(i), reference="") for i in range(100)]
PUBLICATION = (WeightsPhase.PAUSE, WeightsPhase.START, WeightsPhase.UPDATE, WeightsPhase.FINISH, WeightsPhase.RESUME)


def make_config(**changes: object) -> Config:
    config = Config(
        rollout=RolloutConfig(prompts_per_step=4, group_size=2, max_tokens=8),
        algorithm=AlgorithmConfig(critic_warmup_steps=1),
        staleness=StalenessConfig(max_staleness=1),
        learner=LearnerConfig(steps=1000),
        actors=ActorsConfig(start_timeout_s=5.0),
        transport=TransportConfig(heartbeat_s=0.1, heartbeat_timeout_s=1.0),
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def make_service(config: Config) -> LearnerService:
    return LearnerService(config, PROMPTS, lambda prompt: [1, 2, 3], FINGERPRINTS, [1, 2, 3])


def publish(service: LearnerService, version: int, timeout_s: float = 5.0) -> None:
    for phase in PUBLICATION:
        service.command(phase, version, {name: {} for name in service.members()}, timeout_s)


def staleness(groups: list[TrajectoryGroup], version: int) -> int:
    """Of the oldest token, from the token ids themselves."""
    return max(version - int(group.completed.token_ids.min()) for group in groups)


@pytest.fixture
def service() -> Iterator[LearnerService]:
    with make_service(make_config()) as service:
        yield service


def test_a_run_with_skewed_actors_trains_every_lease_once_in_order_and_within_the_bound() -> None:
    config = make_config()
    with make_service(config) as service, ExitStack() as actors:
        for name, delay_s in (("fast", 0.0), ("slow", 0.02)):
            actors.enter_context(FakeActor(service.endpoint, name, delay_s=lambda lease, s=delay_s: s))
        service.wait_for_members(2, 10.0)
        lease_ids, ages, version = [], [], 0
        for step in range(25):
            groups = service.take_batch(10.0)
            lease_ids += [group.lease.lease_id for group in groups]
            ages.append(staleness(groups, version))
            if step >= config.algorithm.critic_warmup_steps:
                version += 1
                publish(service, version)
            service.set_version(version, step + 1)
        stats = service.stats()
    assert lease_ids == sorted(set(lease_ids))
    assert lease_ids == list(range(100))
    assert 0 < max(ages) <= config.staleness.max_staleness
    assert stats["trained_groups"] == 100
    assert sum(count for name, count in stats.items() if name.startswith("dropped/")) == 0

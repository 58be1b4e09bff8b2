"""Slow actors: when they are left without leases, and how they come back."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import ActorsConfig, AlgorithmConfig, Config, LearnerConfig, RolloutConfig, StalenessConfig
from common.types import Lease, Prompt
from learner.rollouts.coordinator import Coordinator
from learner.rollouts.members import RETRY, Member, Presence
from learner.rollouts.prompts import PromptStream
from learner.rollouts.speed import TOLERANCE, Speed, version_times, within
from tests.support.fake_actors import NO_PROBE, group


def useful(token_s: list[float], places: int = 2, bound: int = 2) -> int:
    version_s = version_times(token_s, [places] * len(token_s), group_tokens=100, longest=200, groups=16, bound=bound)
    return within(version_s, TOLERANCE)


def test_one_that_would_hold_up_every_batch_is_of_no_use() -> None:
    assert useful([1.0, 1.0, 1.0, 10.0]) == 3
    assert useful([1.0, 1.0, 1.0, 1.5]) == 4


def test_alone_or_among_its_like_no_actor_is_slow() -> None:
    assert useful([10.0]) == 1
    assert useful([10.0] * 4, places=50) == 4


def test_a_wider_bound_makes_room_for_slower_actors() -> None:
    assert [useful([1.0, 1.0, 1.0, 10.0], bound=bound) for bound in (0, 2, 8)] == [3, 3, 4]


def test_many_slow_actors_that_together_sample_most_are_kept() -> None:
    """Without them a version would take as long as the fast one needs for all groups."""
    assert useful([1.0] + [4.0] * 40, places=1) == 41


@given(st.lists(st.floats(0.9, 1.1), min_size=1, max_size=50).map(sorted), st.integers(1, 64), st.integers(0, 8))
def test_noise_excludes_nobody(token_s: list[float], places: int, bound: int) -> None:
    slowest, fastest = token_s[-1], token_s[0]
    if slowest <= 1.1 * fastest:
        assert useful(token_s, places, bound) == len(token_s)


class Clock:
    """A run of actors with given speeds; each group is one token of generation."""

    def __init__(self) -> None:
        config = Config(
            rollout=RolloutConfig(prompts_per_step=4, group_size=2, max_tokens=8),
            staleness=StalenessConfig(max_staleness=1),
            algorithm=AlgorithmConfig(critic_warmup_steps=0),
            learner=LearnerConfig(steps=10_000),
        )
        prompts = [Prompt(uid=f"p{i}", text="", reference="") for i in range(500)]
        self.coordinator = Coordinator(config, PromptStream(prompts, seed=0), lambda prompt: [1])
        self.now, self.step = 0.0, itertools.count(1)
        self.seconds = {"fast": 1.0, "slow": 100.0}
        for name in self.seconds:
            self.coordinator.join(name, 4, 0.0)
            self.coordinator.ready(name, 0, NO_PROBE)

    def round(self, num_tokens: int = 1) -> list[str]:
        """Who got leases, all of which are answered at once; then as many steps as there are batches."""
        for name in self.seconds:
            self.coordinator.heard(name, self.now)
        self.coordinator.tick(self.now)
        self.coordinator.dispatch(self.now)
        leases = [(name, message) for name, message in self.coordinator.outbox if isinstance(message, Lease)]
        self.coordinator.outbox.clear()
        for name, lease in leases:
            done = group(lease.lease_id, [self.coordinator.ledger.version] * num_tokens)
            self.coordinator.receive(name, replace(done, generation_s=self.seconds[name]), self.now)
        while self.coordinator.ledger.take_batch() is not None:
            step = next(self.step)
            for name in self.seconds:
                self.coordinator.loaded(name, step)
            self.coordinator.set_version(step, step)
        self.now += 1.0
        return [name for name, _ in leases]


def test_a_slow_actor_gets_no_leases_until_it_is_tried_again_with_one(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    assert set(clock.round()) == {"fast", "slow"}
    assert all(set(clock.round()) == {"fast"} for _ in range(20))
    assert caplog.text.count("actor slow gets no leases: it is 100.0 times as slow") == 1
    assert clock.coordinator.stats()["actors_too_slow"] == 1
    clock.now += RETRY * 100.0
    assert clock.round().count("slow") == 1
    clock.seconds["slow"] = 1.0
    clock.now += RETRY * 100.0
    for _ in range(40):  # its running mean needs a few groups
        clock.now += RETRY * 100.0
        clock.round()
    assert clock.coordinator.stats()["actors_too_slow"] == 0
    assert "slow" in clock.round()


def test_whatever_time_an_actor_says_that_it_took_its_speed_is_a_number() -> None:
    """The least of floats, over several tokens, is zero."""
    clock = Clock()
    clock.seconds["fast"] = 5e-324
    for _ in range(10):
        clock.round(num_tokens=2)
    assert clock.coordinator.stats()["actors_too_slow"] == 1


def test_a_slow_actor_takes_over_when_the_fast_ones_have_left() -> None:
    clock = Clock()
    for _ in range(3):
        clock.round()
    clock.coordinator.remove("fast", "test")
    del clock.seconds["fast"]
    clock.now += 1.0
    assert set(clock.round()) == {"slow"}


def test_a_slow_actor_takes_over_while_the_fast_one_hangs() -> None:
    clock = Clock()
    for _ in range(3):
        clock.round()
    fast = clock.coordinator.member("fast")
    fast.is_hung = True
    clock.now += 1.0
    assert set(clock.round()) == {"slow"} and clock.coordinator.stats()["actors_too_slow"] == 0
    fast.is_hung = False
    clock.now += 1.0
    assert set(clock.round()) == {"fast"}


def test_actors_that_drain_are_not_judged() -> None:
    """They have no places, of which a version's time would be a fraction."""
    clock = Clock()
    for _ in range(3):
        clock.round()
    for name in clock.seconds:
        clock.coordinator.drain(name)
    clock.now += 1.0
    assert clock.round() == []


def test_an_actor_brings_no_more_than_it_samples_at_once() -> None:
    """Of eight leases of two responses four wait."""
    config = Config(rollout=RolloutConfig(group_size=2), actors=ActorsConfig(groups_in_flight=8, max_num_seqs=8))
    assert Speed(config).places(8) == 4 and Speed(config).places(2) == 2
    assert Speed(replace(config, actors=ActorsConfig(groups_in_flight=8))).places(8) == 8


def judged(token_s: list[list[float]], capacity: int = 8) -> list[bool]:
    """Who is too slow, of actors whose groups took so long a token; long responses, and a bound of 0, so that the last
    group of a version is what all wait for."""
    speed, members = Speed(Config(staleness=StalenessConfig(max_staleness=0))), []
    for number, groups in enumerate(token_s):
        member = Member(f"actor-{number}", number, capacity, 0.0, 0.0, presence=Presence.READY)
        for seconds in groups:
            member.measure(100 * seconds, 100)
        members.append(member)
    for length in [10] * 400 + [1000] * 20:
        speed.add(group(0, [0] * length))
    speed.judge(members)
    return [member.is_slow for member in members]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(0.75, 1.25), min_size=4, max_size=12), min_size=2, max_size=16))
def test_actors_that_are_alike_are_not_told_apart_by_their_noise(token_s: list[list[float]]) -> None:
    alike = [[1.0 + (seconds - 1.0) * 0.7 for seconds in groups] for groups in token_s]  # 17% to both sides
    assert not any(judged(alike))


def test_one_slow_group_condemns_nobody_and_four_do() -> None:
    """An engine's first group takes many times as long as the others."""
    alike = [[1.0] * 4] * 3
    assert judged([*alike, [20.0]]) == [False] * 4
    assert judged([*alike, [20.0] * 4]) == [False, False, False, True]
    assert judged([*alike, [20.0]], capacity=1) == [False, False, False, True], "it never holds more at once"

"""Leases that get nowhere: an engine that stands still, a lease that is stuck, an actor that is much slower."""

from dataclasses import replace
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import TransportConfig
from common.types import Cancel, DropReason, Lease
from learner.rollouts.clock import FEWEST, REMEMBERED, EngineClock, LeaseTimes, RunningMedian
from learner.rollouts.coordinator import Coordinator
from tests.learner.rollouts.test_coordinator import finish, granted, make, make_config
from tests.support.fake_actors import NO_PROBE, group, heartbeat, progress

LIMIT_S = TransportConfig().lease_timeout_s


def join(coordinator: Coordinator, name: str, capacity: int = 100) -> None:
    coordinator.join(name, capacity, 0.0)
    coordinator.ready(name, 0, NO_PROBE)


def held_by(leases: list[tuple[str, Lease]], name: str) -> list[int]:
    return [lease.lease_id for holder, lease in leases if holder == name]


def cancelled(coordinator: Coordinator) -> list[int]:
    return [message.lease_id for _, message in coordinator.outbox if isinstance(message, Cancel)]


# ---- an engine that stands still


def test_an_engine_that_stands_still_loses_its_leases_and_gets_none_until_it_moves() -> None:
    coordinator = make(make_config(), "a")
    leases = granted(coordinator)
    beat = dict.fromkeys(held_by(leases, "a"), 5)
    coordinator.heartbeat("a", heartbeat(beat, 20, busy_s=100.0), 0.0)
    coordinator.heartbeat("a", heartbeat(beat, 20, busy_s=100.0 + LIMIT_S), 0.0)
    assert not coordinator.drops
    coordinator.heartbeat("a", heartbeat(beat, 20, busy_s=101.0 + LIMIT_S), 0.0)
    assert coordinator.drops == {DropReason.HUNG: 4}
    assert cancelled(coordinator) == [], "an engine that hangs obeys no command"
    assert granted(coordinator) == []
    join(coordinator, "b", 3)
    again = granted(coordinator)
    assert [lease.prompt_uid for _, lease in again] == [lease.prompt_uid for _, lease in leases[:3]]
    assert {name for name, _ in again} == {"b"}
    coordinator.heartbeat("a", heartbeat(beat, 21, busy_s=102.0 + LIMIT_S), 0.0)
    assert cancelled(coordinator) == held_by(leases, "a")
    assert [name for name, _ in granted(coordinator)] == ["a"]


def test_an_engine_that_is_paused_or_asleep_or_idle_does_not_stand_still() -> None:
    """Its busy seconds do."""
    coordinator = make(make_config(), "a")
    beat = dict.fromkeys(held_by(granted(coordinator), "a"), 5)
    for now in range(0, int(10 * LIMIT_S), 10):
        coordinator.heard("a", now)
        coordinator.heartbeat("a", heartbeat(beat, 20, busy_s=30.0), now)
    assert not coordinator.drops


def test_what_has_been_sampled_is_left_to_the_verifier() -> None:
    coordinator = make(make_config(), "a", capacity=2)
    (_, first), (_, second) = granted(coordinator)
    coordinator.progress("a", progress(first.lease_id, [0, 0], [[0], [0]], ended=(0, 1)))
    beat = {first.lease_id: 2, second.lease_id: 1}
    coordinator.heartbeat("a", heartbeat(beat, 3), 0.0)
    coordinator.heartbeat("a", heartbeat(beat, 3, busy_s=2 * LIMIT_S), 0.0)
    assert coordinator.drops == {DropReason.HUNG: 1}
    finish(coordinator, [("a", first)])
    assert coordinator.stats()["buffered_groups"] == 1


def test_an_engine_that_goes_on_hanging_has_to_leave() -> None:
    coordinator = make(make_config(), "a")
    beat = dict.fromkeys(held_by(granted(coordinator), "a"), 0)
    coordinator.heartbeat("a", heartbeat(beat, 0, busy_s=1.5 * LIMIT_S), 0.0)
    assert coordinator.drops == {DropReason.HUNG: 4} and coordinator.hung() == []
    coordinator.heartbeat("a", heartbeat(beat, 0, busy_s=2.5 * LIMIT_S), 0.0)
    assert coordinator.hung() == [("a", "its engine has drawn no token in 150 s of sampling")]


def test_a_lease_that_is_stuck_in_an_engine_that_gets_on_goes_to_another() -> None:
    coordinator = make(make_config(), "a", capacity=4)
    leases = granted(coordinator)
    ids = held_by(leases, "a")
    for step in range(1, 5):
        beat = {ids[0]: 5, ids[1]: 0} | dict.fromkeys(ids[2:], 10 * step)
        coordinator.heartbeat("a", heartbeat(beat, 100 * step, busy_s=step * LIMIT_S / 2), 0.0)
    assert coordinator.drops == {DropReason.HUNG: 1}, "without a token it waits behind others"
    assert cancelled(coordinator) == ids[:1]
    join(coordinator, "b")
    ((name, again),) = granted(coordinator)
    assert (name, again.prompt_uid) == ("b", leases[0][1].prompt_uid)


def test_with_nobody_else_a_stuck_lease_goes_back_to_its_actor() -> None:
    coordinator = make(make_config(), "a", capacity=4)
    ids = held_by(granted(coordinator), "a")
    for step in range(1, 5):
        beat = {ids[0]: 5} | dict.fromkeys(ids[1:], 10 * step)
        coordinator.heartbeat("a", heartbeat(beat, 100 * step, busy_s=step * LIMIT_S / 2), 0.0)
    assert [name for name, _ in granted(coordinator)] == ["a"]


def test_an_engine_clock_counts_busy_seconds_since_growth() -> None:
    clock = EngineClock()
    assert not clock.beat(heartbeat({1: 0}, 0, busy_s=5.0))
    assert (clock.stalled_s, clock.stuck_s(1)) == (5.0, 0.0)
    assert clock.beat(heartbeat({1: 3}, 3, busy_s=8.0))
    assert not clock.beat(heartbeat({1: 3, 2: 0}, 3, busy_s=9.5))
    assert (clock.stalled_s, clock.stuck_s(1), clock.stuck_s(2), clock.stuck_s(3)) == (1.5, 1.5, 0.0, 0.0)
    assert clock.beat(heartbeat({2: 1}, 4, busy_s=10.0))
    assert (clock.stalled_s, clock.stuck_s(1)) == (0.0, 0.0)


# ---- an actor that is slow


def with_history(*actors: str, **transport: float) -> Coordinator:
    """Leases have taken 10 s for 4 tokens, and all that were sampled have been trained."""
    config = make_config(prompts_per_step=FEWEST, max_staleness=1)
    coordinator = make(replace(config, transport=replace(config.transport, **transport)), *actors)
    for name, lease in granted(coordinator):
        coordinator.receive(name, group(lease.lease_id, [0] * 4), 10.0)
    for steps_done in (1, 2):
        assert coordinator.ledger.take_batch() is not None
        coordinator.set_version(0, steps_done)
    return coordinator


def hear(coordinator: Coordinator, now: float) -> None:
    """As if everybody had said something all the time."""
    for member in coordinator._members:
        member.heard_s = now


def slow_lease(coordinator: Coordinator, grown: int, now: float) -> tuple[str, Lease]:
    """The only lease that is still out, with so many tokens; all others are in, in time."""
    hear(coordinator, 100.0)
    (name, lease), *others = granted(coordinator, now=100.0)
    for other, done in others:
        coordinator.receive(other, group(done.lease_id, [0] * 4), 110.0)
    coordinator.progress(name, progress(lease.lease_id, [0, 0], [[0] * grown, [0]]))
    hear(coordinator, now)
    coordinator.tick(now)
    return name, lease


def test_time_in_which_an_actor_was_not_heard_does_not_count_against_its_leases() -> None:
    coordinator = with_history("a", "b", heartbeat_timeout_s=1000.0)
    hear(coordinator, 100.0)
    (name, lease), *others = granted(coordinator, now=100.0)
    for other, done in others:
        coordinator.receive(other, group(done.lease_id, [0] * 4), 110.0)
    hear(coordinator, 101.0)
    coordinator.tick(150.0)
    for actor in coordinator.members():
        coordinator.heard(actor, 150.0)  # the cable is back
    coordinator.tick(151.0)
    assert not coordinator.drops and lease.lease_id in coordinator.member(name).held


def test_a_lease_that_keeps_the_batch_waiting_on_a_slow_actor_goes_to_another() -> None:
    coordinator = with_history("a", "b")
    name, lease = slow_lease(coordinator, grown=2, now=131.0)
    assert coordinator.drops == {DropReason.STRAGGLER: 1}
    assert cancelled(coordinator) == [lease.lease_id]
    coordinator.outbox.clear()
    ((other, again),) = granted(coordinator, now=131.0)
    assert other != name and again.prompt_uid == lease.prompt_uid
    assert again.prefix_lengths.tolist() == [2, 1]


@pytest.mark.parametrize(("grown", "now"), [(2, 129.0), (7, 140.0)])
def test_a_lease_that_is_young_or_merely_long_stays(grown: int, now: float) -> None:
    coordinator = with_history("a", "b")
    slow_lease(coordinator, grown, now)
    assert not coordinator.drops


def test_a_slow_actor_stays_when_there_is_nobody_else() -> None:
    coordinator = with_history("a")
    slow_lease(coordinator, grown=1, now=500.0)
    assert not coordinator.drops


def test_a_slow_actor_rests_for_twice_as_long_each_time() -> None:
    times = LeaseTimes(TransportConfig())
    coordinator = make(make_config(), "a", "b")
    member = coordinator._members["a"]
    for now, until in ((0.0, 30.0), (10.0, 30.0), (40.0, 100.0), (200.0, 320.0)):
        member.rest.begin(now, 30.0)
        assert member.rest.until_s == until
    coordinator._stand(member, 200.0)
    assert {name for name, _ in granted(coordinator, now=319.0)} == {"b"}
    member.rest.end()
    member.rest.begin(400.0, 30.0)
    assert member.rest.until_s == 430.0
    assert times.limit_s == 0.0 and not times.is_straggler(1e9, 0), "without a median nobody is slow"


@given(st.lists(st.integers(0, 9), min_size=1, max_size=3 * REMEMBERED))
def test_the_running_median_is_that_of_the_last_numbers(numbers: list[int]) -> None:
    running = RunningMedian()
    for number in numbers:
        running.add(number)
    assert running.value == median(numbers[-REMEMBERED:])
    assert len(running) == min(len(numbers), REMEMBERED)

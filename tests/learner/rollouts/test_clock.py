"""Leases that get nowhere: an engine that stands still, a lease that is stuck, an actor that is much slower."""

from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import TransportConfig
from common.types import Cancel, DropReason, Lease, LeaseFailed
from learner.rollouts.clock import FEWEST, REMEMBERED, EngineClock, LeaseTimes, RunningMedian
from learner.rollouts.coordinator import Coordinator
from tests.learner.rollouts.test_coordinator import finish, granted, make, make_config
from tests.support.fake_actors import NO_PROBE, group, heartbeat, progress

LIMIT_S = TransportConfig().lease_timeout_s


def join(coordinator: Coordinator, name: str, capacity: int = 100) -> None:
    coordinator.join(name, capacity, 0.0)
    coordinator.ready(name, 0, NO_PROBE)


def disable(coordinator: Coordinator, name: str, state: dict[str, Any]) -> None:
    """Puts a member into a state in which it gets no leases."""
    for attribute, value in state.items():
        setattr(coordinator.member(name), attribute, value)
    coordinator._stand(coordinator.member(name), 0.0)


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
    coordinator.heartbeat("a", heartbeat(beat, 20, busy_s=101.5 + LIMIT_S), 0.0)
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
    coordinator.heartbeat("a", heartbeat(beat, 0, busy_s=0.0), 0.0)
    coordinator.heartbeat("a", heartbeat(beat, 0, busy_s=1.5 * LIMIT_S), 0.0)
    assert coordinator.drops == {DropReason.HUNG: 4} and coordinator.hung() == []
    coordinator.heartbeat("a", heartbeat(beat, 0, busy_s=2.5 * LIMIT_S), 0.0)
    assert coordinator.hung() == [("a", "its engine has drawn no token in 150 s of sampling")]


@dataclass
class Honest:
    """An actor that does as it is told, a second at a time: its busy clock runs while it has something to sample."""

    coordinator: Coordinator
    leases: set[int] = field(default_factory=set)
    busy_s: float = 0.0
    tokens: int = 0

    def live(self, seconds: range, *, is_hung: bool) -> None:
        for now in map(float, seconds):
            if self.leases:
                self.busy_s, self.tokens = self.busy_s + 1.0, self.tokens + (not is_hung)
            self.coordinator.heard("a", now)
            beat = heartbeat(dict.fromkeys(self.leases, self.tokens), self.tokens, self.busy_s)
            self.coordinator.heartbeat("a", beat, now)
            self.coordinator.tick(now)
            self.coordinator.dispatch(now)
            while self.coordinator.outbox:
                match self.coordinator.outbox.popleft()[1]:
                    case Lease(lease_id=lease_id):
                        self.leases.add(lease_id)
                    case Cancel(lease_id=lease_id):
                        self.leases.discard(lease_id)


def test_the_only_actor_that_hangs_for_a_while_gets_on_with_the_same_prompts() -> None:
    coordinator = make(make_config(), "a")
    actor, limit_s = Honest(coordinator), int(LIMIT_S)
    actor.live(range(10), is_hung=False)
    before = [slot.prompt.uid for slot in coordinator.ledger.slots.train.values()]
    actor.live(range(10, 10 + limit_s + limit_s // 2), is_hung=True)
    assert coordinator.drops == {DropReason.HUNG: 4} and not coordinator.member("a").held
    assert "a (hung, version 0, heard" in coordinator.describe(0.0)
    assert coordinator.hung() == []
    actor.live(range(100, 103), is_hung=False)
    assert actor.leases == coordinator.member("a").held.keys() and len(actor.leases) == 4
    assert [slot.prompt.uid for slot in coordinator.ledger.slots.train.values()] == before


def test_the_only_actor_that_hangs_for_ever_has_to_leave() -> None:
    coordinator = make(make_config(), "a")
    actor, limit_s = Honest(coordinator), int(LIMIT_S)
    actor.live(range(10), is_hung=False)
    actor.live(range(10, 10 + 2 * limit_s), is_hung=True)
    assert coordinator.hung() == []
    actor.live(range(10 + 2 * limit_s, 13 + 2 * limit_s), is_hung=True)
    assert [name for name, _ in coordinator.hung()] == ["a"]


def hanging() -> tuple[Coordinator, dict[int, int]]:
    """An actor whose engine hangs, and the leases that it lists."""
    coordinator = make(make_config(), "a", capacity=4)
    beat = dict.fromkeys(held_by(granted(coordinator), "a"), 5)
    for busy_s in (0.0, 1.1 * LIMIT_S):
        coordinator.heartbeat("a", heartbeat(beat, 20, busy_s=busy_s), 0.0)
    assert coordinator.member("a").is_hung
    coordinator.outbox.clear()
    return coordinator, beat


def test_an_engine_that_hangs_is_watched_across_a_lost_connection() -> None:
    coordinator, beat = hanging()
    first, *others = beat
    coordinator.lose("a", "test")
    coordinator.join_again("a", held=others, finished=[first], now=0.0)
    assert cancelled(coordinator) == [first], "what it has finished tells nothing more"
    assert granted(coordinator) == []
    coordinator.heartbeat("a", heartbeat(dict.fromkeys(others, 5), 20, busy_s=2.1 * LIMIT_S), 0.0)
    assert [name for name, _ in coordinator.hung()] == ["a"]


def test_an_actor_that_drains_while_its_engine_hangs_has_nothing_to_wait_for() -> None:
    coordinator, beat = hanging()
    coordinator.drain("a")
    coordinator.heartbeat("a", heartbeat(beat, 20, busy_s=1.2 * LIMIT_S), 0.0)
    assert cancelled(coordinator) == list(beat)


def test_an_actor_whose_engine_has_got_rid_of_its_requests_gets_others() -> None:
    """It could not show otherwise that it gets on."""
    coordinator, _ = hanging()
    coordinator.heartbeat("a", heartbeat({}, 20, busy_s=1.2 * LIMIT_S), 0.0)
    leases = held_by(granted(coordinator), "a")
    assert len(leases) == 4
    coordinator.heartbeat("a", heartbeat(dict.fromkeys(leases, 0), 20, busy_s=2.1 * LIMIT_S), 0.0)
    assert not coordinator.member("a").is_hung, "its time begins anew"


def test_what_an_engine_was_busy_with_before_its_first_lease_does_not_count_against_it() -> None:
    coordinator = make(make_config())
    join(coordinator, "a")
    for busy_s in (0.0, 5 * LIMIT_S):  # without a token
        coordinator.heartbeat("a", heartbeat({}, 0, busy_s=busy_s), 0.0)
    beat = dict.fromkeys(held_by(granted(coordinator), "a"), 0)
    coordinator.heartbeat("a", heartbeat(beat, 0, busy_s=5 * LIMIT_S + 1.0), 0.0)
    assert not coordinator.drops and not coordinator.member("a").is_hung


def test_what_an_engine_was_busy_with_for_an_earlier_learner_does_not_count_against_it() -> None:
    coordinator = make(make_config(), "a")
    beat = dict.fromkeys(held_by(granted(coordinator), "a"), 0)
    coordinator.heartbeat("a", heartbeat(beat, 0, busy_s=5 * LIMIT_S), 0.0)
    assert not coordinator.drops and not coordinator.member("a").is_hung


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


NO_OTHERS: list[dict[str, Any]] = [{"capacity": 0}, {"is_hung": True}, {"is_slow": True, "tried_s": 0.0}]


@pytest.mark.parametrize("other", [None, *NO_OTHERS])
def test_with_nobody_else_a_stuck_lease_goes_back_to_its_actor(other: dict[str, Any] | None) -> None:
    """One that is there but gets no leases is nobody."""
    coordinator = make(make_config(), "a", capacity=4)
    ids = held_by(granted(coordinator), "a")
    if other is not None:
        join(coordinator, "b")
        disable(coordinator, "b", other)
    for step in range(1, 5):
        beat = {ids[0]: 5} | dict.fromkeys(ids[1:], 10 * step)
        coordinator.heartbeat("a", heartbeat(beat, 100 * step, busy_s=step * LIMIT_S / 2), 0.0)
    assert [name for name, _ in granted(coordinator)] == ["a"]


def test_an_engine_clock_counts_busy_seconds_since_growth() -> None:
    clock = EngineClock()
    assert clock.beat(heartbeat({1: 0}, 0, busy_s=2.0)), "it begins to count"
    assert not clock.beat(heartbeat({1: 0}, 0, busy_s=7.0))
    assert (clock.stalled_s, clock.stuck_s(1)) == (5.0, 0.0)
    assert clock.beat(heartbeat({1: 3}, 3, busy_s=8.0))
    assert not clock.beat(heartbeat({1: 3, 2: 0}, 3, busy_s=9.5))
    assert (clock.stalled_s, clock.stuck_s(1), clock.stuck_s(2), clock.stuck_s(3)) == (1.5, 1.5, 0.0, 0.0)
    assert clock.beat(heartbeat({2: 1}, 4, busy_s=10.0))
    assert (clock.stalled_s, clock.stuck_s(1)) == (0.0, 0.0)
    assert not clock.beat(heartbeat({}, 4, busy_s=20.0)), "it has nothing to sample"
    assert not clock.beat(heartbeat({3: 0}, 4, busy_s=21.0))
    assert clock.stalled_s == 1.0
    clock.beat(heartbeat({}, 4, busy_s=21.5))
    clock.beat(heartbeat({4: 0}, 4, busy_s=23.0))
    assert clock.stalled_s == 2.5, "that a lease was taken from it takes nothing back"
    assert clock.beat(heartbeat({}, 4, busy_s=23.0), is_hung=True)
    assert clock.stalled_s == 0.0


def test_an_engine_that_hangs_is_found_although_its_leases_are_taken_from_it_as_stragglers_first() -> None:
    """It gets others after its rest, and stands still with them too."""
    coordinator = make(make_config(), "a")
    busy_s, lease_ids = 0.0, held_by(granted(coordinator), "a")
    coordinator.heartbeat("a", heartbeat(dict.fromkeys(lease_ids, 0), 0, busy_s=busy_s), 0.0)
    for _ in range(4):
        busy_s += LIMIT_S / 3
        coordinator.heartbeat("a", heartbeat(dict.fromkeys(lease_ids, 0), 0, busy_s=busy_s), 0.0)
        if not coordinator.member("a").is_hung:
            coordinator.heartbeat("a", heartbeat({}, 0, busy_s=busy_s), 0.0)
    assert coordinator.member("a").is_hung and coordinator.drops[DropReason.HUNG] == 4


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


@pytest.mark.parametrize("period_s", [1.0, 2.0, 2.5, 3.0])
def test_an_actor_that_beats_late_is_found_slow_too(period_s: float) -> None:
    """Two heartbeats may be missed; only what is longer does not count. 1 s is what is asked for."""
    coordinator = with_history("a", "b")
    hear(coordinator, 100.0)
    (name, lease), *others = granted(coordinator, now=100.0)
    for other, done in others:
        coordinator.receive(other, group(done.lease_id, [0] * 4), 110.0)
    for number in range(1, 40):
        now = 100.0 + number * period_s
        for actor in coordinator.members():
            coordinator.heard(actor, now)
        coordinator.heartbeat(name, heartbeat({lease.lease_id: 1}, number, busy_s=now), now)
        coordinator.tick(now)
    assert coordinator.drops[DropReason.STRAGGLER] == 1


@pytest.mark.parametrize("period_s", [1.0, 2.5])
def test_a_lease_that_did_not_reach_its_actor_is_missed_however_late_that_beats(period_s: float) -> None:
    coordinator = make(make_config(), "a", capacity=1)
    assert len(granted(coordinator)) == 1
    for number in range(1, 20):
        coordinator.heard("a", number * period_s)
        coordinator.heartbeat("a", heartbeat({}, number), number * period_s)
    assert coordinator.is_lost("a")


def test_the_silence_before_a_lease_is_no_credit_for_it() -> None:
    coordinator = make(make_config(), "a", capacity=1)
    ((_, lease),) = granted(coordinator, now=20.0)
    coordinator.heard("a", 21.0)
    assert coordinator.ledger.slots[lease.lease_id].granted_s == 21.0


def test_a_greeting_ends_a_silence_like_any_other_message() -> None:
    coordinator = make(make_config(), "a", capacity=1)
    ((_, lease),) = granted(coordinator)
    coordinator.lose("a", "test")
    coordinator.join_again("a", held=[lease.lease_id], finished=[], now=4.0)
    assert coordinator.ledger.slots[lease.lease_id].granted_s == 2.0


def test_a_lease_that_keeps_the_batch_waiting_on_a_slow_actor_goes_to_another() -> None:
    coordinator = with_history("a", "b")
    name, lease = slow_lease(coordinator, grown=2, now=131.0)
    assert coordinator.drops == {DropReason.STRAGGLER: 1}
    assert cancelled(coordinator) == [lease.lease_id]
    coordinator.outbox.clear()
    ((other, again),) = granted(coordinator, now=131.0)
    assert other != name and again.prompt_uid == lease.prompt_uid
    assert again.prefix_lengths.tolist() == [2, 1]


def test_prompts_that_failed_and_wait_behind_others_take_no_room_from_a_straggler() -> None:
    coordinator = with_history("a", "b")
    hear(coordinator, 100.0)
    (slow, lease), (holder, failing), *others = granted(coordinator, now=100.0)
    coordinator.fail(holder, LeaseFailed(lease_id=failing.lease_id, reason="a fault"), 100.0)
    coordinator.member("a").account.strikes = coordinator.member("b").account.strikes = 0
    hear(coordinator, 101.0)
    for other, done in [*others, *granted(coordinator, now=101.0)]:
        coordinator.receive(other, group(done.lease_id, [0] * 4), 110.0)
    (other,) = {"a", "b"} - {slow}
    coordinator.member(other).capacity = len(coordinator.member(other).held) + 1
    assert (len(coordinator.ledger.pending), coordinator.ledger.num_due) == (1, 0)
    hear(coordinator, 140.0)
    coordinator.tick(140.0)
    assert coordinator.drops == {DropReason.STRAGGLER: 1} and lease.lease_id in cancelled(coordinator)


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

"""The service over real sockets, with actors that are fakes (tests/fake_actors.py)."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import pytest
import zmq

from common.config import (
    ActorsConfig,
    AlgorithmConfig,
    Config,
    ConfigError,
    LearnerConfig,
    RolloutConfig,
    StalenessConfig,
    TransportConfig,
)
from common.transport import ActorConnection
from common.types import (
    PROTOCOL_VERSION,
    Ack,
    ActorMessage,
    Bye,
    CompletedGroup,
    Hello,
    LearnerMessage,
    Lease,
    MemberId,
    Prompt,
    Pulse,
    Refused,
    SayHello,
    Stop,
    TrajectoryGroup,
    Verdict,
    WeightsPhase,
    WeightsReport,
    Welcome,
)
from learner.rollouts.service import BatchTimeout, LearnerService, MembersWaiting, StillWaiting
from tests.support.fake_actors import FINGERPRINTS, NO_PROBE, FakeActor, group, hello

PROMPTS = [Prompt(uid=f"p{i}", text=str(i), reference="") for i in range(100)]
PUBLICATION = (
    WeightsPhase.PAUSE,
    WeightsPhase.START,
    WeightsPhase.UPDATE,
    WeightsPhase.FINISH,
    WeightsPhase.RESUME,
)
FOREVER_S = 1000.0


def make_config(**staleness: Any) -> Config:
    return Config(
        rollout=RolloutConfig(prompts_per_step=4, group_size=2, max_tokens=8),
        algorithm=AlgorithmConfig(critic_warmup_steps=1),
        staleness=StalenessConfig(**({"max_staleness": 1} | staleness)),
        learner=LearnerConfig(steps=1000),
        actors=ActorsConfig(start_timeout_s=5.0),
        transport=TransportConfig(heartbeat_s=0.1, heartbeat_timeout_s=5.0, grace_s=0.5),
    )


def make_service(config: Config) -> LearnerService:
    return LearnerService(config, PROMPTS, lambda prompt: [1, 2, 3], FINGERPRINTS, [1, 2, 3])


@pytest.fixture
def service() -> Iterator[LearnerService]:
    with make_service(make_config()) as service:
        yield service


def three_batches(service: LearnerService) -> list[str]:
    """The prompts of the warm-up step and of two steps of version 0."""
    uids = []
    for step in range(3):
        uids += [item.lease.prompt_uid for item in service.take_batch(10.0)]
        service.set_version(0, min(step + 1, 1))
    return uids


def publish(
    service: LearnerService, version: int, timeout_s: float = 5.0, members: tuple[str, ...] | None = None
) -> None:
    for phase in PUBLICATION:
        reached = [member for member in service.member_ids() if members is None or member.name in members]
        service.command(phase, version, {member: {} for member in reached}, timeout_s)


def member(service: LearnerService, name: str) -> MemberId:
    return next(member for member in service.member_ids() if member.name == name)


def until(condition: Callable[[], Any], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.005)


def ages(groups: list[TrajectoryGroup], version: int) -> list[int]:
    """Versions between each group's oldest token and now, from the token ids themselves."""
    return [version - int(item.completed.token_ids.min()) for item in groups]


def talk(service: LearnerService, *messages: ActorMessage, num_answers: int = 1) -> list[LearnerMessage]:
    """Says this as a new process, and returns the first answers."""

    async def conversation() -> list[LearnerMessage]:
        async with ActorConnection(service.endpoint, "talker", 16) as connection:
            for message in messages:
                await connection.send(message)
            return [await connection.receive(5.0) for _ in range(num_answers)]

    return asyncio.run(conversation())


def test_a_learner_that_binds_every_interface_advertises_an_address_that_actors_can_reach() -> None:
    everywhere = replace(make_config().transport, host="0.0.0.0", curve=False)
    with make_service(replace(make_config(), transport=everywhere)) as service:
        assert "0.0.0.0" not in service.endpoint
    with make_service(replace(make_config(), transport=replace(everywhere, advertise_host="127.0.0.1"))) as service:
        assert service.endpoint.startswith("tcp://127.0.0.1:")
        with FakeActor(service.endpoint, "a"):
            assert service.wait_for_members(1, 10.0) == ("a",)


# ---- turns, interrupts, a learner after a learner


def test_a_wait_has_turns_and_its_time_out_runs_on_over_them(service: LearnerService) -> None:
    service.turn_s = 0.05
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(StillWaiting):
            service.take_batch(0.4)
    with pytest.raises(BatchTimeout, match=r"waited 0\.4 s for a batch"):
        while True:
            with suppress(StillWaiting):
                service.take_batch(0.4)
    assert 0.4 <= time.monotonic() - began < 5.0


def test_a_wait_that_is_to_begin_anew_has_all_its_time(service: LearnerService) -> None:
    service.turn_s = 0.05
    began = time.monotonic()
    while time.monotonic() < began + 0.6:
        with pytest.raises(StillWaiting):
            service.take_batch(0.4)
        service.begin_anew()


def test_an_interrupt_ends_a_wait_at_once(service: LearnerService) -> None:
    service.turn_s = 60.0
    threading.Timer(0.1, service.interrupt).start()
    with pytest.raises(StillWaiting):
        service.wait_for_members(1, 60.0)


def test_actors_stay_when_the_learner_crashes_and_find_the_next_one_at_the_same_port() -> None:
    config = make_config()
    with ExitStack() as stack:
        with pytest.raises(RuntimeError, match="a tensor"), make_service(config) as service:
            port = int(service.endpoint.rpartition(":")[2])
            actor = stack.enter_context(FakeActor(service.endpoint, "a"))
            service.wait_for_members(1, 10.0)
            raise RuntimeError("a tensor")
        assert actor.received_any(Stop) is None
        with LearnerService(config, PROMPTS, lambda prompt: [1], FINGERPRINTS, [1], former_port=port) as second:
            assert second.endpoint.endswith(f":{port}")
            assert second.wait_for_members(1, 10.0) == ("a",)
            with LearnerService(config, PROMPTS, lambda prompt: [1], FINGERPRINTS, [1], former_port=port) as third:
                assert not third.endpoint.endswith(f":{port}"), "taken: any other one will do"


def test_whoever_takes_part_or_was_heard_of_late_is_company(service: LearnerService) -> None:
    assert not service.has_company()
    with FakeActor(service.endpoint, "a"):
        assert service.has_company()
    until(lambda: not service.members())
    assert service.has_company(), "it may come back"


# ---- actors that do not get on


def test_an_engine_that_hangs_while_its_process_heartbeats_does_not_stop_the_run() -> None:
    config = make_config()
    transport = replace(config.transport, lease_timeout_s=0.5, straggler_factor=1000.0)
    with make_service(replace(config, transport=transport)) as service:
        good = FakeActor(service.endpoint, "a", delay_s=lambda lease: 0.3)
        with good, FakeActor(service.endpoint, "hung", is_hung=True) as hung:
            service.wait_for_members(2, 10.0)
            assert len(set(three_batches(service))) == 12
            assert service.stats()["dropped/hung"] > 0
            until(lambda: hung.received_any(Refused) is not None)
            refused = hung.received_any(Refused)
            assert refused is not None and refused.fatal and "has drawn no token in" in refused.reason


def test_an_actor_that_is_much_slower_keeps_no_batch_waiting() -> None:
    with make_service(make_config()) as service:
        slow = FakeActor(service.endpoint, "slow", delay_s=lambda lease: FOREVER_S)
        with FakeActor(service.endpoint, "a", delay_s=lambda lease: 0.02), slow:
            service.wait_for_members(2, 10.0)
            assert len(set(three_batches(service))) == 12
            assert service.stats()["dropped/straggler"] > 0


# ---- a run


def spoilt(lease: Lease, version: int) -> CompletedGroup:
    sampled = group(lease.lease_id, [version], lease.num_samples)
    return replace(sampled, verdicts=(Verdict.ERROR,) * lease.num_samples, verifier_error="raised KeyError: 'x'")


def test_a_verifier_that_fails_on_everything_ends_the_run_before_its_first_batch(service: LearnerService) -> None:
    with FakeActor(service.endpoint, "a", complete=spoilt):
        with pytest.raises(ConfigError, match=r"chain_sum:verify failed on .* \(it raised KeyError: 'x'\)"):
            service.take_batch(10.0)
        with pytest.raises(ConfigError, match="failed on"):
            service.wait_evaluation(10.0)


def test_a_batch_that_does_not_come_says_that_the_filter_dropped_everything() -> None:
    config = make_config()
    dropping = replace(config.algorithm, dynamic_sampling=True, critic_warmup_steps=0, max_uninformative=10**9)
    with make_service(replace(config, algorithm=dropping)) as service:
        wrong = FakeActor(service.endpoint, "a", num_correct=lambda lease: 0, delay_s=lambda lease: 0.01)
        with (
            wrong,
            pytest.raises(BatchTimeout, match=r"dynamic_sampling dropped \d+ groups \(\d+ with all resp"),
        ):
            service.take_batch(2.0)


def test_a_run_with_skewed_actors_trains_every_lease_once_in_order_and_within_the_bound() -> None:
    config = make_config()
    with make_service(config) as service, ExitStack() as actors:
        for name, delay_s in (("fast", 0.0), ("slow", 0.02)):
            actors.enter_context(FakeActor(service.endpoint, name, delay_s=lambda lease, s=delay_s: s))
        service.wait_for_members(2, 10.0)
        lease_ids, staleness, version = [], [], 0
        for step in range(25):
            groups = service.take_batch(10.0)
            lease_ids += [item.lease.lease_id for item in groups]
            staleness += ages(groups, version)
            if step >= config.algorithm.critic_warmup_steps:
                version += 1
                publish(service, version)
            service.set_version(version, step + 1)
        stats = service.stats()
    assert lease_ids == list(range(100))
    assert 0 < max(staleness) <= config.staleness.max_staleness
    assert stats["trained_groups"] == 100
    assert sum(count for name, count in stats.items() if name.startswith("dropped/")) == 0


def test_staleness_zero_is_on_policy() -> None:
    with make_service(make_config(max_staleness=0)) as service, FakeActor(service.endpoint, "a", capacity=9):
        service.wait_for_members(1, 10.0)
        for version in range(5):
            step = version + 1
            if version == 0:
                assert ages(service.take_batch(10.0), 0) == [0] * 4  # the warm-up's
            assert ages(service.take_batch(10.0), version) == [0] * 4
            publish(service, version + 1)
            service.set_version(version + 1, step + 1)


def test_with_exact_staleness_every_batch_is_exactly_that_old() -> None:
    with make_service(make_config(max_staleness=2, exact=True)) as service, FakeActor(service.endpoint, "a", 5):
        service.wait_for_members(1, 10.0)
        service.take_batch(10.0)  # the warm-up's
        service.set_version(0, 1)
        for version in range(6):
            expected = min(version, 2)
            assert ages(service.take_batch(10.0), version) == [expected] * 4
            service.wait_window_sampled(10.0)
            publish(service, version + 1)
            service.set_version(version + 1, version + 2)


def test_a_killed_actor_costs_no_prompt(service: LearnerService) -> None:
    victim = FakeActor(service.endpoint, "victim", delay_s=lambda lease: FOREVER_S)
    with victim, FakeActor(service.endpoint, "survivor"):
        until(lambda: victim.leases() and service.stats()["buffered_groups"] > 0)
        held = {lease.prompt_uid for lease in victim.leases()}
        victim.kill()
        uids = set(three_batches(service))
        assert held <= uids
        assert service.members() == ("survivor",)
        stats = service.stats()
        assert stats["dropped/actor_lost"] + stats["dropped/straggler"] == len(held), "whatever is noticed first"


def test_a_closed_connection_is_noticed_long_before_the_silence_time_out() -> None:
    config = make_config()
    config = replace(config, transport=replace(config.transport, heartbeat_timeout_s=60.0))
    with make_service(config) as service, FakeActor(service.endpoint, "a") as actor:
        service.wait_for_members(1, 10.0)
        actor.kill()
        until(lambda: not service.members(), timeout_s=3.0)


def test_an_actor_that_is_silent_for_a_while_comes_back() -> None:
    config = make_config()
    config = replace(config, transport=replace(config.transport, heartbeat_timeout_s=0.5))
    with (
        make_service(config) as service,
        FakeActor(service.endpoint, "a", delay_s=lambda lease: 0.05, heartbeat_s=FOREVER_S) as actor,
    ):
        service.wait_for_members(1, 10.0)
        until(lambda: service.stats()["buffered_groups"] == service.stats()["window_groups"])
        until(lambda: not service.members())
        assert service.stats()["buffered_groups"] == 8, "what has arrived stays"
        actor.say(group(0, [0]))  # any message is a sign of life, and the answer a request to greet
        until(lambda: service.members() == ("a",))
        assert actor.received_any(SayHello) == SayHello(reason="it was lost from sight")


# ---- who takes part


def test_a_late_joiner_waits_for_the_current_weights(service: LearnerService) -> None:
    with FakeActor(service.endpoint, "first"):
        service.wait_for_members(1, 10.0)
        publish(service, 1)
        service.set_version(1, 2)
        with FakeActor(service.endpoint, "second") as late:
            service.wait_for_members(2, 10.0)
            assert [member.name for member in service.waiting_ids()] == ["second"]
            with pytest.raises(MembersWaiting, match="second"):
                service.take_batch(10.0)
            with pytest.raises(MembersWaiting):
                service.wait_window_sampled(10.0)
            assert not late.leases()
            publish(service, 1)
            assert service.waiting_ids() == ()
            publish(service, 2)
            service.set_version(2, 3)
            until(late.leases)


def test_joiners_that_come_one_after_another_do_not_keep_a_batch_that_is_ready(service: LearnerService) -> None:
    with FakeActor(service.endpoint, "first"):
        service.wait_for_members(1, 10.0)
        publish(service, 1)
        service.set_version(1, 2)
        until(lambda: service.stats()["buffered_groups"] == service.stats()["window_groups"])
        with FakeActor(service.endpoint, "second"):
            service.wait_for_members(2, 10.0)
            for _ in range(2):  # also when it could not be served
                with pytest.raises(MembersWaiting):
                    service.take_batch(10.0)
            with FakeActor(service.endpoint, "third"):
                service.wait_for_members(3, 10.0)
                publish(service, 1, members=("second",))
                assert [member.name for member in service.waiting_ids()] == ["third"], "it has come meanwhile"
                service.take_batch(10.0)
                with pytest.raises(MembersWaiting, match="third"):
                    service.wait_window_sampled(10.0)


def test_a_batch_that_is_ready_is_taken_when_its_time_is_over_though_a_joiner_could_not_be_served(
    service: LearnerService,
) -> None:
    with FakeActor(service.endpoint, "first"), FakeActor(service.endpoint, "second"):
        service.wait_for_members(2, 10.0)
        publish(service, 1, members=("first",))
        service.set_version(1, 2)
        until(lambda: service.stats()["buffered_groups"] == service.stats()["window_groups"])
        began = time.monotonic()
        with pytest.raises(MembersWaiting, match="second"):
            service.take_batch(0.5)
        until(lambda: time.monotonic() >= began + 0.5)
        assert len(service.take_batch(0.5)) == 4


def test_joiners_that_come_again_and_again_do_not_put_the_time_out_off(service: LearnerService) -> None:
    service.turn_s = 0.05
    with FakeActor(service.endpoint, "first", is_hung=True):
        until(lambda: service.members() == ("first",))
        publish(service, 1)
        service.set_version(1, 2)
        began = time.monotonic()
        with pytest.raises(BatchTimeout, match=r"waited 1\.5 s for a batch"):
            for number in range(1000):
                assert time.monotonic() < began + 30.0, "it waits for ever"
                with FakeActor(service.endpoint, f"joiner-{number}", is_hung=True):
                    until(lambda: len(service.members()) == 2)
                    with pytest.raises(MembersWaiting):
                        service.take_batch(1.5)
                    publish(service, 1, members=(f"joiner-{number}",))
                until(lambda: service.members() == ("first",))
        assert time.monotonic() >= began + 1.5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"protocol_version": 99}, f"it speaks protocol version 99, the learner {PROTOCOL_VERSION}"),
        ({"model_fingerprint": "other"}, "its model has another architecture; give it the learner's model.path"),
        ({"tokenizer_fingerprint": "other"}, "its tokenizer is another one; give it the learner's model.path"),
        ({"capacity": 0}, "its capacity is 0; set actors.groups_in_flight to at least 1"),
        ({"name": "../x"}, "its name must be 1 to 100 letters, digits, or any of _ . : -"),
    ],
)
def test_an_actor_that_does_not_fit_is_told_why_and_to_leave(
    service: LearnerService, changes: dict[str, Any], reason: str
) -> None:
    misfit: Hello = replace(hello("a"), **changes)
    assert talk(service, misfit) == [Refused(reason=reason, fatal=True)]
    assert service.members() == ()


def test_a_welcome_has_the_heartbeats_and_the_probe(service: LearnerService) -> None:
    (welcome,) = talk(service, hello("a"))
    assert isinstance(welcome, Welcome)
    assert (welcome.heartbeat_s, welcome.timeout_s) == (0.1, 5.0)
    assert (welcome.run_id, welcome.incarnation, welcome.number) == ("", 0, 1)
    assert welcome.settings["reward.correct"] == 1.0
    assert welcome.probe_token_ids.tolist() == [1, 2, 3]


NAME_TAKEN = "another actor named a takes part: give this one another --name, or stop that one"


def test_a_live_name_is_refused(service: LearnerService) -> None:
    with FakeActor(service.endpoint, "a") as old:
        service.wait_for_members(1, 10.0)
        assert talk(service, hello("a")) == [Refused(reason=NAME_TAKEN, fatal=True)]
        assert len(service.take_batch(10.0)) == 4
        assert old.received_any(Refused) is None


def test_a_restarted_actor_has_its_name_at_once(service: LearnerService) -> None:
    """Whether or not the learner has noticed the end of its first process, and whether or not that was ready."""
    for _ in range(3):
        with FakeActor(service.endpoint, "a", delay_s=lambda lease: FOREVER_S) as old:
            until(old.leases)
        started = time.monotonic()
        assert isinstance(talk(service, hello("a"))[0], Welcome)
        assert time.monotonic() - started < 1.0
    with FakeActor(service.endpoint, "a"):
        assert len(service.take_batch(10.0)) == 4


def test_the_name_of_an_actor_that_does_not_answer_is_taken_over_after_the_grace_period(
    service: LearnerService,
) -> None:
    with FakeActor(service.endpoint, "a", delay_s=lambda lease: FOREVER_S, heartbeat_s=FOREVER_S) as old:
        until(lambda: service.stats()["in_flight_groups"] == 4)
        with FakeActor(service.endpoint, "a") as new:
            old.join()
            refusal = old.received_any(Refused)
            assert refusal is not None and "another process has its name" in refusal.reason
            until(lambda: service.members() == ("a",))
            assert len(service.take_batch(10.0)) == 4
            assert new.leases()


def test_an_actor_whose_engine_starts_keeps_its_name_without_a_word(service: LearnerService) -> None:
    endpoint = service.endpoint

    async def start_and_wait() -> None:
        async with ActorConnection(endpoint, "a", 16) as connection:
            await connection.send(hello("a"))
            assert isinstance(await connection.receive(5.0), Welcome)
            other = hello("a", process="another")
            assert await asyncio.to_thread(talk, service, other) == [Refused(reason=NAME_TAKEN, fatal=True)]

    asyncio.run(start_and_wait())


def test_a_stranger_is_asked_to_greet_and_its_group_is_not_kept(service: LearnerService) -> None:
    answers = talk(service, group(5, [0]), num_answers=2)
    assert answers[0] == Ack(lease_id=5)
    assert answers[1] == SayHello(reason="the learner does not know it")
    assert service.stats()["dropped/unknown_lease"] == 1


def test_garbage_is_counted_and_harms_nobody(service: LearnerService) -> None:
    with FakeActor(service.endpoint, "a"), zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.rcvtimeo = 5000
        dealer.connect(service.endpoint)
        for frames in ([b""], [b"\xc1", b"x"], [b"\x94\xa3Ack\x02\x81\xa8lease_id\x07\x90"]):
            dealer.send_multipart(frames)
            assert b"malformed message" in dealer.recv()
        assert service.stats()["dropped/malformed"] == 3
        assert len(service.take_batch(10.0)) == 4


def test_a_member_that_sends_garbage_is_dismissed(service: LearnerService) -> None:
    with FakeActor(service.endpoint, "a", delay_s=lambda lease: FOREVER_S) as actor:
        service.wait_for_members(1, 10.0)
        actor.say(Ack(lease_id=1))
        actor.join()
        refusal = actor.received_any(Refused)
        assert refusal is not None and refusal.fatal and "malformed" in refusal.reason
        assert service.members() == ()
        assert service.stats()["pending_prompts"] == len(actor.leases())


# ---- commands


def test_a_command_leaves_at_once(service: LearnerService) -> None:
    with FakeActor(service.endpoint, "a"):
        service.wait_for_members(1, 10.0)
        times = []
        for _ in range(20):
            started = time.monotonic()
            assert service.command(WeightsPhase.PAUSE, 1, {member(service, "a"): {}}, 5.0)
            times.append(time.monotonic() - started)
        assert sorted(times)[10] < 0.1, "the thread sleeps up to 0.25 s when nothing wakes it"


def test_commands_reach_those_named_with_their_payload(service: LearnerService) -> None:
    with FakeActor(service.endpoint, "a") as first, FakeActor(service.endpoint, "b") as second:
        service.wait_for_members(2, 10.0)
        named = member(service, "b")
        assert list(service.command(WeightsPhase.INIT, 3, {named: {"port": 1, "names": ["x"]}}, 5.0)) == [named]
        assert [c.payload for c in second.commands()] == [{"port": 1, "names": ["x"]}]
        assert not first.commands()


def test_who_does_not_answer_in_time_is_not_in_the_result_and_who_fails_is(service: LearnerService) -> None:
    deaf = FakeActor(service.endpoint, "deaf", deaf_to=frozenset({WeightsPhase.START}))
    bad = FakeActor(service.endpoint, "bad", fails={WeightsPhase.START: "out of memory"})
    with deaf, bad, FakeActor(service.endpoint, "good"):
        everybody = service.member_ids() if service.wait_for_members(3, 10.0) else ()
        reports = service.command(WeightsPhase.START, 1, {member: {} for member in everybody}, 0.5)
        assert {member.name: report.error for member, report in reports.items()} == {
            "bad": "out of memory",
            "good": None,
        }
        assert service.member_ids() == everybody, "what that means for them is publication's to say"
        assert service.waiting_ids() == everybody, "no version is whole from START to FINISH"


def test_who_is_lost_is_not_waited_for(service: LearnerService) -> None:
    dead = FakeActor(service.endpoint, "dead", deaf_to=frozenset({WeightsPhase.UPDATE}))
    with dead, FakeActor(service.endpoint, "peer"):
        service.wait_for_members(2, 10.0)
        threading.Timer(0.1, dead.kill).start()
        started = time.monotonic()
        reports = service.command(WeightsPhase.UPDATE, 1, {member: {} for member in service.member_ids()}, 30.0)
        assert time.monotonic() - started < 5.0
        assert [member.name for member in reports] == ["peer"]
        assert [member.name for member in service.lost_ids()] == ["dead"]
        service.command(WeightsPhase.FINISH, 1, {member: {} for member in reports}, 5.0)
        assert service.lost_ids() == ()


def test_rank_0_takes_part_while_the_actors_do(service: LearnerService) -> None:
    with FakeActor(service.endpoint, "a") as actor:
        service.wait_for_members(1, 10.0)
        payloads: dict[MemberId, Any] = {member(service, "a"): {}}
        arrived = []
        service.command(WeightsPhase.UPDATE, 1, payloads, 5.0, lambda: arrived.append(until(actor.commands)))
        assert arrived
        with pytest.raises(ZeroDivisionError):
            service.command(WeightsPhase.UPDATE, 1, payloads, 5.0, lambda: print(1 / 0))
        assert service.command(WeightsPhase.FINISH, 1, payloads, 5.0)


def test_a_dismissed_actor_leaves_and_is_told_why(service: LearnerService) -> None:
    with FakeActor(service.endpoint, "a") as actor, FakeActor(service.endpoint, "good"):
        service.wait_for_members(2, 10.0)
        service.dismiss(member(service, "a"), "it did not answer")
        actor.join()
        assert actor.received_any(Refused) == Refused(reason="it did not answer", fatal=True)
        assert service.members() == ("good",)


def test_a_restarted_actor_of_the_same_name_is_another_member(service: LearnerService) -> None:
    with FakeActor(service.endpoint, "a"):
        service.wait_for_members(1, 10.0)
        before = member(service, "a")
    with FakeActor(service.endpoint, "a") as restarted:
        until(lambda: service.member_ids() not in ((), (before,)))
        service.dismiss(before, "its weights were wrong")
        assert service.command(WeightsPhase.INIT, 1, {before: {}}, 30.0) == {}
        assert service.members() == ("a",) and not restarted.commands()


def test_a_report_of_an_earlier_command_of_the_same_phase_and_version_does_not_count(service: LearnerService) -> None:
    """Publication repeats what failed, and a phase for every bucket."""
    with FakeActor(service.endpoint, "a", deaf_to=frozenset({WeightsPhase.UPDATE})) as actor:
        service.wait_for_members(1, 10.0)
        payloads: dict[MemberId, Any] = {member(service, "a"): {}}
        assert service.command(WeightsPhase.UPDATE, 1, payloads, 0.05) == {}
        late = WeightsReport(
            command_id=actor.commands()[0].command_id,
            phase=WeightsPhase.UPDATE,
            version=1,
            error=None,
            is_shared=False,
            probe_logprobs=NO_PROBE,
        )
        assert service.command(WeightsPhase.UPDATE, 1, payloads, 0.3, lambda: actor.say(late)) == {}


def test_a_command_to_an_actor_that_is_not_there_returns_at_once(service: LearnerService) -> None:
    assert service.command(WeightsPhase.PAUSE, 1, {MemberId("ghost", 1): {}}, 60.0) == {}


def test_a_quarantined_actor_leaves_with_its_groups(service: LearnerService) -> None:
    with FakeActor(service.endpoint, "a") as actor:
        service.wait_for_members(1, 10.0)
        until(lambda: service.stats()["buffered_groups"] > 0)
        service.quarantine(member(service, "a"), "its probe differs", version=0)
        actor.join()
        assert actor.received_any(Refused) == Refused(reason="its probe differs", fatal=True)
        assert service.stats()["buffered_groups"] == 0
        assert service.members() == ()


# ---- evaluation


def test_an_evaluation_runs_beside_training_and_survives_its_actor(service: LearnerService) -> None:
    heldout = [Prompt(uid=f"h{i}", text="", reference="") for i in range(10)]
    victim = FakeActor(service.endpoint, "victim", delay_s=lambda lease: FOREVER_S)
    with victim, FakeActor(service.endpoint, "good", num_correct=lambda lease: 3):
        service.wait_for_members(2, 10.0)
        service.evaluate(heldout, 4, 1.0, version=0)
        until(victim.leases)
        victim.kill()
        result = service.wait_evaluation(10.0)
        assert (result.accuracy, result.num_samples, result.version) == (0.75, 40, 0)
        assert service.poll_evaluation() is None
        assert len(service.take_batch(10.0)) == 4


# ---- time-outs and failures


def test_a_batch_that_does_not_come_says_who_holds_what(service: LearnerService) -> None:
    with pytest.raises(BatchTimeout, match=r"waited 0\.05 s for a batch of 4 groups: .*no actor is connected"):
        service.take_batch(0.05)
    with FakeActor(service.endpoint, "slow", 3, delay_s=lambda lease: FOREVER_S):
        service.wait_for_members(1, 10.0)
        until(lambda: service.stats()["in_flight_groups"] == 3)
        with pytest.raises(BatchTimeout, match=r"slow \(sampling, version 0, .*\) holds the leases \[0, 1, 2\]"):
            service.take_batch(0.05)


def test_other_waits_time_out_with_the_same_detail(service: LearnerService) -> None:
    with pytest.raises(TimeoutError, match=r"2 ready actor\(s\): .*no actor is connected"):
        service.wait_for_members(2, 0.05)
    service.evaluate(PROMPTS[:1], 1, 1.0, version=0)
    with pytest.raises(
        TimeoutError, match=r"the evaluation: .*; 0 of 1 prompts of the evaluation of version 0 .*no actor"
    ):
        service.wait_evaluation(0.05)


def test_an_evaluation_may_take_longer_than_the_time_out_as_long_as_it_gets_on(service: LearnerService) -> None:
    with FakeActor(service.endpoint, "a", capacity=1, delay_s=lambda _: 0.2):
        service.wait_for_members(1, 10.0)
        service.evaluate(PROMPTS[:8], 1, 1.0, version=0)
        started = time.monotonic()
        assert service.wait_evaluation(1.0).num_prompts == 8
    assert time.monotonic() - started > 1.2


def test_a_failure_in_the_thread_reaches_whoever_waits_and_every_later_call() -> None:
    def tokenize(prompt: Prompt) -> list[int]:
        raise KeyError("no such token")

    service = LearnerService(make_config(), PROMPTS, tokenize, FINGERPRINTS, [1])
    with service, FakeActor(service.endpoint, "a"):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="the service thread failed: KeyError"):
                service.take_batch(30.0)
        with pytest.raises(RuntimeError, match="the service thread failed"):
            service.command(WeightsPhase.PAUSE, 1, {MemberId("a", 1): {}}, 30.0)
        assert service.stats()["trained_groups"] == 0  # counters can still be read


def test_a_data_row_that_is_no_json_is_one_sentence() -> None:
    prompts = [replace(PROMPTS[0], row={"asked": {"on": b"bytes"}})]
    service = LearnerService(make_config(), prompts, lambda prompt: [1], FINGERPRINTS, [1])
    sentence = r"Lease\.row\['asked'\]\['on'\] holds b'bytes', which is not a JSON value"
    with service, FakeActor(service.endpoint, "a"), pytest.raises(ConfigError, match=sentence):
        service.take_batch(30.0)


def test_a_lease_that_no_actor_would_take_is_one_sentence() -> None:
    """An actor's end of the connection would refuse it, and so would that of everybody who gets it next."""
    prompts = [replace(PROMPTS[0], row={"tests": "x" * (1 << 20)})]
    config = make_config()
    config = replace(config, transport=replace(config.transport, max_message_mb=1))
    service = LearnerService(config, prompts, lambda prompt: [1], FINGERPRINTS, [1])
    sentence = r"cannot travel: Lease of 10\d+ bytes: transport\.max_message_mb=1 holds 1048576"
    with service, FakeActor(service.endpoint, "a"), pytest.raises(ConfigError, match=sentence):
        service.take_batch(30.0)


def test_a_port_in_use_ends_before_anything_started(service: LearnerService) -> None:
    config = make_config()
    port = int(service.endpoint.rsplit(":", 1)[1])
    taken = replace(config, transport=replace(config.transport, port=port))
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: the port is in use"), make_service(taken):
        pass


# ---- the end


def test_stop_reaches_everybody_and_waits_for_their_byes(service: LearnerService) -> None:
    with FakeActor(service.endpoint, "a") as first, FakeActor(service.endpoint, "b") as second:
        until(lambda: service.stats()["generated_tokens"] == 14)
        started = time.monotonic()
        service.stop("enough")
        assert time.monotonic() - started < 3.0
        for actor in (first, second):
            actor.join()
            assert actor.received_any(Stop) == Stop(reason="enough")
            assert actor.sent[-1] == Bye(error=None)
        service.stop("again")  # does nothing
        assert service.stats()["generated_tokens"] == 14
        with pytest.raises(RuntimeError, match="not running"):
            service.members()


def test_stop_does_not_wait_longer_than_its_deadline(caplog: pytest.LogCaptureFixture) -> None:
    with make_service(make_config()) as service:
        assert isinstance(talk(service, hello("mute"))[0], Welcome)
        started = time.monotonic()
        service.stop("enough", timeout_s=0.3)
        assert time.monotonic() - started < 2.0


def test_an_actor_that_greets_during_the_stop_is_stopped(service: LearnerService) -> None:
    with FakeActor(service.endpoint, "slow", deaf_to_stop=True):
        service.wait_for_members(1, 10.0)
        stopping = threading.Thread(target=service.stop, args=("enough", 1.0))
        endpoint = service.endpoint
        stopping.start()
        time.sleep(0.1)

        async def greet() -> LearnerMessage:
            async with ActorConnection(endpoint, "late", 16) as connection:
                await connection.send(hello("late"))
                return await connection.receive(5.0)

        assert asyncio.run(greet()) == Stop(reason="enough")
        stopping.join(10.0)
        assert not stopping.is_alive()


def test_a_checkpoint_goes_on_in_another_service() -> None:
    with make_service(make_config()) as service, FakeActor(service.endpoint, "a"):
        first = [item.lease.prompt_uid for item in service.take_batch(10.0)]
        service.set_version(0, 1)
        kept = service.snapshot()
    service = make_service(make_config())
    service.restore(kept)
    with service, FakeActor(service.endpoint, "a"):
        rest = [item.lease.prompt_uid for _ in range(2) for item in service.take_batch(10.0)]
    assert len(set(first + rest)) == 12


def test_heartbeats_are_answered_with_the_version(service: LearnerService) -> None:
    with FakeActor(service.endpoint, "a") as actor:
        service.wait_for_members(1, 10.0)
        publish(service, 1)
        service.set_version(1, 2)
        until(lambda: Pulse(version=1) in actor.received)
        stats = service.stats()
        assert (stats["generated_tokens"], stats["busy_s"], stats["uptime_s"]) == (7, 0.5, 1.0)

"""The reception without sockets: whatever actors say in whatever order, it answers and goes on."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.config import AlgorithmConfig, Config, LearnerConfig, RolloutConfig
from common.types import (
    Bye,
    Cancel,
    Draining,
    DropReason,
    LearnerMessage,
    Lease,
    LeaseFailed,
    MemberId,
    Prompt,
    Pulse,
    Ready,
    Refused,
    SayHello,
    Stop,
    Watch,
    WeightsPhase,
    WeightsReport,
    Welcome,
)
from common.wire import WireError, decode, encode
from learner.rollouts.commands import Command
from learner.rollouts.coordinator import Coordinator
from learner.rollouts.evaluation import Evaluation
from learner.rollouts.prompts import PromptStream
from learner.rollouts.reception import LOOK_S, OWN_DATA, Reception
from tests.support.fake_actors import FINGERPRINTS, NO_PROBE, group, heartbeat, hello, ids, progress

PROMPTS = [Prompt(uid=f"p{i}", text="", reference="") for i in range(5)]
IDENTITIES = (b"1", b"2", b"3")


def welcome(run_id: str, incarnation: int, number: int) -> Welcome:
    return Welcome(
        run_id=run_id,
        incarnation=incarnation,
        number=number,
        settings={},
        heartbeat_s=1.0,
        timeout_s=1.0,
        probe_token_ids=ids(),
    )


def test_there_are_no_more_members_than_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has a key can make up names without an end. Lost members keep their places until they are forgotten."""
    monkeypatch.setattr("learner.rollouts.reception.MAX_MEMBERS", 3)
    config = Config()
    coordinator = Coordinator(config, PromptStream(PROMPTS, 0), lambda prompt: [1])
    reception = Reception(config, coordinator, FINGERPRINTS, [1])
    for number in range(20):
        reception.handle(f"{number}".encode(), hello(f"a{number}"), 0.0)
    answers = reception.outgoing()
    assert [identity for identity, answer in answers if isinstance(answer, Welcome)] == [b"0", b"1", b"2"]
    refused = [(identity, answer) for identity, answer in answers if isinstance(answer, Refused)]
    assert [identity for identity, _ in refused] == [f"{number}".encode() for number in range(3, 20)]
    assert {answer for _, answer in refused} == {
        Refused(reason="3 actors take part already, lost ones included, and that is the most there may be", fatal=True)
    }
    assert reception.num_refused == 17
    reception.undeliverable(b"0")
    reception.handle(b"x", hello("x"), 1.0)
    assert reception.num_refused == 18, "a lost one may come back"
    reception.handle(b"y", hello("a0", process="another"), 1.0)
    reception.handle(b"1", Bye(error=None), 1.0)
    reception.handle(b"z", hello("x"), 1.0)
    assert reception.names == ("a0", "a2", "x")


def test_a_group_that_nobody_wants_any_more_is_counted_when_it_comes_and_not_when_it_is_announced() -> None:
    """A member sends what it keeps again as soon as it is welcomed back."""
    config = Config()
    coordinator = Coordinator(config, PromptStream(PROMPTS, 0), lambda prompt: [1])
    reception = Reception(config, coordinator, FINGERPRINTS, [1])
    reception.handle(b"1", hello("a", 1), 0.0)
    reception.handle(b"1", Ready(version=0, probe_logprobs=NO_PROBE), 0.0)
    coordinator.dispatch(0.0)
    messages = [message for _, message in reception.outgoing()]
    (last,) = (message for message in messages if isinstance(message, Welcome))
    (lease_id,) = (message.lease_id for message in messages if isinstance(message, Lease))
    reception.undeliverable(b"1")
    reception.tick(10.0)
    reception.handle(b"2", hello("a", 1, welcome=last, finished=[lease_id]), 11.0)
    reception.handle(b"2", group(lease_id, [0], config.rollout.group_size), 11.0)
    assert coordinator.drops == {DropReason.ACTOR_LOST: 1, DropReason.UNKNOWN_LEASE: 1}


def test_groups_for_an_earlier_learner_are_counted_once_however_often_their_actor_greets() -> None:
    config = Config()
    coordinator = Coordinator(config, PromptStream(PROMPTS, 0), lambda prompt: [1])
    reception = Reception(config, coordinator, FINGERPRINTS, [1], run_id="run", incarnation=2)
    for number in range(4):
        greeting = hello("a", 1, welcome=welcome("run", 1, 7), finished=[5, 6, 7])
        reception.handle(str(number).encode(), greeting, float(number))
    assert coordinator.drops == {DropReason.UNKNOWN_LEASE: 3}


small, counts = st.integers(-1, 6), st.integers(0, 6)
phases = st.sampled_from(WeightsPhase)
sayings: st.SearchStrategy[Any] = st.one_of(
    st.builds(
        hello,
        st.sampled_from("ab"),
        st.integers(0, 3),
        welcome=st.none() | st.builds(welcome, st.sampled_from(["run", "other"]), st.integers(0, 1), small),
        held=st.lists(small, max_size=3),
        finished=st.lists(small, max_size=3),
        process=st.sampled_from("xy"),
    ),
    st.builds(Ready, version=small, probe_logprobs=st.just(NO_PROBE)),
    st.builds(group, small, st.lists(small, min_size=1, max_size=9), st.integers(1, 3), st.integers(0, 3)),
    st.builds(heartbeat, st.dictionaries(small, counts), counts, st.sampled_from([0.1, 500.0]), st.just(1.0)),
    st.builds(
        lambda lease_id, starts, new, ended: progress(lease_id, starts[: len(new)], new, ended),
        small,
        st.lists(st.integers(0, 6), min_size=3, max_size=3),
        st.lists(st.lists(small, max_size=9), min_size=1, max_size=3),
        st.sampled_from([(), (0,), (0, 1)]),
    ),
    st.builds(LeaseFailed, lease_id=small, reason=st.just("no")),
    st.builds(
        WeightsReport,
        command_id=small,
        phase=phases,
        version=small,
        error=st.none() | st.just("no"),
        is_shared=st.booleans(),
        probe_logprobs=st.just(NO_PROBE),
    ),
    st.builds(Draining),
    st.builds(Watch),
    st.builds(Bye, error=st.none()),
    st.builds(WireError, st.just("garbage")),
)
events = st.one_of(
    st.tuples(st.just("say"), st.sampled_from(IDENTITIES), sayings),
    st.tuples(st.sampled_from(["wait", "step", "evaluate"]), st.none(), st.none()),
    st.tuples(st.just("command"), phases, small),
    st.tuples(st.just("dismiss"), st.sampled_from("ab"), st.none()),
    st.tuples(st.just("distrust"), st.sampled_from("ab"), st.integers(1, 3)),
    st.tuples(st.just("disconnect"), st.sampled_from(IDENTITIES), st.none()),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(events, max_size=60))
def test_any_order_of_events_is_survived(history: list[tuple[str, Any, Any]]) -> None:
    config = Config(
        rollout=RolloutConfig(prompts_per_step=2, group_size=2, max_tokens=8),
        algorithm=AlgorithmConfig(critic_warmup_steps=1, dynamic_sampling=True),
        learner=LearnerConfig(steps=100),
    )
    coordinator = Coordinator(config, PromptStream(PROMPTS, 0), lambda prompt: [1])
    reception = Reception(config, coordinator, FINGERPRINTS, [1, 2], run_id="run")
    now, version = 0.0, 0
    commands: list[Command] = []
    for kind, subject, detail in history:
        now += 0.1
        match kind:
            case "say":
                reception.handle(subject, detail, now)
            case "wait":
                now += 20.0
            case "step":
                if coordinator.ledger.take_batch() is not None:
                    version += 1
                    coordinator.set_version(version, version)
            case "evaluate":
                if coordinator.ledger.poll_evaluation() is None and coordinator.ledger.evaluation is None:
                    coordinator.ledger.evaluate(Evaluation(PROMPTS[:2], 2, 1.0, version))
            case "command":
                for command in commands:
                    reception.end(command)
                everybody = [*coordinator.member_ids(), MemberId("a", 1), MemberId("b", 2)]
                commands = [reception.begin(subject, detail, {member: {} for member in everybody})]
            case "dismiss":
                reception.dismiss(subject, "test")
            case "distrust":
                reception.quarantine(MemberId(subject, detail), "test", version)
            case "disconnect":
                reception.undeliverable(subject)
        reception.tick(now)
        coordinator.dispatch(now)
        reception.note_losses()
        assert {identity for identity, _ in reception.outgoing()} <= set(IDENTITIES)
        assert set(coordinator.members()) <= set(reception.names)
        assert reception._names == {identity: name for name, identity in reception._identities.items()}
        assert reception._secrets.keys() == reception._identities.keys()
    reception.begin_stop("over")
    assert all(isinstance(message, Stop) for _, message in reception.outgoing())
    for identity in IDENTITIES:
        reception.handle(identity, Bye(error=None), now)
    assert reception.names == ()


# ---- the probe that comes with Ready

RIGHT, WRONG = np.array([-1.0], np.float32), np.array([-2.0], np.float32)
OTHER_MODEL = Refused(reason="its model is another one", fatal=True)


def judge(probe: Any) -> str | None:
    return None if probe[0] == RIGHT[0] else OTHER_MODEL.reason


def make_reception() -> tuple[Coordinator, Reception]:
    config = Config(rollout=RolloutConfig(prompts_per_step=2, group_size=2, max_tokens=8))
    coordinator = Coordinator(config, PromptStream(PROMPTS, 0), lambda prompt: [1])
    return coordinator, Reception(config, coordinator, FINGERPRINTS, [1, 2])


def become_ready(reception: Reception, **probes: Any) -> None:
    """By name, which is the identity too."""
    for name, probe in probes.items():
        reception.handle(name.encode(), hello(name), 0.0)
        reception.handle(name.encode(), Ready(version=0, probe_logprobs=probe), 0.0)


def sent(coordinator: Coordinator, reception: Reception, name: str) -> list[Any]:
    """After a turn: leases and refusals that this actor was sent."""
    coordinator.dispatch(0.0)
    to_it = [message for identity, message in reception.outgoing() if identity == name.encode()]
    return [message for message in to_it if isinstance(message, Lease | Refused)]


def test_an_actor_with_another_model_is_refused_before_it_gets_a_lease() -> None:
    coordinator, reception = make_reception()
    reception.judge_ready(judge)
    become_ready(reception, wrong=WRONG)
    assert sent(coordinator, reception, "wrong") == [OTHER_MODEL]
    become_ready(reception, right=RIGHT)
    assert any(isinstance(message, Lease) for message in sent(coordinator, reception, "right"))
    assert coordinator.members() == ("right",)


def test_who_was_ready_before_the_learner_is_judged_when_it_has_loaded_and_nothing_of_it_is_trained_on() -> None:
    coordinator, reception = make_reception()
    become_ready(reception, wrong=WRONG)
    lease = sent(coordinator, reception, "wrong")[0]
    reception.handle(b"wrong", group(lease.lease_id, [0, 0]), 0.0)
    assert coordinator.stats()["buffered_groups"] == 1
    reception.judge_ready(judge)
    assert sent(coordinator, reception, "wrong") == [OTHER_MODEL]
    assert coordinator.members() == ()
    assert coordinator.stats()["buffered_groups"] == 0


@pytest.mark.parametrize("way", ["lost", "left", "replaced"])
def test_who_is_not_there_when_the_learner_has_loaded_is_judged_all_the_same(way: str) -> None:
    """And another process of its name, which has the right model, stays."""
    coordinator, reception = make_reception()
    become_ready(reception, wrong=WRONG)
    lease = sent(coordinator, reception, "wrong")[0]
    reception.handle(b"wrong", group(lease.lease_id, [0, 0]), 0.0)
    if way == "left":
        reception.handle(b"wrong", Bye(error=None), 0.0)
    else:
        reception.undeliverable(b"wrong")
    if way == "replaced":
        reception.handle(b"2", hello("wrong", process="another"), 0.0)
        reception.handle(b"2", Ready(version=0, probe_logprobs=RIGHT), 0.0)
    reception.outgoing()
    assert coordinator.stats()["buffered_groups"] == 1
    reception.judge_ready(judge)
    assert coordinator.stats()["buffered_groups"] == 0
    assert [to for to, message in reception.outgoing() if message == OTHER_MODEL] == [b"wrong"] * (way == "lost")
    assert reception.names == (("wrong",) if way == "replaced" else ())


def test_what_an_actor_drew_with_wrong_weights_is_given_up_though_it_leaves_before_its_probe_is_judged() -> None:
    """The report of another one is still awaited."""
    coordinator, reception = make_reception()
    for name in "ab":
        welcomed(reception, name, name.encode())
    coordinator.dispatch(0.0)
    lease, other, *_ = [message for message in replies(reception, b"a") if isinstance(message, Lease)]
    first, _ = coordinator.member_ids()
    for phase in (WeightsPhase.FINISH, WeightsPhase.RESUME):
        command = reception.begin(phase, 1, {member: {} for member in coordinator.member_ids()})
        done = WeightsReport(
            command_id=command.id, phase=phase, version=1, error=None, is_shared=False, probe_logprobs=NO_PROBE
        )
        reception.handle(b"a", done, 1.0)
    for one, version in ((lease, 1), (other, 0)):
        reception.handle(b"a", group(one.lease_id, [version]), 1.0)
    reception.handle(b"a", Bye(error=None), 1.0)
    assert coordinator.stats()["buffered_groups"] == 2
    reception.quarantine(first, "its probe differs", version=1)
    assert coordinator.stats()["buffered_groups"] == 1, "what it drew with the version before is good"
    assert coordinator.stats()["dropped_tokens/actor_lost"] == 2
    assert reception.names == ("b",)


@pytest.mark.parametrize("version", [0, 1])
def test_with_other_weights_than_the_folders_an_actor_is_served_first(version: int) -> None:
    """Later than version 0, or in the middle of it after a resume."""
    coordinator, reception = make_reception()
    reception.judge_ready(judge)
    coordinator.ledger.pace.is_folder_version_0 = version > 0
    coordinator.set_version(version, 1)
    become_ready(reception, a=WRONG)
    assert sent(coordinator, reception, "a") == []
    assert coordinator.waiting_for_weights() == ("a",)


# ---- members that come back, and those that have to leave


def replies(reception: Reception, identity: bytes) -> list[Any]:
    return [message for to, message in reception.outgoing() if to == identity]


def welcomed(reception: Reception, name: str, identity: bytes, now: float = 0.0) -> Welcome:
    reception.handle(identity, hello(name), now)
    reception.handle(identity, Ready(version=0, probe_logprobs=NO_PROBE), now)
    (welcome,) = [message for message in replies(reception, identity) if isinstance(message, Welcome)]
    return welcome


def test_a_member_goes_on_over_a_new_connection_and_is_told_again_what_it_has_not_answered() -> None:
    coordinator, reception = make_reception()
    welcome = welcomed(reception, "a", b"old")
    coordinator.dispatch(0.0)
    leases = replies(reception, b"old")
    (member,) = coordinator.member_ids()
    command = reception.begin(WeightsPhase.PAUSE, 1, {member: {"x": 1}})
    assert replies(reception, b"old") == [command.message(member)]
    reception.handle(b"new", hello("a", welcome=welcome, held=[lease.lease_id for lease in leases]), 1.0)
    again = replies(reception, b"new")
    assert isinstance(again[0], Welcome) and again[0].number == welcome.number
    assert again[1:] == [command.message(member)]
    assert coordinator.member_ids() == (member,) and not coordinator.drops
    assert replies(reception, b"old") == []


PUBLICATION = (
    WeightsPhase.PAUSE,
    WeightsPhase.START,
    WeightsPhase.UPDATE,
    WeightsPhase.FINISH,
    WeightsPhase.RESUME,
)


def begin(reception: Reception, phase: WeightsPhase, version: int) -> Command:
    return reception.begin(phase, version, {MemberId("a", 1): {}, MemberId("b", 2): {}})


def report(reception: Reception, command: Command, name: str) -> None:
    reception.handle(
        name.encode(),
        WeightsReport(
            command_id=command.id,
            phase=command.phase,
            version=command.version,
            error=None,
            is_shared=False,
            probe_logprobs=NO_PROBE,
        ),
        0.5,
    )


def publish(reception: Reception, version: int, phases: Sequence[WeightsPhase]) -> None:
    """To `a` and `b`."""
    for phase in phases:
        command = begin(reception, phase, version)
        for name in "ab":
            report(reception, command, name)
        assert not command.missing()
        reception.end(command)


@pytest.mark.parametrize("version", [0, 1], ids=["that it holds", "that is new"])
@pytest.mark.parametrize("goes_on", [True, False], ids=["without it", "not at all"])
@pytest.mark.parametrize("num_done", range(1, 5))
def test_who_is_lost_between_two_phases_is_served_again(num_done: int, goes_on: bool, version: int) -> None:
    """Its engine is paused, and nobody would tell it to go on."""
    coordinator, reception = make_reception()
    welcome = welcomed(reception, "a", b"a")
    welcomed(reception, "b", b"b")
    publish(reception, version, PUBLICATION[:num_done])
    reception.undeliverable(b"a")
    if goes_on:
        for phase in PUBLICATION[num_done:]:
            command = begin(reception, phase, version)
            assert command.gone == {MemberId("a", 1)}
            report(reception, command, "b")
            reception.end(command)
        assert reception.lost == (MemberId("a", 1),)
    coordinator.set_version(version, 1)
    reception.handle(b"a", hello("a", welcome=welcome), 1.0)
    assert coordinator.waiting_for_weights() == (("a",) if goes_on else ("a", "b"))
    publish(reception, version, PUBLICATION)
    assert coordinator.waiting_for_weights() == ()


@pytest.mark.parametrize("phase", [*PUBLICATION, WeightsPhase.SLEEP, WeightsPhase.WAKE])
def test_who_is_lost_before_it_could_report_is_served_again(phase: WeightsPhase) -> None:
    coordinator, reception = make_reception()
    welcome = welcomed(reception, "a", b"a")
    command = reception.begin(phase, 0, {member: {} for member in coordinator.member_ids()})
    reception.undeliverable(b"a")
    reception.note_losses()
    assert not command.missing()
    reception.end(command)
    reception.handle(b"a", hello("a", welcome=welcome), 1.0)
    assert coordinator.waiting_for_weights() == ("a",), "its engine may be paused, or asleep"


def test_an_actor_that_was_resumed_and_then_lost_is_honest_while_others_are_waited_for() -> None:
    """It comes back before the publication is over, with tokens of the version that it got."""
    coordinator, reception = make_reception()
    welcome = welcomed(reception, "a", b"a")
    welcomed(reception, "b", b"b")
    coordinator.dispatch(0.0)
    held = [message.lease_id for message in replies(reception, b"a") if isinstance(message, Lease)]
    assert len(held) >= 3
    publish(reception, 1, PUBLICATION[:-1])
    begin(reception, WeightsPhase.RESUME, 1)
    reception.undeliverable(b"a")
    reception.note_losses()
    reception.handle(b"a", hello("a", welcome=welcome, held=held), 2.0)
    reception.handle(b"a", progress(held[0], [0, 0], [[0, 1], [1]]), 2.0)
    for lease_id in held[1:]:
        reception.handle(b"a", group(lease_id, [0, 1]), 3.0)
    assert coordinator.members() == ("a", "b") and not coordinator.drops
    stats = coordinator.stats()
    assert (stats["actors_dismissed"], stats["dropped_tokens/malformed"]) == (0, 0)
    assert stats["buffered_groups"] == len(held) - 1


def test_what_was_sampled_after_a_resume_that_was_not_reported_goes_with_an_actor_that_is_distrusted() -> None:
    coordinator, reception = make_reception()
    welcomed(reception, "a", b"a")
    welcomed(reception, "b", b"b")
    coordinator.dispatch(0.0)
    first, second, *_ = [message.lease_id for message in replies(reception, b"a") if isinstance(message, Lease)]
    publish(reception, 1, PUBLICATION[:-1])
    reception.end(begin(reception, WeightsPhase.RESUME, 1))
    reception.handle(b"a", group(first, [0, 0]), 1.0)
    reception.handle(b"a", group(second, [0, 1]), 1.0)
    reception.quarantine(MemberId("a", 1), "no probe", 1)
    assert coordinator.stats()["buffered_groups"] == 1


def test_a_member_that_takes_part_without_having_said_that_it_is_ready_is_asked_to_greet() -> None:
    """Its Ready got lost."""
    _, reception = make_reception()
    reception.handle(b"a", hello("a"), 0.0)
    assert [type(message) for message in replies(reception, b"a")] == [Welcome]
    reception.handle(b"a", heartbeat({}), 1.0)
    assert SayHello in map(type, replies(reception, b"a"))
    reception.handle(b"a", Ready(version=0, probe_logprobs=NO_PROBE), 2.0)
    reception.handle(b"a", heartbeat({}), 3.0)
    assert SayHello not in map(type, replies(reception, b"a"))


def test_a_greeting_that_is_repeated_on_its_connection_is_no_other_process() -> None:
    """The learner may have asked for it twice."""
    _, reception = make_reception()
    for _ in range(2):
        reception.handle(b"1", hello("a", welcome=welcome("earlier", 7, 3), held=[5]), 0.0)
        answers = replies(reception, b"1")
        assert [type(answer) for answer in answers] == [Welcome, Cancel]
        assert answers[0].number == 1
    assert reception.names == ("a",)


def test_a_member_that_is_condemned_leaves_and_is_told_why() -> None:
    coordinator, reception = make_reception()
    welcomed(reception, "a", b"1")
    coordinator.dispatch(0.0)
    for lease in replies(reception, b"1")[:3]:
        reception.handle(b"1", group(lease.lease_id, [-1]), 0.0)
    reason = "3 of its groups were refused, the last one: token id -1"
    assert replies(reception, b"1")[-1] == Refused(reason=reason, fatal=True)
    assert reception.names == () and coordinator.stats()["actors_dismissed"] == 1


def test_an_actor_that_is_lost_for_long_is_forgotten_and_may_greet_as_a_new_member() -> None:
    coordinator, reception = make_reception()
    old = welcomed(reception, "a", b"1")
    reception.undeliverable(b"1")
    reception.tick(599.0)
    assert reception.names == ("a",)
    reception.tick(601.0)
    assert reception.names == () and coordinator.stats()["actors_forgotten"] == 1
    reception.handle(b"2", hello("a", welcome=old, held=[0]), 602.0)
    again, cancel = replies(reception, b"2")
    assert again.number == old.number + 1 and cancel == Cancel(lease_id=0)


def test_of_two_claims_to_a_name_the_later_one_stands() -> None:
    _, reception = make_reception()
    welcomed(reception, "a", b"1")
    for identity in (b"2", b"3"):
        reception.handle(identity, hello("a", process=identity.decode()), 1.0)
    assert [message.fatal for message in replies(reception, b"2")] == [True]
    reception.undeliverable(b"1")
    reception.tick(1.1)
    assert [type(message) for message in replies(reception, b"3")] == [Welcome]


def test_a_connection_that_claims_a_name_and_then_greets_under_another_has_only_that() -> None:
    """And one that claims two names claims the second."""
    coordinator, reception = make_reception()
    for name in ("a", "c"):
        welcomed(reception, name, name.encode())
    for name in ("a", "b"):
        reception.handle(b"2", hello(name, process="2"), 1.0)
    for name in ("a", "c"):
        reception.handle(b"3", hello(name, process="3"), 1.0)
    reception.undeliverable(b"a")
    reception.undeliverable(b"c")
    reception.tick(1.1)
    coordinator.dispatch(1.1)
    welcomes = [to for to, message in reception.outgoing() if isinstance(message, Welcome)]
    assert sorted(welcomes) == [b"2", b"3"]
    reception.begin_stop("over")
    assert {to for to, _ in reception.outgoing()} == {b"a", b"2", b"3"}
    for identity in (b"2", b"3"):
        reception.handle(identity, Bye(error=None), 2.0)
    assert reception.names == ()


def test_a_message_that_cannot_travel_costs_its_peer_alone() -> None:
    """Unless it is made of the run's own data: then it could be sent to nobody."""
    coordinator, reception = make_reception()
    for name in "ab":
        welcomed(reception, name, name.encode())
    for identity in (b"a", b"b"):
        reception.handle(identity, heartbeat({}), 0.0)
    reception.handle(b"observer", Watch(), 0.0)
    sent = []

    def send(identity: bytes, message: LearnerMessage) -> bool:
        if identity != b"b" and not isinstance(message, OWN_DATA):
            raise WireError("too long")
        sent.append((identity, message))
        return True

    reception.deliver(send)
    assert sent == [(b"b", Pulse(version=0))]
    assert coordinator.members() == ("b",) and reception.observers.identities == ()
    coordinator.dispatch(0.0)
    with pytest.raises(WireError, match="no JSON"):
        reception.deliver(lambda identity, message: cannot_travel("no JSON"))


def cannot_travel(why: str) -> bool:
    raise WireError(why)


def test_a_member_that_is_dismissed_for_what_it_says_is_told_so_however_long_that_is() -> None:
    """Its texts as they arrive: through the wire."""
    coordinator, reception = make_reception()
    welcomed(reception, "a", b"1")
    command = reception.begin(WeightsPhase.PAUSE, 1, {member: {} for member in coordinator.member_ids()})
    failed = WeightsReport(
        command_id=command.id,
        phase=WeightsPhase.PAUSE,
        version=1,
        error="x" * 5_000_000,
        is_shared=False,
        probe_logprobs=NO_PROBE,
    )
    reception.handle(b"1", decode(encode(failed), 1 << 23), 1.0)  # type: ignore[arg-type]
    (report,) = command.reports.values()
    reception.dismiss("a", f"it failed in phase pause of version 1: {report.error}")
    refusals = [message for message in replies(reception, b"1") if isinstance(message, Refused)]
    assert len(encode(refusals[-1])[0]) < 10_000


def test_a_claim_goes_with_its_connection() -> None:
    _, reception = make_reception()
    welcomed(reception, "a", b"1")
    reception.handle(b"2", hello("a", process="2"), 1.0)
    reception.handle(b"2", Bye(error="it has waited for too long"), 2.0)
    reception.undeliverable(b"1")
    reception.tick(3.0)
    assert replies(reception, b"2") == []


# ---- which process it is that greets


def settled(reception: Reception, identity: bytes, closed: set[bytes], now: float) -> list[Any]:
    """What this connection is sent until a claim that was made at `now` is settled; those of `closed` turn out
    to be closed a moment later."""
    got, tick = [], 0

    def send(to: bytes, message: LearnerMessage) -> bool:
        got.extend([message] if to == identity else [])
        return to not in closed or not tick

    for tick in range(25):
        reception.tick(now + tick * LOOK_S)
        reception.deliver(send)
    return got


def test_a_starting_actor_whose_welcome_got_lost_is_welcomed_on_its_next_connection() -> None:
    """The learner takes the one before for open; what the engine has is the model folder's still."""
    coordinator, reception = make_reception()
    reception.handle(b"old", hello("a"), 0.0)
    reception.outgoing()
    reception.handle(b"new", hello("a"), 40.0)
    assert [type(message) for message in settled(reception, b"new", {b"old"}, 40.0)] == [Welcome]
    reception.handle(b"new", Ready(version=0, probe_logprobs=NO_PROBE), 50.0)
    assert coordinator.members() == ("a",) and coordinator.waiting_for_weights() == ()


def test_an_actor_that_was_another_learners_is_welcomed_on_each_connection_that_it_greets_on() -> None:
    """Its greetings name that learner until a Welcome has come."""
    coordinator, reception = make_reception()
    for identity in (b"1", b"2"):
        reception.handle(identity, hello("a", welcome=welcome("earlier", 7, 3), held=[5]), 0.0)
        answers = replies(reception, identity)
        assert [type(answer) for answer in answers] == [Welcome, Cancel]
        assert answers[0].number == 1
    reception.handle(b"2", Ready(version=0, probe_logprobs=NO_PROBE), 1.0)
    assert coordinator.waiting_for_weights() == ("a",)


def test_a_greeting_of_a_member_that_comes_late_costs_it_nothing() -> None:
    """From a connection before that on which it is ready: the learner reads each of them at its own pace."""
    coordinator, reception = make_reception()
    welcomed(reception, "a", b"new")
    coordinator.dispatch(0.0)
    held = [message.lease_id for message in replies(reception, b"new")]
    reception.handle(b"old", hello("a"), 1.0)
    assert replies(reception, b"old") == []
    reception.undeliverable(b"old")
    reception.handle(b"new", heartbeat(dict.fromkeys(held, 1)), 1.5)
    assert replies(reception, b"new") == [Pulse(version=0)]
    assert coordinator.members() == ("a",) and not coordinator.drops


@pytest.mark.parametrize("is_ready", [True, False], ids=["ready", "joining"])
def test_who_knows_all_of_a_member_but_its_secret_is_another_process(is_ready: bool) -> None:
    """Run and incarnation are in every Welcome, and numbers are counted."""
    coordinator, reception = make_reception()
    reception.handle(b"a", hello("a"), 0.0)
    if is_ready:
        reception.handle(b"a", Ready(version=0, probe_logprobs=NO_PROBE), 0.0)
    coordinator.dispatch(0.0)
    welcome, *leases = replies(reception, b"a")
    assert bool(leases) == is_ready
    reception.handle(b"2", hello("a", welcome=welcome, process="another"), 1.0)
    assert replies(reception, b"2") == []
    if is_ready:
        reception.handle(b"a", heartbeat({lease.lease_id: 0 for lease in leases}), 1.5)
    (refusal,) = settled(reception, b"2", set(), 1.0)
    assert refusal.fatal and "another actor named a takes part" in refusal.reason
    assert reception.names == ("a",) and not coordinator.drops
    reception.handle(b"2", Bye(error=None), 2.0)
    assert reception.names == ("a",)


def test_a_claim_finds_out_that_a_starting_actors_connection_was_closed_a_moment_later() -> None:
    _, reception = make_reception()
    reception.handle(b"1", hello("a"), 0.0)
    reception.outgoing()
    reception.handle(b"2", hello("a", process="another"), 1.0)
    assert [type(message) for message in settled(reception, b"2", {b"1"}, 1.0)] == [Welcome]

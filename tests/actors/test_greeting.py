"""An actor that loses its connection or its learner, and finds them again. No engine is started."""

import asyncio
import json
import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors import main as actor_main
from actors.greeting import ActorError, LearnerStops, Session
from common.config import (
    ActorsConfig,
    AlgorithmConfig,
    Config,
    LearnerConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    StalenessConfig,
    TransportConfig,
    VerifierConfig,
)
from common.launcher import moved_to, reserve_port
from common.transport import ConnectionRenewed, model_fingerprints
from common.types import Bye, DropReason, Hello, Progress, Prompt, Stop, WeightsPhase, WeightsReport
from learner.rollouts.archive import read_about
from learner.rollouts.service import LearnerService, MembersWaiting
from learner.rollouts.snapshot import read_snapshot, write_snapshot
from tests.support.fake_actors import progress
from tests.support.live_actor import FakeEngine, LiveActor
from tests.support.proxy import Direction, Proxy
from tests.support.runs import ROOT

PROMPTS = [Prompt(uid=f"p{i}", text=str(i), reference="") for i in range(400)]
PUBLICATION = (
    WeightsPhase.PAUSE,
    WeightsPhase.START,
    WeightsPhase.UPDATE,
    WeightsPhase.FINISH,
    WeightsPhase.RESUME,
)


START_S = 100.0  # a process may take long on busy cores


def make_config(**transport: Any) -> Config:
    return Config(
        model=ModelConfig(path=str(ROOT / "configs/models/chain_sum")),
        rollout=RolloutConfig(prompts_per_step=4, group_size=2, max_tokens=8),
        algorithm=AlgorithmConfig(critic_warmup_steps=0),
        staleness=StalenessConfig(max_staleness=2),
        learner=LearnerConfig(steps=1000),
        transport=TransportConfig(**({"heartbeat_s": 0.1, "heartbeat_timeout_s": 5.0, "grace_s": 2.0} | transport)),
    )


def make_service(config: Config, **identity: Any) -> LearnerService:
    fingerprints = model_fingerprints(config.model.path)
    return LearnerService(config, PROMPTS, lambda prompt: [1, 2], fingerprints, [1, 2], **identity)


def publish(service: LearnerService, version: int) -> None:
    for phase in PUBLICATION:
        service.command(phase, version, {member: {} for member in service.member_ids()}, 5.0)


def train(service: LearnerService, version: int) -> list[str]:
    """One step at `version`; the prompts that were trained."""
    while True:
        try:
            groups = service.take_batch(20.0)
            break
        except MembersWaiting:
            publish(service, version)
    for item in groups:
        assert item.completed.token_ids.tolist() == item.completed.versions.tolist()
        assert 0 <= version - item.oldest_version <= 2
    return [item.lease.prompt_uid for item in groups]


def until(condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.005)


def drops(service: LearnerService) -> dict[str, float]:
    stats = service.stats()
    return {reason: stats[f"dropped/{reason}"] for reason in DropReason if stats[f"dropped/{reason}"]}


# ---- the end


def test_an_actor_that_comes_when_the_run_is_over_leaves_without_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended:
        """The connection to a learner that stops."""

        name, endpoint = "late", "tcp://127.0.0.1:1"

        def __init__(self, *_: object) -> None:
            self.sent = sent

        async def __aenter__(self) -> "Ended":
            return self

        async def __aexit__(self, *_: object) -> None:
            pass

        async def send(self, message: Any) -> None:
            self.sent.append(message)

        async def receive(self, timeout_s: float) -> Stop:
            return Stop(reason="the run is complete")

    sent: list[Any] = []
    monkeypatch.setattr(actor_main, "ActorConnection", Ended)
    assert actor_main.main(make_config(), Ended.endpoint, Ended.name) == 0
    assert sent[-1] == Bye(error=None)


# ---- connections


def test_connections_that_are_cut_cost_no_group() -> None:
    """What is sampled while the connection is cut arrives afterwards, and is trained once."""
    config = make_config()
    with ExitStack() as stack:
        service = stack.enter_context(make_service(config))
        proxy = stack.enter_context(Proxy(service.endpoint))
        actor = stack.enter_context(LiveActor(config, proxy.endpoint, delay_s=0.1))
        uids = []
        for version in range(8):
            uids += train(service, version)
            service.wait_for_members(1, 10.0)
            publish(service, version + 1)
            service.set_version(version + 1, version + 1)
            if version % 2:
                until(lambda: actor.actor._tasks)
                proxy.cut()
        assert len(set(uids)) == len(uids) == 32
        until(lambda: service.stats()["received_groups"] == len(actor.engine.sampled))
        assert drops(service).keys() <= {DropReason.ACTOR_LOST, DropReason.DUPLICATE}, "on its way, or sent again"
        assert len(set(actor.engine.sampled)) == len(actor.engine.sampled)
        service.wait_for_members(1, 10.0)
        assert [member.number for member in service.member_ids()] == [1], "it is the same member"


def test_a_half_open_connection_is_replaced_and_the_leases_stay() -> None:
    config = make_config(heartbeat_timeout_s=0.6, grace_s=5.0)
    with ExitStack() as stack:
        service = stack.enter_context(make_service(config))
        proxy = stack.enter_context(Proxy(service.endpoint))
        actor = stack.enter_context(LiveActor(config, proxy.endpoint, delay_s=1.0))
        until(lambda: len(actor.actor._tasks) == 12)
        proxy.freeze()
        until(lambda: not service.members())
        until(service.members)
        assert len(train(service, 0)) == 4
        assert drops(service) == {}
        assert [member.number for member in service.member_ids()] == [1]


# ---- messages that go down with a connection that libzmq makes again by itself: neither side takes the other for lost

TO_LEARNER: Direction = "to the learner"
TO_ACTORS: Direction = "to the actors"
RARELY = make_config(heartbeat_s=30.0, heartbeat_timeout_s=90.0, grace_s=60.0)  # no heartbeat mends anything


class Line:
    """The way between a learner and an actor `a`, whose next message in one direction can get lost."""

    def __init__(self, stack: ExitStack, config: Config = RARELY) -> None:
        self._stack, self._config = stack, config
        self.service = stack.enter_context(make_service(config))
        self.proxy = stack.enter_context(Proxy(self.service.endpoint))

    def connect(self, delay_s: float = 0.02) -> LiveActor:
        return self._stack.enter_context(LiveActor(self._config, self.proxy.endpoint, delay_s=delay_s))

    def lose(self, direction: Direction, num_bytes: int = 1) -> None:
        """The rest of what has been sent since it was frozen."""
        until(lambda: self.proxy.num_swallowed[direction] >= num_bytes)
        self.proxy.cut()

    def command(self, phase: WeightsPhase, loses: Direction) -> WeightsReport:
        """The report of `a`, although something of this phase gets lost."""
        (member,) = members = self.service.member_ids()
        self.proxy.freeze(loses)
        reports = self.service.command(phase, 1, {member: {}}, 10.0, lambda: self.lose(loses))
        assert self.service.member_ids() == members and self.service.lost_ids() == ()
        return reports[member]


@pytest.fixture
def line() -> Iterator[Line]:
    with ExitStack() as stack:
        yield Line(stack)


def test_a_command_or_its_report_that_gets_lost_is_sent_again(line: Line) -> None:
    actor = line.connect()
    until(lambda: line.service.stats()["received_groups"] == 12 and not actor.actor._unacknowledged)
    assert line.command(WeightsPhase.PAUSE, TO_ACTORS).error is None
    assert line.command(WeightsPhase.START, TO_LEARNER).error is None
    assert actor.engine.phases == [WeightsPhase.PAUSE, WeightsPhase.START], "each once"


@pytest.mark.parametrize("direction", [TO_LEARNER, TO_ACTORS])
def test_a_ready_and_the_leases_that_answer_it_are_sent_again_when_they_get_lost(
    line: Line, direction: Direction, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = FakeEngine.score

    async def freeze_and_score(self: FakeEngine, token_ids: Any) -> Any:
        line.proxy.freeze(direction)
        return await score(self, token_ids)

    monkeypatch.setattr(FakeEngine, "score", freeze_and_score)
    line.connect()
    line.lose(direction)
    monkeypatch.undo()
    assert line.service.wait_for_members(1, 10.0) == ("a",)
    assert len(train(line.service, 0)) == 4


def test_a_group_whose_acknowledgement_gets_lost_is_not_kept(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator = line.service._coordinator
    take, was_frozen = coordinator.receive, threading.Event()

    def freeze_and_take(*arguments: Any) -> None:
        if not was_frozen.is_set():
            line.proxy.freeze(TO_ACTORS)
            was_frozen.set()
        take(*arguments)

    monkeypatch.setattr(coordinator, "receive", freeze_and_take)
    actor = line.connect()
    line.lose(TO_ACTORS)
    until(lambda: line.service.stats()["received_groups"] == 12 and not actor.actor._unacknowledged)


def test_who_leaves_says_so_again_when_that_got_lost(line: Line) -> None:
    actor = line.connect(delay_s=1000.0)
    until(lambda: len(actor.actor._tasks) == 12)
    line.proxy.freeze(TO_LEARNER)
    actor.drain()
    line.lose(TO_LEARNER)
    until(lambda: line.service._coordinator.member("a").capacity == 0)


def test_progress_that_gets_lost_is_reported_again_and_nothing_is_held_against_its_actor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn, told = Counter[int](), Counter[int]()

    def draw(self: FakeEngine, lease_id: int) -> Progress:
        """A token of each completion, at each heartbeat."""
        drawn[lease_id] += 1
        start, told[lease_id] = told[lease_id], drawn[lease_id]
        return progress(lease_id, [start] * 2, [[0] * (drawn[lease_id] - start)] * 2)

    monkeypatch.setattr(FakeEngine, "progress", draw)
    monkeypatch.setattr(FakeEngine, "progress_again", lambda self: told.clear())
    config = make_config()
    with ExitStack() as stack:
        line = Line(stack, replace(config, rollout=replace(config.rollout, max_tokens=1000)))
        line.connect(delay_s=1000.0)
        slots = line.service._coordinator.ledger.slots

        def known() -> list[int]:
            return [slot.partial.num_tokens if slot.partial else 0 for slot in list(slots.train.values())]

        until(lambda: len(known()) == 12 and min(known()) >= 2)
        line.proxy.freeze(TO_LEARNER)
        before = max(known())
        line.lose(TO_LEARNER, 3000)  # more than all but the progress of two heartbeats
        until(lambda: min(known()) > 2 * before + 4)
        assert line.service.stats()["dropped_tokens/malformed"] == 0
        assert line.service.stats()["dropped/straggler"] == 0


class Interrupted:
    """A connection on which this comes."""

    name, endpoint = "a", "tcp://127.0.0.1:1"

    def __init__(self, answers: list[Any]) -> None:
        self._answers = iter(answers)
        self.sent: list[Any] = []

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    async def receive(self, timeout_s: float) -> Any:
        if isinstance(answer := next(self._answers), Exception):
            raise answer
        return answer


def test_the_first_greeting_is_repeated_on_every_connection() -> None:
    connection = Interrupted([ConnectionRenewed(), ConnectionRenewed(), Stop(reason="enough")])
    with pytest.raises(LearnerStops, match="enough"):
        asyncio.run(Session(make_config(), connection).begin())  # type: ignore[arg-type]
    assert [type(message) for message in connection.sent] == [Hello] * 3
    assert len({message.secret for message in connection.sent}) == 1


def test_no_two_actors_have_one_secret() -> None:
    def greeting() -> Hello:
        connection = Interrupted([Stop(reason="enough")])
        with pytest.raises(LearnerStops):
            asyncio.run(Session(make_config(), connection).begin())  # type: ignore[arg-type]
        (hello,) = connection.sent
        return hello

    assert greeting().secret != greeting().secret


def test_an_actor_that_comes_while_the_learner_is_being_started_waits_for_it(caplog: pytest.LogCaptureFixture) -> None:
    """It was itself started again meanwhile, or is an addition: no reason to end, and to be given up."""
    with ExitStack() as stack:
        config = make_config(port=stack.enter_context(reserve_port()), heartbeat_timeout_s=0.3)
        actor = LiveActor(config, f"tcp://127.0.0.1:{config.transport.port}")
        entered = stack.enter_context(ThreadPoolExecutor()).submit(stack.enter_context, actor)
        until(lambda: "does not answer within 0.3 s: a new connection" in caplog.text)
        service = stack.enter_context(make_service(config))
        entered.result(10.0)
        assert len(train(service, 0)) == 4


def test_an_actor_that_no_learner_answers_ends_with_one_sentence() -> None:
    with reserve_port() as port:
        config = replace(make_config(heartbeat_timeout_s=0.2), actors=ActorsConfig(start_timeout_s=0.5))
        actor = LiveActor(config, f"tcp://127.0.0.1:{port}")
        with pytest.raises(AssertionError, match="did not begin"), actor:
            pass
    assert f"'a' heard nothing from the learner at tcp://127.0.0.1:{port} for 0.5 s" in str(actor.failure)


def test_an_actor_whose_learner_does_not_come_back_ends_with_one_sentence() -> None:
    config = make_config(heartbeat_timeout_s=0.3, reconnect_s=0.8)
    with make_service(config) as service, Proxy(service.endpoint) as proxy:
        actor = LiveActor(config, proxy.endpoint)
        with actor:
            service.wait_for_members(1, 5.0)
            proxy.close()
            actor.join()
    assert "'a' heard nothing from the learner at tcp://127.0.0.1:" in str(actor.failure)
    assert "(transport.reconnect_s=0.8)" in str(actor.failure)


# ---- learners


def serve(config: Config, folder: Path, incarnation: int, num_steps: int) -> None:
    """A learner process: one step, one publication and one checkpoint after the other, the last of them for good."""
    service = make_service(config, run_id="run", incarnation=incarnation)
    file, version, uids = folder / "state.bin", 0, []
    if file.is_file():
        kept, about = read_snapshot(file, time.monotonic())
        service.restore(kept)
        version, uids = about["version"], about["uids"]
    with service:
        service.wait_for_members(1, START_S)
        publish(service, version)
        service.set_version(version, version)
        while version < num_steps:
            uids += train(service, version)
            version += 1
            publish(service, version)
            service.set_version(version, version)
            (folder / f"step-{incarnation}").write_text(str(version))
            if version % 3 == 0:
                write_snapshot(folder / "state.tmp", service.snapshot(), {"version": version, "uids": uids})
                (folder / "state.tmp").rename(file)
        (folder / "drops").write_text(json.dumps(drops(service)))


@pytest.mark.slow
def test_an_actor_outlives_learners_that_are_killed_and_every_prompt_is_trained_once(tmp_path: Path) -> None:
    with ExitStack() as stack:
        config = make_config(port=stack.enter_context(reserve_port()), heartbeat_timeout_s=START_S)
        context, actor = multiprocessing.get_context("forkserver"), None
        for incarnation, kill_at in ((1, 5), (2, 11), (3, None)):
            process = context.Process(target=serve, args=(config, tmp_path, incarnation, 18))
            process.start()
            stack.callback(process.kill)
            if actor is None:
                actor = LiveActor(config, f"tcp://127.0.0.1:{config.transport.port}", delay_s=0.03)
                stack.enter_context(actor)
            if kill_at is None:
                process.join(START_S)
                assert process.exitcode == 0
                continue
            reached = tmp_path / f"step-{incarnation}"
            until(lambda file=reached, step=kill_at: file.is_file() and int(file.read_text() or 0) >= step, START_S)
            process.kill()
            process.join(10.0)
        assert actor is not None
        actor.join()
        assert actor.failure is None, "the last learner sent it home"
    uids = read_about(tmp_path / "state.bin")["about"]["uids"]
    assert len(uids) == len(set(uids)) == 18 * 4
    assert json.loads((tmp_path / "drops").read_text()).keys() <= {DropReason.UNKNOWN_LEASE}
    assert {lease_id >> 20 for lease_id in actor.engine.sampled} == {1, 2, 3}


def replaced_by(config: Config, restarted: Config, **identity: Any) -> str:
    """How an actor ends when its learner's place is taken by another one."""
    with ExitStack() as stack:
        port = stack.enter_context(reserve_port())
        with_port = [replace(c, transport=replace(c.transport, port=port)) for c in (config, restarted)]
        first = make_service(with_port[0], run_id="run", incarnation=1)
        first.__enter__()
        actor = stack.enter_context(LiveActor(with_port[0], f"tcp://127.0.0.1:{port}"))
        first.wait_for_members(1, 5.0)
        die(first)
        with make_service(with_port[1], **({"run_id": "run", "incarnation": 2} | identity)):
            actor.join()
    return str(actor.failure)


def die(service: LearnerService) -> None:
    """Without a word to anybody, as when its process is killed."""
    with service._changed:
        service._is_closing = True
        assert service._socket is not None and service._thread is not None
        service._socket.wake()
    service._thread.join(10.0)


def test_a_learner_of_another_run_in_the_same_place_ends_an_actor() -> None:
    config = make_config()
    assert "trains another run now (other, not run): start this actor again" in replaced_by(
        config, config, run_id="other"
    )


def test_a_learner_that_was_restarted_with_what_only_a_new_start_can_give_ends_an_actor() -> None:
    config = make_config()
    slower = replace(config, verifier=VerifierConfig(timeout_s=9.0))
    assert "verifier.timeout_s was 3.0 and is 9.0 since the learner was started again" in replaced_by(config, slower)


def test_other_rewards_reach_an_actor_when_its_learner_is_restarted() -> None:
    with ExitStack() as stack:
        config = make_config(port=stack.enter_context(reserve_port()))
        first = make_service(config, run_id="run", incarnation=1)
        first.__enter__()
        stack.enter_context(LiveActor(config, first.endpoint))
        first.wait_for_members(1, 5.0)
        die(first)
        doubled = replace(config, reward=RewardConfig(correct=2.0))
        with make_service(doubled, run_id="run", incarnation=2) as second:
            second.wait_for_members(1, 10.0)
            publish(second, 0)
            assert {float(r) for item in second.take_batch(10.0) for r in item.completed.rewards} == {2.0}


def test_a_learner_that_has_moved_is_found_where_its_file_says(tmp_path: Path) -> None:
    """Somebody else has its port, or it was started on another host."""
    config, file = make_config(heartbeat_timeout_s=0.4), tmp_path / "endpoint"
    with ExitStack() as stack:
        first = make_service(config, run_id="run", incarnation=1)
        first.__enter__()
        actor = LiveActor(config, first.endpoint, locate=lambda: moved_to(f"file:{file}", first_endpoint))
        first_endpoint = first.endpoint
        stack.enter_context(actor)
        first.wait_for_members(1, 5.0)
        die(first)
        second = stack.enter_context(make_service(config, run_id="run", incarnation=2))
        assert second.endpoint != first_endpoint
        file.write_text(second.endpoint)
        second.wait_for_members(1, 10.0)
        assert len(train(second, 0)) == 4


def test_an_engine_that_slept_when_its_learner_died_is_awake_for_the_next() -> None:
    with ExitStack() as stack:
        config = make_config(port=stack.enter_context(reserve_port()))
        config = replace(config, actors=replace(config.actors, sleep_while_training=True))
        first = make_service(config, run_id="run", incarnation=1)
        first.__enter__()
        actor = stack.enter_context(LiveActor(config, first.endpoint))
        first.wait_for_members(1, 5.0)
        first.command(WeightsPhase.SLEEP, 0, {member: {} for member in first.member_ids()}, 5.0)
        die(first)
        with make_service(config, run_id="run", incarnation=2) as second:
            second.wait_for_members(1, 10.0)
            assert len(train(second, 0)) == 4
            assert actor.engine.phases == [WeightsPhase.SLEEP, WeightsPhase.WAKE, *PUBLICATION]


def test_an_engine_that_was_not_told_to_wake_up_does_so_before_it_takes_weights() -> None:
    """Its connection was lost when the step ended."""
    config = make_config()
    with make_service(config) as service, LiveActor(config, service.endpoint) as actor:
        service.wait_for_members(1, 10.0)
        for _ in range(2):
            service.command(WeightsPhase.SLEEP, 0, {member: {} for member in service.member_ids()}, 10.0)
            publish(service, 0)
        assert actor.engine.phases == [WeightsPhase.SLEEP, WeightsPhase.WAKE, *PUBLICATION] * 2
        assert len(train(service, 0)) == 4


def test_a_name_that_is_taken_ends_the_second_actor_with_one_sentence() -> None:
    config = make_config()
    with make_service(config) as service, LiveActor(config, service.endpoint):
        service.wait_for_members(1, 5.0)
        second = LiveActor(config, service.endpoint)
        with pytest.raises(AssertionError, match="did not begin"), second:
            pass
        assert isinstance(second.failure, ActorError)
        assert "another actor named a takes part: give this one another --name" in str(second.failure)
        assert len(train(service, 0)) == 4

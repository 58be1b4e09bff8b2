"""An actor that is asked to leave: what it has begun, what it hands back, what a signal does before it takes part."""

import asyncio
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.greeting import Session
from actors.main import Actor, Departure
from actors.sampling import Completion, Sampling
from common.agreement import shared_settings
from common.config import ActorsConfig, AlgorithmConfig, Config, LearnerConfig, RolloutConfig, TransportConfig
from common.stopping import ECHO_S
from common.transport import ActorConnection
from common.types import Bye, CompletedGroup, Draining, Lease, Progress, Prompt, Ready, Welcome
from learner.rollouts.service import LearnerService
from tests.support.fake_actors import FINGERPRINTS, FakeActor, group

PROMPTS = [Prompt(uid=f"p{i}", text="", reference="") for i in range(20)]
CONFIG = Config(
    rollout=RolloutConfig(prompts_per_step=4, group_size=2, max_tokens=8),
    algorithm=AlgorithmConfig(critic_warmup_steps=1),
    learner=LearnerConfig(steps=100),
    actors=ActorsConfig(drain_s=0.5, groups_in_flight=4),
)
ENGINE = SimpleNamespace(version=0, generated_tokens=0, busy_s=0.0)


ENGINE.progress = lambda lease_id: None
ENGINE.num_drawn = lambda lease_id: 0
ENGINE.forget = ENGINE.progress
ENGINE.progress_again = lambda: None


def take_part(endpoint: str, draining: list[Any], engine: Any = ENGINE, config: Config = CONFIG) -> None:
    """One real actor whose engine stands still, in this thread, until it has drained."""

    async def conversation() -> None:
        async with ActorConnection(endpoint, "leaves", 16) as connection:
            session = Session(config, connection)
            await session.begin()
            event = asyncio.Event()
            draining.extend([asyncio.get_running_loop(), event])
            await Actor(session, engine, None).serve(event, np.empty(0, np.float32))  # type: ignore[arg-type]
            await connection.send(Bye(error=None))

    asyncio.run(conversation())


def test_a_draining_actor_finishes_what_it_can_and_hands_back_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled: list[Lease] = []
    draining: list[Any] = []

    async def complete(lease: Lease, *_: Any) -> CompletedGroup:
        sampled.append(lease)
        while not draining[1].is_set():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1 if len(sampled) > 2 and lease is sampled[0] else 1000.0)
        return group(lease.lease_id, [0], lease.num_samples)

    monkeypatch.setattr("actors.main.complete", complete)
    monkeypatch.setattr("actors.greeting.model_fingerprints", lambda path: FINGERPRINTS)
    with LearnerService(CONFIG, PROMPTS, lambda prompt: [1], FINGERPRINTS, []) as service:
        actor = threading.Thread(target=take_part, args=(service.endpoint, draining))
        actor.start()
        until(lambda: len(sampled) == 4)
        loop, event = draining
        loop.call_soon_threadsafe(event.set)
        actor.join(10.0)
        assert not actor.is_alive()
        assert len(sampled) == 4, "nothing was leased to it meanwhile, although one group was finished"
        until(lambda: not service.members())
        with FakeActor(service.endpoint, "other"):
            batch = service.take_batch(10.0)
        first, *others = batch
        assert (first.actor, first.lease.prompt_uid) == ("leaves", sampled[0].prompt_uid)
        uids = {lease.prompt_uid for lease in sampled[1:]}
        assert {item.lease.prompt_uid for item in others} == uids and {item.actor for item in others} == {"other"}
        stats = service.stats()
        assert (stats["dropped/actor_lost"], stats["dropped/failed"]) == (3, 0)


class HalfDone:
    """An engine that has drawn 3 and 2 tokens of the two responses of each lease, and draws no more."""

    version, busy_s = 0, 0.0

    def __init__(self) -> None:
        self.leases: dict[int, Sampling] = {}

    async def score(self, token_ids: Any) -> Any:
        return np.empty(0, np.float32)

    async def sample(self, lease: Lease) -> list[Completion]:
        self.leases[lease.lease_id] = Sampling(lease, [f"{lease.lease_id}/{index}" for index in (0, 1)], self.state_of)
        await asyncio.sleep(1000.0)
        return []

    def state_of(self, request_id: str) -> Any:
        """As vLLM's output processor has it."""
        lease_id, index = map(int, request_id.split("/"))
        token_ids = self.drawn(lease_id, index)
        return SimpleNamespace(
            detokenizer=SimpleNamespace(output_token_ids=token_ids, num_output_tokens=lambda: len(token_ids)),
            logprobs_processor=SimpleNamespace(logprobs=SimpleNamespace(logprobs=[-t / 8.0 for t in token_ids])),
            weight_version_starts=[("0", 0)],
        )

    def drawn(self, lease_id: int, index: int) -> list[int]:
        """Tokens that tell whose they are."""
        return [10 * lease_id + place + 5 * index for place in range(3 - index)]

    @property
    def generated_tokens(self) -> int:
        return sum(map(self.num_drawn, self.leases))

    def num_drawn(self, lease_id: int) -> int:
        return self.leases[lease_id].num_drawn()

    def progress(self, lease_id: int) -> Progress | None:
        return self.leases[lease_id].progress()

    def forget(self, lease_id: int) -> None:
        del self.leases[lease_id]


def continued(lease: Lease, version: int) -> CompletedGroup:
    """The prefix of a lease, and one token more of each response."""
    ends, lengths = np.cumsum(lease.prefix_lengths).tolist(), lease.prefix_lengths + np.int32(1)
    added = {"token_ids": 7, "behavior_logprobs": -1.0, "versions": version}
    whole = {name: np.insert(getattr(lease, f"prefix_{name}"), ends, value) for name, value in added.items()}
    return replace(group(lease.lease_id, [version]), lengths=lengths, **whole)


def test_the_next_actor_begins_with_the_tokens_of_one_that_has_drained(monkeypatch: pytest.MonkeyPatch) -> None:
    """No heartbeat has told of them: they are what is sent last."""
    monkeypatch.setattr("actors.greeting.model_fingerprints", lambda path: FINGERPRINTS)
    config = replace(CONFIG, transport=TransportConfig(heartbeat_s=60.0, heartbeat_timeout_s=120.0))
    engine, draining = HalfDone(), list[Any]()
    with LearnerService(config, PROMPTS, lambda prompt: [1], FINGERPRINTS, []) as service:
        actor = threading.Thread(target=take_part, args=(service.endpoint, draining, engine, config))
        actor.start()
        until(lambda: len(engine.leases) == 4)
        begun = {sampling.lease.prompt_uid: lease_id for lease_id, sampling in engine.leases.items()}
        loop, event = draining
        loop.call_soon_threadsafe(event.set)
        actor.join(10.0)
        assert not actor.is_alive() and not engine.leases
        until(lambda: not service.members())
        with FakeActor(service.endpoint, "next", complete=continued) as successor:
            batch = service.take_batch(10.0)
            leases = {lease.prompt_uid: lease for lease in successor.leases()}
    assert len(batch) == 4 and {item.lease.prompt_uid for item in batch} == set(begun)
    for item in batch:
        uid = item.lease.prompt_uid
        first, second = (engine.drawn(begun[uid], index) for index in (0, 1))
        assert leases[uid].prefix_lengths.tolist() == [3, 2]
        assert leases[uid].prefix_token_ids.tolist() == first + second
        assert leases[uid].prefix_behavior_logprobs.tolist() == [-token / 8.0 for token in first + second]
        assert leases[uid].prefix_versions.tolist() == [0] * 5
        assert leases[uid].prefix_finish_reasons == (None, None)
        assert (item.actor, item.completed.token_ids.tolist()) == ("next", [*first, 7, *second, 7])
    assert service.stats()["dropped_tokens/actor_lost"] == 0 and service.stats()["prefix_tokens"] == 20


def until(condition: Any) -> None:
    deadline = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_signals_end_an_actor_at_once_or_let_it_drain() -> None:
    async def ended_by(*numbers: int, takes_part: bool, late: bool) -> tuple[bool, int | None]:
        departure = Departure(asyncio.create_task(asyncio.sleep(1000)), takes_part=takes_part)
        for number in numbers:
            departure.handle(number)
            departure.drains_since_s -= ECHO_S * late
        departure.task.cancel()
        return departure.is_draining.is_set(), departure.number

    def run(*numbers: int, takes_part: bool = True, late: bool = False) -> tuple[bool, int | None]:
        return asyncio.run(ended_by(*numbers, takes_part=takes_part, late=late))

    assert run(signal.SIGTERM) == (True, None)
    assert run(signal.SIGHUP) == run(signal.SIGHUP, signal.SIGTERM) == (True, None), "of a terminal that went away"
    assert run(signal.SIGTERM, signal.SIGTERM) == (True, None), "an echo, as Slurm and torchrun send it"
    assert run(signal.SIGTERM, signal.SIGTERM, late=True) == (True, signal.SIGTERM)
    assert run(signal.SIGTERM, signal.SIGINT) == (True, signal.SIGINT)
    assert run(signal.SIGINT) == (False, signal.SIGINT)
    assert run(signal.SIGTERM, takes_part=False) == (False, signal.SIGTERM)


def test_the_learner_is_told_that_nothing_more_is_wanted() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def drained() -> None:
        actor = Actor(Session(CONFIG, SimpleNamespace(send=send)), ENGINE, None)  # type: ignore[arg-type]
        event = asyncio.Event()
        event.set()
        await asyncio.wait_for(actor._drain(event), 10.0)

    asyncio.run(drained())
    assert sent == [Draining()]


@pytest.mark.parametrize("incarnation", [0, 1])
def test_it_is_told_again_on_a_new_connection_and_to_a_learner_that_was_started_again(incarnation: int) -> None:
    """Before Ready, which a lease may be the answer to."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(type(message))

    def welcome(incarnation: int) -> Welcome:
        return Welcome(
            run_id="",
            incarnation=incarnation,
            number=1,
            settings=shared_settings(CONFIG),
            heartbeat_s=1.0,
            timeout_s=1.0,
            probe_token_ids=np.empty(0, np.int32),
        )

    async def drained() -> None:
        session = Session(CONFIG, SimpleNamespace(send=send, endpoint=""))  # type: ignore[arg-type]
        session.welcome = welcome(0)
        actor = Actor(session, ENGINE, None)  # type: ignore[arg-type]
        await actor._go_on(welcome(incarnation))
        event = asyncio.Event()
        event.set()
        await actor._drain(event)
        await actor._go_on(welcome(incarnation))

    asyncio.run(drained())
    assert sent == [Ready, Draining, Draining, Ready]

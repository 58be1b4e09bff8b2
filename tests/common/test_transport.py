"""The sockets on loopback: delivery, wake-ups, limits, reconnects, and sentences for a user's mistakes."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from common.config import Config, ConfigError, TransportConfig
from common.keys import ActorKeys, LearnerKeys, actor_keys, make_keys
from common.transport import ActorConnection, ConnectionRenewed, LearnerSocket, model_fingerprints
from common.types import Ack, ActorMessage, Bye, Ready, Stop, WeightsCommand, WeightsPhase
from common.wire import WireError, encode, pack
from tests.support.fake_actors import group
from tests.support.proxy import Proxy


@pytest.fixture
def learner() -> Iterator[LearnerSocket]:
    socket = LearnerSocket("127.0.0.1", 0, 1)
    yield socket
    socket.close()


def received(socket: LearnerSocket, count: int, timeout_s: float = 5.0) -> list[tuple[bytes, ActorMessage | WireError]]:
    found: list[tuple[bytes, ActorMessage | WireError]] = []
    deadline = time.monotonic() + timeout_s
    while len(found) < count and time.monotonic() < deadline:
        socket.poll(0.1)
        found += socket.receive()
    assert len(found) == count, found
    return found


def test_messages_go_both_ways(learner: LearnerSocket) -> None:
    async def talk() -> None:
        async with ActorConnection(learner.endpoint, "a", 1) as connection:
            await connection.send(group(3, [0, 1]))
            ((identity, message),) = await asyncio.to_thread(received, learner, 1)
            assert identity.startswith(b"a#")
            assert message.lease_id == 3
            np.testing.assert_array_equal(message.versions, [0, 1, 0, 1])
            assert learner.send(identity, Ack(lease_id=3))
            assert await connection.receive(5.0) == Ack(lease_id=3)

    asyncio.run(talk())


def test_ipv6_addresses_stand_in_brackets() -> None:
    try:
        learner = LearnerSocket("::1", 0, 1)
    except ConfigError as error:
        pytest.skip(f"no IPv6 here: {error}")

    async def say() -> None:
        async with ActorConnection(f"tcp://[::1]:{learner.port}", "a", 1) as connection:
            await connection.send(Bye(error=None))

    asyncio.run(say())
    assert [message for _, message in received(learner, 1)] == [Bye(error=None)]
    learner.close()


def test_what_was_sent_before_closing_is_delivered(learner: LearnerSocket) -> None:
    async def leave() -> None:
        async with ActorConnection(learner.endpoint, "a", 1) as connection:
            await connection.send(group(1, [0] * 1000))
            await connection.send(Bye(error=None))

    asyncio.run(leave())
    assert [message for _, message in received(learner, 2)][1] == Bye(error=None)


def test_stop_is_delivered_although_the_learner_closes_at_once() -> None:
    learner = LearnerSocket("127.0.0.1", 0, 1)

    async def talk() -> None:
        async with ActorConnection(learner.endpoint, "a", 1) as connection:
            await connection.send(Bye(error=None))
            ((identity, _),) = await asyncio.to_thread(received, learner, 1)
            learner.send(identity, Stop(reason="over"))
            learner.close()
            assert await connection.receive(5.0) == Stop(reason="over")

    asyncio.run(talk())


def test_an_actor_that_connects_before_the_learner_listens_is_heard_later() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as probe:
        port = probe.bind_to_random_port("tcp://127.0.0.1")

    async def talk() -> None:
        async with ActorConnection(f"tcp://127.0.0.1:{port}", "early", 1) as connection:
            await connection.send(Bye(error=None))
            await asyncio.sleep(0.2)
            learner = LearnerSocket("127.0.0.1", port, 1)
            ((_, message),) = await asyncio.to_thread(received, learner, 1)
            learner.close()
            assert message == Bye(error=None)

    asyncio.run(talk())


def test_a_connection_that_libzmq_makes_again_by_itself_is_told_of_before_its_first_message(
    learner: LearnerSocket,
) -> None:
    """And neither the first one, nor one that the actor makes, which greets by then."""

    async def talk() -> None:
        with Proxy(learner.endpoint) as proxy:
            async with ActorConnection(proxy.endpoint, "a", 1) as connection:
                for lease_id in range(2):
                    await connection.send(Bye(error=None))
                    ((identity, _),) = await asyncio.to_thread(received, learner, 1)
                    learner.send(identity, Ack(lease_id=lease_id))
                    assert await connection.receive(5.0) == Ack(lease_id=lease_id)
                    proxy.cut()
                    await connection.send(Bye(error=None))
                    ((again, _),) = await asyncio.to_thread(received, learner, 1)
                    learner.send(again, Ack(lease_id=lease_id))
                    assert again == identity
                    with pytest.raises(ConnectionRenewed):
                        await connection.receive(5.0)
                    assert await connection.receive(5.0) == Ack(lease_id=lease_id)
                    connection.reopen(proxy.endpoint)

    asyncio.run(talk())


def test_a_wake_up_ends_the_poll_at_once(learner: LearnerSocket) -> None:
    def after(call: Callable[[], None], delay_s: float) -> None:
        threading.Timer(delay_s, call).start()

    for _ in range(5):
        after(learner.wake, 0.02)
        started = time.monotonic()
        learner.poll(5.0)
        assert time.monotonic() - started < 1.0
    started = time.monotonic()
    learner.poll(0.05)  # no wake-up is left over
    assert time.monotonic() - started > 0.04


def test_waking_a_closed_socket_does_nothing() -> None:
    socket = LearnerSocket("127.0.0.1", 0, 1)
    for _ in range(100_000):  # more than the wake-up's own buffer holds
        socket.wake()
    socket.close()
    socket.wake()


def test_sending_to_nobody_says_so(learner: LearnerSocket) -> None:
    assert not learner.send(b"nobody", Ack(lease_id=1))


def test_a_port_in_use_is_one_sentence_with_the_address(learner: LearnerSocket) -> None:
    port = int(learner.endpoint.rsplit(":", 1)[1])
    with pytest.raises(
        ConfigError, match=rf"^cannot listen on tcp://127.0.0.1:{port}: the port is in use; .*transport.port"
    ):
        LearnerSocket("127.0.0.1", port, 1)


def test_an_address_of_another_machine_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on tcp://192\.0\.2\.1:0 .*transport\.host"):
        LearnerSocket("192.0.2.1", 0, 1)


def test_an_endpoint_that_is_none_is_one_sentence() -> None:
    async def connect() -> None:
        async with ActorConnection("here", "a", 1):
            pass

    with pytest.raises(ConfigError, match="cannot connect to 'here'"):
        asyncio.run(connect())


def test_an_actor_does_not_send_what_the_learner_would_not_take(learner: LearnerSocket) -> None:
    async def send() -> None:
        async with ActorConnection(learner.endpoint, "a", 1) as connection:
            await connection.send(Ready(version=0, probe_logprobs=np.zeros(1 << 18, np.float32)))

    with pytest.raises(WireError, match=r"Ready of .* bytes"):
        asyncio.run(send())


def test_the_learner_does_not_send_what_no_actor_would_take(learner: LearnerSocket) -> None:
    """It would not be told: the actor's side ends the connection, and what waits for it there is lost."""
    command = WeightsCommand(command_id=1, phase=WeightsPhase.UPDATE, version=1, payload={"names": "x" * (1 << 20)})
    with pytest.raises(WireError, match=r"WeightsCommand of 10\d+ bytes: transport\.max_message_mb=1 holds 1048576"):
        learner.send(b"a", command)


@pytest.mark.parametrize("is_encrypted", [False, True])
def test_the_largest_message_is_carried_in_both_directions(is_encrypted: bool, tmp_path: Path) -> None:
    """Encrypted it is longer, and ZeroMQ counts that."""
    of_learner, of_actor = keys(tmp_path) if is_encrypted else (None, None)
    learner = LearnerSocket("127.0.0.1", 0, 1, of_learner)
    ready = Ready(version=0, probe_logprobs=np.zeros((1 << 18) - 64, np.float32))
    command = WeightsCommand(command_id=1, phase=WeightsPhase.UPDATE, version=1, payload={"names": ""})

    async def talk() -> None:
        async with ActorConnection(learner.endpoint, "a", 1, of_actor) as connection:
            await connection.send(grown(ready))
            ((identity, message),) = await asyncio.to_thread(received, learner, 1)
            assert isinstance(message, Ready)
            assert learner.send(identity, grown(command))
            assert isinstance(await connection.receive(5.0), WeightsCommand)

    try:
        asyncio.run(talk())
    finally:
        learner.close()


def keys(folder: Path) -> tuple[LearnerKeys, ActorKeys | None]:
    make_keys(folder)
    return LearnerKeys(folder), actor_keys(Config(transport=TransportConfig(keys=str(folder))), "a")


def grown(message: Any) -> Any:
    """To 1 MiB, when packed."""
    missing = (1 << 20) - len(pack(encode(message)))
    if isinstance(message, Ready):
        message = replace(message, probe_logprobs=np.zeros(len(message.probe_logprobs) + missing // 4, np.float32))
    else:
        message = replace(message, payload={"names": "x" * (missing - 4)})
    assert len(pack(encode(message))) == 1 << 20
    return message


def test_a_peer_that_sends_too_much_is_cut_off_and_garbage_is_a_wire_error(learner: LearnerSocket) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(learner.endpoint)
        dealer.send(b"\xc1")
        dealer.send_multipart([b"\x90", b"x" * (2 << 20)])
        ((_, message),) = received(learner, 1)
        assert isinstance(message, WireError)
        learner.poll(0.3)
        assert list(learner.receive()) == []


def test_a_message_in_the_wrong_direction_is_a_wire_error(learner: LearnerSocket) -> None:
    async def talk() -> None:
        async with ActorConnection(learner.endpoint, "a", 1) as connection:
            command = WeightsCommand(command_id=1, phase=WeightsPhase.PAUSE, version=1, payload={})
            await connection.send(command)  # type: ignore[arg-type]
            ((_, message),) = await asyncio.to_thread(received, learner, 1)
            assert isinstance(message, WireError)
            assert "message of the learner" in str(message)

    asyncio.run(talk())


def test_silence_of_the_learner_is_a_time_out_that_names_it(learner: LearnerSocket) -> None:
    async def listen() -> None:
        async with ActorConnection(learner.endpoint, "lonely", 1) as connection:
            await connection.receive(0.05)

    with pytest.raises(TimeoutError, match=f"'lonely' heard nothing from the learner at {learner.endpoint}"):
        asyncio.run(listen())


def make_model(folder: Path, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 64, "transformers_version": "5.0"} | config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_fingerprints_depend_on_architecture_and_tokenizer_only(tmp_path: Path) -> None:
    first = model_fingerprints(make_model(tmp_path / "a"))
    assert model_fingerprints(make_model(tmp_path / "b", transformers_version="6.0", dtype="bfloat16")) == first
    wider = model_fingerprints(make_model(tmp_path / "c", hidden_size=128))
    assert wider[0] != first[0]
    assert wider[1] == first[1]
    other = make_model(tmp_path / "d")
    (other / "tokenizer.json").write_text('{"vocab": 1}')
    assert model_fingerprints(other)[0] == first[0]
    assert model_fingerprints(other)[1] != first[1]


def test_a_folder_that_is_no_model_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no readable config\.json"):
        model_fingerprints(tmp_path / "missing")
    (make_model(tmp_path / "a") / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="no tokenizer files"):
        model_fingerprints(tmp_path / "a")

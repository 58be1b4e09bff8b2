"""What strangers, wrong keys and hostile peers get: nothing decoded, a sentence, a bound; and the others are served."""

import asyncio
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice, takewhile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import zmq

from common import connections, transport
from common.config import Config, TransportConfig
from common.connections import MAX_STRIKES, Refusal
from common.keys import ActorKeys, LearnerKeys, actor_keys, make_keys
from common.transport import ActorConnection, HandshakeError, LearnerSocket
from common.types import (
    MAX_LISTED,
    Ack,
    ActorMessage,
    Bye,
    Prompt,
    Pulse,
    Ready,
    WeightsCommand,
    WeightsPhase,
)
from common.wire import WireError, encode, pack
from learner.rollouts.service import LearnerService
from tests.support import strangers
from tests.support.fake_actors import FINGERPRINTS, heartbeat, hello
from tests.support.flood import Flood, Honest


class Served:
    """A learner's socket with a thread that reads it, and answers each message with an Ack of its number."""

    def __init__(self, socket: LearnerSocket) -> None:
        self.socket = socket
        self.arrived: list[tuple[bytes, ActorMessage | WireError]] = []
        self._is_over = False
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._is_over:
            self.socket.poll(0.05)
            for identity, message in self.socket.receive():
                self.arrived.append((identity, message))
                self.socket.send(identity, Ack(lease_id=len(self.arrived)))

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{what}: {self.socket.refusals}, {len(self.arrived)} messages"
            time.sleep(0.01)

    def end(self) -> None:
        self._is_over = True
        self._thread.join()
        self.socket.close()


@contextmanager
def serving(keys: LearnerKeys | None, max_message_mb: int = 1) -> Iterator[Served]:
    served = Served(LearnerSocket("127.0.0.1", 0, max_message_mb, keys))
    try:
        yield served
    finally:
        served.end()


def keys_in(folder: Path) -> tuple[LearnerKeys, ActorKeys]:
    make_keys(folder)
    config = Config(transport=TransportConfig(keys=str(folder)))
    actor = actor_keys(config, "a")
    assert actor is not None
    return LearnerKeys(folder), actor


def greet(served: Served, keys: ActorKeys | None, timeout_s: float = 10.0) -> None:
    """One message and its answer. Raises what the connection raises."""

    async def talk() -> None:
        async with ActorConnection(served.socket.endpoint, "a", 1, keys) as connection:
            await connection.send(Bye(error=None))
            assert isinstance(await connection.receive(timeout_s), Ack)

    asyncio.run(talk())


def test_with_its_key_an_actor_is_served(tmp_path: Path) -> None:
    learner, actor = keys_in(tmp_path)
    with serving(learner) as served:
        greet(served, actor)
        assert [message for _, message in served.arrived] == [Bye(error=None)]
        assert not served.socket.refusals


def test_an_actor_whose_key_is_unknown_is_told_at_once_and_nothing_of_it_is_decoded(tmp_path: Path) -> None:
    learner, _ = keys_in(tmp_path / "learner")
    _, stranger = keys_in(tmp_path / "other")
    stranger = ActorKeys(own=stranger.own, learner=learner.own.public, folder=stranger.folder)
    with serving(learner) as served:
        started = time.monotonic()
        with pytest.raises(HandshakeError, match=f"the learner at {served.socket.endpoint} does not know the key of "):
            greet(served, stranger)
        assert time.monotonic() - started < 5.0
        served.until(lambda: served.socket.refusals[Refusal.KEY] == 1, "the refusal is counted")
        assert not served.arrived


def test_an_actor_that_knows_another_learner_or_no_keys_is_told_so(tmp_path: Path) -> None:
    learner, _ = keys_in(tmp_path / "learner")
    _, other = keys_in(tmp_path / "other")
    with serving(learner) as served:
        with pytest.raises(HandshakeError, match=r"does not have the secret key of .*other/learner\.key.*--keys"):
            greet(served, other)
        with pytest.raises(HandshakeError, match="wants keys, and actor a has none: give --keys"):
            greet(served, None)
        served.until(lambda: served.socket.refusals[Refusal.HANDSHAKE] >= 4, "the refusals are counted")
        assert not served.arrived
    with serving(None) as served, pytest.raises(HandshakeError, match=r"or does not encrypt.*transport\.curve"):
        greet(served, other)


def test_without_its_authenticator_a_learner_accepts_nobody(tmp_path: Path) -> None:
    learner, actor = keys_in(tmp_path)
    with serving(learner) as served:
        greet(served, actor)
        assert served.socket._authenticator is not None
        served.socket._authenticator.stop()
        with pytest.raises((HandshakeError, TimeoutError)):
            greet(served, actor, timeout_s=3.0)
        served.socket._authenticator = None
        assert len(served.arrived) == 1


def test_a_message_that_never_ends_is_cut_off_and_the_others_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 MB/s for three seconds, from a peer that has not said hello, while another one asks all the time."""
    monkeypatch.setattr(connections, "IN_FLIGHT_BYTES", 4 << 20)
    process, chunk = psutil.Process(), strangers.frame(bytes(1 << 20), strangers.MORE)
    with serving(None) as served, Honest(served.socket.endpoint, [], Bye(error=None), Ack) as honest:
        before_it = honest.num_answers
        started, before, largest, cuts = time.monotonic(), process.memory_info().rss, 0, 0
        peer = None
        while (elapsed_s := time.monotonic() - started) < 3.0 or peer is not None:  # the last one has seen its end
            if peer is None:
                peer = strangers.connect(served.socket.port)
                strangers.ready(peer, b"endless")
            try:
                peer.sendall(chunk)
            except OSError:
                peer, cuts = None, cuts + 1
            largest = max(largest, process.memory_info().rss - before)
            time.sleep(max(0.0, 0.01 - (time.monotonic() - started - elapsed_s)))
        assert cuts == served.socket.refusals[Refusal.ENDLESS] >= 2
        assert largest < 100 << 20, "5 MB, and what half a second brings, twice at most"
        assert honest.num_answers >= before_it + 20
        assert not any(isinstance(message, WireError) for _, message in served.arrived)


@pytest.mark.parametrize(
    "message",
    [
        heartbeat(dict.fromkeys(range(MAX_LISTED), 1)),
        replace(hello("flood", held=range(MAX_LISTED)), run_id="another", incarnation=0, number=1),
    ],
    ids=["heartbeat", "hello"],
)
def test_a_flood_of_messages_does_not_keep_another_actor_from_its_answers(message: ActorMessage) -> None:
    """Each of them lists as many leases as one may that the learner does not know of, and thus has to cancel."""
    prompts = [Prompt(uid="p", text="", reference="")]
    with LearnerService(Config(), prompts, lambda prompt: [1], FINGERPRINTS, [1]) as service:
        port = int(service.endpoint.rpartition(":")[2])
        with (
            Honest(service.endpoint, [hello("honest")], heartbeat({}), Pulse) as honest,
            Flood(port, [hello("flood")], message) as flood,
        ):
            honest.until(honest.num_answers + 50)
            assert flood.is_on and flood.num_sent > 50


def test_a_message_that_never_ends_is_cut_off_in_a_flood_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """No look counts here at which all that has come is read: a flood may leave none. Who sends whole ones stays."""
    monkeypatch.setattr(connections, "IN_FLIGHT_BYTES", 1 << 20)
    large = Ready(version=0, probe_logprobs=np.zeros(1 << 16, np.float32))
    learner = LearnerSocket("127.0.0.1", 0, 1)
    check = learner._connections.check

    def check_if_behind(now: float, *, is_all_read: bool) -> None:
        if not is_all_read:
            check(now, is_all_read=False)

    monkeypatch.setattr(learner._connections, "check", check_if_behind)
    with Flood(learner.port, [], large, "one") as one, Flood(learner.port, [], large, "two") as two:
        endless = strangers.connect(learner.port)
        strangers.ready(endless, b"endless")
        sending = threading.Thread(target=send_without_end, args=(endless,), daemon=True)
        sending.start()
        deadline = time.monotonic() + 30.0
        while not learner.refusals and time.monotonic() < deadline:
            deque(islice(learner.receive(), 10), maxlen=0)  # a part of what is there
        assert learner.refusals == {Refusal.ENDLESS: 1}
        assert one.is_on and two.is_on and min(one.num_sent, two.num_sent) > 8, "more than the endless one might bring"
        sending.join(10.0)
    learner.close()


def send_without_end(peer: socket.socket) -> None:
    with suppress(OSError):
        while True:
            peer.sendall(strangers.frame(bytes(1 << 18), strangers.MORE))
    peer.close()


def test_of_too_many_connections_the_newest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 5)
    with serving(None) as served:
        crowd = [strangers.connect(served.socket.port) for _ in range(5)]
        for number, peer in enumerate(crowd):
            strangers.ready(peer, f"p{number}".encode())
            peer.sendall(strangers.frame(pack(encode(Bye(error=None))), 0))
        served.until(lambda: len(served.arrived) == 5, "they are there")
        for number in range(1, 4):
            late = strangers.connect(served.socket.port)
            strangers.ready(late, b"late")
            late.sendall(strangers.frame(pack(encode(Bye(error=None))), 0))
            assert strangers.is_closed(late)
            assert served.socket.refusals == {Refusal.CROWD: number}
        for peer in crowd:
            assert not strangers.is_closed(peer, 0.05)


def test_a_message_of_many_frames_from_a_peer_with_a_key_is_skipped(tmp_path: Path) -> None:
    learner, actor = keys_in(tmp_path)
    with serving(learner) as served, zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.CURVE_SERVERKEY, actor.learner)
        dealer.setsockopt(zmq.CURVE_PUBLICKEY, actor.own.public)
        dealer.setsockopt(zmq.CURVE_SECRETKEY, actor.own.secret)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(served.socket.endpoint)
        dealer.send_multipart([b"x"] * 50_000)
        dealer.send(pack(encode(Bye(error="next"))))
        served.until(lambda: len(served.arrived) == 2, "both are there")
        assert "more than one frame" in str(served.arrived[0][1])
        assert served.arrived[1][1] == Bye(error="next")


def test_a_stranger_may_not_send_more_than_a_handshake(tmp_path: Path) -> None:
    learner, actor = keys_in(tmp_path)
    with serving(learner) as served:
        peer = strangers.connect(served.socket.port, b"CURVE")
        peer.sendall(strangers.frame(bytes(1 << 19), strangers.COMMAND)[: 1 << 18])  # within the limit of a frame
        assert strangers.is_closed(peer)
        assert served.socket.refusals[Refusal.STRANGER] == 1
        greet(served, actor)


def test_of_too_many_strangers_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_STRANGERS", 5)
    learner, actor = keys_in(tmp_path)
    with serving(learner) as served:
        crowd = [strangers.connect(served.socket.port, b"CURVE") for _ in range(30)]
        served.until(lambda: served.socket.refusals[Refusal.STRANGER] >= 25, "25 are cut off")
        assert all(strangers.is_closed(peer) for peer in crowd[:25])
        assert not any(strangers.is_closed(peer, 0.05) for peer in crowd[25:])
        greet(served, actor)


def test_every_connection_is_looked_at_in_time_but_not_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of its own: two rounds in steps of a tenth of CHECK_S."""
    learner = LearnerSocket("127.0.0.1", 0, 1)
    crowd = [strangers.connect(learner.port) for _ in range(20)]
    table = learner._connections
    deadline = time.monotonic() + 10.0
    while len(table._peers) < len(crowd):
        assert time.monotonic() < deadline, f"{len(table._peers)} of {len(crowd)} were told of"
        table.follow()
    looks: list[int] = []
    monkeypatch.setattr(table, "_look", lambda descriptor, is_all_read: looks.append(descriptor))
    table._checked_s = 0.0
    for step in range(1, 21):
        before = len(looks)
        table.check(step * connections.CHECK_S / 10)
        assert len(looks) - before <= 3, f"step {step}: two are due"
    assert {looks.count(descriptor) for descriptor in table._peers} <= {1, 2} and len(looks) >= 36
    table.check(3 * connections.CHECK_S)
    assert {looks.count(descriptor) for descriptor in table._peers} <= {2, 3}
    for peer in crowd:
        peer.close()
    learner.close()


def test_strangers_that_come_and_go_do_not_keep_others_from_being_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of its own: while one connection stays, ten come and go in each tenth of CHECK_S."""
    events: deque[tuple[int, int]] = deque([(zmq.EVENT_ACCEPTED, 3)])
    monitor = SimpleNamespace(getsockopt=lambda option: zmq.POLLIN if events else 0)
    router = SimpleNamespace(get_monitor_socket=lambda kinds: monitor, getsockopt=lambda option: 1)

    def told(socket: object) -> dict[str, int]:
        return dict(zip(("event", "value"), events.popleft(), strict=True))

    monkeypatch.setattr(connections, "recv_monitor_message", told)
    table = connections.Connections(router, 1)  # type: ignore[arg-type]
    looks: list[int] = []
    monkeypatch.setattr(table, "_look", lambda descriptor, is_all_read: looks.append(descriptor))
    table._checked_s = 0.0
    for step in range(1, 101):
        table.follow()
        table.check(step * connections.CHECK_S / 10)
        events.extend((kind, 4) for kind in (zmq.EVENT_ACCEPTED, zmq.EVENT_DISCONNECTED) * 10)
    assert looks.count(3) >= 9, "ten rounds are over"


def test_what_may_be_whole_messages_that_wait_is_looked_at_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of a peer, as the kernel would tell of them, at looks before which not all was read."""
    monitor = SimpleNamespace(getsockopt=lambda option: 0)
    router = SimpleNamespace(get_monitor_socket=lambda kinds: monitor, getsockopt=lambda option: 1)
    table = connections.Connections(router, 1)  # type: ignore[arg-type]
    cut: list[int] = []
    monkeypatch.setattr(table, "cut", lambda descriptor, reason: cut.append(descriptor))
    received = 0
    monkeypatch.setattr(table, "_traffic", lambda descriptor: connections._Traffic(1 << 20, received))
    table.delivered(3)
    table._look(3, False)
    for _ in range(5):
        received += 2 * connections.IN_FLIGHT_BYTES
        table._look(3, False)
        table.delivered(3)
        table._look(3, False)
    assert cut == []
    received += 2 * connections.IN_FLIGHT_BYTES
    table._look(3, False)
    assert cut == []
    table._look(3, False)
    assert cut == [3]
    table.delivered(3)
    table._look(3, True)
    received += 2 * connections.IN_FLIGHT_BYTES
    table._look(3, True)
    assert cut == [3, 3]


def test_a_slow_handshake_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "HANDSHAKE_MS", 200)
    with serving(None) as served:
        assert strangers.is_closed(strangers.connect(served.socket.port))


def is_cut_off(peer: socket.socket) -> bool:
    """Whether a peer that goes on sending garbage loses its connection."""
    with suppress(OSError):
        for _ in range(20):
            peer.sendall(strangers.frame(b"\xc1", 0) * 5 * MAX_STRIKES)
            if strangers.is_closed(peer, timeout_s=0.5):
                break
        else:
            return False
    return True


def test_a_flood_of_garbage_is_cut_off_again_and_again() -> None:
    with serving(None) as served:
        for number in range(1, 11):
            peer = strangers.connect(served.socket.port)
            strangers.ready(peer, b"garbage")
            assert is_cut_off(peer), f"round {number}: {served.socket.refusals}"
            assert served.socket.refusals[Refusal.MALFORMED] == number  # and none for what was left over
        greet(served, None)


def test_empty_frames_are_no_messages() -> None:
    with serving(None) as served:
        peer = strangers.connect(served.socket.port)
        strangers.ready(peer, b"empty")
        peer.sendall(strangers.frame(b"", 0) + strangers.frame(b"", strangers.MORE) + strangers.frame(b"", 0))
        served.until(lambda: len(served.arrived) == 2, "both are refused")
        assert all(isinstance(message, WireError) for _, message in served.arrived)
        greet(served, None)


def fill(learner: LearnerSocket) -> tuple[socket.socket, int]:
    """A peer that does not read what it is sent, and how many messages the learner could send to it."""
    peer = strangers.connect(learner.port)
    strangers.ready(peer, b"deaf")
    peer.sendall(strangers.frame(pack(encode(Bye(error=None))), 0))
    arrived: list[tuple[bytes, ActorMessage | WireError]] = []
    while not arrived:
        learner.poll(5.0)
        arrived += learner.receive()
    ((identity, _),) = arrived
    command = WeightsCommand(command_id=1, phase=WeightsPhase.INIT, version=1, payload={"long": "x" * 100_000})
    return peer, sum(takewhile(bool, (learner.send(identity, command) for _ in range(10_000))))


def test_who_has_stopped_reading_is_as_good_as_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "SND_QUEUE", 100)
    learner = LearnerSocket("127.0.0.1", 0, 1)
    peer, num_sent = fill(learner)
    assert 100 <= num_sent < 10_000
    peer.close()
    learner.close()


def test_a_peer_that_ends_while_the_learner_closes_does_not_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Again and again: once in dozens it keeps a socket that is told only then how long it may linger."""
    monkeypatch.setattr(transport, "SND_QUEUE", 100)
    monkeypatch.setattr(transport, "LINGER_MS", 100)
    for _ in range(40):
        learner = LearnerSocket("127.0.0.1", 0, 1)
        peer, _ = fill(learner)
        closing = threading.Thread(
            target=lambda *ends: [end.close() for end in ends], args=(peer, learner), daemon=True
        )
        closing.start()
        closing.join(10.0)
        assert not closing.is_alive(), "the learner's socket does not close"


def test_an_actor_that_connects_again_takes_the_place_of_its_dead_connection() -> None:
    """The first connection stays open, as TCP leaves it when a cable is cut."""
    with serving(None) as served:
        dead, alive = (strangers.connect(served.socket.port) for _ in range(2))
        for number, peer in enumerate((dead, alive)):
            strangers.ready(peer, b"same")
            peer.sendall(strangers.frame(pack(encode(Bye(error=None))), 0))
            served.until(lambda count=number + 1: len(served.arrived) == count, "it has come")  # type: ignore[misc]
        assert {identity for identity, _ in served.arrived} == {b"same"}
        alive.settimeout(5.0)
        answer = b""
        while b"Ack" not in answer:
            more = alive.recv(1 << 16)
            assert more, "the new connection has ended"
            answer += more


def test_no_message_is_larger_than_the_limit_in_the_library_itself() -> None:
    with serving(None) as served:
        peer = strangers.connect(served.socket.port)
        strangers.ready(peer, b"large")
        peer.sendall(strangers.frame(b"", 0)[:1] + ((1 << 20) + 1).to_bytes(8, "big"))
        assert strangers.is_closed(peer)
        largest = pack(encode(Ready(version=0, probe_logprobs=np.zeros((1 << 18) - 100, np.float32))))
        assert len(largest) <= 1 << 20
        peer = strangers.connect(served.socket.port)
        strangers.ready(peer, b"fits")
        peer.sendall(strangers.frame(largest, 0))
        served.until(lambda: len(served.arrived) == 1, "the largest message comes")
        assert isinstance(served.arrived[0][1], Ready)

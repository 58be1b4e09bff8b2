"""RUN/control from outside: whatever comes over it, the supervisor goes on, and so does who asks it."""

import json
import os
import resource
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.config import ConfigError
from common.control import (
    DEAF_S,
    FILE,
    MAX_OPEN,
    PACKET_BYTES,
    REQUEST_S,
    ControlSocket,
    Status,
    fitting,
    status,
)
from common.types import JSON

LIMIT_S = 10.0  # for what takes a moment


class Supervisor:
    """One that answers with what it was asked, as its like does what it does not know."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.selector = selectors.DefaultSelector()
        self.control = ControlSocket(run_dir, self.selector, self.handle)

    def handle(self, request: JSON) -> JSON:
        if request == {"command": "status"}:
            return {"wanted": 1, "active": 1, "given_up": []}
        raise ConfigError(f"unknown: {request!r}")

    def turn(self) -> None:
        """All that is there by now."""
        while ready := self.selector.select(0.0):
            for key, _ in ready:
                assert isinstance(key.fileobj, socket.socket)
                self.control.hear(key.fileobj)

    def connect(self) -> socket.socket:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        peer.settimeout(LIMIT_S)
        peer.connect(str(self.run_dir / FILE))
        return peer

    def ask(self, packet: bytes) -> JSON:
        with self.connect() as peer:
            self.turn()
            peer.send(packet)
            self.turn()
            return json.loads(peer.recv(PACKET_BYTES))

    @property
    def num_watched(self) -> int:
        return len(self.selector.get_map())


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path)
    yield supervisor
    supervisor.control.close()
    supervisor.selector.close()
    assert not (tmp_path / FILE).exists()


GOOD = b'{"command": "status"}'


@pytest.mark.parametrize(
    ("packet", "words"),
    [
        (b"[" * 60_000, "nested too deeply"),
        *((b"[" * depth + b"]" * depth, "") for depth in (100, 900, 960, 990)),
        (b'"' + b"\x7f" * 60_000 + b'"', "the answer has"),  # five bytes each when it is quoted
        (b"\xff", "utf-8"),
        (b"{", "Expecting property name"),
        (b"1" * 5000, "integer string conversion"),
        (b"[NaN]", "unknown: [nan]"),
    ],
    ids=lambda value: str(len(value)),
)
def test_what_is_no_request_is_answered_with_a_sentence(supervisor: Supervisor, packet: bytes, words: str) -> None:
    reply = supervisor.ask(packet)
    assert set(reply) == {"error"} and words in reply["error"]
    assert supervisor.ask(GOOD)["wanted"] == 1
    assert supervisor.num_watched == 1


def test_who_hangs_up_before_it_asks_or_before_it_is_answered_leaves_nothing_behind(supervisor: Supervisor) -> None:
    supervisor.connect().close()
    with supervisor.connect() as peer:
        peer.send(GOOD)
    supervisor.turn()
    assert supervisor.num_watched == 1


def test_who_connects_and_does_not_ask_is_hung_up_on(supervisor: Supervisor) -> None:
    peer = supervisor.connect()
    supervisor.turn()
    due = supervisor.control.tend(time.monotonic())
    assert due <= time.monotonic() + REQUEST_S
    assert supervisor.control.tend(due - 0.001) == due and supervisor.num_watched == 2
    assert supervisor.control.tend(due) == float("inf") and supervisor.num_watched == 1
    assert peer.recv(1) == b""


def test_of_too_many_connections_the_oldest_go(supervisor: Supervisor) -> None:
    peers = [supervisor.connect() for _ in range(MAX_OPEN + 2)]
    supervisor.turn()
    supervisor.control.tend(time.monotonic())
    assert supervisor.num_watched == 1 + MAX_OPEN
    assert [len(peer.recv(1)) for peer in peers[:2]] == [0, 0]
    peers[2].send(GOOD)
    supervisor.turn()
    assert json.loads(peers[2].recv(PACKET_BYTES))["active"] == 1


def test_without_a_descriptor_left_it_listens_again_later(supervisor: Supervisor) -> None:
    peer = supervisor.connect()
    peer.send(GOOD)
    _, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.open(os.devnull, os.O_RDONLY)
    os.close(spare)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))  # the lowest that is free
    try:
        supervisor.turn()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert supervisor.num_watched == 0
    due = supervisor.control.tend(time.monotonic())
    assert due <= time.monotonic() + DEAF_S
    supervisor.control.tend(due)
    supervisor.turn()
    assert json.loads(peer.recv(PACKET_BYTES))["active"] == 1


def test_lines_that_do_not_fit_into_an_answer_are_counted() -> None:
    lines = [f"actor-{i} ended: \U0001f600" for i in range(5000)]
    told = fitting(lines)
    assert told[:-1] == lines[: len(told) - 1] and told[-1] == f"and {5000 - len(told) + 1} more"
    assert PACKET_BYTES // 2 < len(json.dumps({"wanted": 5000, "active": 0, "given_up": told})) <= PACKET_BYTES
    assert fitting(lines[:3]) == lines[:3]


def served_once(run_dir: Path, answer: bytes, ask: Callable[[], object]) -> object:
    """What `ask` returns when it is answered so."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.settimeout(LIMIT_S)
        listener.bind(str(run_dir / FILE))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(PACKET_BYTES)
                connection.send(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            return ask()
        finally:
            thread.join(LIMIT_S)


def test_an_answer_that_is_cut_off_is_an_error_that_who_asks_expects(tmp_path: Path) -> None:
    whole = json.dumps({"wanted": 3, "active": 0, "given_up": ["x" * 1000]}).encode()
    assert served_once(tmp_path, whole, lambda: status(tmp_path)) == Status(wanted=3, active=0, given_up=("x" * 1000,))
    (tmp_path / FILE).unlink()
    with pytest.raises(ConfigError, match="an answer that cannot be read"):
        served_once(tmp_path, whole[:500], lambda: status(tmp_path))

"""One who watches a run: asks its learner once a second how the run stands, and never waits for the answer.

observer = Observer(find, keys, max_message_mb)
status = observer.look(now)     as often as one likes
"""

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import zmq
from zmq.utils.monitor import recv_monitor_message

from common.keys import ActorKeys
from common.transport import HANDSHAKES, Handshakes, connect, open_dealer
from common.types import Message, Refused, RunStatus, Stop, Watch
from common.wire import WireError, decode, encode, pack, unpack

ASK_S = 1.0
CONNECTING_S = 0.1  # between two looks at whether it is connected
LOST_S = 3.0  # of silence, after which the address is looked up again
NAME = "observer"  # also of the keys that are its own, if the run has such (common/keys.py)


def endpoint_of(run_dir: Path) -> str | None:
    """Where the learner of a run is, by RUN/endpoint; None: it has not written it yet."""
    path = run_dir / "endpoint"
    return path.read_text().strip() if path.is_file() else None


class RunOver(Exception):
    """The learner says that the run ends; why."""


class Observer:
    """The DEALER of an observer, a context manager. One thread.

    Args:
        find: where the learner is now; None: nobody has written that yet.
        keys: as an actor's; called when the learner is found, which has made its own by then.
    """

    def __init__(
        self, find: Callable[[], str | None], keys: Callable[[], ActorKeys | None], max_message_mb: int
    ) -> None:
        self.endpoint: str | None = None
        self.status: RunStatus | None = None
        self.heard_s = time.monotonic()  # at first the time of the beginning
        self._find = find
        self._keys = keys
        self._max_bytes = max_message_mb << 20
        self._asked_s = 0.0
        self._is_connected = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._hang_up()
        self._context.term()

    def look(self, now: float) -> RunStatus | None:
        """The last status that has come. Asks for the next one when it is time.

        Raises RunOver; WireError when the learner refuses to be watched, or speaks another protocol; ConfigError
        (HandshakeError is one) for keys that do not fit.
        """
        if self._socket is None or now - self.heard_s > LOST_S:
            self._go_to(self._find())
        if self._socket is not None:
            self._read(self._socket, now)
            if now - self._asked_s >= ASK_S:
                self._ask(self._socket, now)
        return self.status

    def wait(self, timeout_s: float) -> None:
        """Until something has come, there may be something to ask, or the time is over."""
        if not self._is_connected:
            timeout_s = min(timeout_s, CONNECTING_S)
        if self._socket is None:
            time.sleep(timeout_s)
        else:
            self._socket.poll(round(timeout_s * 1000))

    def _go_to(self, endpoint: str | None) -> None:
        if endpoint is None or endpoint == self.endpoint:
            return
        self._hang_up()
        keys = self._keys()
        self.endpoint, self._handshakes = endpoint, Handshakes(NAME, keys)
        self._socket = open_dealer(self._context, endpoint, NAME, self._max_bytes, keys)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a learner that is not there
        self._socket.setsockopt(zmq.LINGER, 0)
        self._monitor = self._socket.get_monitor_socket(HANDSHAKES)
        connect(self._socket, endpoint, self._context)

    def _ask(self, channel: zmq.Socket[bytes], now: float) -> None:
        try:
            channel.send(pack(encode(Watch())), zmq.NOBLOCK)
        except zmq.Again:
            self._is_connected = False  # not yet, or not any more
            return
        self._is_connected, self._asked_s = True, now

    def _read(self, channel: zmq.Socket[bytes], now: float) -> None:
        assert self._monitor is not None and self.endpoint is not None
        while self._monitor.poll(0):
            self._handshakes.note(recv_monitor_message(self._monitor)["event"], self.endpoint)
        while channel.poll(0):
            self._take(channel.recv_multipart(zmq.NOBLOCK)[0], now)

    def _take(self, frame: bytes, now: float) -> None:
        message: Message = decode(unpack(frame), self._max_bytes)
        self.heard_s = now
        match message:
            case RunStatus():
                self.status = message
            case Stop(reason=reason):
                raise RunOver(reason)
            case Refused(reason=reason):
                raise WireError(f"the learner at {self.endpoint} refuses to be watched: {reason}")

    def _hang_up(self) -> None:
        if self._socket is not None and self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close(linger=0)
            self._socket = self._monitor = None

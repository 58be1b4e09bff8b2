"""The TCP connections of the learner's ROUTER, as libzmq's monitor and the kernel tell of them.

libzmq bounds a frame (MAXMSGSIZE) and the number of whole messages that wait (RCVHWM). It bounds neither what it keeps
of a message whose last frame never comes, nor how many connections there are, in the handshake or after it. The kernel
knows how much each has brought; whoever exceeds what an honest peer can need is cut off, and may connect again.
"""

import logging
import socket
import struct
import time
from collections import Counter, OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import NamedTuple

import zmq
from zmq.utils.monitor import recv_monitor_message

logger = logging.getLogger(__name__)

MAX_STRANGERS = 1024  # connections in the handshake; the oldest go first
MAX_CONNECTIONS = 4096  # after it, twice as many as there may be actors; the newest go first
STRANGER_BYTES = 16 << 10  # a handshake takes below 1 KiB
IN_FLIGHT_BYTES = 16 << 20  # may lie in the kernel and in libzmq, as whole messages that nobody has seen yet
MAX_STRIKES = 10  # malformed messages of one connection
CHECK_S = 0.25  # between two looks at one connection

# What a server sends before it accepts a client (ZMTP 3.1): greeting 64, with CURVE WELCOME 170, and one for SYN.
_NULL_REPLY_BYTES = 64 + 1
_CURVE_REPLY_BYTES = 64 + 170 + 1
_TCP_INFO_BYTES = struct.Struct("@120xQQ")  # struct tcp_info, linux/tcp.h: bytes_acked, bytes_received
_FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | _FAILED


class Refusal(StrEnum):
    """Why a connection was not made, or cut off."""

    KEY = "refused_keys"  # no key of an actor that may take part
    HANDSHAKE = "failed_handshakes"  # another learner's key, no encryption, another protocol, or too slow
    STRANGER = "cut_strangers"  # too many of them, or too much sent before the handshake
    CROWD = "cut_crowd"  # more than MAX_CONNECTIONS that got through the handshake
    ENDLESS = "cut_endless"  # more bytes than the largest message takes, and no message
    MALFORMED = "cut_malformed"  # MAX_STRIKES messages that are none


class _Traffic(NamedTuple):
    sent: int  # bytes that the peer has acknowledged
    received: int  # bytes


@dataclass
class _Peer:
    """`base`: bytes received by the check after its last message; None: that check is still to come."""

    base: int | None = None
    strikes: int = 0
    is_known: bool = False  # the handshake is over
    is_suspect: bool = False  # it has brought too much, or whole messages that were not read yet
    since_s: float = field(default_factory=time.monotonic)


class Connections:
    """By file descriptor. Used by the thread that owns the socket.

    A descriptor can be closed and used again at any time: it is looked at anew each time, and touched only while it is
    a connection to our port. The worst that a mix-up does is to cut off a connection that connects again.
    """

    def __init__(self, router: zmq.Socket[bytes], max_bytes: int) -> None:
        """`router` must have its options, but not be bound yet; then `port` has to be set."""
        self.port = 0
        self.monitor = router.get_monitor_socket(_EVENTS)
        self._reply_bytes = _CURVE_REPLY_BYTES if router.getsockopt(zmq.CURVE_SERVER) else _NULL_REPLY_BYTES
        self.refusals: Counter[Refusal] = Counter()
        self._max_bytes = max_bytes + IN_FLIGHT_BYTES
        self._peers: OrderedDict[int, _Peer] = OrderedDict()  # first who was not looked at for longest
        self._checked_s = self._limited_s = time.monotonic()
        self._max_queued = int(router.getsockopt(zmq.RCVHWM))
        self._left_over: dict[int, int] = {}  # of who was cut off: messages that may still be read, at most
        self._ended: set[int] = set()  # descriptors that were closed since the last `check`

    def __len__(self) -> int:
        return len(self._peers)

    def follow(self) -> None:
        """Read what the monitor has told since the last call."""
        while int(self.monitor.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            event = recv_monitor_message(self.monitor)
            kind, value = event["event"], event["value"]
            if kind == zmq.EVENT_ACCEPTED:
                self._peers.pop(value, None)
                self._peers[value] = _Peer()
            elif kind == zmq.EVENT_DISCONNECTED:
                self._peers.pop(value, None)
                self._ended.add(value)
            elif kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self.refusals[Refusal.KEY] += 1
            elif kind & _FAILED:
                self.refusals[Refusal.HANDSHAKE] += 1

    def delivered(self, descriptor: int) -> None:
        """A whole message has come over this connection, which may still be to be told of."""
        peer = self._peers.setdefault(descriptor, _Peer())
        peer.base, peer.is_known, peer.is_suspect = None, True, False

    def strike(self, descriptor: int) -> None:
        """What has come was no message.

        One that was cut off may have had more of them on their way, which come when its descriptor is another's, and
        under another identity when it has connected again (ROUTER_HANDOVER): they count for nobody.
        """
        if num_left := self._left_over.get(descriptor, 0):
            self._left_over[descriptor] = num_left - 1
        elif (peer := self._peers.get(descriptor)) is not None:
            peer.strikes += 1
            if peer.strikes == MAX_STRIKES:
                self._left_over[descriptor] = self._max_queued
                self._ended.discard(descriptor)  # that was the one before it
                self.cut(descriptor, Refusal.MALFORMED)

    def check(self, now: float, *, is_all_read: bool = True) -> None:
        """Look at as many connections as are due by `now`, a monotonic time, and cut off who sends too much: each once
        in CHECK_S, since all at once would keep everybody waiting.

        To be called when all messages that have come are read: what somebody has brought since its last one is a part
        of the next. Under a flood that may never be. Then it is enough that since the last call a message of everybody
        was read who had one waiting: two looks are too much without one in between.
        """
        for descriptor in self._ended:
            self._left_over.pop(descriptor, None)
        self._ended.clear()
        each_s = CHECK_S / max(1, len(self._peers))
        num_due = min(int((now - self._checked_s) / each_s), len(self._peers))
        if not num_due:
            return
        self._checked_s = max(self._checked_s + num_due * each_s, now - CHECK_S)
        for descriptor in list(islice(self._peers, num_due)):
            self._peers.move_to_end(descriptor)
            self._look(descriptor, is_all_read)
        if now - self._limited_s >= CHECK_S:
            self._limited_s = now
            self._limit_strangers()
            self._limit_crowd()

    def _look(self, descriptor: int, is_all_read: bool) -> None:
        peer = self._peers[descriptor]
        if (traffic := self._traffic(descriptor)) is None:
            del self._peers[descriptor]  # closed
            return
        peer.is_known = peer.is_known or traffic.sent > self._reply_bytes
        if peer.base is None:
            peer.base = traffic.received
        if not peer.is_known and traffic.received > STRANGER_BYTES:
            self.cut(descriptor, Refusal.STRANGER)
        elif traffic.received - peer.base > self._max_bytes:
            if is_all_read or peer.is_suspect:
                self.cut(descriptor, Refusal.ENDLESS)
            peer.is_suspect = True

    def _limit_strangers(self) -> None:
        strangers = [descriptor for descriptor, peer in self._peers.items() if not peer.is_known]
        strangers.sort(key=lambda descriptor: self._peers[descriptor].since_s)
        for descriptor in strangers[: max(0, len(strangers) - MAX_STRANGERS)]:
            self._look(descriptor, False)  # the handshake may be over by now
            if (peer := self._peers.get(descriptor)) is not None and not peer.is_known:
                self.cut(descriptor, Refusal.STRANGER)

    def _limit_crowd(self) -> None:
        crowd = [descriptor for descriptor, peer in self._peers.items() if peer.is_known]
        crowd.sort(key=lambda descriptor: self._peers[descriptor].since_s)
        for descriptor in crowd[MAX_CONNECTIONS:]:
            self._look(descriptor, False)  # it may have been closed by now
            self.cut(descriptor, Refusal.CROWD)

    def cut(self, descriptor: int, reason: Refusal) -> None:
        """End the connection; libzmq frees what it kept of it."""
        if self._peers.pop(descriptor, None) is None:
            return
        self.refusals[reason] += 1
        if (connection := self._borrowed(descriptor)) is None:
            return
        with suppress(OSError):
            logger.warning("the connection from %s is cut off: %s", connection.getpeername()[:2], reason)
            connection.shutdown(socket.SHUT_RDWR)
        connection.detach()

    def _traffic(self, descriptor: int) -> _Traffic | None:
        """None when it is no connection to our port (any more)."""
        if (connection := self._borrowed(descriptor)) is None:
            return None
        try:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES.size)
            return _Traffic(*_TCP_INFO_BYTES.unpack(info))
        except OSError:
            return None
        finally:
            connection.detach()

    def _borrowed(self, descriptor: int) -> socket.socket | None:
        """libzmq's descriptor as a socket, which the caller detaches; None when it is no connection to our port."""
        try:
            connection = socket.socket(fileno=descriptor)
        except OSError:
            return None
        with suppress(OSError):
            if connection.type == socket.SOCK_STREAM and connection.getsockname()[1:2] == (self.port,):
                return connection
        connection.detach()
        return None

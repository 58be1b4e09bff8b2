"""The sockets: a ROUTER in the learner's service thread, a DEALER in each actor; both speak common/wire.py.

An actor's ZeroMQ identity is its name and a random suffix: two connections of one name never share a mailbox, and
nobody can guess the identity of another. Nothing is dropped: where the learner's queue of an actor is full, the actor's
own grows, and that is bounded by its leases.
"""

import asyncio
import errno
import hashlib
import json
import secrets
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast, get_args

import zmq
import zmq.asyncio
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from common.addresses import in_url
from common.config import ConfigError
from common.connections import Connections, Refusal
from common.keys import ActorKeys, LearnerKeys
from common.types import ActorMessage, LearnerMessage, Message
from common.wire import WireError, decode, encode, pack, unpack

LINGER_MS = 3000  # how long a closed socket may still deliver what was sent: Stop, Bye, the last group
MESSAGES_PER_TURN = 1000  # read at once, so that a flood does not keep the learner from sending
BYTES_PER_TURN = 64 << 20  # the same
FRAMES_PER_TURN = 10_000  # of a message that has too many of them, skipped at once
ENCRYPTION_BYTES = 64  # more than CURVE adds to a message, which libzmq counts when it compares with the limit
RCV_QUEUE = 64  # messages of one actor that wait to be read; then its TCP connection waits
SND_QUEUE = 100_000  # messages that an actor has not read: it is given up
HANDSHAKE_MS = 10_000  # longest handshake
MAX_HANDSHAKES = 3  # that fail one after another, before an actor gives up
RECONNECT_MS = (100, 2000)  # first and longest pause before an actor connects again

_DOMAIN = "async-vapo"  # of ZAP, the protocol by which libzmq asks whether a key is allowed
HANDSHAKES = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
)
SomeSocket = TypeVar("SomeSocket", bound=zmq.Socket[Any])
_VOLATILE_KEYS = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}


def model_fingerprints(path: str | Path) -> tuple[str, str]:
    """SHA-256 of a model folder's architecture (config.json less volatile keys), and of its tokenizer files.

    Raises ConfigError when the folder lacks either.
    """
    folder = Path(path)
    try:
        architecture = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path {str(path)!r} has no readable config.json; name a Hugging Face folder"
        ) from error
    stable = {key: value for key, value in architecture.items() if key not in _VOLATILE_KEYS}
    present = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not present:
        raise ConfigError(f"model.path {str(path)!r} has no tokenizer files; save the tokenizer there too")
    tokenizer = hashlib.sha256()
    for file in present:
        tokenizer.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return hashlib.sha256(json.dumps(stable, sort_keys=True).encode()).hexdigest(), tokenizer.hexdigest()


class HandshakeError(ConfigError):
    """Learner and actor do not accept each other; what to do about it."""


class ConnectionRenewed(Exception):
    """libzmq has connected again by itself, under the same identity: neither side takes the other for lost, but what
    was on its way is lost, in either direction."""


class LearnerSocket:
    """The ROUTER. One thread binds, polls, receives, sends and closes; any thread may call `wake`.

    With `keys` only actors whose keys they hold get through a handshake; what others send is never decoded. What a peer
    can make this process keep is bounded: RCV_QUEUE messages of max_message_mb, and see common/connections.py.
    `wake` ends a `poll` at once: what another thread has put down to be sent leaves without a polling delay.
    """

    def __init__(self, host: str, port: int, max_message_mb: int, keys: LearnerKeys | None = None) -> None:
        self._max_bytes = max_message_mb << 20
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator = None if keys is None else _start_authenticator(self._context, keys)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a send to nobody is an error, not a silent drop
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # who connects again does not wait for a dead connection's end
        _limit(self._socket, self._max_bytes, RCV_QUEUE, SND_QUEUE, is_encrypted=keys is not None)
        self._socket.setsockopt(zmq.IPV6, int(":" in host))
        if keys is not None:
            _require_keys(self._socket, keys)
        self._connections = Connections(self._socket, self._max_bytes)
        try:
            self._socket.bind(f"tcp://{in_url(host)}:{port or '*'}")
        except zmq.ZMQError as error:
            self._release(linger_ms=0)
            raise ConfigError(_bind_sentence(host, port, error)) from error
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)  # as bound; a wildcard stays one
        self.port = self._connections.port = int(self.endpoint.rpartition(":")[2])
        self._num_read = 0  # messages since the last look at connections
        self._is_skipping = False  # the rest of a message of many frames
        self._awake, self._waker = socket.socketpair()
        for end in (self._awake, self._waker):
            end.setblocking(False)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._connections.monitor, zmq.POLLIN)
        self._poller.register(self._awake.fileno(), zmq.POLLIN)

    @property
    def refusals(self) -> Counter[Refusal]:
        """Connections that were refused or cut off, by reason."""
        return self._connections.refusals

    def wake(self) -> None:
        try:
            self._waker.send(b"\0")
        except BlockingIOError:
            return  # thousands of wake-ups are unread already: the thread is going to look
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.EPIPE):  # closed: nobody left to wake
                raise

    def poll(self, timeout_s: float) -> None:
        """Return when a message is there, when woken, or after timeout_s."""
        ready = dict(self._poller.poll(max(0, round(timeout_s * 1000))))
        if self._awake.fileno() in ready:
            self._awake.recv(1 << 16)

    def receive(self) -> Iterator[tuple[bytes, ActorMessage | WireError]]:
        """What has arrived, with its sender; a WireError stands for what is no message.

        At most MESSAGES_PER_TURN, and of BYTES_PER_TURN, taken from the senders in turn.
        """
        self._connections.follow()
        if self._num_read > len(self._connections):  # each of them had its turn: what is left unread is a flood
            self._check(is_all_read=False)
        num_bytes = 0
        for _ in range(MESSAGES_PER_TURN):
            try:
                identity, frame = self._next_frame()
            except zmq.Again:
                self._check(is_all_read=True)
                return
            num_bytes += len(frame)
            self._num_read += 1
            yield identity, self._decoded(frame)
            if num_bytes > BYTES_PER_TURN:
                return

    def _check(self, *, is_all_read: bool) -> None:
        self._num_read = 0
        self._connections.check(time.monotonic(), is_all_read=is_all_read)

    def _next_frame(self) -> tuple[bytes, zmq.Frame]:
        """Sender and first frame of the next message. Raises zmq.Again when there is none yet."""
        for _ in range(FRAMES_PER_TURN if self._is_skipping else 0):
            self._is_skipping = bool(self._socket.recv(zmq.NOBLOCK, copy=False).more)
            if not self._is_skipping:
                break
        if self._is_skipping:
            raise zmq.Again
        identity = self._socket.recv(zmq.NOBLOCK)
        frame = self._socket.recv(zmq.NOBLOCK, copy=False)  # a message has one at least
        self._is_skipping = bool(frame.more)
        return identity, frame

    def _decoded(self, frame: zmq.Frame) -> ActorMessage | WireError:
        descriptor = int(frame.get(zmq.SRCFD))
        self._connections.delivered(descriptor)
        try:
            if frame.more:
                raise WireError("a message of more than one frame")
            message = decode(unpack(frame.buffer), self._max_bytes)
            if not isinstance(message, get_args(ActorMessage)):
                raise WireError(f"{type(message).__name__} is a message of the learner, not of an actor")
            return cast(ActorMessage, message)
        except WireError as error:
            self._connections.strike(descriptor)
            return error

    def send(self, identity: bytes, message: LearnerMessage) -> bool:
        """False when no peer of that identity is connected, or when it has stopped reading. Raises WireError when the
        message is larger than an actor takes."""
        packed = _packed(message, self._max_bytes)
        try:
            self._socket.send_multipart([identity, packed], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    def close(self) -> None:
        """Close; what was sent still gets LINGER_MS to leave."""
        self._release(LINGER_MS)
        self._awake.close()
        self._waker.close()

    def _release(self, linger_ms: int) -> None:
        self._socket.disable_monitor()
        self._connections.monitor.close(linger=0)
        self._socket.close(linger=linger_ms)
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()


class ActorConnection:
    """The DEALER, an async context manager. It reconnects by itself, says so, and delivers what was sent meanwhile.

    With `keys` it speaks to the learner of that key and to nobody else.
    """

    def __init__(self, endpoint: str, name: str, max_message_mb: int, keys: ActorKeys | None = None) -> None:
        self.endpoint = endpoint
        self.name = name
        self._max_bytes = max_message_mb << 20
        self._keys = keys
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._handshakes = Handshakes(f"actor {name}", keys)

    async def __aenter__(self) -> Self:
        self._socket = self._connected()
        return self

    def reopen(self, endpoint: str) -> None:
        """A new connection, because the old one may be half open, or the learner elsewhere. What the old one had not
        delivered is lost."""
        self._close(linger_ms=0)
        self.endpoint = endpoint
        self._socket = self._connected()

    def _close(self, linger_ms: int) -> None:
        self._channel.disable_monitor()
        self._monitor.close(linger=0)
        self._channel.close(linger=linger_ms)

    def _connected(self) -> zmq.asyncio.Socket:
        channel = open_dealer(self._context, self.endpoint, self.name, self._max_bytes, self._keys)
        self._has_met = False  # the learner, over this socket
        self._monitor = channel.get_monitor_socket(HANDSHAKES)
        connect(channel, self.endpoint, self._context)
        self._poller = zmq.asyncio.Poller()
        self._poller.register(channel, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        return channel

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._socket is not None:
            self._close(0 if isinstance(error, HandshakeError) else LINGER_MS)
            self._socket = None
        await asyncio.to_thread(self._context.term)  # blocks while it lingers: not on the event loop

    async def send(self, message: ActorMessage) -> None:
        """Queue the message. Raises WireError when it is larger than the learner takes."""
        await self._channel.send(_packed(message, self._max_bytes), copy=False)

    async def receive(self, timeout_s: float) -> LearnerMessage:
        """The next message. Raises TimeoutError naming the learner's endpoint, HandshakeError, WireError, or
        ConnectionRenewed before the first message of another connection than that of the greeting."""
        deadline = time.monotonic() + timeout_s
        channel = self._channel
        while True:
            # poll before recv: cancelling a poll loses nothing, cancelling a recv may lose a message
            ready = dict(await self._poller.poll(max(0, round((deadline - time.monotonic()) * 1000))))
            if self._monitor in ready:
                event = (await recv_monitor_message(self._monitor))["event"]
                self._handshakes.note(event, self.endpoint)
                if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    is_renewed, self._has_met = self._has_met, True
                    if is_renewed:
                        raise ConnectionRenewed
            elif channel in ready:
                break
            elif time.monotonic() >= deadline:
                raise TimeoutError(f"{self.name!r} heard nothing from the learner at {self.endpoint} for {timeout_s} s")
        frames = await channel.recv_multipart(copy=False)
        message = decode(unpack(frames[0].buffer), self._max_bytes)
        if not isinstance(message, get_args(LearnerMessage)):
            raise WireError(f"{type(message).__name__} is a message of an actor, not of the learner")
        return cast(LearnerMessage, message)

    @property
    def _channel(self) -> zmq.asyncio.Socket:
        assert self._socket is not None, "use `async with ActorConnection(...)`"
        return self._socket


class Handshakes:
    """What the monitor of a DEALER tells of its attempts to connect: when there is no use in more of them."""

    def __init__(self, who: str, keys: ActorKeys | None) -> None:
        self._who = who
        self._keys = keys
        self._was_connected = False
        self._failures = 0  # one after another

    def note(self, event: int, endpoint: str) -> None:
        """Raises HandshakeError when connecting again is of no use."""
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._was_connected, self._failures = True, 0
            return
        self._failures += 1
        place = f"the learner at {endpoint}"
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and self._keys is not None:
            raise HandshakeError(
                f"{place} does not know the key of {self._who}: put the public key "
                f"{self._keys.own.public.decode()} (of {self._keys.folder}) as a *.key file into the folder actors of "
                "the learner's keys"
            )
        is_final = event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL  # libzmq does not try again
        if not is_final and (self._was_connected or self._failures < MAX_HANDSHAKES):
            return  # a learner that just ends looks alike
        if self._keys is None:
            raise HandshakeError(f"{place} wants keys, and {self._who} has none: give --keys, a copy of RUN/keys")
        raise HandshakeError(
            f"{place} does not have the secret key of {self._keys.folder / 'learner.key'}, or does not encrypt: give "
            "--keys a copy of its own keys, or set transport.curve on both sides alike"
        )


def open_dealer(
    context: zmq.Context[SomeSocket], endpoint: str, name: str, max_bytes: int, keys: ActorKeys | None
) -> SomeSocket:
    """A DEALER with all its options, which is still to be connected."""
    channel = context.socket(zmq.DEALER)
    channel.setsockopt(zmq.IDENTITY, f"{name[:200]}#{secrets.token_hex(12)}".encode()[-255:])
    channel.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS[0])
    channel.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MS[1])
    _limit(channel, max_bytes, 0, 0, is_encrypted=keys is not None)
    channel.setsockopt(zmq.IPV6, int("[" in endpoint))
    if keys is not None:
        channel.setsockopt(zmq.CURVE_SERVERKEY, keys.learner)
        channel.setsockopt(zmq.CURVE_PUBLICKEY, keys.own.public)
        channel.setsockopt(zmq.CURVE_SECRETKEY, keys.own.secret)
    return channel


def connect(channel: zmq.Socket[Any], endpoint: str, context: zmq.Context[Any]) -> None:
    try:
        channel.connect(endpoint)
    except zmq.ZMQError as error:
        context.destroy(linger=0)
        raise ConfigError(f"cannot connect to {endpoint!r} ({error}); give tcp://HOST:PORT") from None


def _start_authenticator(context: zmq.Context[zmq.Socket[bytes]], keys: LearnerKeys) -> ThreadAuthenticator:
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve_callback(_DOMAIN, credentials_provider=keys)
    return authenticator


def _require_keys(router: zmq.Socket[bytes], keys: LearnerKeys) -> None:
    router.setsockopt(zmq.CURVE_SERVER, 1)
    router.setsockopt(zmq.CURVE_PUBLICKEY, keys.own.public)
    router.setsockopt(zmq.CURVE_SECRETKEY, keys.own.secret)
    router.setsockopt_string(zmq.ZAP_DOMAIN, _DOMAIN)
    router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without its authenticator it accepts nobody, instead of everybody


def _packed(message: Message, max_bytes: int) -> bytes:
    """Raises WireError above the limit: the other side would end the connection, again after every reconnect."""
    packed = pack(encode(message))
    if len(packed) > max_bytes:
        limit = f"transport.max_message_mb={max_bytes >> 20} holds {max_bytes}"
        raise WireError(f"{type(message).__name__} of {len(packed)} bytes: {limit}")
    return packed


def _limit(
    channel: zmq.Socket[Any] | zmq.asyncio.Socket, max_bytes: int, receive: int, send: int, *, is_encrypted: bool
) -> None:
    channel.setsockopt(zmq.MAXMSGSIZE, max_bytes + (ENCRYPTION_BYTES if is_encrypted else 0))
    channel.setsockopt(zmq.RCVHWM, receive)
    channel.setsockopt(zmq.SNDHWM, send)
    channel.setsockopt(zmq.LINGER, LINGER_MS)  # a connection that is ending when the socket closes keeps this one
    channel.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    channel.setsockopt(zmq.TCP_KEEPALIVE, 1)  # a dead connection is found, and its memory freed, in two minutes
    channel.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 60)
    channel.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 15)
    channel.setsockopt(zmq.TCP_KEEPALIVE_CNT, 4)


def _bind_sentence(host: str, port: int, error: zmq.ZMQError) -> str:
    address = f"tcp://{host}:{port}"
    if error.errno == zmq.EADDRINUSE:
        return f"cannot listen on {address}: the port is in use; set transport.port to another, or to 0 for any"
    return f"cannot listen on {address} ({error}); set transport.host to an address of this machine"

"""The sockets: a ROUTER in the learner's service thread, a DEALER in each actor; both speak common/wire.py.

An actor's ZeroMQ identity is its name and a random suffix: two processes of one name never share a mailbox.
Nothing is dropped at a high-water mark (there is none): what is in flight is bounded by leases.
"""

import asyncio
import errno
import hashlib
import json
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast, get_args

import zmq
import zmq.asyncio

from common.addresses import in_url
from common.config import ConfigError
from common.types import ActorMessage, LearnerMessage
from common.wire import WireError, decode, encode

LINGER_MS = 3000  # how long a closed socket may still deliver what was sent: Stop, Bye, the last group
MESSAGES_PER_TURN = 1000  # read at once, so that a flood does not keep the learner from sending
RECONNECT_MS = (100, 2000)  # first and longest pause before an actor connects again

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
)
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


class LearnerSocket:
    """The ROUTER. One thread binds, polls, receives, sends and closes; any thread may call `wake`.

    `wake` ends a `poll` at once: what another thread has put down to be sent leaves without a polling delay.
    """

    def __init__(self, host: str, port: int, max_message_mb: int) -> None:
        self._max_bytes = max_message_mb << 20
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a send to nobody is an error, not a silent drop
        _limit(self._socket, self._max_bytes)
        self._socket.setsockopt(zmq.IPV6, int(":" in host))
        try:
            self._socket.bind(f"tcp://{in_url(host)}:{port or '*'}")
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(_bind_sentence(host, port, error)) from error
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)  # as bound; a wildcard stays one
        self.port = int(self.endpoint.rpartition(":")[2])
        self._awake, self._waker = socket.socketpair()
        for end in (self._awake, self._waker):
            end.setblocking(False)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._awake.fileno(), zmq.POLLIN)

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
        """What has arrived, with its sender; a WireError stands for what is no message."""
        for _ in range(MESSAGES_PER_TURN):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            identity = frames[0].bytes
            try:
                message = decode([frame.buffer for frame in frames[1:]], self._max_bytes)
                if not isinstance(message, get_args(ActorMessage)):
                    raise WireError(f"{type(message).__name__} is a message of the learner, not of an actor")
                yield identity, cast(ActorMessage, message)
            except WireError as error:
                yield identity, error

    def send(self, identity: bytes, message: LearnerMessage) -> bool:
        """False when no peer of that identity is connected."""
        frames = encode(message)
        try:
            self._socket.send_multipart([identity, *frames], copy=False)
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False
            raise
        return True

    def close(self) -> None:
        """Close; what was sent still gets LINGER_MS to leave."""
        self._socket.close(linger=LINGER_MS)
        self._context.term()
        self._awake.close()
        self._waker.close()


class ActorConnection:
    """The DEALER, an async context manager. It reconnects by itself and delivers what was sent meanwhile."""

    def __init__(self, endpoint: str, name: str, max_message_mb: int) -> None:
        self.endpoint = endpoint
        self.name = name
        self._max_bytes = max_message_mb << 20
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None

    async def __aenter__(self) -> Self:
        channel = self._context.socket(zmq.DEALER)
        channel.setsockopt(zmq.IDENTITY, f"{self.name[:200]}#{secrets.token_hex(6)}".encode()[-255:])
        channel.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS[0])
        channel.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MS[1])
        _limit(channel, self._max_bytes)
        channel.setsockopt(zmq.IPV6, int("[" in self.endpoint))
        try:
            channel.connect(self.endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(f"cannot connect to {self.endpoint!r} ({error}); give tcp://HOST:PORT") from None
        self._socket = channel
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._socket is not None:
            self._socket.close(linger=LINGER_MS)
            self._socket = None
        await asyncio.to_thread(self._context.term)  # blocks while it lingers: not on the event loop

    async def send(self, message: ActorMessage) -> None:
        """Queue the message. Raises WireError when it is larger than the learner takes."""
        frames = encode(message)
        size = sum(len(frame) for frame in frames)
        if size > self._max_bytes:  # the learner would cut the connection, again after every reconnect
            raise WireError(f"{type(message).__name__} of {size} bytes: limit {self._max_bytes}")
        await self._channel.send_multipart(frames, copy=False)

    async def receive(self, timeout_s: float) -> LearnerMessage:
        """The next message. Raises TimeoutError naming the learner's endpoint, or WireError."""
        # poll before recv: cancelling a poll loses nothing, cancelling a recv may lose a message
        if not await self._channel.poll(max(0, round(timeout_s * 1000))):
            raise TimeoutError(f"{self.name!r} heard nothing from the learner at {self.endpoint} for {timeout_s} s")
        frames = await self._channel.recv_multipart(copy=False)
        message = decode([frame.buffer for frame in frames], self._max_bytes)
        if not isinstance(message, get_args(LearnerMessage)):
            raise WireError(f"{type(message).__name__} is a message of an actor, not of the learner")
        return cast(LearnerMessage, message)

    @property
    def _channel(self) -> zmq.asyncio.Socket:
        assert self._socket is not None, "use `async with ActorConnection(...)`"
        return self._socket


def _limit(channel: zmq.Socket[Any] | zmq.asyncio.Socket, max_bytes: int) -> None:
    channel.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    channel.setsockopt(zmq.SNDHWM, 0)
    channel.setsockopt(zmq.RCVHWM, 0)
    channel.setsockopt(zmq.TCP_KEEPALIVE, 1)


def _bind_sentence(host: str, port: int, error: zmq.ZMQError) -> str:
    address = f"tcp://{host}:{port}"
    if error.errno == zmq.EADDRINUSE:
        return f"cannot listen on {address}: the port is in use; set transport.port to another, or to 0 for any"
    return f"cannot listen on {address} ({error}); set transport.host to an address of this machine"

"""RUN/control: how other processes talk to the supervisor of a live run, on its own machine and as its own user.

One request is one JSON object, and so is its answer; either is one packet of a Unix socket.

    {"command": "status"}               -> Status
    {"command": "resize", "count": 3}   -> {"done": ["actor-2 is started on cores 1"]}
    anything that is not possible       -> {"error": "one sentence"}
"""

import json
import os
import selectors
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.config import ConfigError
from common.types import JSON

CONTROL_VARIABLE = "ASYNC_VAPO_CONTROL"  # environment variable of a supervised process: the run directory
FILE = "control"
PACKET_BYTES = 1 << 16
ANSWER_S = 10.0
REQUEST_S = 5.0  # for a request, once its connection is made
MAX_OPEN = 16  # connections without a request; the oldest go first
DEAF_S = 1.0  # after a connection that could not be taken, as when no descriptors are left
LINES_BYTES = PACKET_BYTES - 4096  # of the lines in an answer


@dataclass(frozen=True, kw_only=True)
class Status:
    """The actors of a supervisor: how many it is meant to have, how many run or will be started again, and why those
    that it has given up ended, as many of these as fit."""

    wanted: int
    active: int
    given_up: tuple[str, ...] = ()


class ControlSocket:
    """The supervisor's end, whose sockets `selector` watches beside others: `hear` is for one that is readable, `tend`
    for every turn. `handle` answers a request, and raises ConfigError for one that is not possible.

    Whatever other processes do, it costs no more than MAX_OPEN descriptors, each for REQUEST_S.
    """

    def __init__(self, run_dir: Path, selector: selectors.BaseSelector, handle: Callable[[JSON], JSON]) -> None:
        """Raises OSError where the file system has no sockets."""
        self._selector = selector
        self._handle = handle
        self._open: dict[socket.socket, float] = {}  # by when a request has to be there (monotonic), oldest first
        self._deaf_until: float | None = None  # monotonic
        self._path = run_dir / FILE
        self._path.unlink(missing_ok=True)  # a supervisor that was killed has left it; the run is locked
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        before = os.umask(0o177)
        try:
            with _short(run_dir) as folder:
                self._listener.bind(f"{folder}/{FILE}")
        except OSError:
            self._listener.close()
            raise
        finally:
            os.umask(before)
        self._listener.listen()
        selector.register(self._listener, selectors.EVENT_READ)

    def hear(self, end: socket.socket) -> None:
        """A new connection, or the request on one."""
        if end is self._listener:
            self._accept()
            return
        self._release(end)
        with end:
            _send(end, self._reply(end))

    def tend(self, now: float) -> float:
        """Hang up where no request has come, listen again; when it is to be called next."""
        while self._open and (now >= next(iter(self._open.values())) or len(self._open) > MAX_OPEN):
            oldest = next(iter(self._open))
            self._release(oldest)
            oldest.close()
        if self._deaf_until is not None and now >= self._deaf_until:
            self._deaf_until = None
            self._selector.register(self._listener, selectors.EVENT_READ)
        times = (*self._open.values(), *(() if self._deaf_until is None else (self._deaf_until,)))
        return min(times, default=float("inf"))

    def close(self) -> None:
        for end in (self._listener, *self._open):
            end.close()
        self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        now = time.monotonic()
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it stays readable
            self._selector.unregister(self._listener)
            self._deaf_until = now + DEAF_S
            return
        connection.setblocking(False)
        self._open[connection] = now + REQUEST_S
        self._selector.register(connection, selectors.EVENT_READ)

    def _release(self, connection: socket.socket) -> None:
        del self._open[connection]
        self._selector.unregister(connection)

    def _reply(self, connection: socket.socket) -> JSON:
        try:
            packet = connection.recv(PACKET_BYTES)
            return self._handle(json.loads(packet) if packet else None)
        except OSError:
            return {"error": "the request cannot be read"}
        except RecursionError:
            return {"error": "the request is nested too deeply"}
        except ValueError as error:  # ConfigError is one
            return {"error": str(error)}


def _send(connection: socket.socket, reply: JSON) -> None:
    """A peer that has gone, or does not read, wants none."""
    packet = json.dumps(reply).encode()
    if len(packet) > PACKET_BYTES:
        packet = json.dumps({"error": f"the answer has {len(packet)} bytes, a packet {PACKET_BYTES}"}).encode()
    try:
        connection.send(packet)
    except OSError:
        return


def fitting(lines: Sequence[str]) -> list[str]:
    """The first of these lines, as many as fit into an answer, and how many more there are."""
    told, room = list[str](), LINES_BYTES
    for line in lines:
        room -= len(json.dumps(line)) + 2
        if room < 0:
            return [*told, f"and {len(lines) - len(told)} more"]
        told.append(line)
    return told


def ask(run_dir: Path, request: dict[str, JSON]) -> dict[str, JSON]:
    """The live supervisor's answer. Raises ConfigError when nobody supervises the run or it says no; TimeoutError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(ANSWER_S)
        try:
            with _short(run_dir) as folder:
                connection.connect(f"{folder}/{FILE}")
            connection.send(json.dumps(request).encode())
            packet = connection.recv(PACKET_BYTES)
        except TimeoutError:
            raise TimeoutError(f"the supervisor of {run_dir} did not answer within {ANSWER_S:g} s") from None
        except OSError as error:
            raise ConfigError(
                f"no `train` that runs on this machine answers for {run_dir} ({error.strerror}): start it there, or "
                "connect actors with run.py actor --connect"
            ) from None
    if not packet:
        raise ConfigError(f"the supervisor of {run_dir} is about to end")
    try:
        reply: dict[str, JSON] = json.loads(packet)
    except ValueError:
        raise ConfigError(f"the supervisor of {run_dir} gave an answer that cannot be read") from None
    if "error" in reply:
        raise ConfigError(reply["error"])
    return reply


def status(run_dir: Path) -> Status:
    """What the supervisor says of its actors. Raises as `ask`."""
    reply = ask(run_dir, {"command": "status"})
    return Status(wanted=reply["wanted"], active=reply["active"], given_up=tuple(reply["given_up"]))


@contextmanager
def _short(folder: Path) -> Iterator[str]:
    """`folder` under a name that fits the 108 bytes of a socket's address, however deep it lies."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)

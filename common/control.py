"""RUN/control: how other processes talk to the supervisor of a live run, on its own machine and as its own user.

One request is one JSON object, and so is its answer; either is one packet of a Unix socket.

    {"command": "status"}               -> Status
    {"command": "resize", "count": 3}   -> {"done": ["actor-2 is started on cores 1"]}
    anything that is not possible       -> {"error": "one sentence"}
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.config import ConfigError
from common.types import JSON

CONTROL_VARIABLE = "ASYNC_VAPO_CONTROL"  # environment variable of a supervised process: the run directory
FILE = "control"
PACKET_BYTES = 1 << 16
ANSWER_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Status:
    """The actors of a supervisor: how many it is meant to have, how many run or will be started again, and why those
    that it has given up ended."""

    wanted: int
    active: int
    given_up: tuple[str, ...] = ()


class ControlSocket:
    """The supervisor's end. `listener` is to be watched for reading; a readable one has a connection to `accept`."""

    def __init__(self, run_dir: Path) -> None:
        """Raises OSError where the file system has no sockets."""
        self._path = run_dir / FILE
        self._path.unlink(missing_ok=True)  # a supervisor that was killed has left it; the run is locked
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        before = os.umask(0o177)
        try:
            with _short(run_dir) as folder:
                self.listener.bind(f"{folder}/{FILE}")
        except OSError:
            self.listener.close()
            raise
        finally:
            os.umask(before)
        self.listener.listen()

    def accept(self) -> socket.socket:
        connection, _ = self.listener.accept()
        connection.setblocking(False)
        return connection

    def close(self) -> None:
        self.listener.close()
        self._path.unlink(missing_ok=True)


def read_request(connection: socket.socket) -> JSON:
    """The request of a readable connection. Raises ValueError when it is none; None when the peer has gone."""
    try:
        packet = connection.recv(PACKET_BYTES)
    except ConnectionError:
        return None
    return json.loads(packet) if packet else None


def answer(connection: socket.socket, reply: JSON) -> None:
    """Send the reply and hang up; a peer that has gone wants none."""
    with connection:
        try:
            connection.send(json.dumps(reply).encode())
        except (ConnectionError, BlockingIOError):
            return


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
    reply: dict[str, JSON] = json.loads(packet)
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

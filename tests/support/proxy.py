"""A TCP proxy whose connections can be cut, or go silent without being closed, as those of a host that vanished."""

import contextlib
import socket
import threading
from collections import Counter
from typing import Literal, Self

Direction = Literal["to the learner", "to the actors"]
BOTH: tuple[Direction, ...] = ("to the learner", "to the actors")


class Proxy:
    """A context manager in front of `endpoint` (tcp://HOST:PORT); actors connect to its own `endpoint`."""

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._frozen: set[socket.socket] = set()
        self.num_swallowed = Counter[Direction]()  # bytes that did not pass, because their connection is frozen

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nobody gets through any more."""
        with contextlib.suppress(OSError):  # closed already
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Both sides see their connection closed."""
        with self._lock:
            for pair in self._pairs:
                for end in pair:
                    with contextlib.suppress(OSError):  # closed by its peer already
                        end.shutdown(socket.SHUT_RDWR)
            self._pairs.clear()

    def freeze(self, *directions: Direction) -> None:
        """Nothing passes any more over the connections of now, in these directions, or in both; new ones work."""
        ends = [BOTH.index(direction) for direction in directions or BOTH]
        with self._lock:
            self._frozen.update(pair[end] for pair in self._pairs for end in ends)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
            except OSError:  # the listener is closed
                return
            with self._lock:
                self._pairs.append((near, far))
            for source, sink, direction in zip((near, far), (far, near), BOTH, strict=True):
                threading.Thread(target=self._forward, args=(source, sink, direction), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, direction: Direction) -> None:
        with contextlib.suppress(OSError):  # cut
            while data := source.recv(1 << 16):
                if source not in self._frozen:
                    sink.sendall(data)
                else:
                    self.num_swallowed[direction] += len(data)
        if source not in self._frozen:
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_RDWR)

"""Who sends as much as its line takes, and who wants no more than its answers meanwhile."""

import asyncio
import socket
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

from common.transport import ActorConnection
from common.types import ActorMessage, LearnerMessage
from common.wire import encode, pack
from tests.support import strangers

PATIENCE_S = 5.0  # for one answer, on a busy machine; one that waits for the end of a flood never comes


class Flood:
    """A context manager: a peer that sends messages without an end and reads no answer."""

    def __init__(self, port: int, first: list[ActorMessage], again: ActorMessage, name: str = "flood") -> None:
        self.num_sent = 0
        self._first = b"".join(strangers.frame(pack(encode(message)), 0) for message in first)
        self._again = strangers.frame(pack(encode(again)), 0)
        self._peer = strangers.connect(port)
        strangers.ready(self._peer, name.encode())
        self._peer.settimeout(60.0)  # the learner may make it wait
        self._thread = threading.Thread(target=self._send, daemon=True)

    def _send(self) -> None:
        try:
            self._peer.sendall(self._first)
            while True:
                self._peer.sendall(self._again)
                self.num_sent += 1
        except OSError:
            return  # the flood is over, or cut off

    @property
    def is_on(self) -> bool:
        return self._thread.is_alive()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # it was cut off
            self._peer.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._peer.close()


class Honest:
    """A context manager: an actor that asks again once it is answered. TimeoutError at the end when it was not."""

    def __init__(
        self, endpoint: str, first: list[ActorMessage], ask: ActorMessage, answer: type[LearnerMessage]
    ) -> None:
        self.num_answers = 0
        self.longest_s = 0.0
        self._endpoint, self._first, self._ask, self._answer = endpoint, first, ask, answer
        self._is_over = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.until(2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over = True
        self._thread.join()
        if self._failure is not None and error is None:
            raise self._failure

    def until(self, num_answers: int) -> None:
        """It has been answered so often. Raises what its connection raised."""
        while self.num_answers < num_answers and self._thread.is_alive():
            time.sleep(0.005)
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            asyncio.run(self._talk())
        except BaseException as failure:
            self._failure = failure

    async def _talk(self) -> None:
        async with ActorConnection(self._endpoint, "honest", 1) as connection:
            for message in self._first:
                await connection.send(message)
            while not self._is_over:
                began = time.monotonic()
                await connection.send(self._ask)
                while not isinstance(await connection.receive(PATIENCE_S), self._answer):
                    pass
                self.longest_s = max(self.longest_s, time.monotonic() - began)
                self.num_answers += 1

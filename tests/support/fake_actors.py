"""Actors without an engine that speak the real protocol over real sockets, each in a thread of its own.

A fake stamps the version that it holds into every token's id as well as into `versions`, so that tests read
staleness from the data.
"""

import asyncio
import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import numpy as np

from common.keys import ActorKeys
from common.transport import ActorConnection, ConnectionRenewed
from common.types import (
    PROTOCOL_VERSION,
    Ack,
    ActorMessage,
    Bye,
    Cancel,
    CompletedGroup,
    FinishReason,
    Heartbeat,
    Hello,
    LearnerMessage,
    Lease,
    Message,
    Progress,
    Ready,
    Refused,
    SayHello,
    Stop,
    Verdict,
    WeightsCommand,
    WeightsPhase,
    WeightsReport,
    Welcome,
)

Kind = TypeVar("Kind")

FINGERPRINTS = ("model", "tokenizer")
NO_PROBE = np.empty(0, np.float32)


def ids(*values: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(values, np.int32)


def hello(
    name: str,
    capacity: int = 4,
    fingerprints: tuple[str, str] = FINGERPRINTS,
    welcome: Welcome | None = None,
    held: Iterable[int] = (),
    finished: Iterable[int] = (),
    process: str | None = None,
) -> Hello:
    """`welcome`: the last that it got; `process`: whose greeting it is, the only one of its name if that is None."""
    return Hello(
        protocol_version=PROTOCOL_VERSION,
        name=name,
        secret=hashlib.sha256((process or name).encode()).hexdigest()[:32],
        capacity=capacity,
        model_fingerprint=fingerprints[0],
        tokenizer_fingerprint=fingerprints[1],
        run_id=None if welcome is None else welcome.run_id,
        incarnation=None if welcome is None else welcome.incarnation,
        number=None if welcome is None else welcome.number,
        held=ids(*held),
        finished=ids(*finished),
    )


def group(lease_id: int, versions: list[int], num_samples: int = 2, num_correct: int = 1) -> CompletedGroup:
    """Every sample has one token per entry of `versions`."""
    n, length = num_samples, len(versions)
    return CompletedGroup(
        lease_id=lease_id,
        lengths=np.full(n, length, np.int32),
        token_ids=np.tile(np.array(versions, np.int32), n),
        behavior_logprobs=np.zeros(n * length, np.float32),
        versions=np.tile(np.array(versions, np.int32), n),
        rewards=np.where(np.arange(n) < num_correct, 1.0, -1.0).astype(np.float32),
        verdicts=tuple(Verdict.CORRECT if i < num_correct else Verdict.WRONG for i in range(n)),
        verifier_error=None,
        finish_reasons=(FinishReason.STOP,) * n,
        generation_s=0.0,
        verification_s=0.0,
    )


def heartbeat(
    leases: dict[int, int], generated_tokens: int = 0, busy_s: float = 0.0, uptime_s: float = 0.0
) -> Heartbeat:
    """`leases`: tokens by lease id."""
    return Heartbeat(
        lease_ids=np.array(list(leases), np.int32),
        lease_tokens=np.array(list(leases.values()), np.int32),
        generated_tokens=generated_tokens,
        busy_s=busy_s,
        uptime_s=uptime_s,
    )


def progress(lease_id: int, starts: list[int], new: list[list[int]], ended: tuple[int, ...] = ()) -> Progress:
    """New tokens of each completion, each token stamped with its own id as its version; `ended` are complete."""
    versions = np.array([version for tokens in new for version in tokens], np.int32)
    return Progress(
        lease_id=lease_id,
        starts=np.array(starts, np.int32),
        lengths=np.array(list(map(len, new)), np.int32),
        token_ids=versions,
        behavior_logprobs=np.zeros(len(versions), np.float32),
        versions=versions,
        finish_reasons=tuple(FinishReason.STOP if i in ended else None for i in range(len(new))),
    )


@dataclass
class FakeActor:
    """One actor in a thread, as a context manager. `delay_s(lease)` is how long it "samples"."""

    endpoint: str
    name: str
    capacity: int = 4
    version: int = 0
    delay_s: Callable[[Lease], float] = lambda lease: 0.0
    num_correct: Callable[[Lease], int] = lambda lease: 1
    complete: Callable[[Lease, int], CompletedGroup] | None = None  # (lease, version) -> what it "samples"
    fingerprints: tuple[str, str] = FINGERPRINTS
    deaf_to_stop: bool = False
    deaf_to: frozenset[WeightsPhase] = frozenset()  # phases it does not answer
    fails: dict[WeightsPhase, str] = field(default_factory=dict)
    heartbeat_s: float = 0.1
    keys: ActorKeys | None = None
    is_hung: bool = False  # its engine draws nothing, while the process heartbeats
    received: list[LearnerMessage] = field(default_factory=list)
    sent: list[ActorMessage] = field(default_factory=list)
    failure: BaseException | None = None
    welcome: Welcome | None = None

    def __enter__(self) -> Self:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._main, name=self.name, daemon=True)
        self._thread.start()
        assert self._ready.wait(10.0), f"{self.name} was not welcomed"
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """No bye: the connection just closes, as when a process is killed."""
        if self._loop.is_running():
            self._loop.call_soon_threadsafe(self._over.set)
        self.join()

    def join(self, timeout_s: float = 10.0) -> None:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"{self.name} did not end"

    def say(self, message: Message) -> None:
        """Send anything, from this process."""
        asyncio.run_coroutine_threadsafe(self._connection.send(message), self._loop).result(5.0)  # type: ignore[arg-type]

    def leases(self) -> list[Lease]:
        return [message for message in self.received if isinstance(message, Lease)]

    def commands(self) -> list[WeightsCommand]:
        return [message for message in self.received if isinstance(message, WeightsCommand)]

    def received_any(self, kind: type[Kind]) -> Kind | None:
        """The first message of this kind, or None."""
        return next((message for message in self.received if isinstance(message, kind)), None)

    def _main(self) -> None:
        try:
            asyncio.run(self._take_part())
        except BaseException as error:
            self.failure = error
        finally:
            self._ready.set()

    async def _take_part(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        self._process = secrets.token_hex(8)
        self._held: dict[int, asyncio.Task[None]] = {}
        async with ActorConnection(self.endpoint, self.name, 16, self.keys) as self._connection:
            await self._send(hello(self.name, self.capacity, self.fingerprints, process=self._process))
            welcome = await self._receive()
            if not isinstance(welcome, Welcome):
                return
            self.welcome = welcome
            await self._send(Ready(version=self.version, probe_logprobs=NO_PROBE))
            self._ready.set()
            tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._beat())]
            over = asyncio.create_task(self._over.wait())
            done, _ = await asyncio.wait([*tasks, over], return_when=asyncio.FIRST_COMPLETED)
            for task in (*tasks, over, *self._held.values()):
                task.cancel()
            for task in done:
                task.result()

    async def _send(self, message: ActorMessage) -> None:
        self.sent.append(message)
        await self._connection.send(message)

    async def _receive(self) -> LearnerMessage:
        while True:
            try:
                message = await self._connection.receive(10.0)
            except ConnectionRenewed:
                await self._greet_again()
                continue
            self.received.append(message)
            return message

    async def _greet_again(self) -> None:
        await self._send(
            hello(self.name, self.capacity, self.fingerprints, self.welcome, self._held, process=self._process)
        )

    async def _beat(self) -> None:
        busy_s, before_s = 0.5, time.monotonic()
        while True:
            now_s = time.monotonic()
            if self.is_hung and self._held:  # an engine without a request is not busy
                busy_s += now_s - before_s
            before_s = now_s
            await self._send(heartbeat(dict.fromkeys(self._held, 0), generated_tokens=7, busy_s=busy_s, uptime_s=1.0))
            await asyncio.sleep(self.heartbeat_s)

    async def _listen(self) -> None:
        while True:
            match await self._receive():
                case Lease() as lease:
                    self._held[lease.lease_id] = asyncio.create_task(self._sample(lease))
                case Cancel(lease_id=lease_id):
                    if (task := self._held.pop(lease_id, None)) is not None:
                        task.cancel()
                case WeightsCommand() as command:
                    await self._obey(command)
                case Stop() if not self.deaf_to_stop:
                    await self._send(Bye(error=None))
                    return
                case SayHello():
                    await self._greet_again()
                case Welcome() as welcome:
                    self.welcome = welcome
                    await self._send(Ready(version=self.version, probe_logprobs=NO_PROBE))
                case Refused(fatal=True):
                    return
                case Ack():
                    pass

    async def _sample(self, lease: Lease) -> None:
        first = self.version
        if self.is_hung:
            await self._over.wait()
        await asyncio.sleep(self.delay_s(lease))
        if self.complete is not None:
            completed = self.complete(lease, first)
        else:
            versions = [first] * 2 + [self.version]
            completed = group(lease.lease_id, versions, lease.num_samples, self.num_correct(lease))
        await self._send(completed)
        del self._held[lease.lease_id]

    async def _obey(self, command: WeightsCommand) -> None:
        if command.phase in self.deaf_to:
            return
        error = self.fails.get(command.phase)
        if command.phase is WeightsPhase.FINISH and error is None:
            self.version = command.version
        report = WeightsReport(
            command_id=command.command_id,
            phase=command.phase,
            version=command.version,
            error=error,
            is_shared=False,
            probe_logprobs=NO_PROBE,
        )
        await self._send(report)

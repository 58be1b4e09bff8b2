"""One actor: connects to a learner, samples what it is leased, verifies it and streams it back.

    python run.py actor --connect tcp://HOST:PORT -c RUN/config.yaml --name NAME

The loop reads one message at a time and never waits inside: leases run as tasks, and weight phases as one task at a
time. A completed group is kept until the learner acknowledges it.

An actor outlives its connection and its learner. When the learner says that it does not know it, or is not heard for a
while, the actor greets again with what it holds, and goes on with what the learner still wants (actors/greeting.py).
"""

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from actors.engine import Engine, EngineError, RequestRefused
from actors.greeting import ActorError, LearnerStops, Session
from actors.rollout import complete
from actors.verifier.pool import VerifierError, VerifierPool, pool_of
from common.addresses import address_towards, prefer_interface_of
from common.broadcast import BrokenTransfer
from common.child import announce_ready
from common.config import Config, ConfigError, Device
from common.keys import ActorKeys
from common.stopping import is_echo, stop_numbers
from common.transport import ActorConnection
from common.types import (
    Ack,
    Bye,
    Cancel,
    CompletedGroup,
    Draining,
    Float32Array,
    Heartbeat,
    Lease,
    LeaseFailed,
    Pulse,
    Ready,
    Refused,
    SayHello,
    Stop,
    WeightsCommand,
    WeightsPhase,
    WeightsReport,
    Welcome,
)
from common.wire import WireError

logger = logging.getLogger(__name__)

NO_PROBE = np.empty(0, dtype=np.float32)


@dataclass
class Departure:
    """How signals end this actor, made on its event loop: the first SIGTERM or SIGHUP lets one that takes part finish
    what it samples; SIGINT, a later SIGTERM that is no echo, or any before it takes part, ends it at once."""

    task: "asyncio.Task[None]"
    is_draining: asyncio.Event = field(default_factory=asyncio.Event)
    is_broken_off: bool = False  # the start of the engine, which goes on in its thread
    takes_part: bool = False
    number: int | None = None  # of the signal that has ended it at once
    drains_since_s: float = 0.0  # monotonic

    def handle(self, number: int) -> None:
        if self.is_draining.is_set() and is_echo(number, time.monotonic() - self.drains_since_s):
            return
        if number in (signal.SIGTERM, signal.SIGHUP) and self.takes_part and not self.is_draining.is_set():
            self.is_draining.set()
            self.drains_since_s = time.monotonic()
        else:
            self.number = number
            self.task.cancel()


class Actor:
    """One connected actor.

    Invariants: a lease is either in `_tasks` (being sampled), or in `_unacknowledged` (sent, not acknowledged), or
    forgotten; weight phases run one after another, in the order in which they came.
    """

    def __init__(self, session: Session, engine: Engine, verifier: VerifierPool) -> None:
        self._session = session
        self._connection = session.connection
        self._engine = engine
        self._verifier = verifier
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._unacknowledged: dict[int, CompletedGroup] = {}
        self._phases: asyncio.Queue[WeightsCommand] = asyncio.Queue()
        self._newest_command = -1  # id of the newest that came
        self._report: WeightsReport | None = None  # the last
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._has_less_to_do = asyncio.Event()  # than before: a lease is done, or a group has arrived
        self._is_draining = False
        self._is_asleep = False

    async def serve(self, is_draining: asyncio.Event, probe_logprobs: Float32Array) -> None:
        """Takes part until the learner says stop, or it is asked to drain and has. `probe_logprobs` are the engine's of
        the learner's probe. Raises ActorError, EngineError or TimeoutError."""
        ready_at = time.monotonic()
        await self._connection.send(Ready(version=self._engine.version, probe_logprobs=probe_logprobs))
        announce_ready()
        background = [
            asyncio.create_task(self._beat(ready_at)),
            asyncio.create_task(self._run_phases()),
            asyncio.create_task(self._listen()),
            asyncio.create_task(self._drain(is_draining)),
        ]
        try:
            done, _ = await asyncio.wait([*background, self._failure], return_when=asyncio.FIRST_COMPLETED)
            for finished in done:
                finished.result()
        finally:
            for task in (*background, *self._tasks.values()):
                task.cancel()
            await asyncio.gather(*background, *self._tasks.values(), return_exceptions=True)

    async def _listen(self) -> None:
        while True:
            match await self._session.receive(self._tasks, self._unacknowledged):
                case Lease() as lease:
                    self._begin(lease)
                case Ack(lease_id=lease_id):
                    self._unacknowledged.pop(lease_id, None)
                    self._has_less_to_do.set()
                case Cancel(lease_id=lease_id):
                    self._unacknowledged.pop(lease_id, None)
                    self._has_less_to_do.set()
                    if (task := self._tasks.get(lease_id)) is not None:
                        task.cancel()
                case WeightsCommand() as command:
                    await self._take(command)
                case Welcome() as welcome:
                    await self._go_on(welcome)
                case Refused(reason=reason, fatal=fatal):
                    if fatal:
                        raise ActorError(f"the learner refused this actor: {reason}")
                    logger.warning("the learner refused a message: %s", reason)
                case Stop(reason=reason):
                    logger.info("stopping: %s", reason)
                    return
                case Pulse() | SayHello():
                    pass

    async def _go_on(self, welcome: Welcome) -> None:
        """The learner knows this actor again. Cancel follows for each lease and group that it does not want."""
        if self._session.accept(welcome):
            self._begin_anew()
        else:
            for group in self._unacknowledged.values():
                await self._connection.send(group)
            self._engine.progress_again()  # what the old connection had not delivered is lost
        if self._is_draining:
            await self._connection.send(Draining())
        await self._connection.send(Ready(version=self._engine.version, probe_logprobs=NO_PROBE))

    def _begin_anew(self) -> None:
        """The learner has been started again: what an earlier life of it had asked for is void."""
        while not self._phases.empty():
            self._phases.get_nowait()

    async def _take(self, command: WeightsCommand) -> None:
        """Each command once; the learner repeats one that it has no report of."""
        if command.command_id > self._newest_command:
            self._newest_command = command.command_id
            self._phases.put_nowait(command)
        elif self._report is not None and self._report.command_id == command.command_id:
            await self._connection.send(self._report)

    def _begin(self, lease: Lease) -> None:
        if lease.lease_id in self._tasks or lease.lease_id in self._unacknowledged:
            return
        task = asyncio.create_task(self._work(lease))
        self._tasks[lease.lease_id] = task
        task.add_done_callback(lambda finished: self._finished(lease.lease_id, finished))

    def _finished(self, lease_id: int, task: asyncio.Task[None]) -> None:
        del self._tasks[lease_id]
        self._has_less_to_do.set()
        if not task.cancelled() and (error := task.exception()) is not None and not self._failure.done():
            self._failure.set_exception(error)

    async def _work(self, lease: Lease) -> None:
        try:
            group = await complete(lease, self._engine, self._verifier, self._session.config.reward)
            self._unacknowledged[lease.lease_id] = group
            await self._connection.send(group)
        except (RequestRefused, WireError) as error:  # its content alone: nothing that a lease asks for ends an actor
            self._unacknowledged.pop(lease.lease_id, None)
            logger.warning("lease %d, prompt %s: %s", lease.lease_id, lease.prompt_uid, error)
            await self._connection.send(LeaseFailed(lease_id=lease.lease_id, reason=str(error)))

    async def _drain(self, is_asked: asyncio.Event) -> None:
        """Returns when it may leave: all that it was leased has arrived, or actors.drain_s are over."""
        await is_asked.wait()
        self._is_draining = True
        logger.info("draining: %d groups are being sampled", len(self._tasks))
        await self._connection.send(Draining())
        try:
            async with asyncio.timeout(self._session.config.actors.drain_s):
                while self._tasks or self._unacknowledged:
                    self._has_less_to_do.clear()
                    await self._has_less_to_do.wait()
        except TimeoutError:
            logger.warning("the leases %s go back unfinished", [*self._tasks, *self._unacknowledged])
            await self.flush_progress()

    async def _run_phases(self) -> None:
        while True:
            command = await self._phases.get()
            probe, error, is_shared = NO_PROBE, None, False
            try:
                probe = await self._phase(command)
            except Exception as problem:
                logger.exception("weights phase %s of version %d", command.phase, command.version)
                error, is_shared = f"{type(problem).__name__}: {problem}", isinstance(problem, BrokenTransfer)
            self._report = WeightsReport(
                command_id=command.command_id,
                phase=command.phase,
                version=command.version,
                error=error,
                is_shared=is_shared,
                probe_logprobs=probe,
            )
            await self._connection.send(self._report)

    async def _phase(self, command: WeightsCommand) -> np.ndarray[Any, np.dtype[np.float32]]:
        match command.phase:
            case WeightsPhase.PAUSE:
                await self._wake()  # who was to say so may have died, or this actor was lost then
                await self._engine.pause()
            case WeightsPhase.INIT:
                await self._engine.init_transfer(command.payload)
            case WeightsPhase.START:
                await self._engine.start_update()
            case WeightsPhase.UPDATE:
                await self._engine.update(command.payload)
            case WeightsPhase.FINISH:
                await self._engine.finish_update(command.version)
            case WeightsPhase.RESUME:
                await self._engine.resume()
                return await self._engine.score(self._session.welcome.probe_token_ids)
            case WeightsPhase.SLEEP:
                self._is_asleep = True
                await self._engine.sleep()
            case WeightsPhase.WAKE:
                await self._wake()
        return NO_PROBE

    async def _wake(self) -> None:
        if self._is_asleep:
            await self._engine.wake()
            self._is_asleep = False

    async def flush_progress(self) -> None:
        """Sends all that was drawn for the leases under way: whoever gets them next goes on from there."""
        while await self._send_progress():
            pass

    async def _send_progress(self) -> bool:
        """One message for each lease that has grown; whether there was one."""
        news = [progress for lease_id in self._tasks if (progress := self._engine.progress(lease_id)) is not None]
        for progress in news:
            await self._connection.send(progress)
        return bool(news)

    async def _beat(self, ready_at: float) -> None:
        while True:
            await self._send_progress()
            lease_ids = sorted(self._tasks)
            await self._connection.send(
                Heartbeat(
                    lease_ids=np.array(lease_ids, dtype=np.int32),
                    lease_tokens=np.array([self._engine.num_drawn(id_) for id_ in lease_ids], dtype=np.int32),
                    generated_tokens=self._engine.generated_tokens,
                    busy_s=self._engine.busy_s,
                    uptime_s=time.monotonic() - ready_at,
                )
            )
            await asyncio.sleep(self._session.welcome.heartbeat_s)


async def _started(engine: Engine, session: Session, departure: Departure) -> Float32Array:
    """The log-probs of the probe, from the engine that is up. Raises EngineError, or TimeoutError when it takes too
    long: a remote actor has nobody else who would end it."""
    limit_s = session.config.actors.start_timeout_s
    departure.is_broken_off = True
    try:
        async with asyncio.timeout(limit_s):
            await engine.start()
            departure.is_broken_off = False
            return await engine.score(session.welcome.probe_token_ids)
    except EngineError:
        departure.is_broken_off = False
        raise
    except TimeoutError as error:
        raise TimeoutError(f"the engine was not ready within actors.start_timeout_s={limit_s:g}") from error


async def _take_part(
    config: Config,
    endpoint: str,
    name: str,
    keys: ActorKeys | None,
    locate: Callable[[], str] | None,
    departure: Departure,
) -> None:
    """What can fail fast comes first: an actor that does not fit is refused, and the verifier is loaded, before the
    engine starts."""
    async with (
        ActorConnection(endpoint, name, config.transport.max_message_mb, keys) as connection,
        AsyncExitStack() as stack,
    ):
        session = Session(config, connection, locate)
        error: str | None = "interrupted"
        try:
            config = await session.begin()
            verifier = await stack.enter_async_context(pool_of(config))
            engine = Engine(config)
            stack.push_async_callback(engine.shutdown)
            probe_logprobs = await _started(engine, session, departure)
            departure.takes_part = True
            await Actor(session, engine, verifier).serve(departure.is_draining, probe_logprobs)
            error = None
        except LearnerStops as stop:
            logger.info("stopping: %s", stop)
            error = None
        except Exception as problem:
            error = str(problem)
            raise
        finally:
            await connection.send(Bye(error=error))


def main(
    config: Config,
    endpoint: str,
    name: str,
    keys: ActorKeys | None = None,
    locate: Callable[[], str] | None = None,
) -> int:
    """Runs one actor until the learner stops it, or it has drained. Returns the exit code: 128 + n when signal n has
    ended it at once. `locate`: see Session."""
    if config.device is Device.cuda and (learner := urlsplit(endpoint).hostname) is not None:
        prefer_interface_of(address_towards(learner))

    async def run() -> int:
        task = asyncio.current_task()
        assert task is not None
        departure = Departure(task)
        for number in stop_numbers():
            asyncio.get_running_loop().add_signal_handler(number, departure.handle, number)
        code = 0
        try:
            await _take_part(config, endpoint, name, keys, locate, departure)
        except asyncio.CancelledError:
            if departure.number is None:
                raise
            code = 128 + departure.number
        except (ActorError, EngineError, VerifierError, TimeoutError, ValueError) as error:
            logger.error("actor %s: %s", name, error)
            print(f"error: actor {name}: {error}", file=sys.stderr, flush=True)
            code = 2 if isinstance(error, ConfigError) else 1
        if departure.is_broken_off:  # nothing ends that thread, and Python would wait for it
            logging.shutdown()
            os._exit(code)  # the guardian ends what the engine has started
        return code

    return asyncio.run(run())

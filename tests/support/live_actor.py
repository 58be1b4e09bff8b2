"""The real actor over real sockets, in a thread, with an engine and a verifier that are fakes.

Every token is the version that drew it. The engine holds its requests while it is paused.
"""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from actors.engine import Completion
from actors.greeting import Session
from actors.main import Actor
from actors.verifier.judgement import Judgement
from common.config import Config
from common.transport import ActorConnection
from common.types import FinishReason, Lease, Verdict, WeightsPhase


class FakeEngine:
    """Samples a lease in `delay_s`, two tokens a completion; remembers the phases that it went through."""

    def __init__(self, delay_s: float) -> None:
        self.version = self.generated_tokens = 0
        self.busy_s = 0.0
        self.phases: list[WeightsPhase] = []
        self.sampled: list[int] = []
        self._delay_s = delay_s
        self._running = asyncio.Event()
        self._running.set()

    def decode(self, token_ids: Any) -> str:
        return ""

    async def score(self, token_ids: Any) -> Any:
        return np.zeros(len(token_ids) - 1, np.float32)

    async def sample(self, lease: Lease) -> list[Completion]:
        first = self.version
        await asyncio.sleep(self._delay_s)
        await self._running.wait()
        versions = np.array([first, self.version], np.int32)
        self.sampled.append(lease.lease_id)
        self.generated_tokens += 2 * lease.num_samples
        completion = Completion(
            token_ids=versions,
            behavior_logprobs=np.full(2, -1.0, np.float32),
            versions=versions,
            finish_reason=FinishReason.STOP,
            text="",
        )
        return [completion] * lease.num_samples

    def progress(self, lease_id: int) -> None:
        """A lease is drawn at once."""

    def sampling_s(self, lease_id: int) -> float:
        return self._delay_s

    def num_drawn(self, lease_id: int) -> int:
        return 0

    def progress_again(self) -> None:
        """Nothing was reported."""

    def forget(self, lease_id: int) -> None:
        """Nothing is kept."""

    async def pause(self) -> None:
        self.phases.append(WeightsPhase.PAUSE)
        self._running.clear()

    async def start_update(self) -> None:
        self.phases.append(WeightsPhase.START)

    async def update(self, payload: Any) -> None:
        self.phases.append(WeightsPhase.UPDATE)

    async def finish_update(self, version: int) -> None:
        self.phases.append(WeightsPhase.FINISH)
        self.version = version

    async def resume(self) -> None:
        self.phases.append(WeightsPhase.RESUME)
        self._running.set()

    async def sleep(self) -> None:
        self.phases.append(WeightsPhase.SLEEP)
        self._running.clear()

    async def wake(self) -> None:
        self.phases.append(WeightsPhase.WAKE)
        self._running.set()


class FakeVerifier:
    async def judge(self, response: str, reference: str, row: dict[str, Any]) -> Judgement:
        return Judgement(Verdict.CORRECT)


@dataclass
class LiveActor:
    """A context manager; `failure` is how it ended, if not by Stop or at the end of the context."""

    config: Config
    endpoint: str
    name: str = "a"
    delay_s: float = 0.02
    locate: Callable[[], str] | None = None
    failure: BaseException | None = None
    engine: FakeEngine = field(init=False, repr=False)
    actor: Actor = field(init=False, repr=False)

    def __enter__(self) -> Self:
        self._began = threading.Event()
        self._thread = threading.Thread(target=self._main, name=self.name, daemon=True)
        self._thread.start()
        assert self._began.wait(100.0) and self.failure is None, f"{self.name} did not begin: {self.failure}"
        return self

    def __exit__(self, *_: object) -> None:
        if self._loop.is_running():
            self._loop.call_soon_threadsafe(self._task.cancel)
        self.join()

    def drain(self) -> None:
        """As SIGTERM asks for."""
        self._loop.call_soon_threadsafe(self._is_draining.set)

    def join(self, timeout_s: float = 10.0) -> None:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"{self.name} did not end"

    def _main(self) -> None:
        try:
            asyncio.run(self._take_part())
        except BaseException as error:
            self.failure = None if isinstance(error, asyncio.CancelledError) else error
        finally:
            self._began.set()

    async def _take_part(self) -> None:
        self._loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        self._task = task
        self.engine, self._is_draining = FakeEngine(self.delay_s), asyncio.Event()
        async with ActorConnection(self.endpoint, self.name, 16) as connection:
            session = Session(self.config, connection, self.locate)
            await session.begin()
            self.actor = Actor(session, self.engine, FakeVerifier())  # type: ignore[arg-type]
            self._began.set()
            probe = await self.engine.score(session.welcome.probe_token_ids)
            await self.actor.serve(self._is_draining, probe)

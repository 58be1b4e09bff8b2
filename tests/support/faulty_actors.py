"""An actor in a process of its own that fails where a test wants it to.

The actor is the real one, from its greeting to its end. Its engine is vLLM's, or the learner's network, which samples
nothing and tells whoever started it, through a pipe, what it is told and what it holds when it samples again.
"""

import asyncio
import faulthandler
import hashlib
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch
from torch import Tensor

import actors.main
from actors.engine import Engine
from common.broadcast import BrokenTransfer
from common.config import Config
from common.types import Float32Array, Int32Array, WeightsPhase
from learner.networks.model import load_policy
from tests.support.live_actor import FakeEngine, FakeVerifier
from tests.support.transfer_actors import TransferActor

NEVER_S = 1e6


class Fault(StrEnum):
    """What goes wrong."""

    DIES = "dies"  # SIGKILL
    STOPS = "stops"  # SIGSTOP: no answer, no heartbeat, and no connection closes
    HANGS = "hangs"  # its engine does not come back, while the actor heartbeats
    ERRS = "errs"  # its engine raises an error of its own


@dataclass(frozen=True)
class Strike:
    """When: at the `at`-th command of `phase`, counted from 0."""

    fault: Fault
    phase: WeightsPhase
    at: int = 0


def digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Of their names and bytes."""
    sha = hashlib.sha256()
    for name, tensor in sorted(weights, key=lambda named: named[0]):
        sha.update(name.encode())
        sha.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


class FaultyEngine(FakeEngine):
    """Takes real weights. Each phase is sent to `pipe`, with the digest of the weights at RESUME."""

    def __init__(self, config: Config, pipe: Connection, strike: Strike | None) -> None:
        super().__init__(NEVER_S)
        self._config = config
        self._pipe = pipe
        self._strike = strike
        self._num_obeyed = Counter[WeightsPhase]()

    async def start(self) -> None:
        policy = load_policy(self._config, torch.device("cpu"), None)
        self._network = TransferActor(policy, torch.empty(0, dtype=torch.long))

    async def shutdown(self) -> None:
        self._network.receiver.close()

    async def score(self, token_ids: Int32Array) -> Float32Array:
        self._network.probe = torch.tensor(token_ids.tolist())
        scored: Float32Array = self._network.obey(WeightsPhase.RESUME, {})[2]
        return scored

    async def pause(self) -> None:
        await self._obey(WeightsPhase.PAUSE)
        await super().pause()

    async def init_transfer(self, payload: dict[str, Any]) -> None:
        await self._obey(WeightsPhase.INIT, payload)

    async def start_update(self) -> None:
        await self._obey(WeightsPhase.START)

    async def update(self, payload: dict[str, Any]) -> None:
        await self._obey(WeightsPhase.UPDATE, payload)

    async def finish_update(self, version: int) -> None:
        await self._obey(WeightsPhase.FINISH)
        await super().finish_update(version)

    async def resume(self) -> None:
        await self._obey(WeightsPhase.RESUME)
        await super().resume()

    async def _obey(self, phase: WeightsPhase, payload: dict[str, Any] | None = None) -> None:
        if self._strike is not None and (phase, self._num_obeyed[phase]) == (self._strike.phase, self._strike.at):
            await self._fail(self._strike.fault)
        self._num_obeyed[phase] += 1
        if payload is not None:
            # longer than a collective may take: whoever looks at a failed test sees where this process was
            faulthandler.dump_traceback_later(0.6 * self._config.weights.timeout_s)
            error, _, _ = await asyncio.to_thread(self._network.obey, phase, payload)
            faulthandler.cancel_dump_traceback_later()
            if error is not None:
                raise BrokenTransfer(error)
        self._pipe.send((phase, digest(self._network.weights().items()) if phase is WeightsPhase.RESUME else ""))

    async def _fail(self, fault: Fault) -> None:
        match fault:
            case Fault.DIES:
                os.kill(os.getpid(), signal.SIGKILL)
            case Fault.STOPS:
                os.kill(os.getpid(), signal.SIGSTOP)
            case Fault.HANGS:
                await asyncio.sleep(NEVER_S)
            case Fault.ERRS:
                self._network.receiver.close()  # as the engine's worker does (actors/weights.py)
                raise RuntimeError("no such tensor")


class FaultyVllm(Engine):
    """Its engine core dies or stops, while the process of the actor lives on."""

    def __init__(self, config: Config, strike: Strike | None) -> None:
        super().__init__(config)
        self._strike = strike
        self._num_buckets = 0

    async def update(self, payload: dict[str, Any]) -> None:
        if self._strike is not None and self._num_buckets == self._strike.at:
            (core,) = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("VLLM::EngineCor")]
            core.send_signal(signal.SIGKILL if self._strike.fault is Fault.DIES else signal.SIGSTOP)
        self._num_buckets += 1
        await super().update(payload)


def act(config: Config, endpoint: str, name: str, pipe: Connection, strike: Strike | None) -> None:
    """Ends as `run.py actor` does."""
    _act(partial(FaultyEngine, pipe=pipe, strike=strike), config, endpoint, name)


def act_with_vllm(config: Config, endpoint: str, name: str, pipe: Connection, strike: Strike | None) -> None:
    """The same; `strike` is in an UPDATE."""
    _act(partial(FaultyVllm, strike=strike), config, endpoint, name)


def _act(engine: Callable[[Config], Any], config: Config, endpoint: str, name: str) -> None:
    actors.main.Engine = engine  # type: ignore[assignment,misc]
    actors.main.pool_of = lambda config: nullcontext(FakeVerifier())  # type: ignore[assignment,misc,return-value]
    sys.exit(actors.main.main(config, endpoint, name))

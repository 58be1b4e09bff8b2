"""`run.py ARGUMENTS` with engines of a fixed rate and a learner of a fixed rate, for benchmarks/scaling.py.

    python -m benchmarks.fixed_rate train runs_dir=... name=...

Supervisor, learner and actors are real processes, forked with their libraries loaded; what they tell each other, the
coordinator, verification and publications are real. An engine sleeps until a group would be drawn at one token per
TOKEN_S, however many sequences run, and then computes all of its log-probs in one pass of the learner's own network. A
learner trains really, and then sleeps until the step has taken TRAIN_TOKEN_S for each of its tokens.

Lengths are those that a simulation draws for the same lease.
"""

import asyncio
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

import actors.main
import common.child
import learner.main
import run
from actors.sampling import Completion
from common.types import FinishReason, Float32Array, Int32Array, Lease, Progress
from learner.algorithm.packing import Batch
from learner.algorithm.trainer import Metrics, Trainer
from learner.planning.engine import EngineSpeed
from learner.planning.speeds import Speeds
from tests.support.forked_train import DEVNULL, PIPE, Forked
from tests.support.network_engine import NetworkEngine, stamp

GROUPS, SAMPLES, PLACES = 16, 8, 2  # of a step; responses of a group; groups that an actor samples at once
ENOUGH = 4  # actors that are ideally just enough for the learner
TOKEN_S = 0.025
MAX_TOKENS = 120


def nominal() -> Speeds:
    """What the processes are built to do, with publications that take no time."""
    engine = EngineSpeed(base_s=TOKEN_S)
    speeds = Speeds(train_token_s=(0.0,), publish_s=(0.0,), engine=engine, length_mean=12.0, length_sigma=1.0)
    random = np.random.default_rng(0)
    drawn = np.stack([speeds.lengths(0, random, SAMPLES, MAX_TOKENS) for _ in range(5000)])
    token_s = float(drawn.max(axis=1).sum() / drawn.sum()) * TOKEN_S / (ENOUGH * PLACES)
    return replace(speeds, train_token_s=(token_s,))


SPEEDS = nominal()


class Drawing:
    """A group under way. Times are those of the engine's clock."""

    def __init__(self, lease: Lease, began_s: float) -> None:
        self.lengths = SPEEDS.lengths(0, np.random.default_rng(lease.seed), lease.num_samples, lease.max_tokens)
        self.began_s = began_s
        self.ends_s = began_s + TOKEN_S * int(self.lengths.max())

    def num_drawn(self, now_s: float) -> int:
        passes = int((now_s - self.began_s) / TOKEN_S)
        return int(np.minimum(self.lengths, passes).sum())


class FixedRateEngine(NetworkEngine):
    """Tells of a group before its end only how far it is."""

    async def start(self) -> None:
        self._drawings: dict[int, Drawing] = {}
        self._goes_on = asyncio.Event()
        self._goes_on.set()
        self._loads: list[tuple[float, int]] = [(0.0, 0)]  # (clock, version)
        self._clock_s = self._idle_s = 0.0  # of the engine, which stands still in a pause; of it without a lease
        self._since_s = time.monotonic()
        await super().start()

    async def _take_turns(self) -> None:
        """Each lease has its own time."""

    def _now_s(self) -> float:
        now = time.monotonic()
        seconds, self._since_s = now - self._since_s, now
        if not self._is_paused:
            self._clock_s += seconds
            self._idle_s += 0.0 if self._drawings else seconds
        return self._clock_s

    @property
    def busy_s(self) -> float:
        return self._now_s() - self._idle_s

    @busy_s.setter
    def busy_s(self, seconds: float) -> None:
        """Set by nobody but the base class, to 0, before the clock starts."""

    async def sample(self, lease: Lease) -> list[Completion]:
        now_s = self._now_s()
        drawing = self._drawings[lease.lease_id] = Drawing(lease, now_s)
        while (left_s := drawing.ends_s - self._now_s()) > 0:
            await self._goes_on.wait()
            await asyncio.sleep(left_s)
        self._now_s()
        return self._completions(lease, drawing)

    def _completions(self, lease: Lease, drawing: Drawing) -> list[Completion]:
        """Each token tells the version that drew it; log-probs are those of the newest weights."""
        times, versions = zip(*self._loads, strict=True)
        drawn_s = drawing.began_s + TOKEN_S * np.arange(1, int(drawing.lengths.max()) + 1)
        stamps = np.array(versions, np.int32)[np.searchsorted(times, drawn_s, side="left") - 1]
        tokens = np.array([stamp(int(version)) for version in stamps], np.int32)
        whole = [np.concatenate([lease.prompt_token_ids, tokens[:length]]) for length in drawing.lengths]
        logprobs = self._logprobs(whole, [len(lease.prompt_token_ids)] * lease.num_samples)
        return [self._completion(tokens[: len(its_own)], its_own, stamps[: len(its_own)]) for its_own in logprobs]

    def _completion(self, tokens: Int32Array, logprobs: Float32Array, versions: Int32Array) -> Completion:
        return Completion(
            token_ids=tokens,
            behavior_logprobs=logprobs,
            versions=versions,
            finish_reason=FinishReason.LENGTH if len(tokens) == MAX_TOKENS else FinishReason.STOP,
            text=self.decode(tokens),
        )

    @property
    def generated_tokens(self) -> int:
        return self._forgotten_tokens + sum(drawing.num_drawn(self._now_s()) for drawing in self._drawings.values())

    def sampling_s(self, lease_id: int) -> float:
        return self._now_s() - self._drawings[lease_id].began_s

    def num_drawn(self, lease_id: int) -> int:
        return self._drawings[lease_id].num_drawn(self._now_s()) if lease_id in self._drawings else 0

    def progress(self, lease_id: int) -> Progress | None:
        return None

    def progress_again(self) -> None:
        """Nothing was told."""

    def forget(self, lease_id: int) -> None:
        self._now_s()
        if (drawing := self._drawings.pop(lease_id, None)) is not None:
            self._forgotten_tokens += drawing.num_drawn(self._now_s())

    async def pause(self) -> None:
        self._now_s()
        self._is_paused = True
        self._goes_on.clear()

    async def resume(self) -> None:
        self._now_s()
        self._is_paused = False
        self._goes_on.set()

    async def finish_update(self, version: int) -> None:
        self.version = version
        self._loads.append((self._now_s(), version))


class PacedTrainer(Trainer):
    """Takes as long as `SPEEDS` say, if it can."""

    def step(self, batch: Batch, *arguments: Any, **keywords: Any) -> Metrics:
        ends_s = time.monotonic() + SPEEDS.train_s(0, batch.num_response_tokens)
        metrics = super().step(batch, *arguments, **keywords)
        time.sleep(max(0.0, ends_s - time.monotonic()))
        return metrics


def main() -> int:
    common.child.subprocess = SimpleNamespace(Popen=Forked, PIPE=PIPE, DEVNULL=DEVNULL)  # type: ignore[assignment]
    actors.main.Engine = FixedRateEngine  # type: ignore[assignment,misc]
    learner.main.Trainer = PacedTrainer  # type: ignore[misc]
    return run.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

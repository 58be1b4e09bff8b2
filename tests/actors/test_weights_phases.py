"""The phases of a publication in an actor, without an engine: what is asked of vLLM, and what the learner is told."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from actors.engine import Engine
from actors.greeting import Session
from actors.main import Actor
from common.broadcast import BrokenTransfer
from common.config import Config
from common.types import WeightsCommand, WeightsPhase, WeightsReport


class LLM:
    """vLLM's AsyncLLM, as far as updates go."""

    def __init__(self, *problems: str | None) -> None:
        self.problems = list(problems)
        self.calls: list[str] = []

    async def start_weight_update(self) -> None:
        self.calls.append("start")

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append(f"finish {weight_version}")

    async def collective_rpc(self, method: str) -> list[str | None]:
        assert method == "transfer_problem"
        return self.problems


def make_engine(llm: LLM) -> Engine:
    engine = Engine(Config())
    engine._llm = llm
    return engine


def test_an_update_that_was_broken_off_is_closed_before_the_next_begins() -> None:
    """vLLM refuses to start while one is open, and would count what had come of a layer twice."""

    async def updates(engine: Engine) -> None:
        await engine.start_update()
        await engine.start_update()
        await engine.finish_update(3)
        await engine.start_update()

    llm = LLM()
    engine = make_engine(llm)
    asyncio.run(updates(engine))
    assert llm.calls == ["start", "finish None", "start", "finish 3", "start"]
    assert engine.version == 3


def test_weights_of_the_same_version_by_two_learners_share_no_prefix_cache() -> None:
    """An actor outlives its learner, which goes on from an older checkpoint and publishes its versions again."""
    salts: list[str] = []

    async def generate(prompt: Any, *_: object) -> AsyncIterator[SimpleNamespace]:
        salts.append(prompt["cache_salt"])
        yield SimpleNamespace(finished=True)

    async def sample_with(engine: Engine, versions: Sequence[int]) -> None:
        for version in versions:
            await engine.start_update()
            await engine.finish_update(version)
            for request in ("a", "b"):
                await engine._run(np.arange(4, dtype=np.int32), None, request)

    llm = LLM()
    cast(Any, llm).generate = generate
    asyncio.run(sample_with(make_engine(llm), [0, 1, 0, 1]))
    assert len(set(salts)) == 4 and salts[::2] == salts[1::2]


def test_a_problem_of_any_worker_is_a_broken_transfer() -> None:
    asyncio.run(make_engine(LLM(None, None))._check_transfer())
    with pytest.raises(BrokenTransfer, match="closed by peer"):
        asyncio.run(make_engine(LLM(None, "closed by peer"))._check_transfer())


class Connection:
    def __init__(self, num_reports: int) -> None:
        self.reports: list[WeightsReport] = []
        self.num_reports, self.is_over = num_reports, asyncio.Event()

    async def send(self, report: WeightsReport) -> None:
        self.reports.append(report)
        if len(self.reports) == self.num_reports:
            self.is_over.set()


class FailingEngine:
    """Its transfer breaks, then it runs out of memory, then all is well."""

    def __init__(self) -> None:
        self.errors = [BrokenTransfer("timed out"), RuntimeError("out of memory"), None]

    async def start_update(self) -> None:
        if (error := self.errors.pop(0)) is not None:
            raise error


def test_the_learner_is_told_which_errors_are_the_collectives() -> None:
    async def phases() -> list[WeightsReport]:
        connection = Connection(3)
        actor = Actor(Session(Config(), cast(Any, connection)), cast(Any, FailingEngine()), cast(Any, None))
        for command_id in (7, 8, 9):
            actor._phases.put_nowait(
                WeightsCommand(command_id=command_id, phase=WeightsPhase.START, version=1, payload={})
            )
        running = asyncio.create_task(actor._run_phases())
        await asyncio.wait_for(connection.is_over.wait(), 30.0)
        running.cancel()
        return connection.reports

    reports = asyncio.run(phases())
    assert [(report.command_id, report.error, report.is_shared) for report in reports] == [
        (7, "BrokenTransfer: timed out", True),
        (8, "RuntimeError: out of memory", False),
        (9, None, False),
    ]


def test_a_command_that_is_repeated_is_answered_again_and_carried_out_once() -> None:
    """The learner repeats on a new connection what it has no report of."""

    async def reports() -> list[WeightsReport]:
        connection, engine = Connection(2), FailingEngine()
        actor = Actor(Session(Config(), cast(Any, connection)), cast(Any, engine), cast(Any, None))
        command = WeightsCommand(command_id=7, phase=WeightsPhase.START, version=1, payload={})
        running = asyncio.create_task(actor._run_phases())
        for _ in range(2):  # the second comes while the first is under way
            await actor._take(command)
        while actor._report is None:
            await asyncio.sleep(0)
        await actor._take(command)
        await asyncio.wait_for(connection.is_over.wait(), 30.0)
        running.cancel()
        assert len(engine.errors) == 2
        return connection.reports

    first, second = asyncio.run(reports())
    assert first == second

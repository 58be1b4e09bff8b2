"""How many responses are in the engine at once (actors.max_num_seqs), who waits, and blocks. vLLM is a fake."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from actors.engine import Engine, block_size, executor
from common.config import ActorsConfig, Config, Device, ModelConfig, RolloutConfig
from common.memory import num_sequences
from tests.actors.test_refusals import output
from tests.support.vllm_support import lease


class Held:
    """Answers the request of a name when it is told to."""

    output_processor = SimpleNamespace(external_req_ids={}, request_states={})
    errored = False

    def __init__(self) -> None:
        self.running: dict[str, asyncio.Event] = {}

    async def generate(self, prompt: Any, parameters: Any, request_id: str) -> AsyncIterator[Any]:
        ended = self.running[request_id] = asyncio.Event()
        try:
            await ended.wait()
            yield SimpleNamespace(finished=True, outputs=[output()], prompt_logprobs=None)
        finally:
            del self.running[request_id]

    def leases(self) -> list[int]:
        return [int(request_id.split("-")[1]) for request_id in self.running]

    async def end(self, lease_id: int) -> None:
        """One response of this lease."""
        self.running[next(name for name in self.running if name.startswith(f"lease-{lease_id}-"))].set()
        await settled()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def config(max_num_seqs: int | None) -> Config:
    return Config(
        model=ModelConfig(path="nowhere"),
        rollout=RolloutConfig(group_size=2),
        actors=ActorsConfig(groups_in_flight=4, max_num_seqs=max_num_seqs),
    )


def with_leases(max_num_seqs: int | None, check: Callable[[Engine, Held, list[asyncio.Task[Any]]], Any]) -> None:
    """`check` begins when an engine has been asked for the leases 1, 2 and 3 of two responses each."""

    async def run() -> None:
        engine, llm = Engine(config(max_num_seqs)), Held()
        engine._llm = llm
        tasks = [asyncio.create_task(engine.sample(lease(number, num_samples=2))) for number in (1, 2, 3)]
        await settled()
        try:
            await check(engine, llm, tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert not llm.running

    asyncio.run(run())


@pytest.mark.parametrize(("setting", "expected"), [(None, 8), (3, 3), (100, 8)])
def test_an_engine_has_places_for_all_that_it_holds_or_for_as_many_as_are_set(
    setting: int | None, expected: int
) -> None:
    assert num_sequences(config(setting)) == expected


def test_responses_beyond_the_places_begin_in_order_as_soon_as_others_end() -> None:
    async def check(engine: Engine, llm: Held, tasks: list[asyncio.Task[Any]]) -> None:
        assert llm.leases() == [1, 1, 2]
        await llm.end(1)
        assert llm.leases() == [1, 2, 2]
        await llm.end(2)
        assert llm.leases() == [1, 2, 3]
        await llm.end(1)
        assert tasks[0].done() and llm.leases() == [2, 3, 3]

    with_leases(3, check)


def test_without_the_setting_all_begin_at_once() -> None:
    async def check(engine: Engine, llm: Held, tasks: list[asyncio.Task[Any]]) -> None:
        assert llm.leases() == [1, 1, 2, 2, 3, 3]

    with_leases(None, check)


def test_who_is_cancelled_leaves_the_place_and_the_queue() -> None:
    async def check(engine: Engine, llm: Held, tasks: list[asyncio.Task[Any]]) -> None:
        tasks[1].cancel()  # one response in the engine, one that waits
        await settled()
        assert llm.leases() == [1, 1, 3]
        await llm.end(1)
        assert llm.leases() == [1, 3, 3]

    with_leases(3, check)


def test_the_probe_does_not_wait_for_a_place() -> None:
    async def check(engine: Engine, llm: Held, tasks: list[asyncio.Task[Any]]) -> None:
        probing = asyncio.create_task(engine.score(lease(4).prompt_token_ids))
        await settled()
        assert any(name.startswith("probe") for name in llm.running)
        probing.cancel()
        await asyncio.gather(probing, return_exceptions=True)

    with_leases(2, check)


def test_a_group_is_timed_from_its_first_place(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 10.0
    monkeypatch.setattr(Engine, "busy_s", property(lambda engine: now_s))

    async def check(engine: Engine, llm: Held, tasks: list[asyncio.Task[Any]]) -> None:
        nonlocal now_s
        now_s = 15.0
        await llm.end(1)
        assert [engine.sampling_s(number) for number in (1, 2)] == [5.0, 0.0]
        await llm.end(1)
        now_s = 17.0
        assert [engine.sampling_s(number) for number in (1, 2, 3)] == [7.0, 2.0, 0.0]
        engine.forget(1)
        assert engine.sampling_s(1) == 0.0

    with_leases(2, check)


def test_the_busy_clock_runs_while_a_response_is_drawn_and_not_for_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 10.0
    monkeypatch.setattr("actors.engine.time", SimpleNamespace(monotonic=lambda: now_s))

    async def check(engine: Engine, llm: Held, tasks: list[asyncio.Task[Any]]) -> None:
        nonlocal now_s
        probing = asyncio.create_task(engine.score(lease(4).prompt_token_ids))
        now_s = 15.0
        await settled()
        assert engine.busy_s == 5.0
        for task in tasks:
            task.cancel()
        await settled()
        now_s = 35.0
        assert [name.split("-")[0] for name in llm.running] == ["probe"] and engine.busy_s == 5.0
        probing.cancel()
        await asyncio.gather(probing, return_exceptions=True)
        assert engine.busy_s == 5.0

    with_leases(2, check)


@pytest.mark.parametrize(
    ("longest_prompt", "device", "expected"), [(63, "cpu", None), (64, "cpu", 32), (900, "cuda", None)]
)
def test_blocks_are_small_where_prompts_can_fill_several(
    longest_prompt: int, device: str, expected: int | None
) -> None:
    made = replace(
        config(None),
        device=Device(device),
        model=ModelConfig(path="nowhere", max_model_len=100 + longest_prompt),
        rollout=RolloutConfig(group_size=2, max_tokens=100),
    )
    assert block_size(made) == expected


@pytest.mark.parametrize(
    ("device", "tensor_parallel_size", "is_alone"), [("cpu", 1, True), ("cpu", 2, False), ("cuda", 1, False)]
)
def test_on_cpus_a_model_that_is_not_split_runs_in_the_engines_own_process(
    device: str, tensor_parallel_size: int, is_alone: bool
) -> None:
    made = config(None)
    made = replace(made, device=Device(device), actors=replace(made.actors, tensor_parallel_size=tensor_parallel_size))
    assert (executor(made) is not None) == is_alone


def test_who_names_cores_for_the_engine_gets_the_process_that_keeps_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for binding, is_alone in (("nobind", True), ("0-1", False)):
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", binding)
        assert (executor(config(None)) is not None) == is_alone

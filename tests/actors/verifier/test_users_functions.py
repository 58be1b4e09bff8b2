"""Functions of users in the pool: what they return and raise, async ones, what is refused before anything starts."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from actors.verifier.async_template import MAX_AT_ONCE
from actors.verifier.judgement import Judgement
from actors.verifier.pool import VerifierPool
from actors.verifier.trial import try_verifier
from common.config import Config, ConfigError, ModelConfig, RewardConfig, VerifierConfig
from common.types import Prompt, Verdict

SYNC, ASYNC = "returning_plugins:verify", "returning_plugins:verify_async"
CORRECT, TIMED_OUT = Judgement(Verdict.CORRECT), Judgement(Verdict.TIMED_OUT)
either = pytest.mark.parametrize("function", [SYNC, ASYNC])


@pytest.fixture(autouse=True)
def plugin_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "support"))


def in_pool(body: Callable[[VerifierPool], Awaitable[Any]], function: str, **options: Any) -> Any:
    settings: dict[str, Any] = {"num_workers": 1, "timeout_s": 5.0, "memory_mb": 512, **options}

    async def main() -> Any:
        async with asyncio.timeout(60), VerifierPool(function, **settings) as pool:
            return await body(pool)

    return asyncio.run(main())


@either
def test_what_a_function_returns_or_raises_comes_back_and_it_goes_on(function: str) -> None:
    async def body(pool: VerifierPool) -> list[Judgement]:
        return [await pool.judge(response, "", {}) for response in ("number", "none", "raise", "dict", "true")]

    number, none, error, pair, true = in_pool(body, function, correct_from=0.25)
    assert number == Judgement(Verdict.CORRECT, 0.25)
    assert none.verdict is Verdict.ERROR and none.error.startswith("returned None (NoneType)")
    assert error.verdict is Verdict.ERROR and error.error.startswith("raised KeyError: 'no such column' (returning_")
    assert (pair, true) == (Judgement(Verdict.WRONG, -0.5), CORRECT)


def test_async_answers_that_wait_do_not_wait_for_each_other_in_one_worker() -> None:
    async def body(pool: VerifierPool) -> tuple[float, list[Judgement]]:
        await pool.judge("true", "", {})
        started_s = time.monotonic()
        judgements = await asyncio.gather(*[pool.judge("wait", "", {"s": 1.0}) for _ in range(MAX_AT_ONCE)])
        return time.monotonic() - started_s, judgements

    elapsed_s, judgements = in_pool(body, ASYNC, timeout_s=30.0)
    assert judgements == [Judgement(Verdict.CORRECT, 1.0)] * MAX_AT_ONCE
    assert elapsed_s < MAX_AT_ONCE / 10  # one after the other they take ten times as long


def test_more_async_answers_than_are_taken_at_once_are_all_judged() -> None:
    async def body(pool: VerifierPool) -> list[Judgement]:
        return await asyncio.gather(*[pool.judge("wait", "", {"s": 0.05}) for _ in range(3 * MAX_AT_ONCE)])

    judgements = in_pool(body, ASYNC, num_workers=2, timeout_s=30.0)
    assert judgements == [Judgement(Verdict.WRONG, 0.05)] * (3 * MAX_AT_ONCE)


@pytest.mark.parametrize(
    ("response", "error"),
    [
        ("time out by itself", "raised TimeoutError"),
        ("cancel", "raised CancelledError"),
        ("exit", "raised SystemExit: 1"),
    ],
)
def test_async_answers_that_end_badly_by_themselves_are_errors(response: str, error: str) -> None:
    async def body(pool: VerifierPool) -> list[Judgement]:
        return await asyncio.gather(pool.judge(response, "", {}), pool.judge("wait", "", {"s": 0.5}))

    bad, good = in_pool(body, ASYNC, timeout_s=20.0, correct_from=0.5)
    assert bad.verdict is Verdict.ERROR and bad.error.startswith(error)
    assert good == Judgement(Verdict.CORRECT, 0.5)


def test_an_async_answer_that_waits_too_long_times_out_and_others_are_judged() -> None:
    async def body(pool: VerifierPool) -> list[Judgement]:
        return await asyncio.gather(pool.judge("wait", "", {"s": 60}), pool.judge("true", "", {}))

    assert in_pool(body, ASYNC, timeout_s=1.0) == [TIMED_OUT, CORRECT]


def test_an_async_answer_that_blocks_its_worker_times_out_and_later_ones_are_judged() -> None:
    async def body(pool: VerifierPool) -> list[Judgement]:
        blocking = asyncio.create_task(pool.judge("block", "", {"s": 60}))
        await asyncio.sleep(2.0)
        return [await pool.judge("true", "", {}), await blocking]

    assert in_pool(body, ASYNC, timeout_s=3.0) == [CORRECT, TIMED_OUT]


def test_large_rows_reach_an_async_function_whole() -> None:
    texts = ["\ud800\n", "x" * 3_000_000, "y" * 3_000_000]

    async def body(pool: VerifierPool) -> list[Judgement]:
        return await asyncio.gather(*[pool.judge("echo", str(len(text)), {"text": text}) for text in texts])

    assert in_pool(body, ASYNC, timeout_s=20.0) == [CORRECT] * 3


def test_an_object_with_an_async_call_is_async() -> None:
    async def body(pool: VerifierPool) -> Judgement:
        return await pool.judge("", "", {})

    assert in_pool(body, "returning_plugins:judge") == CORRECT


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def verify(response, reference, row)\n    return True\n", "SyntaxError: expected ':' in mine.py line 1"),
        ("import os\nprice = 1 / 0\n", "ZeroDivisionError: division by zero in mine.py line 2"),
        ("raise SystemExit('no licence')\n", "SystemExit: no licence in mine.py line 1"),
        ("import no_such_package\n", "ModuleNotFoundError: No module named 'no_such_package' in mine.py line 1"),
        ("other = 1\n", "has no attribute 'verify'"),
        ("verify = 1\n", "is a int, not a function"),
        ("def verify(response, reference): ...\n", "is verify(response, reference), but it is called as"),
        ("def verify(response, reference, row, *, judge): ...\n", "missing a required argument: 'judge'"),
        ("INTERRUPTIBLE = ('mine',)\nasync def verify(response, reference, row): ...\n", "INTERRUPTIBLE has no use"),
    ],
)
def test_a_function_that_cannot_be_used_is_one_sentence_at_the_start(
    source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))

    async def body(pool: VerifierPool) -> None:
        raise AssertionError("must not start")

    with pytest.raises(ConfigError) as caught:
        in_pool(body, "mine:verify")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def try_on(reference: str, function: str = SYNC, **settings: Any) -> None:
    config = Config(
        model=ModelConfig(path="none"),
        verifier=VerifierConfig(function=function, **settings),
        reward=RewardConfig(),
    )
    asyncio.run(try_verifier(config, Prompt(uid="train/0", text="", reference=reference, row={"s": 60})))


@either
def test_a_function_is_tried_on_the_first_row(function: str) -> None:
    for reference in ("true", "false", "number", "dict"):
        try_on(reference, function)
    with pytest.raises(ConfigError, match=rf"verifier\.function={function} returned None \(NoneType\).*train/0"):
        try_on("none", function)
    with pytest.raises(ConfigError, match="raised KeyError"):
        try_on("raise", function)


def test_a_function_that_is_too_slow_for_its_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"came to no end within verifier\.timeout_s=0\.5 s"):
        try_on("wait", ASYNC, timeout_s=0.5)


def test_a_refused_module_that_has_started_a_thread_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "import threading\nthreading.Thread(target=threading.Event().wait).start()\n"
    (tmp_path / "starts_a_thread.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))

    async def start() -> None:
        async with asyncio.timeout(30), VerifierPool("starts_a_thread:absent", 1, 5.0, 512):
            raise AssertionError("it has no such function")

    with pytest.raises(ConfigError, match="absent"):
        asyncio.run(start())

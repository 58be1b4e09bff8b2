"""The pool: time and memory limits, replacement of dead workers, the event loop stays free, plug-in
verifiers."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.verifier.pool import VerifierPool
from common.types import Verdict

HOSTILE = "verifier_plugins:behave"
INTERRUPTIBLE = "interruptible_plugins:behave"
ECHO = ("echo", "a", {"expected": "a"})
either = pytest.mark.parametrize("function", [HOSTILE, INTERRUPTIBLE])


@pytest.fixture(autouse=True)
def plugin_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "support"))


def in_pool(body: Callable[[VerifierPool], Awaitable[Any]], function: str = HOSTILE, **options: Any) -> Any:
    settings: dict[str, Any] = {"num_workers": 1, "timeout_s": 0.5, "memory_mb": 512, **options}

    async def main() -> Any:
        async with asyncio.timeout(60), VerifierPool(function, **settings) as pool:
            return await body(pool)

    return asyncio.run(main())


def test_the_plug_in_gets_response_reference_and_row_and_its_verdict_comes_back() -> None:
    async def body(pool: VerifierPool) -> list[Verdict]:
        return [
            await pool.verify("echo", "a", {"expected": "a"}),
            await pool.verify("echo", "a", {"expected": "b"}),
            await pool.verify("nothing", "a", {}),
        ]

    assert in_pool(body) == [Verdict.CORRECT, Verdict.WRONG, Verdict.UNANSWERED]


@either
@pytest.mark.parametrize(
    ("behaviour", "verdict"),
    [
        *((behaviour, Verdict.TIMED_OUT) for behaviour in ("hang", "eat memory")),
        *((behaviour, Verdict.ERROR) for behaviour in ("raise", "exit", "die", "close descriptors")),
        ("load what is not there", Verdict.ERROR),
    ],
)
def test_after_an_answer_that_ruins_its_worker_the_next_is_served(
    function: str, behaviour: str, verdict: Verdict
) -> None:
    async def body(pool: VerifierPool) -> list[Verdict]:
        ruined = await pool.verify(behaviour, "", {})
        return [ruined, *[await pool.verify("echo", "a", {"expected": "a"}) for _ in range(3)]]

    assert in_pool(body, function) == [verdict, *[Verdict.CORRECT] * 3]


@pytest.mark.alone
@either
def test_others_do_not_wait_for_an_answer_that_hangs(function: str) -> None:
    async def body(pool: VerifierPool) -> float:
        hanging = [asyncio.create_task(pool.verify("hang", "", {})) for _ in range(3)]
        started_s = time.monotonic()
        others = await asyncio.gather(*[pool.verify("echo", "a", {"expected": "a"}) for _ in range(50)])
        elapsed_s = time.monotonic() - started_s
        assert set(others) == {Verdict.CORRECT}
        assert set(await asyncio.gather(*hanging)) == {Verdict.TIMED_OUT}
        return elapsed_s

    assert in_pool(body, function, timeout_s=4.0) < 2.0


def test_the_event_loop_runs_on_while_answers_hang() -> None:
    async def body(pool: VerifierPool) -> int:
        hanging = asyncio.create_task(pool.verify("hang", "", {}))
        ticks = 0
        while not hanging.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    assert in_pool(body) > 10


@pytest.mark.alone
def test_when_the_template_is_killed_its_answers_are_errors_and_another_is_started() -> None:
    async def body(pool: VerifierPool) -> list[Verdict]:
        hanging = asyncio.create_task(pool.verify("hang", "", {}))
        await pool.verify("echo", "a", {"expected": "a"})
        assert pool._process is not None
        os.kill(pool._process.pid, signal.SIGKILL)
        return [await hanging, await pool.verify("echo", "a", {"expected": "a"})]

    assert in_pool(body, timeout_s=20.0) == [Verdict.ERROR, Verdict.CORRECT]


@pytest.mark.alone
@either
def test_workers_that_hang_or_are_stopped_die_with_their_template(function: str) -> None:
    async def body(pool: VerifierPool) -> tuple[set[int], int]:
        hanging = [asyncio.create_task(pool.verify("hang", "", {})) for _ in range(4)]
        await asyncio.gather(*[pool.verify("echo", "a", {"expected": "a"}) for _ in range(20)])
        assert pool._process is not None
        template = psutil.Process(pool._process.pid)
        workers = template.children()
        template.kill()
        await asyncio.gather(*hanging)
        _, alive = psutil.wait_procs(workers, timeout=10)
        return {worker.pid for worker in alive}, len(workers)

    alive, num_workers = in_pool(body, function, timeout_s=8.0)
    assert num_workers >= (4 if function == HOSTILE else 2)
    assert not alive


@either
def test_answers_that_take_long_are_judged_among_answers_that_hang(function: str) -> None:
    async def body(pool: VerifierPool) -> list[Verdict]:
        hanging = [asyncio.create_task(pool.verify("hang", "", {})) for _ in range(5)]
        verdicts = await asyncio.gather(*[pool.verify("work", "", {"cpu_s": 0.1}) for _ in range(3)])
        await asyncio.gather(*hanging)
        return verdicts

    assert in_pool(body, function, timeout_s=4.0) == [Verdict.CORRECT] * 3


@either
def test_under_load_no_ordinary_answer_pays_for_those_that_hang(function: str) -> None:
    answers = [
        ("hang", {}) if k % 50 == 25 else ("work", {"cpu_s": 0.008 if k % 20 == 3 else 0.0001}) for k in range(600)
    ]

    async def body(pool: VerifierPool) -> list[Verdict]:
        return await asyncio.gather(*[pool.verify(response, "", row) for response, row in answers])

    expected = [Verdict.TIMED_OUT if response == "hang" else Verdict.CORRECT for response, _ in answers]
    assert in_pool(body, function, timeout_s=3.0) == expected


@either
@pytest.mark.parametrize(
    ("num_workers", "answers"),
    [
        (1, [("work", {"cpu_s": 0.06})] * 50),
        (1, [("work", {"cpu_s": 0.06 if k % 10 == 9 else 0.0001}) for k in range(500)]),
        (2, [("sleep", {"s": 0.1})] * 60),
    ],
    ids=["all compute", "one in ten computes", "all sleep"],
)
def test_a_verifier_that_takes_long_loses_no_answer_when_many_wait(
    function: str, num_workers: int, answers: list[tuple[str, dict[str, float]]]
) -> None:
    async def body(pool: VerifierPool) -> list[Verdict]:
        return await asyncio.gather(*[pool.verify(response, "", row) for response, row in answers])

    assert in_pool(body, function, num_workers=num_workers, timeout_s=1.0) == [Verdict.CORRECT] * len(answers)


@either
@pytest.mark.parametrize("behaviour", ["hang", "sleep"])
def test_once_the_usual_time_is_known_others_hardly_wait_for_what_hangs(function: str, behaviour: str) -> None:
    limit_s = 6.0

    async def body(pool: VerifierPool) -> tuple[float, set[Verdict]]:
        echo = ("echo", "a", {"expected": "a"})
        await asyncio.gather(*[pool.verify(*echo) for _ in range(20)])
        hanging = [asyncio.create_task(pool.verify(behaviour, "", {"s": 60})) for _ in range(20)]
        started_s = time.monotonic()
        await asyncio.gather(*[pool.verify(*echo) for _ in range(200)])
        elapsed_s = time.monotonic() - started_s
        return elapsed_s, set(await asyncio.gather(*hanging))

    elapsed_s, verdicts = in_pool(body, function, timeout_s=limit_s)
    assert elapsed_s < limit_s / 2  # one after the other they would take 20 times the limit
    assert verdicts == {Verdict.TIMED_OUT}


@pytest.mark.parametrize(("behaviour", "is_kept"), [("hang", True), ("hang elsewhere", False), ("hang in C", False)])
def test_a_worker_is_kept_when_its_answer_was_interrupted_in_code_that_may_be(behaviour: str, is_kept: bool) -> None:
    async def body(pool: VerifierPool) -> tuple[set[Verdict], Verdict, Verdict]:
        await asyncio.gather(*[pool.verify(*ECHO) for _ in range(20)])
        answers = [(behaviour, "", {}) if k == 100 else ECHO for k in range(200)]
        verdicts = await asyncio.gather(*[pool.verify(*answer) for answer in answers])
        hanging = verdicts.pop(100)
        return set(verdicts), hanging, await pool.verify("interrupted before", "", {})

    after = Verdict.CORRECT if is_kept else Verdict.WRONG
    assert in_pool(body, INTERRUPTIBLE, timeout_s=2.0) == ({Verdict.CORRECT}, Verdict.TIMED_OUT, after)


@pytest.mark.parametrize("behaviour", ["swallow", "swallow and go on"])
def test_the_verdict_of_an_answer_that_was_interrupted_does_not_count(behaviour: str) -> None:
    async def body(pool: VerifierPool) -> tuple[set[Verdict], set[Verdict]]:
        others = await asyncio.gather(*[pool.verify(*ECHO) for _ in range(20)])
        answers = [(behaviour, "", {}) if k % 50 == 25 else ECHO for k in range(200)]
        verdicts = await asyncio.gather(*[pool.verify(*answer) for answer in answers])
        swallowing = {v for v, answer in zip(verdicts, answers, strict=True) if answer is not ECHO}
        return swallowing, {*others, *(v for v, answer in zip(verdicts, answers, strict=True) if answer is ECHO)}

    assert in_pool(body, INTERRUPTIBLE, timeout_s=1.0) == ({Verdict.TIMED_OUT}, {Verdict.CORRECT})


@pytest.mark.parametrize("behaviour", ["hang", "hang in C", "die", "raise", "exit", "eat memory", "swallow"])
def test_the_answers_handed_over_together_with_one_that_ruins_their_worker_are_judged(behaviour: str) -> None:
    async def body(pool: VerifierPool) -> list[Verdict]:
        await asyncio.gather(*[pool.verify(*ECHO) for _ in range(50)])
        answers = [(behaviour, "", {}) if k % 100 == 7 else ECHO for k in range(400)]
        return await asyncio.gather(*[pool.verify(*answer) for answer in answers])

    ruined = Verdict.ERROR if behaviour in ("raise", "exit", "die") else Verdict.TIMED_OUT
    expected = [ruined if k % 100 == 7 else Verdict.CORRECT for k in range(400)]
    assert in_pool(body, INTERRUPTIBLE, timeout_s=1.5) == expected


@pytest.mark.alone
def test_a_rare_answer_that_takes_long_is_judged_at_a_later_attempt_while_others_hang() -> None:
    async def body(pool: VerifierPool) -> list[Verdict]:
        await asyncio.gather(*[pool.verify(*ECHO) for _ in range(1000)])
        hanging = [asyncio.create_task(pool.verify("hang", "", {})) for _ in range(3)]
        others = [asyncio.create_task(pool.verify(*ECHO)) for _ in range(200)]
        verdicts = await asyncio.gather(*[pool.verify("work", "", {"cpu_s": 0.05}) for _ in range(2)])
        await asyncio.gather(*hanging, *others)
        return verdicts

    assert in_pool(body, INTERRUPTIBLE, timeout_s=12.0) == [Verdict.CORRECT] * 2


@pytest.mark.alone
@pytest.mark.parametrize("hanging", ["hang", "hang in C", "sleep"])
def test_what_hung_while_nobody_waited_makes_way_for_the_later_attempts_of_others(hanging: str) -> None:
    async def body(pool: VerifierPool) -> list[Verdict]:
        await asyncio.gather(*[pool.verify(*ECHO) for _ in range(1000)])
        first = asyncio.create_task(pool.verify(hanging, "", {"s": 100}))
        await asyncio.sleep(0.2)  # a worker takes it up alone
        await pool.verify(*ECHO)
        others = [asyncio.create_task(pool.verify(*ECHO)) for _ in range(200)]
        verdicts = await asyncio.gather(*[pool.verify("work", "", {"cpu_s": 0.05}) for _ in range(2)])
        assert not first.done()
        await asyncio.gather(first, *others)
        return verdicts

    assert in_pool(body, INTERRUPTIBLE, timeout_s=6.0) == [Verdict.CORRECT] * 2


@pytest.mark.alone
def test_what_began_while_nobody_waited_keeps_what_it_has_done_when_others_need_later_attempts() -> None:
    """Begun again, it would not end within its limit."""

    async def body(pool: VerifierPool) -> list[Verdict]:
        await asyncio.gather(*[pool.verify(*ECHO) for _ in range(1000)])
        first = asyncio.create_task(pool.verify("work", "", {"cpu_s": 4.0}))
        await asyncio.sleep(2.5)
        await pool.verify(*ECHO)
        others = [asyncio.create_task(pool.verify(*ECHO)) for _ in range(200)]
        short = await pool.verify("work", "", {"cpu_s": 0.05})
        await asyncio.gather(*others)
        assert not first.done()
        return [short, await first]

    assert in_pool(body, INTERRUPTIBLE, timeout_s=6.2) == [Verdict.CORRECT] * 2


@pytest.mark.alone
def test_answers_that_are_put_off_because_they_take_long_are_all_judged_also_when_many_come_at_once() -> None:
    async def body(pool: VerifierPool) -> list[Verdict]:
        await asyncio.gather(*[pool.verify(*ECHO) for _ in range(1000)])
        answers = [("work long", "", {"cpu_s": 0.05}) if k % 20 == 5 else ECHO for k in range(400)]
        return await asyncio.gather(*[pool.verify(*answer) for answer in answers])

    assert in_pool(body, INTERRUPTIBLE, timeout_s=1.0) == [Verdict.CORRECT] * 400


def test_a_cancelled_caller_leaves_the_pool_whole() -> None:
    async def body(pool: VerifierPool) -> Verdict:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await pool.verify("hang", "", {})
        return await pool.verify("echo", "a", {"expected": "a"})

    assert in_pool(body) is Verdict.CORRECT


def test_answers_that_are_asked_at_once_are_one_write_to_the_other_process() -> None:
    writes: list[bytes] = []

    async def body(pool: VerifierPool) -> list[Verdict]:
        assert pool._process is not None and pool._process.stdin is not None
        write = pool._process.stdin.write

        def noted(data: bytes) -> None:
            writes.append(data)
            write(data)

        pool._process.stdin.write = noted  # type: ignore[method-assign]
        await asyncio.gather(*[pool.verify(*ECHO) for _ in range(8)])
        return await asyncio.gather(*[pool.verify("echo", str(k), {"expected": "3"}) for k in range(5)])

    wrong = Verdict.WRONG
    assert in_pool(body) == [wrong, wrong, wrong, Verdict.CORRECT, wrong]
    assert [data.count(b"\n") for data in writes] == [8, 5]


def test_what_a_verifier_prints_does_not_reach_the_protocol() -> None:
    async def body(pool: VerifierPool) -> Verdict:
        return await pool.verify("print", "a", {})

    assert in_pool(body) is Verdict.CORRECT


@either
def test_any_text_crosses_the_pipes(function: str) -> None:
    texts = ["", "\x00\n\r\n\u2028", "\ud800 lone surrogate", "\U0001d7d8", "x" * 1_000_000]

    async def body(pool: VerifierPool) -> list[Verdict]:
        return [await pool.verify("length", str(len(text)), {"text": text}) for text in texts]

    assert in_pool(body, function) == [Verdict.CORRECT] * len(texts)


@either
def test_heavy_modules_are_loaded_once_when_first_needed(function: str) -> None:
    async def body(pool: VerifierPool) -> list[Verdict]:
        cold = [await pool.verify("is warm", "", {}), await pool.verify("is warm", "", {})]
        needing = await asyncio.gather(*[pool.verify("need warmth", "", {}) for _ in range(4)])
        return [*cold, *needing, await pool.verify("is warm", "", {})]

    wrong, correct = Verdict.WRONG, Verdict.CORRECT
    assert in_pool(body, function, num_workers=2) == [wrong, wrong, correct, correct, correct, correct, correct]


def test_the_verifier_is_warmed_up_once_in_the_template_for_every_later_worker() -> None:
    async def body(pool: VerifierPool) -> list[Verdict]:
        before = await pool.verify("is warmed up", "", {})
        await pool.verify("need warmth", "", {})
        await pool.verify("die", "", {})
        return [before, await pool.verify("is warmed up", "", {})]

    assert in_pool(body) == [Verdict.WRONG, Verdict.CORRECT]


@pytest.mark.parametrize("function", ["no_such_module:verify", "verifier_plugins:absent", "verifier_plugins", ""])
def test_a_function_that_cannot_be_loaded_is_one_sentence_at_the_start(function: str) -> None:
    async def body(pool: VerifierPool) -> None:
        raise AssertionError("must not start")

    with pytest.raises(ValueError, match=r"verifier\.function"):
        in_pool(body, function=function)


def test_names_of_packages_that_are_no_tuple_are_one_sentence_at_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "careless_plugin.py").write_text("INTERRUPTIBLE = 'sympy'\ndef verify(response, reference, row): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    async def body(pool: VerifierPool) -> None:
        raise AssertionError("must not start")

    with pytest.raises(ValueError, match="INTERRUPTIBLE is 'sympy'; it must be a tuple"):
        in_pool(body, function="careless_plugin:verify")


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="num_workers = 0"):
        VerifierPool(HOSTILE, num_workers=0, timeout_s=1.0, memory_mb=100)


def test_the_template_loads_neither_torch_nor_vllm_nor_sympy() -> None:
    code = (
        "import sys, actors.verifier.template, actors.verifier.math\n"
        "print([m for m in ('torch', 'vllm', 'sympy', 'numpy.linalg') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "torch" not in printed.stdout and "vllm" not in printed.stdout and "sympy" not in printed.stdout

"""Answers that try to hang, crash or execute something: each gets a verdict in time and the pool stays whole."""

import asyncio
import time

import pytest

from actors.verifier.math import answers_equal, verify, verify_anywhere
from actors.verifier.pool import VerifierPool
from common.types import Verdict

pytestmark = pytest.mark.timeout(120)
TIMEOUT_S = 3.0
# No real number has a value here, so only sympy could prove equality, and works on it for minutes.
LONG_SIMPLIFICATION = r"\arcsin(x^2+2)+(\sin x+\cos x)^{40}"
ITS_REFERENCE = r"\arcsin(x^2+2)+(\sin x-\cos x)^{40}"
HOSTILE = {
    "power tower": "9^{9^{9^9}}",
    "nested braces": "{" * 10_000,
    "nested brackets": "(" * 5_000 + ")" * 5_000,
    "a megabyte of digits": "1" * 1_000_000,
    "a megabyte of spaces": " " * 1_000_000 + "x",
    "a megabyte of braces": "{" * 500_000 + "}" * 500_000,
    "boxes never closed": r"\boxed{" * 50_000,
    "code": "__import__('os').system('false')",
    "factorials": "5" + "!" * 500,
    "large factorial": "(10^9)!",
    "large binomial": r"\binom{10^{12}}{5 \cdot 10^{11}}",
    "sine of a giant": r"\sin(10^{10^9})",
    "floor of a giant": r"\lfloor 10^{10^9} / 3 \rfloor",
    "sign of a giant": "(-1)^{10^{10^9}}",
    "double sum": r"\sum_{k=1}^{1000} \sum_{j=1}^{1000} \sin(kjx)",
    "many powers": "9^{60000}" * 200,
    "long chain": "1/" * 900 + "1",
    "signs": "-" * 1_900 + "1",
    "macros": r"\frac" * 600,
    "environments": r"\begin{pmatrix}" * 100,
    "digit groups": "111 " * 480,
    "nested radicals": "+".join(rf"\sqrt{{{p}+\sqrt[3]{{{p}}}}}" for p in (2, 3, 5, 7, 11, 13, 17)),
    "surrogate": "\ud800\x00",
    "simplification": LONG_SIMPLIFICATION,
}


@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in ("simplification", "double sum")])
def test_a_hostile_answer_is_judged_wrong_in_good_time(name: str) -> None:
    text = HOSTILE[name]
    started_s = time.monotonic()
    for reference in ("42", r"\sqrt{2}+x"):
        assert verify("\\boxed{" + text + "}", reference, {}) in (Verdict.WRONG, Verdict.UNANSWERED)
        assert verify_anywhere(text, reference, {}) in (Verdict.WRONG, Verdict.UNANSWERED)
    assert time.monotonic() - started_s < 4 * TIMEOUT_S


def test_the_pool_gives_every_hostile_answer_a_verdict_and_is_whole_afterwards() -> None:
    async def body() -> tuple[dict[str, Verdict], list[Verdict], float]:
        async with VerifierPool("actors.verifier.math:verify", 2, TIMEOUT_S, 1024) as pool:
            started_s = time.monotonic()
            answers = [pool.verify("\\boxed{" + text + "}", ITS_REFERENCE, {}) for text in HOSTILE.values()]
            verdicts = dict(zip(HOSTILE, await asyncio.gather(*answers), strict=True))
            elapsed_s = time.monotonic() - started_s
            after = [await pool.verify(r"\boxed{\sqrt8}", r"2\sqrt2", {}) for _ in range(4)]
            return verdicts, after, elapsed_s

    verdicts, after, elapsed_s = asyncio.run(body())
    assert Verdict.CORRECT not in verdicts.values()
    assert verdicts["simplification"] is Verdict.TIMED_OUT
    assert after == [Verdict.CORRECT] * 4
    assert elapsed_s < 30


def test_text_is_never_executed(tmp_path: object) -> None:
    marker = f"{tmp_path}/executed"
    for text in (f"__import__('os').mkdir('{marker}')", rf"\text{{exec('import os; os.mkdir(\"{marker}\")')}}"):
        assert not answers_equal(text, "42")
    from pathlib import Path

    assert not Path(marker).exists()

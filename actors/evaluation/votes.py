"""Which responses to a prompt give the same answer: what maj@K counts.

An answer is what the run's verifier reads off a response, and equal is what that verifier takes for equal; a verifier
that does not say which answer it has read has no maj@K. All right answers equal the reference, and so each other; wrong
ones are compared with each other, in the verifier's processes, because they are the model's texts.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

from actors.verifier import math
from actors.verifier.extract import extract
from actors.verifier.pool import VerifierPool
from common.config import Config
from common.scores import ABSTAINS
from common.tasks import chain_sum, verifier_function
from common.types import AnswerForm, Verdict

Reader = Callable[[str], str | None]
Equal = Callable[[str, str], Awaitable[bool]]

RIGHT = 0  # the vote of every right answer

_MATH = {f"{math.__name__}:{name}": partial(extract, mode=mode) for name, mode in math.EXTRACTIONS.items()}
_TEXT: dict[str, Reader] = {chain_sum.VERIFIER: chain_sum.read_answer}  # equal when they are the same text


def answer_reader(function: str) -> Reader | None:
    """What reads the answer off a response as the verifier "module:function" does; None where that is not known."""
    return _MATH.get(function) or _TEXT.get(function)


@asynccontextmanager
async def equality(config: Config) -> AsyncIterator[Equal]:
    """Whether two answers are equal to the verifier of `config`, whatever their form."""
    if verifier_function(config) not in _MATH:
        yield _is_same_text
        return
    settings = config.verifier
    pool = VerifierPool(
        "actors.grade:grade_row",
        settings.num_workers,
        settings.timeout_s,
        settings.memory_mb,
        answer_form=AnswerForm.ANY,
    )
    async with pool:

        async def is_equal(answer: str, other: str) -> bool:
            return await pool.verify(answer, other, {"input": "answer"}) is Verdict.CORRECT

        yield is_equal


async def votes_of(answers: Sequence[str | None], verdicts: Sequence[Verdict], is_equal: Equal) -> list[int]:
    """The vote of each response to one prompt: RIGHT, a number from 1 on for each wrong answer, or ABSTAINS."""
    firsts: list[str] = []  # one of each wrong answer that has been met
    known: dict[str, int] = {}
    votes = []
    for answer, verdict in zip(answers, verdicts, strict=True):
        if answer is None or verdict is Verdict.CORRECT:
            votes.append(ABSTAINS if answer is None else RIGHT)
            continue
        if answer not in known:
            known[answer] = await _number(answer, firsts, is_equal)
        votes.append(known[answer])
    return votes


async def _number(answer: str, firsts: list[str], is_equal: Equal) -> int:
    for number, first in enumerate(firsts, start=1):
        if await is_equal(answer, first):
            return number
    firsts.append(answer)
    return len(firsts)


async def _is_same_text(answer: str, other: str) -> bool:
    return answer == other

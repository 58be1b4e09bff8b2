"""Which responses vote for the same answer."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from actors.evaluation.votes import RIGHT, answer_reader, equality, votes_of
from common.config import Config, ModelConfig, VerifierConfig
from common.scores import ABSTAINS
from common.types import Verdict

C, W, U = Verdict.CORRECT, Verdict.WRONG, Verdict.UNANSWERED


async def same_number(answer: str, other: str) -> bool:
    return float(answer) == float(other)


@given(st.lists(st.sampled_from(["1", "1.0", "2", "2.0", "2.00", "7"]), max_size=9))
def test_wrong_answers_have_one_vote_exactly_when_they_are_equal(answers: list[str]) -> None:
    votes = asyncio.run(votes_of(answers, [W] * len(answers), same_number))
    pairs = [(a, b, v, w) for a, v in zip(answers, votes, strict=True) for b, w in zip(answers, votes, strict=True)]
    assert all((float(a) == float(b)) == (v == w) for a, b, v, w in pairs)
    assert set(votes) == set(range(1, len(set(votes)) + 1))


def test_right_answers_agree_whatever_they_look_like_and_no_answer_is_no_vote() -> None:
    votes = asyncio.run(votes_of(["1/2", "0.5", None, "3", "3.0"], [C, C, U, W, W], same_number))
    assert votes == [RIGHT, RIGHT, ABSTAINS, 1, 1]


def test_a_verifier_s_answers_are_read_as_it_reads_them() -> None:
    boxed, line = (answer_reader(f"actors.verifier.math:{name}") for name in ("verify", "verify_answer_line"))
    assert boxed is not None and line is not None
    assert (boxed(r"so \boxed{4}"), boxed("Answer: 4"), line("Answer: 4")) == ("4", None, "4")
    chain = answer_reader("common.tasks.chain_sum:verify")
    assert chain is not None and chain("a+3=50#50") == "50"
    assert answer_reader("common.tasks.number_walk:verify") is answer_reader("mine:verify") is None


def test_answers_are_equal_to_the_mathematical_verifier_whatever_their_form() -> None:
    function = "actors.verifier.math:verify"
    config = Config(model=ModelConfig(path="none"), verifier=VerifierConfig(function=function))

    async def compare() -> list[int]:
        async with equality(config) as is_equal:
            return await votes_of([r"\frac{1}{2}", "0.5", "2/4", "x", "0.25"], [W] * 5, is_equal)

    assert asyncio.run(compare()) == [1, 1, 1, 2, 3]

"""chain_sum: add up a chain of one-digit terms, one written step per term.

    prompt      47a+3b-8=
    response    a+3=50b-8=42#42        then end of sequence

A letter labels each term, so that a step is found by its letter. A prompt has 2..20 terms (the start counts
as one), every partial sum stays in 10..99, and a response has 10..118 tokens of one character, the end
included.
"""

from dataclasses import dataclass
from random import Random

from common.types import Prompt, Verdict

NAME = "chain_sum"
VERIFIER = "common.tasks.chain_sum:verify"
LABELS = "abcdefghijklmnopqrs"
CHARACTERS = "0123456789+-=#" + LABELS
MIN_TERMS, MAX_TERMS = 2, 20
LOWEST, HIGHEST = 10, 99
MAX_PROMPT_TOKENS = 2 + 3 * (MAX_TERMS - 1) + 1
MAX_RESPONSE_TOKENS = 6 * (MAX_TERMS - 1) + 3 + 1


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A start in 10..99 and the signed one-digit terms that are added to it."""

    start: int
    terms: tuple[int, ...]

    @property
    def text(self) -> str:
        steps = "".join(f"{label}{term:+d}" for label, term in zip(LABELS, self.terms, strict=False))
        return f"{self.start}{steps}="

    @property
    def answer(self) -> int:
        return self.start + sum(self.terms)

    def prompt(self, uid: str) -> Prompt:
        return Prompt(uid=uid, text=self.text, reference=str(self.answer))


def sample_problem(rng: Random) -> Problem:
    """A problem with a uniform number of terms, each uniform among those that keep the sum in 10..99."""
    start = total = rng.randint(LOWEST, HIGHEST)
    terms: list[int] = []
    for _ in range(rng.randint(MIN_TERMS, MAX_TERMS) - 1):
        term = rng.choice([d for d in range(-9, 10) if d != 0 and LOWEST <= total + d <= HIGHEST])
        terms.append(term)
        total += term
    return Problem(start=start, terms=tuple(terms))


def verify(response: str, reference: str, row: dict[str, object]) -> Verdict:
    """CORRECT iff what follows the last `#` is exactly the reference; UNANSWERED without a `#`.

    The steps are not graded.
    """
    answer = read_answer(response)
    if answer is None:
        return Verdict.UNANSWERED
    return Verdict.CORRECT if answer == reference else Verdict.WRONG


def read_answer(response: str) -> str | None:
    """What follows the last `#`; None without one."""
    _, marker, answer = response.rpartition("#")
    return answer if marker else None


def _forgetful_sum(total: int, term: int) -> int:
    """The sum with the carry (or borrow) lost: units right, tens digit left as it was."""
    return total // 10 * 10 + (total + term) % 10


def _write_steps(problem: Problem, rng: Random, carry_drop: float, hard_term: int) -> str | None:
    total, steps = problem.start, []
    for label, term in zip(LABELS, problem.terms, strict=False):
        carries = (total + term) // 10 != total // 10
        is_dropped = carries and abs(term) >= hard_term and rng.random() < carry_drop
        total = _forgetful_sum(total, term) if is_dropped else total + term
        if not LOWEST <= total <= HIGHEST:
            return None
        steps.append(f"{label}{term:+d}={total}")
    return "".join(steps) + f"#{total}"


def sample_demonstration(rng: Random, carry_drop: float, hard_term: int) -> tuple[str, str]:
    """A (prompt, response) pair; a step with |term| >= `hard_term` loses its carry with probability `carry_drop`.

    Later steps go on from the wrong sum. A demonstration whose wrong sums leave 10..99 is drawn again.
    """
    while True:
        problem = sample_problem(rng)
        response = _write_steps(problem, rng, carry_drop, hard_term)
        if response is not None:
            return problem.text, response

"""The mathematical verifier: is the final answer of a response equal to the reference?

`verify` takes the last box of the response. `verify_answer_line`, `verify_hashes` and `verify_anywhere` also accept
an answer without a box; which of them a task uses is its `verifier.function`. Each takes `verifier.answer_form`.
"""

import re
from fractions import Fraction
from typing import Any

from actors.verifier.extract import Extraction, extract, stated_reference, unboxed
from actors.verifier.heavy import load
from common.types import AnswerForm, Verdict

_PLAIN = re.compile(r"\s*\$?\s*([+-]?\d{1,400})(?:\.(\d{1,100}))?\s*\$?\s*\.?\s*")
_MAX_PLAIN = 600  # characters of a plain number
_MAX_COMPARED = 100_000  # characters of an answer that is looked at at all
# Code in which an answer may be interrupted anywhere: what outlives the answer there, caches of finished results, is
# written in one step. Not sympy: its objects would remember facts that were being found out as unknown.
INTERRUPTIBLE = (
    *("mpmath", "pylatexenc"),
    *("abc", "collections", "contextlib", "dataclasses", "enum", "fractions", "json", "numbers", "random", "re"),
)
# Where each of the functions looks for the answer.
EXTRACTIONS = {
    "verify": Extraction.BOXED,
    "verify_answer_line": Extraction.ANSWER_LINE,
    "verify_hashes": Extraction.HASHES,
    "verify_anywhere": Extraction.ANYWHERE,
}
# Typical answers by the heavy module that they need, for warm_up.
_TYPICAL = {
    "actors.verifier.compare": (
        (r"\frac{3}{4}", "0.75"),
        (r"\text{(B)}", "B"),
        (r"x = 1{,}000", "1000"),
        (r"(1, \frac{9}{2})", "(1, 4.5)"),
    ),
    "mpmath": (
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
        (r"x^2 + 2x + 1", "(x+1)^2"),
        (r"\frac{2\pi}{3}", "2*pi/3"),
        (r"[-1, 2) \cup (3, \infty)", r"[-1, 2] \cup (3, \infty)"),
        (r"1 \pm \sqrt{5}", r"1 + \sqrt{5}, 1 - \sqrt{5}"),
        (r"\sin^2 x", r"1 - \cos^2(x)"),
        (r"y = 2x - 3", "2x - y = 3"),
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}"),
        (r"\log_2 5", r"\frac{\ln 5}{\ln 2}"),
        (r"2^{n-1}", r"\frac{2^n}{2}"),
    ),
    "sympy": ((r"\sqrt{-x^2 - 1} + y", r"y + \sqrt{-(1 + x^2)}"),),
}


def verify(response: str, reference: str, row: dict[str, Any], answer_form: AnswerForm = AnswerForm.EXACT) -> Verdict:
    """Compares the last \\boxed{} or \\fbox{} of the response with the reference."""
    return _verify(response, reference, EXTRACTIONS["verify"], answer_form)


def verify_answer_line(
    response: str, reference: str, row: dict[str, Any], answer_form: AnswerForm = AnswerForm.EXACT
) -> Verdict:
    """As `verify`; without a box, the last line of the form "Answer: ..."."""
    return _verify(response, reference, EXTRACTIONS["verify_answer_line"], answer_form)


def verify_hashes(
    response: str, reference: str, row: dict[str, Any], answer_form: AnswerForm = AnswerForm.EXACT
) -> Verdict:
    """As `verify`; without a box, the text after the last ####."""
    return _verify(response, reference, EXTRACTIONS["verify_hashes"], answer_form)


def verify_anywhere(
    response: str, reference: str, row: dict[str, Any], answer_form: AnswerForm = AnswerForm.EXACT
) -> Verdict:
    """As `verify`; without a box, "the answer is ...", else the last formula or number of the text."""
    return _verify(response, reference, EXTRACTIONS["verify_anywhere"], answer_form)


def warm_up(module: str) -> None:
    """Judges typical answers that need `module`, a heavy one, and fills the caches that others profit from.

    The pool's template process calls it once it has loaded the module; a user's verifier may have one as well.
    """
    for answer, reference in _TYPICAL.get(module, ()):
        answers_equal(answer, reference, AnswerForm.EXACT)


def _verify(response: str, reference: str, mode: Extraction, answer_form: AnswerForm) -> Verdict:
    answer = extract(response, mode)
    if answer is None:
        return Verdict.UNANSWERED
    return Verdict.CORRECT if answers_equal(answer, reference, answer_form) else Verdict.WRONG


def answers_equal(answer: str, reference: str, answer_form: AnswerForm = AnswerForm.ANY) -> bool:
    """Whether an answer, as LaTeX or plain text, is the reference. The empty answer equals nothing.

    With ANY symmetric, but that only the reference may be a worked solution. With EXACT it must also have the form of
    the reference (see the module form).
    """
    x, y = _plain_number(answer), _plain_number(reference)
    if x is not None and y is not None:
        return x == y
    if len(answer) > _MAX_COMPARED or len(reference) > _MAX_COMPARED:
        return False
    compare = load("actors.verifier.compare")  # the parser, which plain numbers do without
    return bool(compare.texts_equal(unboxed(answer), stated_reference(reference), answer_form is AnswerForm.EXACT))


def _plain_number(text: str) -> Fraction | None:
    """The common case without any parsing: an integer or a decimal."""
    found = _PLAIN.fullmatch(text) if len(text) <= _MAX_PLAIN else None
    if found is None:
        return None
    whole, places = found.groups()
    return Fraction(int(whole)) if places is None else Fraction(f"{whole}.{places}")

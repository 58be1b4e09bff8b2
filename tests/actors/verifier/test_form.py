r"""The form of an answer: a formula of the question is no answer to it, whatever its value."""

import asyncio
from pathlib import Path

import pytest

from actors.verifier.math import answers_equal, verify, verify_anywhere
from actors.verifier.plugin import load_verifier
from actors.verifier.pool import VerifierPool
from common.types import AnswerForm, Verdict

MATHEMATICAL = "actors.verifier.math:verify"
# reference: (answers in its form, answers of its value that are not)
FORMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "26000": (
        ("26000", "26,000", "2.6e4", r"2.6\times10^4", r"x = 26000", "513^2-487^2 = 26000", "26000 = 513^2-487^2"),
        ("513^2-487^2", r"26 \cdot 1000", "25999+1", "x = 25999+1", r"\sqrt{676000000}"),
    ),
    "1000": (("10^3", "1 000", "1e3", r"1 \text{ thousand}"), ("5!+880", r"\binom{1000}{1}", r"2^3\cdot5^3")),
    "6": (
        (r"\frac{12}{2}", "6.0", "6 cm", r"6^\circ", "six"),
        (r"\max(3,6)", r"\min(6,9)", r"\gcd(12,18)", r"\sum_{k=1}^{3}k", "3!", r"\log_2 64", r"20 \bmod 7", r"|-6|"),
    ),
    "-2": (("-2", r"-\frac{4}{2}"), (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", "1-3", r"\lfloor -1.5 \rfloor")),
    r"\frac{5}{6}": (("5/6", "10/12", r"\frac{-5}{-6}"), (r"\frac12+\frac13", r"\frac{2+3}{6}", r"\frac{1/2}{3/5}")),
    r"\frac{7}{2}": ((r"3\frac12", "3 1/2", "3.5", "3½"), (r"3+\frac12", r"7 \cdot \frac12")),
    r"0.\overline{3}": (("1/3", "0.(3)"), (r"1-\frac23",)),
    "50": (("50%", r"50\text{ percent}"), (r"\frac12 \cdot 100",)),
    "1011_2": (("1011_{2}", "1011 (base 2)"), ()),
    "6+9i": (("9i+6", r"\frac{12+18i}{2}"), ("6(1+2i)-3i", "3(2+3i)")),
    r"-2+3i, -2-3i": ((r"-2 \pm 3i", "-2-3i, -2+3i"), (r"-2 \pm \sqrt{-9}",)),
    "x < 3": (("3 > x", r"(-\infty, 3)", "-x > -3"), ("2x < 6", "x-3 < 0")),
    "(-1,3)": (("-1<x<3",), ("|x-1|<2",)),
    "x = 5": (("5", "x=5", "5 = x"), ("2x = 10", "x = 2+3")),
    "(2, 3)": (("(2,3)", "(2.0, 6/2)"), ("(1+1, 3)",)),
    r"\begin{pmatrix}1/2&1\\3/2&2\end{pmatrix}": (
        (r"\frac12\begin{pmatrix}1&2\\3&4\end{pmatrix}",),
        (
            r"\begin{pmatrix}0&1\\1&1\end{pmatrix}+\begin{pmatrix}1/2&0\\1/2&1\end{pmatrix}",
            r"\begin{pmatrix}1/2&0+1\\3/2&2\end{pmatrix}",
        ),
    ),
    r"3\sqrt{13}": ((r"\sqrt{117}", r"\frac{39}{\sqrt{13}}"), ("|6+9i|", r"\max(3\sqrt{13}, 1)")),
    r"\frac{\sqrt6+\sqrt2}{4}": ((r"\frac{\sqrt2(\sqrt3+1)}{4}",), (r"\cos 15^\circ", r"\sin 75^\circ")),
    r"\frac{\pi}{3}": ((r"\frac{2\pi}{6}", r"60^\circ"), (r"\arccos\frac12",)),
    r"\log_2 5": ((r"\frac{\ln 5}{\ln 2}",), ()),
    r"\cos 20^\circ": ((r"\sin 70^\circ",), ()),
    "15x - 80": (("5(3x-16)", "-80+15x"), ("19x + 1 - 4x - 81", r"3 \cdot 5x - 80", "(20x-81)+(1-5x)")),
    "12^{10}": ((r"2^{20} \cdot 3^{10}",), ()),
    "2+x+3": (("1+x+4", "x+5"), ()),
    r"\frac{n(n+1)}{2}": ((r"\binom{n+1}{2}", r"\frac{n^2+n}{2}"), (r"\sum_{k=1}^n k",)),
    r"\sum_{k=1}^n k^2": ((r"\sum_{j=1}^{n} j^2",), ()),
    r"\text{even}": (("even",), ()),
    "C": (("(C)", "C. x = 42"), ()),
}


@pytest.mark.parametrize("reference", FORMS)
def test_an_answer_in_the_form_of_its_reference_is_right(reference: str) -> None:
    answers, _ = FORMS[reference]
    assert [answer for answer in answers if not answers_equal(answer, reference, AnswerForm.EXACT)] == []


@pytest.mark.parametrize("reference", FORMS)
def test_an_answer_that_is_not_worked_out_is_right_only_where_any_form_is(reference: str) -> None:
    _, formulas = FORMS[reference]
    assert [formula for formula in formulas if answers_equal(formula, reference, AnswerForm.EXACT)] == []
    assert [formula for formula in formulas if not answers_equal(formula, reference, AnswerForm.ANY)] == []


def test_exact_is_what_training_gets_unless_it_says_otherwise() -> None:
    assert verify(r"\boxed{513^2-487^2}", "26000", {}) is Verdict.WRONG
    assert verify(r"\boxed{513^2-487^2}", "26000", {}, AnswerForm.ANY) is Verdict.CORRECT
    assert verify_anywhere("It is $513^2-487^2$.", "26000", {}) is Verdict.WRONG


@pytest.mark.parametrize(("form", "verdict"), [(AnswerForm.EXACT, Verdict.WRONG), (AnswerForm.ANY, Verdict.CORRECT)])
def test_the_pool_hands_the_setting_to_the_verifier(form: AnswerForm, verdict: Verdict) -> None:
    async def body() -> Verdict:
        async with asyncio.timeout(60), VerifierPool(MATHEMATICAL, 1, 3.0, 1024, answer_form=form) as pool:
            return await pool.verify(r"\boxed{2^{10}}", "1024", {})

    assert asyncio.run(body()) is verdict


def test_a_function_without_the_keyword_is_left_alone_and_the_setting_is_refused_where_it_has_no_use() -> None:
    load_verifier("common.tasks.chain_sum:verify", 1.0)
    with pytest.raises(ValueError, match=r'answer_form is "any", but common\.tasks\.chain_sum:verify has no keyword'):
        load_verifier("common.tasks.chain_sum:verify", 1.0, AnswerForm.ANY)


def test_a_function_that_asks_for_the_form_without_a_default_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "def verify(response, reference, row, *, answer_form):\n    return answer_form == 'any'\n"
    (tmp_path / "asks_for_the_form.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    verifier = load_verifier("asks_for_the_form:verify", 1.0, AnswerForm.ANY)
    assert verifier.verify("r", "a", {}) is True

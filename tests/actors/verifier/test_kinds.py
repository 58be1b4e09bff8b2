"""Kinds of mistakes that the verifier made once: what must not be accepted, beside what must not be refused for it."""

import pytest

from actors.verifier.math import answers_equal, verify, verify_answer_line, verify_anywhere
from common.types import AnswerForm, Verdict
from tests.support.verifier_kinds import KINDS, STATED

pytestmark = pytest.mark.timeout(120)
FUNCTIONS = {"a": verify_anywhere, "l": verify_answer_line}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_the_same_is_equal_in_both_orders(kind: str) -> None:
    same, _ = KINDS[kind]
    assert [(a, b) for a, b in same if not (answers_equal(a, b) and answers_equal(b, a))] == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_the_same_is_refused_in_both_orders(kind: str) -> None:
    _, different = KINDS[kind]
    assert [(a, b) for a, b in different if answers_equal(a, b) or answers_equal(b, a)] == []


@pytest.mark.parametrize(("response", "reference", "is_right", "modes"), STATED)
def test_what_a_response_states_is_judged(response: str, reference: str, is_right: bool, modes: str) -> None:
    for mode in modes:
        assert (FUNCTIONS[mode](response, reference, {}, AnswerForm.ANY) is Verdict.CORRECT) == is_right, mode


def test_an_answer_tag_counts_without_a_box_only_where_answer_lines_do() -> None:
    assert verify("<answer>42</answer>", "42", {}) is Verdict.UNANSWERED
    assert verify_answer_line(r"<answer>41</answer> \boxed{42}", "42", {}) is Verdict.CORRECT


def test_only_a_reference_may_be_a_worked_solution() -> None:
    assert answers_equal("42", "6 * 7 = 42\n#### 42")
    assert not answers_equal("41 #### 42", "42")
    assert answers_equal("42", r"\boxed{42")
    assert not answers_equal(r"\boxed{42", "42")

"""The verifier on its own cases and, where the folder is at hand, on the shared ones."""

import json
import subprocess
import sys
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest

from actors.grade import grade_row
from actors.verifier.extract import Extraction, extract
from actors.verifier.math import answers_equal, verify, verify_answer_line, verify_anywhere, verify_hashes
from common.types import AnswerForm, Verdict
from tests.support.verifier_cases import CLASSES, DIFFERENT, RESPONSES

SHARED = Path(__file__).resolve().parents[4] / "shared"


@pytest.mark.parametrize("spellings", CLASSES, ids=lambda spellings: spellings[0][:40])
def test_spellings_of_one_answer_are_equal_in_both_orders(spellings: tuple[str, ...]) -> None:
    pairs = list(combinations(spellings[:2], 2)) + [(spellings[k % 2], other) for k, other in enumerate(spellings[2:])]
    pairs += list(pairwise(spellings))
    refused = [(a, b) for a, b in pairs if not (answers_equal(a, b) and answers_equal(b, a))]
    assert not refused


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_answers_that_look_alike_but_differ_are_refused_in_both_orders(a: str, b: str) -> None:
    assert not answers_equal(a, b)
    assert not answers_equal(b, a)


def test_different_answers_are_different() -> None:
    firsts = [spellings[0] for spellings in CLASSES]
    assert [(a, b) for a, b in combinations(firsts, 2) if answers_equal(a, b)] == []


@pytest.mark.parametrize(("text", "mode", "answer"), RESPONSES)
def test_the_final_answer_is_found(text: str, mode: str, answer: str | None) -> None:
    assert extract(text, Extraction(mode)) == answer


def test_verdicts() -> None:
    assert verify(r"so \boxed{\frac12}", "0.5", {}) is Verdict.CORRECT
    assert verify(r"so \boxed{\frac13}", "0.5", {}) is Verdict.WRONG
    assert verify("so 0.5", "0.5", {}) is Verdict.UNANSWERED
    assert verify(r"\boxed{}", "0.5", {}) is Verdict.WRONG
    assert verify_answer_line("Answer: 0.5", "1/2", {}) is Verdict.CORRECT
    assert verify_hashes("#### 1,000", "1000", {}) is Verdict.CORRECT
    assert verify_anywhere("The answer is 1/2.", "0.5", {}) is Verdict.CORRECT


def test_a_reference_may_be_a_worked_solution() -> None:
    assert answers_equal("18", "She sells 16 - 3 - 4 = 9 eggs a day.\nShe makes 9 * 2 = 18.\n#### 18")
    assert answers_equal("28", r"Therefore the total is $4 \cdot 7 = \boxed{28}$ apples.")


def judge(row: dict[str, Any], form: AnswerForm) -> bool:
    gold = row["gold"]
    if row.get("gold_input") == "response":
        gold = extract(gold, Extraction.ANYWHERE) or gold
    return grade_row(row["pred"], gold, row, form) is Verdict.CORRECT


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared cases are not here")
@pytest.mark.parametrize(
    ("name", "form", "most_refused"),
    [
        ("grader_cases.jsonl", AnswerForm.ANY, 1),  # of 422 right ones; Math-Verify 0.8: 35
        ("grader_cases.jsonl", AnswerForm.EXACT, 15),  # the others are formulas for numbers
        ("grader_cases_2.jsonl", AnswerForm.ANY, 0),  # of 171
        ("grader_cases_2.jsonl", AnswerForm.EXACT, 3),
    ],
)
def test_no_wrong_shared_case_is_accepted_and_hardly_a_right_one_refused(
    name: str, form: AnswerForm, most_refused: int
) -> None:
    rows = [json.loads(line) for line in (SHARED / name).read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if not row.get("contested")]
    judged = [(row["id"], row["equal"], judge(row, form)) for row in rows]
    assert [case for case, is_right, is_accepted in judged if is_accepted and not is_right] == []
    assert len([case for case, is_right, is_accepted in judged if is_right and not is_accepted]) <= most_refused


def test_warming_up_for_one_heavy_module_loads_none_of_the_others() -> None:
    script = """
import importlib, sys
from actors.verifier.math import _TYPICAL, warm_up
for module in _TYPICAL:
    assert module not in sys.modules, module
    importlib.import_module(module)
    warm_up(module)
warm_up("json")
"""
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).resolve().parents[1], check=True, timeout=60)

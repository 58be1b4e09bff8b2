"""The verifier on its own cases and, where the folder is at hand, on the shared ones."""

import json
import subprocess
import sys
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from actors.verifier.extract import Extraction, extract
from actors.verifier.math import answers_equal, verify, verify_answer_line, verify_anywhere, verify_hashes
from common.types import Verdict
from tests.support.verifier_cases import CLASSES, DIFFERENT, RESPONSES

SHARED = Path(__file__).resolve().parents[4] / "shared" / "grader_cases.jsonl"


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


@pytest.mark.skipif(not SHARED.is_file(), reason="the shared cases are not here")
def test_the_shared_cases_have_no_false_accept_and_more_right_ones_than_math_verify() -> None:
    accepted, false_accepts = 0, []
    for line in SHARED.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("contested"):
            continue
        gold = row["gold"]
        if row.get("gold_input") == "response":
            gold = extract(gold, Extraction.ANYWHERE) or gold
        if row["input"] == "response":
            is_equal = verify_anywhere(row["pred"], gold, {}) is Verdict.CORRECT
        else:
            is_equal = answers_equal(row["pred"], gold)
        accepted += is_equal and row["equal"]
        if is_equal and not row["equal"]:
            false_accepts.append(row["id"])
    assert false_accepts == []
    assert accepted > 400  # Math-Verify 0.8: 387 of 422


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

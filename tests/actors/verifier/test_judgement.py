"""What a user's function may return, and what becomes of everything else."""

from pathlib import Path

import pytest

from actors.verifier.judgement import Judgement, decode, encode, judgement_of, raised
from common.types import Verdict
from tests.support.returning_plugins import VALUES, verify

C, W, U = Verdict.CORRECT, Verdict.WRONG, Verdict.UNANSWERED


@pytest.mark.parametrize(
    ("name", "judgement"),
    [
        ("verdict", Judgement(U)),
        ("name", Judgement(U)),
        ("true", Judgement(C)),
        ("false", Judgement(W)),
        ("numpy bool", Judgement(C)),
        ("number", Judgement(W, 0.25)),
        ("integer", Judgement(C, 1.0)),
        ("numpy number", Judgement(C, 0.5)),
        ("object", Judgement(C, 0.3)),
        ("dict", Judgement(W, -0.5)),
        ("dict with bool", Judgement(C, 0.1)),
    ],
)
def test_a_judgement_may_be_given_in_many_ways(name: str, judgement: Judgement) -> None:
    assert judgement_of(VALUES[name], correct_from=0.5) == judgement


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none", "returned None (NoneType), which is not a Verdict"),
        ("text", "returned 'yes' (str)"),
        ("nan", "returned nan (float)"),
        ("infinite", "returned inf (float)"),
        ("huge", "returned 1000"),
        ("half a dict", "returned {'reward': 1.0} (dict)"),
        ("reward that is none", "(dict)"),
        ("reward that is true", "(dict)"),
        ("list", "returned [1.0] (list)"),
        ("error", "returned Verdict.ERROR"),
        ("surrogate", "(str)"),
    ],
)
def test_anything_else_is_an_error_that_names_value_and_type(name: str, words: str) -> None:
    judgement = judgement_of(VALUES[name], correct_from=1.0)
    assert (judgement.verdict, judgement.reward) == (Verdict.ERROR, None)
    assert judgement.error is not None and words in judgement.error
    assert "\n" not in judgement.error and len(judgement.error) <= 300


@pytest.mark.parametrize("response", ["raise", "raise elsewhere"])
def test_an_exception_is_an_error_with_the_line_of_the_function(response: str) -> None:
    try:
        verify(response, "", {})
    except Exception as error:
        text = raised(error).error
    lines = Path(verify.__code__.co_filename).read_text().splitlines()
    place = {"raise": 'row["no such column"]', "raise elsewhere": "base=99"}[response]
    (number,) = [number for number, line in enumerate(lines, start=1) if place in line]
    kind = {"raise": "raised KeyError: 'no such column'", "raise elsewhere": "raised ValueError: "}[response]
    assert text is not None and text.startswith(kind) and text.endswith(f"(returning_plugins.py line {number})")


@pytest.mark.parametrize(
    "judgement",
    [Judgement(C), Judgement(W, 0.1), Judgement(W, -1e-300), Judgement(Verdict.ERROR, None, "raised a b c: d")],
)
def test_a_judgement_crosses_the_pipe_whole(judgement: Judgement) -> None:
    assert decode(encode(judgement)) == judgement
    assert b"\n" not in encode(judgement)


def test_a_text_that_cannot_be_written_is_made_one_that_can() -> None:
    judgement = judgement_of(VALUES["surrogate"], 1.0)
    assert decode(encode(judgement)) == judgement


def test_an_exception_that_cannot_be_written_is_an_error_all_the_same() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert raised(Mute()).error == "raised Mute: (without a text)"

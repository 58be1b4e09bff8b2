"""The benchmark with a pretrained model, as far as it goes without one: its problems, and what it says of a run."""

from pathlib import Path

import pytest

from benchmarks.smollm2 import problems, render, result
from tests.support.made_up_run import MadeUp, write_run


def parts(row: dict[str, object]) -> tuple[int, str, int]:
    text = row["prompt"][-1]["content"]  # type: ignore[index]
    a, sign, b = text.removeprefix("What is ").removesuffix("?").split()
    return int(a), sign, int(b)


def test_all_one_digit_problems_are_there_and_no_held_out_one_has_its_mirror_image_in_training() -> None:
    held_out, trained = (list(map(parts, rows)) for rows in problems())
    assert len({*held_out, *trained}) == len(held_out) + len(trained) == 300
    assert not {(b, sign, a) for a, sign, b in held_out} & set(trained)
    assert {sign: sum(row[1] == sign for row in held_out) for sign in "+-*"}.keys() == set("+-*")
    assert 0.3 < len(held_out) / 300 < 0.37


def test_every_answer_is_right() -> None:
    for row in (row for rows in problems() for row in rows):
        a, sign, b = parts(row)
        assert int(str(row["answer"])) == {"+": a + b, "-": a - b, "*": a * b}[sign]


def test_the_gain_has_the_standard_error_of_both_evaluations(tmp_path: Path) -> None:
    found = result(write_run(tmp_path / "run", MadeUp(change={"memory/peak_gib": 1.5})))
    assert found["curve"][0] == pytest.approx((0, 0.21, 0.04 / 1.96))  # type: ignore[index]
    text = render(found)
    assert "| 60 | 0.900 | 0.020 |" in text
    assert "+0.690 +- 0.029" in text

"""Data files: which columns are used, which rows cannot be, and what becomes of those."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.config import ConfigError, OnBadRow, TaskConfig, TrainFile
from common.tasks import Task, load_task
from common.tasks.rows import BadRow

GOOD = {"prompt": "1+1?", "answer": "2"}


def write(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def task_of(folder: Path, rows: list[Any], **settings: Any) -> Task:
    """The task whose training file holds `rows`."""
    train = write(folder / "train.jsonl", rows)
    heldout = write(folder / "heldout.jsonl", [{"prompt": "held out", "answer": 1}])
    return load_task(TaskConfig(name="file", train_file=train, heldout_file=heldout, **settings))


def refusal(folder: Path, rows: list[Any], **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        task_of(folder, rows, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


USER = {"role": "user", "content": "1+1?"}
BAD_ROWS = [
    ('{"prompt": ', BadRow.UNREADABLE, "not valid JSON"),
    ("[" * 5000, BadRow.UNREADABLE, "not valid JSON"),
    ('{"prompt": "a", "answer": ' + "9" * 5000 + "}", BadRow.UNREADABLE, "not valid JSON"),
    ([1], BadRow.UNREADABLE, "must be a JSON object, not a list"),
    ({"prompt": " \n", "answer": 1}, BadRow.NO_PROMPT, "column 'prompt' must be a text that is not blank"),
    ({"prompt": [{"role": "user"}], "answer": 1}, BadRow.NO_PROMPT, "column 'prompt' must be"),
    ({"prompt": [{"role": "user", "content": " "}], "answer": 1}, BadRow.NO_PROMPT, "'prompt' is blank"),
    ({"prompt": None, "answer": 1}, BadRow.NO_PROMPT, "not nothing"),
    ({"answer": 1}, BadRow.NO_PROMPT, "column 'prompt' is missing (there is: answer)"),
    ({"prompt": "b"}, BadRow.NO_ANSWER, "column 'answer' is missing"),
    ({"prompt": "b", "answer": "  "}, BadRow.NO_ANSWER, "column 'answer' is blank"),
    ({"prompt": "b", "answer": None}, BadRow.NO_ANSWER, "must be a text or a number, not nothing"),
    ({"prompt": "b", "answer": True}, BadRow.NO_ANSWER, "must be a text or a number, not true or false"),
    ('{"prompt": "b", "answer": NaN}', BadRow.NO_ANSWER, "column 'answer' is nan"),
    ('{"prompt": "b", "answer": -Infinity}', BadRow.NO_ANSWER, "column 'answer' is -inf"),
    (
        {"prompt": [USER, {"role": "assistant", "content": "2"}], "answer": 2},
        BadRow.ANSWERED,
        "ends with the assistant's turn",
    ),
    ({"prompt": "a", "answer": 1, "id": 2**63}, BadRow.UNSENDABLE, "column 'id' holds an integer of 19 digits"),
    ({"prompt": "a", "answer": 1, "x": {"y": [10**30]}}, BadRow.UNSENDABLE, "column 'x' holds an integer of 31"),
    ('{"prompt": "a", "answer": 1, "score": [NaN]}', BadRow.UNSENDABLE, "column 'score' holds nan"),
    ('{"prompt": "a \\ud83d", "answer": 1}', BadRow.UNSENDABLE, "column 'prompt' holds half a surrogate pair"),
    ('{"prompt": "a", "answer": "\\udc00"}', BadRow.UNSENDABLE, "column 'answer' holds half a surrogate pair"),
    ('{"prompt": "a", "answer": 1, "x": {"\\udc00": 1}}', BadRow.UNSENDABLE, "a name in column 'x' holds half"),
    ('{"prompt": "a", "answer": 1, "x": ' + "[" * 17 + "]" * 17 + "}", BadRow.UNSENDABLE, "deeper than 16"),
]


@pytest.mark.parametrize(("row", "reason", "words"), BAD_ROWS)
def test_a_row_that_cannot_be_used_is_refused_by_file_and_line(
    tmp_path: Path, row: Any, reason: BadRow, words: str
) -> None:
    message = refusal(tmp_path, [GOOD, row])
    assert message.startswith(f"{tmp_path}/train.jsonl, line 2: ")
    assert words in message


def test_rows_that_cannot_be_used_are_left_out_and_counted_where_that_is_asked_for(tmp_path: Path) -> None:
    rows = [GOOD, *(row for row, _, _ in BAD_ROWS), {"prompt": "last", "answer": 3}]
    task = task_of(tmp_path, rows, on_bad_row=OnBadRow.drop)
    assert [prompt.text for prompt in task.train] == ["1+1?", "last"]
    assert [problem.reason for problem in task.problems] == [reason for _, reason, _ in BAD_ROWS]
    assert task.problems[0].place == f"{tmp_path}/train.jsonl, line 2"
    assert task.place(task.train[1]) == f"{tmp_path}/train.jsonl, line {len(rows)}"


def test_the_first_of_several_bad_rows_is_named_and_the_others_counted(tmp_path: Path) -> None:
    rows = [GOOD, {"prompt": "", "answer": 1}, {"prompt": "x", "answer": ""}, {"prompt": "y", "answer": ""}]
    assert "line 2: column 'prompt' must be" in (message := refusal(tmp_path, rows))
    assert "(2 more such rows); mend or remove the row" in message


def test_a_file_without_a_usable_row_is_an_error_even_where_rows_may_be_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": "", "answer": 1}, {"prompt": "a", "answer": ""}]
    message = refusal(tmp_path, rows, on_bad_row=OnBadRow.drop)
    assert "none of its 2 rows can be used; " in message
    assert "train.jsonl, line 1: column 'prompt' must be" in message


def test_a_training_prompt_that_is_held_out_is_left_out_only_where_that_is_asked_for(tmp_path: Path) -> None:
    rows = [GOOD, {"prompt": "held out", "answer": 7}]
    message = refusal(tmp_path, rows)
    assert "train.jsonl, line 2: its prompt is also that of" in message and "heldout.jsonl, line 1, and held" in message
    task = task_of(tmp_path, rows, on_bad_row=OnBadRow.drop)
    assert [prompt.text for prompt in task.train] == ["1+1?"]
    assert [problem.reason for problem in task.problems] == [BadRow.HELD_OUT]
    assert len(task.heldout) == 1


def test_an_answer_of_more_than_64_bits_is_a_text_for_the_verifier_too(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": 10**30}, {"prompt": "b", "answer": -5}]
    assert [(p.reference, p.row["answer"]) for p in task_of(tmp_path, rows).train] == [(f"{10**30}",) * 2, ("-5", -5)]
    nested = [{"prompt": "a", "reward_model": {"ground_truth": 10**30, "style": "rule"}}]
    (prompt,) = task_of(tmp_path, nested).train
    assert prompt.row == {"reward_model": {"ground_truth": f"{10**30}", "style": "rule"}}


# --- columns


def only(task: Task) -> tuple[str, str]:
    (prompt,) = task.train
    return prompt.text or prompt.messages[-1]["content"], prompt.reference  # type: ignore[index]


SHAPES = [
    ({"prompt": [USER], "ability": "MATH", "reward_model": {"ground_truth": "34", "style": "rule"}}, "34"),  # DAPO
    ({"question": "1+1?", "answer": "She adds 1 and 1.\n#### 1,002 "}, "1,002"),  # GSM8K
    ({"problem": "1+1?", "level": "Level 1", "solution": r"Not \boxed{3} but \boxed{\frac{1}{2}}."}, r"\frac{1}{2}"),
    ({"problem": "1+1?", "solution": r"So \boxed{3}.", "answer": "3", "subject": "Algebra"}, "3"),  # MATH-500
    ({"problem": "1+1?", "solution": "34"}, "34"),
    ({"messages": [USER], "ground_truth": 4}, "4"),
    ({"prompt": "1+1?", "answer": "## not a GSM8K answer"}, "## not a GSM8K answer"),
]


@pytest.mark.parametrize(("row", "reference"), SHAPES)
def test_the_columns_of_the_usual_data_sets_are_recognised(tmp_path: Path, row: dict[str, Any], reference: str) -> None:
    train = write(tmp_path / "train.jsonl", [row])
    other = json.loads(json.dumps(row).replace("1+1?", "2+2?"))
    heldout = write(tmp_path / "heldout.jsonl", [other])
    task = load_task(TaskConfig(name="file", train_file=train, heldout_file=heldout))
    assert only(task) == ("1+1?", reference)


def test_the_columns_in_use_can_be_told(tmp_path: Path) -> None:
    rows = [{"question": "1+1?", "answer": "2 #### 2"}]
    assert str(task_of(tmp_path, rows).files[0].columns) == (
        "prompt = column 'question', reference = column 'answer' after its last ####"
    )


def test_a_mark_that_few_answers_hold_does_not_cut_the_others(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "answer": "#### 1" if i == 0 else str(i)} for i in range(5)]
    assert [prompt.reference for prompt in task_of(tmp_path, rows).train] == ["#### 1", "1", "2", "3", "4"]


def test_a_named_column_is_taken_as_it_stands(tmp_path: Path) -> None:
    rows = [{"question": "1+1?", "answer": "Add. #### 2", "prompt": "other"}]
    train = write(tmp_path / "train.jsonl", rows)
    heldout = write(tmp_path / "h.jsonl", [{"question": "2+2?", "answer": "4"}])
    columns = {"prompt_field": "question", "answer_field": "answer"}
    task = load_task(TaskConfig(name="file", train_file=train, heldout_file=heldout, **columns))
    assert only(task) == ("1+1?", "Add. #### 2")


def test_two_columns_that_could_be_meant_are_one_sentence(tmp_path: Path) -> None:
    message = refusal(tmp_path, [{"prompt": "a", "problem": "b", "answer": 1}])
    assert "the columns 'prompt' and 'problem' can each be the prompt; say which with task.prompt_field" in message
    message = refusal(tmp_path, [{"prompt": "a", "answer": 1, "reward_model": {"ground_truth": 1}}])
    assert "'answer' and 'reward_model.ground_truth' can each be the answer" in message
    message = refusal(tmp_path, [GOOD], answer_field="reference")
    assert "column 'reference' is missing (there is: answer, prompt); name the column of the answer" in message
    message = refusal(tmp_path, [{"text": "a", "answer": 1}])
    assert "column 'prompt' is missing (there is: answer, text); name the column of the prompt" in message


def test_a_row_without_the_part_that_holds_the_answer_is_refused(tmp_path: Path) -> None:
    gsm8k = [{"question": "a", "answer": "b #### 1"}, {"question": "c", "answer": "12"}]
    assert "line 2: column 'answer' has no answer after its last ####" in refusal(tmp_path, gsm8k)
    math = [{"problem": "a", "solution": r"\boxed{1}"}, {"problem": "c", "solution": r"\boxed{12"}]
    assert r"line 2: column 'solution' has no answer in its last \boxed{}" in refusal(tmp_path, math)


def test_parquet_that_pandas_wrote_is_judged_like_jsonl(tmp_path: Path) -> None:
    rows = [{"problem": "a", "answer": 1.0}, {"problem": "b", "answer": float("nan")}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    heldout = write(tmp_path / "h.jsonl", [GOOD])
    config = TaskConfig(name="file", train_file=str(tmp_path / "train.parquet"), heldout_file=heldout)
    with pytest.raises(ConfigError, match=r"train\.parquet, line 2: column 'answer' is nan"):
        load_task(config)


# --- several files


def test_several_files_keep_uids_of_their_own_and_their_weights(tmp_path: Path) -> None:
    sources = [
        TrainFile(path=write(tmp_path / "a" / "train.jsonl", [GOOD, {"prompt": "x", "answer": 1}]), weight=3.0),
        TrainFile(path=write(tmp_path / "b" / "train.jsonl", [{"question": "y", "answer": "#### 1"}])),
        TrainFile(path=write(tmp_path / "c.jsonl", [{"prompt": "z", "answer": 1}])),
    ]
    heldout = write(tmp_path / "h.jsonl", [{"prompt": "held out", "answer": 1}])
    task = load_task(TaskConfig(name="file", train_files=sources, heldout_file=heldout))
    assert [prompt.uid for prompt in task.train] == [
        f"train/{tmp_path}/a/train.jsonl:1",
        f"train/{tmp_path}/a/train.jsonl:2",
        f"train/{tmp_path}/b/train.jsonl:1",
        "train/c.jsonl:1",
    ]
    assert [(share.num_prompts, share.weight) for share in task.shares] == [(2, 3.0), (1, 1.0), (1, 1.0)]
    assert task.place(task.train[2]) == f"{tmp_path}/b/train.jsonl, line 1"


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ([TrainFile(path="a.jsonl", weight=0.0)], "weight=0.0 of a.jsonl must be above 0"),
        ([TrainFile(path="a.jsonl"), TrainFile(path="a.jsonl")], "names a.jsonl twice"),
        ([TrainFile(path="a.jsonl"), TrainFile(path="./x/../a.jsonl")], "names a.jsonl twice"),
        ([], "task.train_file is not set"),
    ],
)
def test_files_that_cannot_be_mixed_are_one_sentence(sources: list[TrainFile], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_task(TaskConfig(name="file", train_files=sources, heldout_file="h.jsonl"))
    assert words in str(caught.value)


def test_one_file_and_several_are_not_both_given() -> None:
    config = TaskConfig(name="file", train_file="a", train_files=[TrainFile(path="b")], heldout_file="h")
    with pytest.raises(ConfigError, match="are both set"):
        load_task(config)

"""Tasks: problems are well formed, sets are disjoint, graders exact; bad files end in one clear sentence."""

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import ConfigError, TaskConfig
from common.tasks import chain_sum, load_heldout, load_task, number_walk
from common.types import Verdict

PROCEDURAL = ("chain_sum", "number_walk")


# --- procedural sets ------------------------------------------------------------


@pytest.mark.parametrize("name", PROCEDURAL)
def test_train_and_heldout_share_no_prompt_and_uids_are_unique(name: str) -> None:
    task = load_task(TaskConfig(name=name, num_train=3000, num_heldout=200))
    heldout = {prompt.text for prompt in task.heldout}
    assert (len(task.train), len(task.heldout), len(heldout)) == (3000, 200, 200)
    assert heldout.isdisjoint(prompt.text for prompt in task.train)
    assert len({prompt.uid for prompt in (*task.train, *task.heldout)}) == 3200


@pytest.mark.parametrize("name", PROCEDURAL)
def test_the_task_seed_alone_decides_the_sets(name: str) -> None:
    first, again, other = (
        load_task(TaskConfig(name=name, seed=seed, num_train=20, num_heldout=20)) for seed in (1, 1, 2)
    )
    assert (first.train, first.heldout) == (again.train, again.heldout)
    assert first.heldout != other.heldout


@pytest.mark.parametrize("name", PROCEDURAL)
def test_the_held_out_set_alone_is_the_one_of_training(name: str) -> None:
    config = TaskConfig(name=name, num_train=500, num_heldout=50)
    alone = load_heldout(config)
    assert alone.heldout == load_task(config).heldout and not alone.train


@pytest.mark.parametrize("name", PROCEDURAL)
def test_the_default_sets_keep_to_the_task_s_sizes_and_characters(name: str) -> None:
    module = chain_sum if name == "chain_sum" else number_walk
    task = load_task(TaskConfig(name=name, num_train=2000))
    assert {c for prompt in task.train for c in prompt.text} <= set(module.CHARACTERS)
    assert max(len(prompt.text) for prompt in task.train) == module.MAX_PROMPT_TOKENS
    assert task.verifier == f"common.tasks.{name}:verify"


@given(st.integers(0, 10**6))
def test_chain_sum_keeps_every_partial_sum_two_digits_long(seed: int) -> None:
    problem = chain_sum.sample_problem(Random(seed))
    totals = [problem.start + sum(problem.terms[:i]) for i in range(len(problem.terms) + 1)]
    assert all(10 <= total <= 99 for total in totals)
    assert all(1 <= abs(term) <= 9 for term in problem.terms)
    assert 2 <= len(problem.terms) + 1 <= 20


@given(st.integers(0, 10**6))
def test_number_walk_starts_1_to_90_away_from_the_target(seed: int) -> None:
    problem = number_walk.sample_problem(Random(seed))
    assert 1 <= abs(problem.target - problem.start) <= 90
    assert min(problem.start, problem.target) >= 0 and max(problem.start, problem.target) <= 99


# --- chain_sum ------------------------------------------------------------


def test_chain_sum_writes_the_documented_prompt_and_response() -> None:
    problem = chain_sum.Problem(start=47, terms=(3, -8))
    assert (problem.text, problem.prompt("u").reference) == ("47a+3b-8=", "42")
    assert chain_sum._write_steps(problem, Random(0), carry_drop=0.0, hard_term=8) == "a+3=50b-8=42#42"


def test_a_dropped_carry_leaves_the_tens_digit_and_later_steps_go_on_from_there() -> None:
    problem = chain_sum.Problem(start=47, terms=(8, 6, -8))  # 6 is not a hard term and keeps its carry
    assert chain_sum._write_steps(problem, Random(0), carry_drop=1.0, hard_term=8) == "a+8=45b+6=51c-8=53#53"
    borrow = chain_sum.Problem(start=42, terms=(-9, 6))  # 42 - 9 = 33 becomes 43
    assert chain_sum._write_steps(borrow, Random(0), carry_drop=1.0, hard_term=8) == "a-9=43b+6=49#49"


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("a+3=50b-8=42#42", Verdict.CORRECT),
        ("#42", Verdict.CORRECT),  # the steps are not graded
        ("a+3=50#50#42", Verdict.CORRECT),  # the last answer counts
        ("a+3=50b-8=42#43", Verdict.WRONG),
        ("a+3=50b-8=42#042", Verdict.WRONG),
        ("a+3=50b-8=42#42#", Verdict.WRONG),
        ("a+3=50b-8=42#42a", Verdict.WRONG),
        ("a+3=50b-8=42", Verdict.UNANSWERED),
        ("", Verdict.UNANSWERED),
    ],
)
def test_chain_sum_grades_the_final_answer_exactly(response: str, verdict: Verdict) -> None:
    assert chain_sum.verify(response, "42", {}) is verdict


@given(st.integers(0, 10**6))
def test_a_clean_chain_sum_demonstration_is_graded_correct(seed: int) -> None:
    rng = Random(seed)
    problem = chain_sum.sample_problem(rng)
    response = chain_sum._write_steps(problem, rng, carry_drop=0.0, hard_term=8)
    assert response is not None
    assert chain_sum.verify(response, str(problem.answer), {}) is Verdict.CORRECT
    assert len(response) + 1 <= chain_sum.MAX_RESPONSE_TOKENS


# --- number_walk ------------------------------------------------------------

SIXTEEN_MOVES = "+148-147" * 8


@pytest.mark.parametrize(
    ("start", "target", "response", "verdict"),
    [
        (47, 83, "+956+965+974+983#", Verdict.CORRECT),
        (83, 47, "-974-965-956-947#", Verdict.CORRECT),
        (3, 0, "-300#", Verdict.CORRECT),
        (47, 46, "+552-349-346#", Verdict.CORRECT),
        (47, 47, SIXTEEN_MOVES + "#", Verdict.CORRECT),
        (47, 83, "+956+965+974+982#", Verdict.WRONG),  # wrong arithmetic
        (47, 83, "+955+964+973+982+183#", Verdict.WRONG),  # wrong first move, consistent afterwards
        (47, 83, "+956+965#", Verdict.WRONG),  # not there yet
        (47, 83, "+956+965+974+983##", Verdict.WRONG),
        (47, 83, "+956+965+974+98#", Verdict.WRONG),  # cut move
        (47, 83, "+956 965+974+983#", Verdict.WRONG),
        (47, 47, "+047#", Verdict.WRONG),  # a move has digit 1..9
        (97, 95, "+905-195#", Verdict.WRONG),  # 106 does not fit
        (2, 5, "-5-3+805#", Verdict.WRONG),  # below 0
        (47, 47, SIXTEEN_MOVES + "+148-147#", Verdict.WRONG),  # eighteen moves
        (47, 83, "#", Verdict.WRONG),
        (47, 83, "+956+965+974+983", Verdict.UNANSWERED),
        (47, 83, "", Verdict.UNANSWERED),
        (47, 83, "+956+965+974+983#+1", Verdict.UNANSWERED),
        (3, 5, "+\u0662\u0660\u0665#", Verdict.WRONG),  # digits of another script are not digits here
    ],
)
def test_number_walk_checks_every_transition(start: int, target: int, response: str, verdict: Verdict) -> None:
    row = {"start": start, "target": target}
    assert number_walk.verify(response, f"{target:02d}", row) is verdict


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3, -1]), st.integers(0, 3))
def test_changing_one_position_of_a_correct_walk_makes_it_wrong(seed: int, change: int, which: int) -> None:
    row = {"start": 20, "target": 47}
    walk = ["+929", "+938", "+341", "+647"]
    assert number_walk.verify("".join(walk) + "#", "47", row) is Verdict.CORRECT
    walk[which] = walk[which][:2] + f"{int(walk[which][2:]) + change:02d}"
    assert number_walk.verify("".join(walk) + "#", "47", row) is Verdict.WRONG


@given(st.integers(0, 10**6))
def test_number_walk_demonstrations_have_right_arithmetic_and_fail_only_by_not_arriving(seed: int) -> None:
    text, response = number_walk.sample_demonstration(Random(seed), right_direction=0.75, careless_landing=0.3)
    start, last = int(text[:2]), int(response[-3:-1])
    assert number_walk.verify(response, f"{last:02d}", {"start": start, "target": last}) is Verdict.CORRECT
    assert len(response) + 1 <= number_walk.MAX_RESPONSE_TOKENS
    assert number_walk.MAX_RESPONSE_TOKENS == 66


def test_importing_the_tasks_loads_neither_torch_nor_vllm() -> None:
    code = "import sys, common.tasks; sys.exit(any(m in sys.modules for m in ('torch', 'vllm', 'pyarrow')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# --- settings ------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TaskConfig(name="chain_sun"), "chain_sun"),
        (TaskConfig(num_heldout=0), "task.num_heldout is 0"),
        (TaskConfig(num_heldout=10**6), "task.num_heldout is 1000000"),
        (TaskConfig(num_train=0), "task.num_train is 0"),
        (TaskConfig(train_file="a.jsonl"), "task.train_file"),
        (TaskConfig(name="file"), "task.train_file is not set"),
        (TaskConfig(name="file", train_file="a.jsonl"), "task.heldout_file is not set"),
        (
            TaskConfig(name="file", train_file="a.jsonl", heldout_file="b.jsonl", num_train=5),
            "task.num_train",
        ),
        (TaskConfig(name="file", train_file="a.csv", heldout_file="b.jsonl"), "'.csv'"),
        (TaskConfig(name="file", train_file="nowhere/a.jsonl", heldout_file="b.jsonl"), "no such file"),
    ],
)
def test_a_bad_setting_is_one_sentence_that_names_it(config: TaskConfig, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_task(config)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


# --- file ------------------------------------------------------------


def _file_task(tmp_path: Path, train: str, heldout: str = '{"prompt": "held out", "answer": 1}\n') -> TaskConfig:
    (tmp_path / "train.jsonl").write_text(train)
    (tmp_path / "heldout.jsonl").write_text(heldout)
    return TaskConfig(
        name="file", train_file=str(tmp_path / "train.jsonl"), heldout_file=str(tmp_path / "heldout.jsonl")
    )


def test_jsonl_rows_become_prompts_in_order(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "2+2?"}]
    rows = [
        {"prompt": "1+1?", "answer": "2", "level": 3},
        {"prompt": messages, "answer": 4, "tags": ["sum", None]},
    ]
    task = load_task(_file_task(tmp_path, json.dumps(rows[0]) + "\n\n" + json.dumps(rows[1])))
    first, second = task.train
    assert (first.uid, first.text, first.reference) == ("train/train.jsonl:1", "1+1?", "2")
    assert (first.messages, first.row) == (None, {"answer": "2", "level": 3})
    assert (second.uid, second.text, second.reference) == ("train/train.jsonl:3", "", "4")
    assert second.messages == tuple(messages)
    assert second.row == {"answer": 4, "tags": ["sum", None]}
    assert task.heldout[0].uid == "heldout/heldout.jsonl:1"
    assert task.verifier == "actors.verifier.math:verify"


def test_a_held_out_file_is_read_without_one_to_train_on(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text('{"prompt": "1+1=", "answer": 2}\n{"prompt": "1+2=", "answer": 3, "level": 1}\n')
    task = load_heldout(TaskConfig(name="file", heldout_file=str(path)))
    assert [(p.uid, p.reference) for p in task.heldout] == [
        ("heldout/test.jsonl:1", "2"),
        ("heldout/test.jsonl:2", "3"),
    ]
    assert not task.train and task.verifier == "actors.verifier.math:verify"
    path.write_text('{"prompt": "1+1="}\n')
    with pytest.raises(ConfigError, match=r"test\.jsonl"):
        load_heldout(TaskConfig(name="file", heldout_file=str(path)))


def test_parquet_rows_with_nested_columns_become_prompts(tmp_path: Path) -> None:
    for name in ("train", "heldout"):
        rows = [{"prompt": [{"role": "user", "content": name}], "reward_model": {"ground_truth": "34"}}]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    task = load_task(
        TaskConfig(
            name="file",
            train_file=str(tmp_path / "train.parquet"),
            heldout_file=str(tmp_path / "heldout.parquet"),
            answer_field="reward_model.ground_truth",
        )
    )
    assert task.train[0].messages == ({"role": "user", "content": "train"},)
    assert task.train[0].reference == "34"


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("", "train.jsonl: the file is empty"),
        ("\n \n", "train.jsonl: the file is empty"),
        (
            '{"prompt": "a", "answer": 1}\n{"prompt": "b"}\n',
            "train.jsonl, line 2: column 'answer' is missing",
        ),
        ('{"text": "a", "answer": 1}', "train.jsonl: column 'prompt' is missing (there is: answer, text)"),
        ('{"prompt": "a", "answer": 1}\n\n{"prompt": ', "train.jsonl, line 3: not valid JSON"),
        ('["a", 1]', "line 1: a row must be a JSON object, not a list"),
        ('{"prompt": "", "answer": 1}', "line 1: column 'prompt' must be"),
        ('{"prompt": 5, "answer": 1}', "line 1: column 'prompt' must be"),
        ('{"prompt": [{"role": "user"}], "answer": 1}', "line 1: column 'prompt' must be"),
        ('{"prompt": [], "answer": 1}', "line 1: column 'prompt' must be"),
        ('{"prompt": "a", "answer": null}', "line 1: column 'answer' must be a text or a number"),
        ('{"prompt": "a", "answer": true}', "line 1: column 'answer' must be a text or a number"),
        ('{"prompt": "held out", "answer": 1}', "held-out prompts must not be trained on"),
    ],
)
def test_a_bad_row_is_one_sentence_that_names_file_and_line(tmp_path: Path, train: str, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_task(_file_task(tmp_path, train))
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bytes_that_are_not_utf8_and_files_that_are_not_parquet_are_named(tmp_path: Path) -> None:
    config = _file_task(tmp_path, "")
    (tmp_path / "train.jsonl").write_bytes(b'{"prompt": "\xff", "answer": 1}')
    with pytest.raises(ConfigError, match=r"train\.jsonl, line 1: not valid JSON in UTF-8"):
        load_task(config)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"not parquet")
    with pytest.raises(ConfigError, match=r"broken\.parquet: not a readable Parquet file"):
        load_task(TaskConfig(name="file", train_file=str(broken), heldout_file=str(broken)))


def test_a_parquet_column_that_cannot_travel_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": "a", "answer": "1", "image": b"png"}]), path)
    with pytest.raises(ConfigError, match=r"train\.parquet, line 1: column 'image' holds a bytes"):
        load_task(TaskConfig(name="file", train_file=str(path), heldout_file=str(path)))

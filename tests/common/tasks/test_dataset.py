"""A data set is judged once, before anything starts, and what came of it is kept beside the run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import Config, ConfigError, ModelConfig, OnBadRow, RolloutConfig, TaskConfig, TransportConfig
from common.tasks import dataset
from common.tasks.dataset import Dataset, describe, load_dataset
from tests.support.tokenizers import ids_of, write_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> str:
    return write_tokenizer(tmp_path / "model")


def config_of(folder: Path, rows: list[Any], on_bad_row: OnBadRow = OnBadRow.error, **sections: Any) -> Config:
    files = {"train": rows, "heldout": [{"prompt": "9+9=", "answer": 18}]}
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    task = TaskConfig(
        name="file",
        train_file=str(folder / "train.jsonl"),
        heldout_file=str(folder / "heldout.jsonl"),
        on_bad_row=on_bad_row,
    )
    model = ModelConfig(path=str(folder / "model"), max_model_len=30)
    return Config(model=model, task=task, rollout=RolloutConfig(max_tokens=20), **sections)


def rows_of(*texts: str) -> list[dict[str, Any]]:
    return [{"prompt": text, "answer": 1} for text in texts]


def ids(data: Dataset) -> list[list[int]]:
    return [data.token_ids(prompt).tolist() for prompt in (*data.task.train, *data.task.heldout)]


@pytest.mark.usefixtures("model")
def test_a_prompt_may_be_as_long_as_leaves_every_response_its_length(tmp_path: Path) -> None:
    config = config_of(tmp_path, rows_of("1" * 10))
    assert ids(load_dataset(config, None)) == [ids_of("1" * 10), ids_of("9+9=")]
    with pytest.raises(ConfigError) as caught:
        load_dataset(config_of(tmp_path, rows_of("1", "1" * 11)), None)
    assert str(caught.value).startswith(
        f"{tmp_path}/train.jsonl, line 2: its prompt has 11 tokens, and with rollout.max_tokens=20 it needs "
        "model.max_model_len=31, which is 30; "
    )


@pytest.mark.usefixtures("model")
def test_rows_that_cannot_be_asked_are_left_out_counted_and_listed(tmp_path: Path) -> None:
    config = config_of(tmp_path, rows_of("1", "1" * 11, "日本語", "2", "", "2" * 12), OnBadRow.drop)
    data = load_dataset(config, tmp_path / "data")
    assert [prompt.text for prompt in data.task.train] == ["1", "2"]
    listed = [json.loads(line) for line in (tmp_path / "data" / "dropped.jsonl").read_text().splitlines()]
    assert [(row["place"].rpartition(" ")[2], row["reason"]) for row in listed] == [
        ("5", "no_prompt"),
        ("2", "too_long"),
        ("3", "no_tokens"),
        ("6", "too_long"),
    ]
    lines = describe(data)
    assert "data: 2 prompts to train on and 1 held out, 1 to 4 tokens long" in lines
    assert lines[-1].startswith("data: left out 4 rows (too_long 2, no_prompt 1, no_tokens 1), first ")


@pytest.mark.usefixtures("model")
def test_a_row_that_no_message_can_carry_is_refused(tmp_path: Path) -> None:
    big = [{"prompt": "1", "answer": 1, "tests": "x" * (5 << 20)}]
    with pytest.raises(ConfigError, match=r"line 1: it cannot be sent to an actor \(Lease has a header of 5\d+ bytes"):
        load_dataset(config_of(tmp_path, big), None)
    small = [{"prompt": "1", "answer": 1, "tests": "x" * (2 << 20)}]
    load_dataset(config_of(tmp_path, small), None)
    limit = TransportConfig(max_message_mb=1)
    with pytest.raises(ConfigError, match=r"line 1: its 2\d+ bytes exceed transport\.max_message_mb=1"):
        load_dataset(config_of(tmp_path, small, transport=limit), None)


@pytest.mark.usefixtures("model")
def test_a_second_look_reads_what_the_first_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, rows_of("1", "日本語", "1+1"), OnBadRow.drop)
    first = load_dataset(config, tmp_path / "data")
    monkeypatch.setattr(dataset, "tokenizing", None)  # calling it is an error
    second = load_dataset(config, tmp_path / "data")
    assert ids(first) == ids(second) == [ids_of("1"), ids_of("1+1"), ids_of("9+9=")]
    assert first.task.problems == second.task.problems
    assert second.token_ids(second.task.train[0]).dtype == np.int32


@pytest.mark.parametrize("content", [b"", b"no archive", None])
@pytest.mark.usefixtures("model")
def test_what_was_kept_is_made_again_when_it_is_damaged(tmp_path: Path, content: bytes | None) -> None:
    config, kept = config_of(tmp_path, rows_of("1+1")), tmp_path / "data" / "tokens.npz"
    first = load_dataset(config, tmp_path / "data")
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert ids(load_dataset(config, tmp_path / "data")) == ids(first)
    assert kept.read_bytes() == whole


@pytest.mark.parametrize("change", ["rows", "tokenizer", "limit"])
@pytest.mark.usefixtures("model")
def test_what_was_kept_is_made_again_when_its_premises_changed(tmp_path: Path, change: str) -> None:
    load_dataset(config_of(tmp_path, rows_of("1+1")), tmp_path / "data")
    rows = rows_of("1+2" if change == "rows" else "1+1")
    if change == "tokenizer":
        write_tokenizer(tmp_path / "model", prefix="<bos>")
    config = config_of(tmp_path, rows, transport=TransportConfig(max_message_mb=1 if change == "limit" else 256))
    again = load_dataset(config, tmp_path / "data")
    assert ids(again) == ids(load_dataset(config, None))
    assert ids(again)[0] == [1] * (change == "tokenizer") + ids_of(rows[0]["prompt"])


@pytest.mark.usefixtures("model")
def test_several_processes_find_what_one_does_in_the_same_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [str(i) if i % 7 else "日" * (i + 1) for i in range(600)]
    config = config_of(tmp_path, rows_of(*texts), OnBadRow.drop)
    monkeypatch.setattr(dataset, "MIN_PARALLEL", 1)
    parallel, serial = load_dataset(config, None, num_processes=2), load_dataset(config, None)
    assert ids(parallel) == ids(serial)
    assert parallel.task.problems == serial.task.problems and len(serial.task.problems) == 86


def test_built_in_tasks_are_judged_as_well(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "model")
    config = Config(
        model=ModelConfig(path=str(tmp_path / "model"), max_model_len=140),
        task=TaskConfig(name="chain_sum", num_train=200, num_heldout=2),
    )
    with pytest.raises(
        ConfigError, match=r"^train/\d+: its prompt has \d+ tokens, and with rollout\.max_tokens=128"
    ) as caught:
        load_dataset(config, None)
    assert "on_bad_row" not in str(caught.value), "which this task does not have"

"""The files of a run: what is written can be read again, also after a crash and after a resume."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, SCALARS, EventAccumulator
from tensorboard.summary.writer import event_file_writer

from common.metrics import RunLog, format_progress, read_jsonl
from common.types import CompletedGroup, FinishReason, Lease, Purpose, TrajectoryGroup, Verdict


def group(lease_id: int) -> TrajectoryGroup:
    """Two completions of 3 and 2 tokens, sampled by versions 4 and 5."""
    lease = Lease(
        lease_id=lease_id,
        purpose=Purpose.TRAIN,
        prompt_uid="train/17",
        prompt_token_ids=np.array([1, 2], dtype=np.int32),
        reference="42",
        row={},
        num_samples=2,
        seed=0,
        temperature=1.0,
        max_tokens=8,
    )
    completed = CompletedGroup(
        lease_id=lease_id,
        lengths=np.array([3, 2], dtype=np.int32),
        token_ids=np.arange(5, dtype=np.int32),
        behavior_logprobs=np.full(5, -0.5, dtype=np.float32),
        versions=np.array([4, 4, 5, 4, 5], dtype=np.int32),
        rewards=np.array([1.0, -1.0], dtype=np.float32),
        verdicts=(Verdict.CORRECT, Verdict.WRONG),
        verifier_error=None,
        finish_reasons=(FinishReason.STOP, FinishReason.STOP),
        generation_s=0.1,
        verification_s=0.01,
    )
    return TrajectoryGroup(lease=lease, actor="actor-0", completed=completed, arrived_s=0.0)


def test_metrics_are_on_disk_after_every_line(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.log(1, {"reward/mean": 0.25, "version": 1.0, "staleness/hist": {1: 30.0, 0: 12.0}})
        (row,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert row.pop("time") > 0
    assert row == {"step": 1, "reward/mean": 0.25, "version": 1, "staleness/hist": {"0": 12.0, "1": 30.0}}


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.log(1, {"a": math.nan, "b": math.inf, "c": float(np.float32(0.5))})
    (row,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert (row["a"], row["b"], row["c"]) == (None, None, 0.5)


def test_the_ledger_line_has_exactly_the_documented_fields(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.ledger(group(lease_id=9), step=3)
    assert json.loads((tmp_path / "ledger.jsonl").read_text()) == {
        "step": 3,
        "prompt_uid": "train/17",
        "lease_id": 9,
        "actor": "actor-0",
        "versions": [4, 5],
        "rewards": [1.0, -1.0],
        "lengths": [3, 2],
        "generation_s": 0.1,
        "verification_s": 0.01,
    }


def test_tensorboard_reads_scalars_and_histograms(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for step in (1, 2):
            log.log(step, {"reward/mean": 0.5 * step, "staleness/hist": {0: 10.0, 2: 30.0}})
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={SCALARS: 0, HISTOGRAMS: 0}).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.5), (2, 1.0)]
    histogram = events.Histograms("staleness/hist")[0].histogram_value
    assert (histogram.num, histogram.sum, histogram.bucket) == (40.0, 60.0, [10.0, 30.0])


def test_tensorboard_reads_texts_too(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.text(4, "samples/group", "**right**, é")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = events.Tensors("samples/group")
    assert (event.step, event.tensor_proto.string_val[0].decode()) == (4, "**right**, é")
    assert events.SummaryMetadata("samples/group").plugin_data.plugin_name == "text"
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_resume_forgets_the_steps_that_are_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Files of one process and second are read in the order of their numbers as text: 9 and 10 would be swapped.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    with RunLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.log(step, {"reward/mean": 0.0})
            log.ledger(group(step), step)
            log.event(step, "alarm", f"step {step}")
    with RunLog(tmp_path, keep_through=1) as log:
        log.log(2, {"reward/mean": 1.0})
        log.ledger(group(20), 2)
    assert [(row["step"], row["reward/mean"]) for row in read_jsonl(tmp_path / "metrics.jsonl")] == [(1, 0), (2, 1)]
    assert [row["lease_id"] for row in read_jsonl(tmp_path / "ledger.jsonl")] == [1, 20]
    assert [row["text"] for row in read_jsonl(tmp_path / "events.jsonl")] == ["step 1"]
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={SCALARS: 0}).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.0), (2, 1.0)]


def test_a_line_cut_off_by_a_crash_is_left_out_and_then_overwritten(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1}\n{"step": 2, "a"')
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1]
    with RunLog(tmp_path, keep_through=1) as log:
        log.log(2, {"a": 2.0})
    assert [row["a"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    "line", [b"{oops}", b"[1]", b'{"a": "\xff"}', 100_000 * b"["], ids=["no JSON", "a list", "no UTF-8", "deep"]
)
def test_any_other_broken_line_is_named_with_what_to_do(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is not .*: .*remove the line$") as refused:
        list(read_jsonl(path))
    assert not isinstance(refused.value, UnicodeError), "the sentence is ours"


def test_a_resume_drops_lines_that_are_of_no_step(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "ledger.jsonl", "events.jsonl"):
        (tmp_path / name).write_text('{"step": 1}\n{}\n{"step": null}\n{"step": "1"}\n{"step": true}\n{"step": 2}\n')
    with RunLog(tmp_path, keep_through=1):
        for name in ("metrics.jsonl", "ledger.jsonl", "events.jsonl"):
            assert list(read_jsonl(tmp_path / name)) == [{"step": 1}]


def test_the_progress_line_shows_the_allow_list_only() -> None:
    values = {"reward/mean": 0.413, "length/mean": 61.2, "time/step_s": 3.04, "secret": 1.0, "staleness/hist": {0: 1.0}}
    assert format_progress(7, 30, values) == "step  7/30  reward +0.41  length 61  3.0 s"


def test_what_ought_to_be_zero_is_shown_when_it_is_not() -> None:
    values = {"accuracy/heldout": 0.5, "eval/num_prompts": 8.0, "eval/num_failed": 0.0, "verifier/num_errors": 3.0}
    assert format_progress(1, 2, values) == "step 1/2  accuracy 0.500  of 8  VERIFIER ERRORS 3"
    failed = {"eval/num_failed": 2.0, "eval/num_errors": 1.0}
    assert format_progress(1, 2, failed) == "step 1/2  PROMPTS FAILED 2  VERIFIER ERRORS IN EVALUATION 1"


def test_progress_is_printed_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path) as log:
        log.progress(2, 8, {"reward/mean": -1.0}, stage="critic warm-up")
    assert capsys.readouterr().out == "critic warm-up 2/8  reward -1.00\n"

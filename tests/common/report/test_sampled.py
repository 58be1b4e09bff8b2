"""Samples on the page of a run: right and wrong ones, escaped, each token under the colour of its age."""

from dataclasses import replace
from pathlib import Path

from common.report.reading import Run, read_run
from common.report.sampled import SHOWN, samples
from common.samples import Sample, sample_file, to_parquet
from common.types import FinishReason, Verdict
from tests.support.made_up_run import MadeUp, write_run

SAMPLE = Sample(
    step=14,
    prompt_uid="train/3",
    lease_id=7,
    actor="actor-0",
    index=0,
    prompt="2+2=",
    reference="4",
    response="<b>4</b>",
    verdict=Verdict.CORRECT,
    reason=FinishReason.STOP,
    reward=1.0,
    version=12,
    token_ids=(1, 2, 3),
    tokens=("<b>", "4", "</b>"),
    versions=(10, 10, 12),
    behavior_logprobs=(-0.1, -0.2, -0.3),
    old_logprobs=(),
    advantages=(),
    values=(),
)


def run_with(folder: Path, *found: Sample) -> Run:
    run = read_run(write_run(folder, MadeUp(steps=2)))
    path = sample_file(folder, 14)
    path.parent.mkdir()
    path.write_bytes(to_parquet(found))
    return run


def test_tokens_are_escaped_and_under_the_colour_of_their_age(tmp_path: Path) -> None:
    text = samples(run_with(tmp_path, SAMPLE))
    assert (
        "<h4>correct · reward +1.00 · 3 tokens, 0 to 2 versions old · ended by stop · reference 4 · prompt train/3 · "
        "actor-0</h4>" in text
    )
    assert '<span class="a5" title="2 versions old">&lt;b&gt;4</span><span class="a0" title="0 versions old">' in text
    assert 'versions old: <span class="a0">0</span> <span class="a2">1</span> <span class="a5">2</span>' in text
    assert "1 of 1 responses of step 14" in text and "<b>" not in text


def test_what_a_browser_might_obey_or_hide_is_written_out(tmp_path: Path) -> None:
    text = samples(run_with(tmp_path, replace(SAMPLE, prompt="a\u202eb\x00", tokens=("\u200b", "4", "x"))))
    assert "a\\u202eb\\x00" in text and "\\u200b" in text


def test_right_and_wrong_ones_are_shown_as_far_as_there_are_both(tmp_path: Path) -> None:
    wrong = replace(SAMPLE, verdict=Verdict.WRONG, reward=-1.0)
    for number, (rights, wrongs, shown) in enumerate([(9, 9, (3, 3)), (1, 9, (1, 5)), (9, 0, (6, 0)), (2, 1, (2, 1))]):
        text = samples(run_with(tmp_path / str(number), *[SAMPLE] * rights, *[wrong] * wrongs))
        assert (text.count("<h4>correct"), text.count("<h4>wrong")) == shown, SHOWN


def test_a_long_response_is_cut_and_a_damaged_file_is_said(tmp_path: Path) -> None:
    long = replace(SAMPLE, tokens=("x" * 5000, "y", "z"))
    run = run_with(tmp_path, long)
    assert len(samples(run)) < 5000 and "y</span>" not in samples(run)
    sample_file(tmp_path, 14).write_bytes(b"nothing")
    assert "Not readable:" in samples(run) and "is damaged" in samples(run)


def test_a_run_without_samples_says_so(tmp_path: Path) -> None:
    assert "None were kept" in samples(read_run(write_run(tmp_path)))

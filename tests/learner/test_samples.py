"""What a run keeps of its responses: which groups, with the trainer's own numbers, within its bounds."""

import errno
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.config import SamplesConfig
from common.metrics import RunLog
from common.samples import read_samples, sample_file, sampled_steps, samples_folder
from common.types import CompletedGroup, FinishReason, Lease, Purpose, TrajectoryGroup, Verdict
from learner import samples as module
from learner.algorithm.experience import Experience
from learner.algorithm.packing import Batch
from learner.samples import (
    MEGABYTE,
    SHOWN_EVERY,
    SHOWN_RESPONSES,
    Observed,
    SampleWriter,
    as_markdown,
    as_samples,
    choose,
    forget_samples_after,
    thin_out,
)
from tests.learner.algorithm.test_trainer import VOCAB, config, make_trainer

RIGHT, WRONG, UNANSWERED = Verdict.CORRECT, Verdict.WRONG, Verdict.UNANSWERED


def make_group(lease_id: int, lengths: list[int], verdicts: tuple[Verdict, ...] | None = None) -> TrajectoryGroup:
    """Random tokens of versions 0 and 1, of the vocabulary of the trainer's tables."""
    generator = np.random.default_rng(lease_id)
    total = sum(lengths)
    verdicts = verdicts or tuple(RIGHT if i % 2 else WRONG for i in range(len(lengths)))
    lease = Lease(
        lease_id=lease_id,
        purpose=Purpose.TRAIN,
        prompt_uid=f"train/{lease_id}",
        prompt_token_ids=np.array([1, 2], dtype=np.int32),
        reference="12",
        row={},
        num_samples=len(lengths),
        seed=0,
        temperature=1.0,
        max_tokens=64,
    )
    completed = CompletedGroup(
        lease_id=lease_id,
        lengths=np.array(lengths, dtype=np.int32),
        token_ids=generator.integers(VOCAB, size=total, dtype=np.int32),
        behavior_logprobs=-generator.random(total, dtype=np.float32) * 3,
        versions=generator.integers(2, size=total, dtype=np.int32),
        rewards=np.array([1.0 if verdict is RIGHT else -1.0 for verdict in verdicts], dtype=np.float32),
        verdicts=verdicts,
        verifier_error=None,
        finish_reasons=(FinishReason.STOP,) * len(lengths),
        generation_s=0.1,
        verification_s=0.01,
    )
    return TrajectoryGroup(lease=lease, actor=f"actor-{lease_id}", completed=completed, arrived_s=0.0)


GROUPS = [make_group(n, lengths) for n, lengths in enumerate(([3, 9], [1, 20], [5, 2], [30, 4]), start=10)]


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a run whose tokens are single letters."""
    decode = lambda ids, **_: "".join("abcdefghijk"[i] for i in ids)  # noqa: E731
    monkeypatch.setattr(module, "load_tokenizer", lambda model: SimpleNamespace(decode=decode))
    return tmp_path


def make_config(run_dir: Path, **settings: Any) -> Any:
    return replace(
        config(), runs_dir=str(run_dir.parent), name=run_dir.name, samples=SamplesConfig(**{"groups": 2, **settings})
    )


def train(run_dir: Path, steps: range, *, warmup_steps: int = 0, **settings: Any) -> dict[int, Experience]:
    """What the trainer computed in each of these steps, all on GROUPS, while samples were kept."""
    cfg, seen = make_config(run_dir, **settings), {}
    trainer = make_trainer(cfg)
    with RunLog(run_dir) as log, SampleWriter(cfg, log) as writer:
        for step in steps:
            observer = writer.observer(step, 1, GROUPS)

            def observe(experience: Experience, step: int = step, observer: Any = observer) -> None:
                seen[step] = experience
                if observer is not None:
                    observer(experience)

            trainer.step(Batch.from_groups(GROUPS), 1, step <= warmup_steps, observe=observe)
    return seen


# ---- the numbers


@pytest.mark.parametrize("num", [2, 9])
def test_the_numbers_are_the_trainers(run_dir: Path, num: int) -> None:
    seen = train(run_dir, range(1, 3), groups=num)
    batch = Batch.from_groups(GROUPS)
    spans = list(pairwise(batch.response_cu_seqlens_B1.tolist()))
    places = {(group.lease.lease_id, i): spans[2 * n + i] for n, group in enumerate(GROUPS) for i in range(2)}
    for step, experience in seen.items():
        samples = read_samples(run_dir, step)
        assert len(samples) == 2 * min(num, len(GROUPS))
        for sample in samples:
            start, end = places[sample.lease_id, sample.index]
            for name in ("behavior_logprobs", "old_logprobs", "advantages", "values"):
                assert getattr(sample, name) == tuple(getattr(experience, f"{name}_T")[start:end].tolist()), name
            assert sample.token_ids == tuple(batch.response_ids_T[start:end].tolist())
            assert sample.versions == tuple(batch.versions_T[start:end].tolist())
            assert sample.response == "".join(sample.tokens) == "".join("abcdefghijk"[i] for i in sample.token_ids)
            assert (sample.prompt, sample.version, sample.actor) == ("bc", 1, f"actor-{sample.lease_id}")
            assert (sample.reward, sample.verdict) == ((1.0, RIGHT) if sample.index else (-1.0, WRONG))


def test_warm_up_has_values_and_no_advantages(run_dir: Path) -> None:
    train(run_dir, range(1, 4), warmup_steps=2)
    first, second, third = (read_samples(run_dir, step)[0] for step in (1, 2, 3))
    assert all(len(sample.values) == len(sample.tokens) for sample in (first, second, third))
    assert [len(sample.advantages) > 0 for sample in (first, second, third)] == [False, False, True]
    assert [len(sample.old_logprobs) > 0 for sample in (first, second, third)] == [True, False, True]


def test_to_observe_changes_nothing(run_dir: Path) -> None:
    trainers = [make_trainer(config()) for _ in range(2)]
    trainers[0].step(Batch.from_groups(GROUPS), 1, False, observe=lambda experience: None)
    trainers[1].step(Batch.from_groups(GROUPS), 1, False)
    first, second = (trainer.policy.network.table for trainer in trainers)
    assert torch.equal(first, second)


# ---- which groups


@given(mixed=st.lists(st.booleans(), max_size=12), num=st.integers(1, 14), seed=st.integers(0, 2**32 - 1))
def test_half_of_the_groups_are_mixed_as_far_as_there_are(mixed: list[bool], num: int, seed: int) -> None:
    groups = [make_group(i, [1, 1], (RIGHT, UNANSWERED if is_mixed else RIGHT)) for i, is_mixed in enumerate(mixed)]
    chosen = choose(groups, num, (seed, 3))
    assert len(set(chosen)) == len(chosen) == min(num, len(groups))
    assert sum(mixed[i] for i in chosen) >= min((num + 1) // 2, sum(mixed))
    assert chosen == choose(groups, num, (seed, 3))


def test_any_group_may_be_chosen() -> None:
    """Also the fifth of five that are all wrong, beside ten mixed ones."""
    groups = [make_group(i, [1, 1], (WRONG, RIGHT if i < 10 else WRONG)) for i in range(15)]
    assert {i for step in range(200) for i in choose(groups, 2, (0, step))} == set(range(15))


def test_every_so_many_steps_are_sampled_beginning_with_the_first(run_dir: Path) -> None:
    train(run_dir, range(1, 9), every=3)
    assert sampled_steps(run_dir) == [1, 4, 7]


# ---- bounds


@given(sizes=st.lists(st.integers(1, 1000), max_size=40), limit=st.integers(1, 5000))
def test_what_is_kept_fits_and_what_goes_has_to(sizes: list[int], limit: int) -> None:
    steps = dict(enumerate(sizes, start=1))
    removed = thin_out(steps, limit)
    kept = sorted(steps.keys() - set(removed))
    assert len(set(removed)) == len(removed)
    assert sum(steps[step] for step in kept) <= limit
    if removed:
        assert sum(steps[step] for step in (*kept, removed[-1])) > limit
    if len(kept) > 1:
        assert kept[0] == 1 and kept[-1] == len(sizes)


@given(num_steps=st.integers(1, 300), room=st.integers(2, 20), every=st.integers(1, 5))
def test_the_whole_run_stays_represented(num_steps: int, room: int, every: int) -> None:
    """Always, of files of one size: the first and the newest step, and no hole between them over twice the mean."""
    kept: dict[int, int] = {}
    for step in range(1, num_steps * every + 1, every):
        kept[step] = 1
        for removed in thin_out(kept, room):
            del kept[removed]
        steps = sorted(kept)
        assert len(steps) == min(room, (step - 1) // every + 1)
        assert steps[0] == 1 and steps[-1] == step
        gaps = [after - before for before, after in pairwise(steps)]
        assert not gaps or max(gaps) <= max(every, 2 * (step - 1) / (len(steps) - 1))


def test_a_folder_never_outgrows_its_bound(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(run_dir, range(1, 2))
    size = sample_file(run_dir, 1).stat().st_size
    monkeypatch.setattr(module, "MEGABYTE", int(4.5 * size))
    sizes = []
    write = module.replace_synced
    monkeypatch.setattr(module, "replace_synced", lambda *of: (write(*of), sizes.append(folder_size(run_dir))))
    train(run_dir, range(2, 12), max_mb=1)
    assert len(sizes) == 10 and max(sizes) <= 4.5 * size
    assert len(sampled_steps(run_dir)) == 4 and {1, 11} <= set(sampled_steps(run_dir))


def folder_size(run_dir: Path) -> int:
    return sum(file.stat().st_size for file in samples_folder(run_dir).iterdir())


def test_a_step_that_alone_is_too_large_is_left_out_and_that_is_said(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train(run_dir, range(1, 3), groups=1)
    monkeypatch.setattr(module, "MEGABYTE", max(sample_file(run_dir, step).stat().st_size for step in (1, 2)))
    train(run_dir, range(3, 4), max_mb=1, groups=4)
    assert sampled_steps(run_dir) == [1, 2]
    assert "step 3 has " in caplog.text and "more than samples.max_mb=1 for all steps" in caplog.text


# ---- what goes wrong


def test_a_resume_forgets_the_steps_that_are_done_again(run_dir: Path) -> None:
    train(run_dir, range(1, 6))
    (samples_folder(run_dir) / "step-000006.parquet.tmp").write_bytes(b"half")
    forget_samples_after(run_dir, 3)
    assert sorted(path.name for path in samples_folder(run_dir).iterdir()) == [
        f"step-{step:06d}.parquet" for step in (1, 2, 3)
    ]
    before = [sample_file(run_dir, step).read_bytes() for step in (1, 2, 3)]
    train(run_dir, range(4, 6))
    assert sampled_steps(run_dir) == [1, 2, 3, 4, 5]
    assert [sample_file(run_dir, step).read_bytes() for step in (1, 2, 3)] == before
    forget_samples_after(run_dir / "new", 0)


def test_a_full_disk_ends_the_run_at_the_next_step(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "replace_synced", write)
    for steps in (range(1, 3), range(1, 2)):  # noticed in step 2, or at the end
        with pytest.raises(OSError, match="No space left"):
            train(run_dir, steps)


# ---- TensorBoard


def test_tensorboard_gets_a_group_now_and_then_and_its_text_is_only_code(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = lambda ids, **_: "</pre>\n# x\x1b[1m```"[: 3 * len(ids)]  # noqa: E731
    monkeypatch.setattr(module, "load_tokenizer", lambda model: SimpleNamespace(decode=decode))
    train(run_dir, range(1, SHOWN_EVERY + 3))
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert events.SummaryMetadata("samples/group").plugin_data.plugin_name == "text"
    texts = events.Tensors("samples/group")
    assert [event.step for event in texts] == [1, 1 + SHOWN_EVERY]
    lines = texts[0].tensor_proto.string_val[0].decode().splitlines()
    assert lines[0].startswith("`train/1") and lines[0].endswith("reference `12`")
    own = [line for line in lines[1:] if line and not line.startswith("    ")]
    assert len(own) == 2 and all(line.startswith("**") and "reward" in line for line in own)
    assert "    # x\\x1b[1m```" in lines


def test_tensorboard_gets_the_best_and_the_worst_of_a_group() -> None:
    group = make_group(1, [3] * 9, (WRONG,) * 7 + (RIGHT, WRONG))
    samples = as_samples(lambda ids: "x" * len(ids), 1, 1, Observed(group=group, streams={}))
    shown = [line for line in as_markdown(samples).split("\n") if line.startswith("**")]
    assert len(shown) == SHOWN_RESPONSES and "correct" in shown[0] and "wrong" in shown[-1]
    assert as_markdown(samples[:1]).count("**wrong") == 1


def test_the_bound_is_in_megabytes() -> None:
    assert MEGABYTE * SamplesConfig().max_mb == 256_000_000

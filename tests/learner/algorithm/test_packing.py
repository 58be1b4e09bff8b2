"""Batches, their selection, broadcast and partition. Sequences are checked one by one against plain lists."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from common.types import CompletedGroup, FinishReason, Lease, Purpose, TrajectoryGroup, Verdict
from learner.algorithm.packing import Batch, broadcast_batch, partition
from tests.support.ranks import run_two_ranks


def make_group(prompt: Sequence[int], responses: Sequence[Sequence[int]], lease_id: int = 0) -> TrajectoryGroup:
    tokens = [token for response in responses for token in response]
    lease = Lease(
        lease_id=lease_id,
        purpose=Purpose.TRAIN,
        prompt_uid=f"p{lease_id}",
        prompt_token_ids=np.array(prompt, np.int32),
        reference="",
        row={},
        num_samples=len(responses),
        seed=0,
        temperature=1.0,
        max_tokens=64,
    )
    completed = CompletedGroup(
        lease_id=lease_id,
        lengths=np.array([len(response) for response in responses], np.int32),
        token_ids=np.array(tokens, np.int32),
        behavior_logprobs=-np.array(tokens, np.float32),
        versions=np.array(tokens, np.int32) + 1000,
        rewards=np.array([response[0] for response in responses], np.float32),
        verdicts=tuple(Verdict.CORRECT if response[0] % 2 else Verdict.WRONG for response in responses),
        verifier_error=None,
        finish_reasons=tuple(FinishReason.LENGTH if len(r) > 3 else FinishReason.STOP for r in responses),
        generation_s=0.0,
        verification_s=0.0,
    )
    return TrajectoryGroup(lease=lease, actor="a", completed=completed, arrived_s=0.0)


def batch_of_lengths(lengths: Sequence[int]) -> Batch:
    groups = [make_group([1], [list(range(1, length))], i) for i, length in enumerate(lengths)]
    return Batch.from_groups(groups)


def test_from_groups_lays_prompts_and_responses_end_to_end() -> None:
    batch = Batch.from_groups([make_group([7, 8], [[1, 2, 3], [4]], 0), make_group([9], [[5, 6, 5, 6]], 1)])
    assert batch.token_ids_S.tolist() == [7, 8, 1, 2, 3, 7, 8, 4, 9, 5, 6, 5, 6]
    assert batch.cu_seqlens_B1.tolist() == [0, 5, 8, 13]
    assert batch.prompt_lengths_B.tolist() == [2, 2, 1]
    assert batch.response_lengths_B.tolist() == [3, 1, 4]
    assert batch.positions_T.tolist() == [1, 2, 3, 6, 8, 9, 10, 11]
    assert batch.response_ids_T.tolist() == [1, 2, 3, 4, 5, 6, 5, 6]
    assert batch.versions_T.tolist() == [1001, 1002, 1003, 1004, 1005, 1006, 1005, 1006]
    assert batch.behavior_logprobs_T.tolist() == [-1, -2, -3, -4, -5, -6, -5, -6]
    assert batch.rewards_B.tolist() == [1, 4, 5]
    assert batch.is_correct_B.tolist() == [True, False, True]
    assert batch.is_truncated_B.tolist() == [False, False, True]
    assert batch.group_index_B.tolist() == [0, 0, 1]
    assert batch.loss_mask_T.all()


def test_an_empty_prompt_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="p3 has no tokens"):
        Batch.from_groups([make_group([], [[1]], 3)])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=8), st.randoms())
def test_select_equals_building_the_batch_from_the_selected_sequences(sizes, random) -> None:
    groups = [
        make_group([random.randrange(100) for _ in range(p)], [[random.randrange(100) for _ in range(r)]], i)
        for i, (p, r) in enumerate(sizes)
    ]
    batch = Batch.from_groups(groups)
    chosen = random.sample(range(len(groups)), random.randint(0, len(groups)))
    expected = Batch.from_groups([groups[i] for i in chosen])
    selected = batch.select(torch.tensor(chosen, dtype=torch.int64))
    for field in fields(Batch):
        if field.name == "group_index_B":
            assert selected.group_index_B.tolist() == chosen
        else:
            assert torch.equal(getattr(selected, field.name), getattr(expected, field.name)), field.name
            assert getattr(selected, field.name).dtype == getattr(expected, field.name).dtype


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(2, 40), min_size=4, max_size=40),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(8, 100),
)
def test_partition_covers_each_sequence_once_within_budget_and_in_step(lengths, minis, ranks, budget) -> None:
    batch = batch_of_lengths(lengths)
    parts = partition(batch, minis, ranks, budget, seed=3)
    assert len(parts) == minis
    assert {len(mini) for mini in parts} == {ranks}
    seen = [int(i) for mini in parts for rank in mini for micro in rank for i in micro]
    assert sorted(seen) == list(range(len(lengths)))
    for mini in parts:
        assert len({len(rank) for rank in mini}) == 1
        for rank in mini:
            for micro in rank:
                assert len(micro) <= 1 or sum(lengths[i] for i in micro) <= budget
    sizes = [sum(len(micro) for rank in mini for micro in rank) for mini in parts]
    assert max(sizes) - min(sizes) <= 1


def test_partition_is_deterministic_and_changes_with_the_seed() -> None:
    batch = batch_of_lengths(list(range(2, 34)))

    def flat(seed: int) -> list[int]:
        return [int(i) for mini in partition(batch, 4, 2, 64, seed) for rank in mini for m in rank for i in m]

    assert flat(1) == flat(1)
    assert flat(1) != flat(2)


def test_ranks_are_balanced_by_compute() -> None:
    lengths = np.random.default_rng(0).integers(10, 400, 128).tolist()
    (mini,) = partition(batch_of_lengths(lengths), 1, 4, 10_000, seed=0)
    loads = [sum(lengths[i] for micro in rank for i in micro) for rank in mini]
    assert max(loads) / min(loads) < 1.02


def test_a_rank_without_sequences_gets_empty_micro_batches() -> None:
    (mini,) = partition(batch_of_lengths([5, 6]), 1, 3, 100, seed=0)
    assert [len(rank) for rank in mini] == [1, 1, 1]
    assert sorted(len(rank[0]) for rank in mini) == [0, 1, 1]


def test_more_mini_batches_than_sequences_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 sequences cannot be split into learner\.mini_batches=3"):
        partition(batch_of_lengths([5, 6]), 3, 1, 100, seed=0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=4, max_size=12),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(31, 100),
)
def test_groups_stay_in_one_micro_batch_as_far_as_they_fit(lengths, minis, ranks, budget) -> None:
    batch = Batch.from_groups([make_group([7], [[1] * n for n in group], i) for i, group in enumerate(lengths)])
    sizes = [sum(1 + n for n in group) for group in lengths]
    parts = partition(batch, minis, ranks, budget, seed=3, keeps_groups=True)
    micros = [micro for mini in parts for rank in mini for micro in rank]
    assert sorted(int(i) for micro in micros for i in micro) == list(range(batch.num_sequences))
    assert all(len(micro) <= 1 or int(batch.lengths_B[micro].sum()) <= budget for micro in micros)
    places = [{k for k, micro in enumerate(micros) if g in batch.group_index_B[micro]} for g in range(len(lengths))]
    assert all(len(where) == 1 for where, size in zip(places, sizes, strict=True) if size <= budget)


def test_more_mini_batches_than_groups_is_refused() -> None:
    batch = Batch.from_groups([make_group([7], [[1], [2]], i) for i in range(2)])
    with pytest.raises(ValueError, match=r"2 groups cannot be split into learner\.mini_batches=3"):
        partition(batch, 3, 1, 100, seed=0, keeps_groups=True)


def _broadcast(rank: int, store: str, batch: Batch) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    received = broadcast_batch(batch if rank == 0 else None)
    for field in fields(Batch):
        assert torch.equal(getattr(received, field.name), getattr(batch, field.name)), field.name
        assert getattr(received, field.name).dtype == getattr(batch, field.name).dtype
    dist.destroy_process_group()


def test_broadcast_gives_every_rank_the_same_batch(tmp_path: Path) -> None:
    batch = Batch.from_groups([make_group([7, 8], [[1, 2, 3], [4]], 0), make_group([9], [[5, 6]], 1)])
    run_two_ranks(_broadcast, str(tmp_path / "store"), batch)

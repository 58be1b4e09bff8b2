"""Batches as packed streams of tokens, and how a batch is split into mini-batches, ranks and micro-batches.

Nothing here pads. A batch of B sequences is two streams, laid end to end in the same order:

    S  prompt + response tokens    what the networks read
    T  response tokens only        what the losses are over

Example, B = 2, prompts [p p] and [q], responses [a b c] and [d]:

    token_ids_S      [p p a b c | q d]
    cu_seqlens_B1    [0 5 7]
    positions_T      [1 2 3 | 5]          the position of S that PREDICTS each response token
    response_ids_T   [a b c | d]
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from common.types import FinishReason, TrajectoryGroup, Verdict

# A sequence of this many tokens spends as much on attention as on its linear layers (12 x a width of 2048).
ATTENTION_EQUALS_LINEAR_TOKENS = 24_576

MicroBatches = list[Tensor]  # one int64 tensor of sequence indices per micro-batch, possibly empty


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Everything that one step trains on, as CPU tensors. Axes: B sequences; S and T as in the header."""

    token_ids_S: Tensor  # int64
    cu_seqlens_B1: Tensor  # int64, starts at 0, ends at S
    prompt_lengths_B: Tensor  # int64, at least 1
    response_lengths_B: Tensor  # int64, at least 1
    behavior_logprobs_T: Tensor  # float32, recorded by the engine at the sampling temperature
    versions_T: Tensor  # int64, policy version that drew each token
    rewards_B: Tensor  # float32
    is_correct_B: Tensor  # bool, by verdict
    is_truncated_B: Tensor  # bool, stopped by the length limit
    group_index_B: Tensor  # int64, equal within a group
    loss_mask_T: Tensor  # bool, tokens that enter the losses

    @property
    def num_sequences(self) -> int:
        return len(self.prompt_lengths_B)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids_S)

    @property
    def num_response_tokens(self) -> int:
        return len(self.versions_T)

    @property
    def lengths_B(self) -> Tensor:
        """Prompt + response tokens of each sequence."""
        return self.prompt_lengths_B + self.response_lengths_B

    @property
    def response_cu_seqlens_B1(self) -> Tensor:
        """Boundaries of the responses in the T stream."""
        return boundaries(self.response_lengths_B)

    @property
    def positions_T(self) -> Tensor:
        """The position of S that predicts each response token (the one before it)."""
        return prediction_positions(self.cu_seqlens_B1, self.prompt_lengths_B)

    @property
    def response_ids_T(self) -> Tensor:
        return self.token_ids_S[self.positions_T + 1]

    @classmethod
    def from_groups(cls, groups: Sequence[TrajectoryGroup]) -> "Batch":
        """All completions of all groups, in order; a group's index is its place in `groups`.

        Raises ValueError when a prompt is empty: nothing would predict its first response token.
        """
        for group in groups:
            if len(group.lease.prompt_token_ids) == 0:
                raise ValueError(f"prompt {group.lease.prompt_uid} has no tokens, give it at least one")
        done = [group.completed for group in groups]
        group_sizes = [len(completed.lengths) for completed in done]
        prompt_lengths = [len(group.lease.prompt_token_ids) for group in groups]
        response_lengths_B = torch.from_numpy(_concatenate([c.lengths for c in done], np.int64))
        prompt_lengths_B = torch.tensor(np.repeat(prompt_lengths, group_sizes), dtype=torch.int64)
        response_ids_T = torch.from_numpy(_concatenate([c.token_ids for c in done], np.int64))
        return cls(
            token_ids_S=torch.from_numpy(_concatenate(_interleave(groups), np.int64)),
            cu_seqlens_B1=boundaries(prompt_lengths_B + response_lengths_B),
            prompt_lengths_B=prompt_lengths_B,
            response_lengths_B=response_lengths_B,
            behavior_logprobs_T=torch.from_numpy(_concatenate([c.behavior_logprobs for c in done], np.float32)),
            versions_T=torch.from_numpy(_concatenate([c.versions for c in done], np.int64)),
            rewards_B=torch.from_numpy(_concatenate([c.rewards for c in done], np.float32)),
            is_correct_B=torch.tensor([v is Verdict.CORRECT for c in done for v in c.verdicts], dtype=torch.bool),
            is_truncated_B=torch.tensor(
                [reason is FinishReason.LENGTH for c in done for reason in c.finish_reasons], dtype=torch.bool
            ),
            group_index_B=torch.tensor(np.repeat(np.arange(len(groups)), group_sizes), dtype=torch.int64),
            loss_mask_T=torch.ones(len(response_ids_T), dtype=torch.bool),
        )

    def select(self, indices: Tensor) -> "Batch":
        """The sequences at `indices` (int64, any order, may be empty), as a batch of their own."""
        tokens = spans(self.cu_seqlens_B1[:-1][indices], self.lengths_B[indices])
        response = self.select_tokens(indices)
        return Batch(
            token_ids_S=self.token_ids_S[tokens],
            cu_seqlens_B1=boundaries(self.lengths_B[indices]),
            prompt_lengths_B=self.prompt_lengths_B[indices],
            response_lengths_B=self.response_lengths_B[indices],
            behavior_logprobs_T=self.behavior_logprobs_T[response],
            versions_T=self.versions_T[response],
            rewards_B=self.rewards_B[indices],
            is_correct_B=self.is_correct_B[indices],
            is_truncated_B=self.is_truncated_B[indices],
            group_index_B=self.group_index_B[indices],
            loss_mask_T=self.loss_mask_T[response],
        )

    def select_tokens(self, indices: Tensor) -> Tensor:
        """Places in T of the response tokens of the sequences at `indices`.

        Indexing a T stream of this batch with the result gives the T stream of `select(indices)`.
        """
        return spans(self.response_cu_seqlens_B1[:-1][indices], self.response_lengths_B[indices])


def boundaries(lengths_B: Tensor) -> Tensor:
    """Cumulative lengths with a leading zero: sequence b occupies [result[b], result[b + 1])."""
    return torch.nn.functional.pad(lengths_B.cumsum(0), (1, 0))


def spans(starts_B: Tensor, lengths_B: Tensor) -> Tensor:
    """The integers of [start, start + length) of every sequence, end to end; int64."""
    offsets_B = starts_B - (lengths_B.cumsum(0) - lengths_B)
    total = int(lengths_B.sum())
    offsets = offsets_B.repeat_interleave(lengths_B, output_size=total)
    return torch.arange(total, device=lengths_B.device) + offsets


def prediction_positions(cu_seqlens_B1: Tensor, prompt_lengths_B: Tensor) -> Tensor:
    """The position in S that predicts each response token: the prompt's last token to the last but one."""
    lengths_B = cu_seqlens_B1.diff()
    return spans(cu_seqlens_B1[:-1] + prompt_lengths_B - 1, lengths_B - prompt_lengths_B)


def broadcast_batch(batch: Batch | None, src: int = 0) -> Batch:
    """The batch of rank `src`, on every rank. A collective; without a process group, its argument.

    CPU tensors travel as they are (three sizes first, then one broadcast per field), so nothing is
    pickled. The default process group must have a CPU backend, see learner/networks/parallel.py.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        assert batch is not None, "the only rank must bring the batch"
        return batch
    is_source = dist.get_rank() == src
    sizes = torch.zeros(3, dtype=torch.int64)
    if is_source:
        assert batch is not None, "the source rank must bring the batch"
        sizes = torch.tensor([batch.num_sequences, batch.num_tokens, batch.num_response_tokens])
    dist.broadcast(sizes, src)
    num_sequences, num_tokens, num_response_tokens = sizes.tolist()
    axes = {"S": num_tokens, "B1": num_sequences + 1, "B": num_sequences, "T": num_response_tokens}
    received: dict[str, Tensor] = {}
    for name in (field.name for field in fields(Batch)):
        if batch is not None and is_source:
            tensor = getattr(batch, name).contiguous()
        else:
            tensor = torch.empty(axes[name.rsplit("_", 1)[1]], dtype=_dtype(name))
        if tensor.numel():
            dist.broadcast(tensor.view(torch.uint8), src)
        received[name] = tensor
    return Batch(**received)


def partition(
    batch: Batch, num_mini_batches: int, num_ranks: int, token_budget: int, seed: int, keeps_groups: bool = False
) -> list[list[MicroBatches]]:
    """Sequence indices as result[mini_batch][rank][micro_batch]; each sequence appears exactly once.

    Mini-batches are a random split (by `seed`) into equal numbers of sequences, plus or minus one; with
    `keeps_groups` of groups, so that what a group has in common can be computed once. Then a group stays in one
    micro-batch, unless it is larger than one: its parts are split as if they were groups.

    Inside a mini-batch, ranks are balanced by estimated compute, and every rank gets the same number of
    micro-batches, because the collectives of a sharded model must match: some may be empty. A
    micro-batch holds at most `token_budget` tokens, except that a longer sequence travels alone. Its
    sequences, or groups, are sorted by decreasing length, and the k-th micro-batches of all ranks are of similar
    cost. Deterministic in its arguments.

    Raises ValueError when there are fewer sequences, or groups, than mini-batches.
    """
    lengths = batch.lengths_B.tolist()
    units = _group_parts(batch, lengths, token_budget) if keeps_groups else [[i] for i in range(batch.num_sequences)]
    if len(units) < num_mini_batches:
        raise ValueError(
            f"{len(units)} {'groups' if keeps_groups else 'sequences'} cannot be split into "
            f"learner.mini_batches={num_mini_batches}, lower it or raise rollout.prompts_per_step"
        )
    sizes = [sum(lengths[i] for i in unit) for unit in units]
    costs = [sum(_cost(lengths[i]) for i in unit) for unit in units]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(units), generator=generator)
    minis = []
    for mini in order.tensor_split(num_mini_batches):
        shares = _balance(mini.tolist(), costs, num_ranks)
        micros = [_fill(share, sizes, costs, token_budget) for share in shares]
        num_micros = max(1, max(len(rank_micros) for rank_micros in micros))
        minis.append([_as_tensors(rank_micros, units, num_micros) for rank_micros in micros])
    return minis


def shard(mini: list[MicroBatches], index: int, num_shards: int) -> list[MicroBatches]:
    """Of a mini-batch [rank][micro_batch] the sequences at the batch's places index, index + num_shards, and so on.

    Shards are disjoint, and together the mini-batch. Members of a group stand side by side in a batch, so shards share
    it evenly, a member more or less. As many micro-batches on every rank as before: some may be empty.
    """
    return [[indices[indices % num_shards == index] for indices in micros] for micros in mini]


def _group_parts(batch: Batch, lengths: list[int], token_budget: int) -> list[list[int]]:
    """The sequences of each group, in parts of at most `token_budget` tokens (or one sequence)."""
    parts: list[list[int]] = []
    last: dict[int, list[int]] = {}  # by group
    for index, group in enumerate(batch.group_index_B.tolist()):
        part = last.get(group)
        if part is None or sum(lengths[i] for i in part) + lengths[index] > token_budget:
            part = last[group] = []
            parts.append(part)
        part.append(index)
    return parts


def _concatenate(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype, copy=False)


def _interleave(groups: Sequence[TrajectoryGroup]) -> list[np.ndarray]:
    """Prompt and completion of every member of every group, alternating."""
    pieces: list[np.ndarray] = []
    for group in groups:
        ends = np.cumsum(group.completed.lengths)[:-1]
        for completion in np.split(group.completed.token_ids, ends):
            pieces += [group.lease.prompt_token_ids, completion]
    return pieces


def _dtype(name: str) -> torch.dtype:
    if name in ("behavior_logprobs_T", "rewards_B"):
        return torch.float32
    return torch.bool if name in ("is_correct_B", "is_truncated_B", "loss_mask_T") else torch.int64


def _cost(length: int) -> float:
    """Compute of one sequence in token equivalents: linear layers plus causal attention."""
    return length * (1 + length / ATTENTION_EQUALS_LINEAR_TOKENS)


def _balance(units: list[int], costs: list[float], num_ranks: int) -> list[list[int]]:
    """Shares of about equal cost: the most expensive unit left goes to the cheapest share."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    for unit in sorted(units, key=lambda u: (-costs[u], u)):
        rank = totals.index(min(totals))
        shares[rank].append(unit)
        totals[rank] += costs[unit]
    return shares


def _fill(share: list[int], sizes: list[int], costs: list[float], token_budget: int) -> list[list[int]]:
    """First-fit decreasing: micro-batches of at most `token_budget` tokens, most expensive first."""
    micros: list[list[int]] = []
    room: list[int] = []
    for unit in share:  # already sorted by decreasing cost
        place = next((k for k, free in enumerate(room) if free >= sizes[unit]), None)
        if place is None:
            micros.append([])
            room.append(token_budget)
            place = len(micros) - 1
        micros[place].append(unit)
        room[place] -= sizes[unit]
    return sorted(micros, key=lambda micro: -sum(costs[unit] for unit in micro))


def _as_tensors(micros: list[list[int]], units: list[list[int]], num_micros: int) -> MicroBatches:
    padded = micros + [[] for _ in range(num_micros - len(micros))]
    return [torch.tensor([i for unit in micro for i in units[unit]], dtype=torch.int64) for micro in padded]

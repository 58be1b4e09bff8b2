"""What has been sampled so far of a group: filled by Progress, handed on as the prefix of the prompt's next lease."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from common.types import (
    CompletedGroup,
    FinishReason,
    Float32Array,
    Int32Array,
    Lease,
    Progress,
    Prompt,
    TrajectoryGroup,
)


class Piece(NamedTuple):
    """L tokens of one completion, one after another."""

    token_ids: Int32Array  # [L]
    behavior_logprobs: Float32Array  # [L]
    versions: Int32Array  # [L]

    def cut(self, start: int, end: int | None = None) -> "Piece":
        return Piece(self.token_ids[start:end], self.behavior_logprobs[start:end], self.versions[start:end])

    def equals(self, other: "Piece") -> bool:
        return all(np.array_equal(ours, theirs) for ours, theirs in zip(self, other, strict=True))


class Partial:
    """The first tokens of each of the n completions of a lease, as far as they have been reported.

    A completion is kept in the pieces in which it came, so that a report costs its own length only. `drawn_by` has the
    newest version of the tokens that each actor has drawn of it. It does not know of those from a checkpoint: whoever
    drew them had been judged before that was taken.
    """

    def __init__(self, num_samples: int) -> None:
        self.finish_reasons: list[FinishReason | None] = [None] * num_samples  # None: it goes on
        self.drawn_by: dict[str, int] = {}
        self._lengths = [0] * num_samples
        self._pieces: list[list[Piece]] = [[] for _ in range(num_samples)]

    @property
    def num_tokens(self) -> int:
        return sum(self._lengths)

    @property
    def lengths(self) -> Int32Array:
        """Tokens of each completion: int32 [n]."""
        return np.array(self._lengths, dtype=np.int32)

    @property
    def is_sampled(self) -> bool:
        """Every completion has ended; the verifier has the rest to do."""
        return None not in self.finish_reasons

    @property
    def oldest_version(self) -> int:
        """Of at least one token."""
        return min(int(piece.versions.min()) for pieces in self._pieces for piece in pieces)

    def lacks(self, progress: Progress) -> bool:
        """Whether tokens before these have not come: an earlier report got lost."""
        return len(progress.starts) == len(self._lengths) and bool((progress.starts > self.lengths).any())

    def add(self, progress: Progress, lease: Lease, actor: str) -> str | None:
        """Takes this actor's new tokens in, or none of them and says why. What was reported before may be reported
        again."""
        if len(progress.lengths) != len(self._lengths):
            return f"{len(progress.lengths)} completions instead of {len(self._lengths)}"
        news = []
        for index, (start, piece) in enumerate(zip(progress.starts.tolist(), _pieces_of(progress), strict=True)):
            end, have = start + len(piece.token_ids), self._lengths[index]
            if start > have:
                return f"completion {index} goes on at token {start}, but only {have} have come"
            if end > lease.max_tokens:
                return f"completion {index} has {end} tokens, the limit is {lease.max_tokens}"
            known = self._completion(index).cut(start, end) if start < have else piece.cut(0, 0)
            if not known.equals(piece.cut(0, have - start)):
                return f"completion {index} differs from what was reported of it before"
            new = piece.cut(have - start)
            if self.finish_reasons[index] is not None and len(new.token_ids):
                return f"completion {index} goes on after its end"
            if progress.finish_reasons[index] is not None and not max(have, end):
                return f"completion {index} has ended without a token"
            news.append(new)
        for index, new in enumerate(news):
            self._append(index, new)
            if len(new.versions):
                self.drawn_by[actor] = max(self.drawn_by.get(actor, 0), int(new.versions.max()))
            self.finish_reasons[index] = self.finish_reasons[index] or progress.finish_reasons[index]
        return None

    def problem_with(self, group: CompletedGroup) -> str | None:
        """Why this group cannot be what these are the first tokens of, or None. A completion may be shorter: a stop
        string that lies across the end of a prefix is found late."""
        for index, piece in enumerate(_pieces_of(group)):
            known = self._completion(index)
            common = min(len(known.token_ids), len(piece.token_ids))
            is_cut = common < len(known.token_ids) and group.finish_reasons[index] is not FinishReason.STOP
            if is_cut or not known.cut(0, common).equals(piece.cut(0, common)):
                return f"completion {index} differs from the {len(known.token_ids)} tokens that were known of it"
        return None

    def prefix(self) -> dict[str, Any]:
        """The prefix fields of a lease."""
        whole = _joined([piece for pieces in self._pieces for piece in pieces])
        return {
            "prefix_lengths": self.lengths,
            "prefix_token_ids": whole.token_ids,
            "prefix_behavior_logprobs": whole.behavior_logprobs,
            "prefix_versions": whole.versions,
            "prefix_finish_reasons": tuple(self.finish_reasons),
        }

    @classmethod
    def of_prefix(cls, lease: Lease) -> Self:
        """What `prefix` was made of."""
        partial = cls(lease.num_samples)
        whole = Piece(lease.prefix_token_ids, lease.prefix_behavior_logprobs, lease.prefix_versions)
        ends = np.cumsum(lease.prefix_lengths).tolist()
        for index, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            partial._append(index, whole.cut(start, end))
        partial.finish_reasons = list(lease.prefix_finish_reasons)
        return partial

    def _append(self, index: int, piece: Piece) -> None:
        if len(piece.token_ids):
            self._pieces[index].append(piece)
            self._lengths[index] += len(piece.token_ids)

    def _completion(self, index: int) -> Piece:
        """All that is known of one completion."""
        if len(self._pieces[index]) != 1:
            self._pieces[index] = [_joined(self._pieces[index])]
        return self._pieces[index][0]


@dataclass(frozen=True, kw_only=True)
class Pending:
    """A prompt that waits to be leased, with what is known of its responses; or, after a resume, to be buffered with
    the group that was sampled for it.

    `turn` is its place in the order of the stream, which it keeps when it comes back, unless it has failed.
    """

    prompt: Prompt
    group: TrajectoryGroup | None = None
    partial: Partial | None = None
    turn: int

    def is_of(self, actor: str, version: int) -> bool:
        """Whether this actor has drawn tokens of it with this version or a newer one; no group is, see Partial."""
        return self.partial is not None and self.partial.drawn_by.get(actor, -1) >= version

    @property
    def num_tokens(self) -> int:
        """Known so far."""
        if self.group is not None:
            return len(self.group.completed.token_ids)
        return self.partial.num_tokens if self.partial is not None else 0


def _joined(pieces: list[Piece]) -> Piece:
    if not pieces:
        return Piece(np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.int32))
    return Piece(*map(np.concatenate, zip(*pieces, strict=True)))


def _pieces_of(tokens: Progress | CompletedGroup) -> list[Piece]:
    """One for each completion."""
    whole = Piece(tokens.token_ids, tokens.behavior_logprobs, tokens.versions)
    ends = np.cumsum(tokens.lengths).tolist()
    return [whole.cut(start, end) for start, end in zip([0, *ends], ends, strict=False)]

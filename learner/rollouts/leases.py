"""Leases: making one, and keeping those that are out or buffered."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.config import Config, OverAge, StalenessConfig
from common.seeds import eval_seed, hashed
from common.types import CompletedGroup, Int32Array, Lease, Prompt, Purpose, TrajectoryGroup
from learner.rollouts.evaluation import Evaluation
from learner.rollouts.partial import Partial, Pending

LEASES_PER_LIFE = 1 << 20  # a longer life only takes ids of the next one, which begins after them


@dataclass
class Slot:
    """A lease that is out (group is None) or buffered."""

    lease: Lease
    prompt: Prompt
    turn: int  # see Pending
    actor: str
    granted_s: float
    oldest_version: int  # of its tokens: of those that may come while it is out, then of those that came
    partial: Partial | None = None  # what is known of it while it is out, its prefix included
    group: TrajectoryGroup | None = None
    drawn_by: dict[str, int] = field(default_factory=dict)  # of `group`: see Partial

    def is_of(self, actor: str, version: int) -> bool:
        """Whether this actor has drawn tokens of it with this version or a newer one."""
        drawn_by = self.drawn_by if self.partial is None else self.partial.drawn_by
        return drawn_by.get(actor, -1) >= version

    @property
    def num_tokens(self) -> int:
        """Known so far."""
        if self.group is not None:
            return len(self.group.completed.token_ids)
        return self.partial.num_tokens if self.partial is not None else 0

    def drawers(self, actor: str, group: CompletedGroup) -> dict[str, int]:
        """`drawn_by` of the group in which this lease ends with this actor."""
        known = {} if self.partial is None else self.partial.drawn_by
        return known | {actor: int(group.versions.max())}

    @property
    def is_sampled(self) -> bool:
        """All of it has been drawn; at most its verification is missing."""
        return self.group is not None or (self.partial is not None and self.partial.is_sampled)

    @property
    def num_steps(self) -> int:
        """Tokens by which the completion that grew most has grown under this lease, as far as is known."""
        return grown(self.partial.lengths, self.lease) if self.partial is not None else 0

    def pending(self) -> Pending:
        """Its prompt, to be leased again where this lease ends."""
        return Pending(prompt=self.prompt, group=self.group, partial=self.partial, turn=self.turn)


class Slots:
    """The leases that are out or buffered, by id.

    `untrained` and `arrived` count the groups in `train` and in `buffered` by their oldest version; none is 0.

    `train` is in the order in which the prompts came from the stream: one that is leased again has a new id and its old
    turn, or a later one when it has failed.

    Ids count up and are never used twice in a run: each life (incarnation) of its learner begins a range of its own.
    """

    def __init__(self, incarnation: int) -> None:
        self.train: dict[int, Slot] = {}  # ascending turns
        self.buffered: dict[int, Slot] = {}  # those of them that have a group, in order of arrival
        self.evaluation: dict[int, Slot] = {}
        self.untrained: Counter[int] = Counter()
        self.arrived: Counter[int] = Counter()
        self.next_lease_id = incarnation * LEASES_PER_LIFE
        self._num_turns = 0

    def go_on_after(self, next_lease_id: int) -> None:
        """After an earlier life that had come to `next_lease_id`, and perhaps some way further before it ended."""
        lives = -(-next_lease_id // LEASES_PER_LIFE)
        self.next_lease_id = max(self.next_lease_id, lives * LEASES_PER_LIFE)

    def __getitem__(self, lease_id: int) -> Slot:
        return self.train[lease_id] if lease_id in self.train else self.evaluation[lease_id]

    @property
    def num_in_flight(self) -> int:
        """Training leases without a group."""
        return len(self.train) - len(self.buffered)

    def out(self) -> list[Slot]:
        """Leases of either purpose without a group."""
        return [slot for slot in (*self.train.values(), *self.evaluation.values()) if slot.group is None]

    def next_turn(self) -> int:
        """The place behind all others."""
        self._num_turns += 1
        return self._num_turns

    def turn_behind(self, num_fresh: int) -> int:
        """The place behind all others and behind so many prompts that are still to be drawn. It is also the last one's
        of these, which comes first."""
        return self._num_turns + num_fresh

    def num_fresh_before(self, turn: int) -> int:
        """Prompts that are still to be drawn before it."""
        return max(0, turn - self._num_turns)

    def is_due(self, turn: int) -> bool:
        """Whether no prompt that is still to be drawn comes before it."""
        return self.num_fresh_before(turn) == 0

    def num_before(self, turn: int) -> int:
        """Training leases that are consumed before a prompt of this turn."""
        return bisect_right(list(self.train.values()), turn, key=lambda slot: slot.turn)

    def add(self, slot: Slot) -> Slot:
        """`slot` under next_lease_id, which its lease must have."""
        assert slot.lease.lease_id == self.next_lease_id
        self.next_lease_id += 1
        if slot.lease.purpose is Purpose.EVAL:
            self.evaluation[slot.lease.lease_id] = slot
            return slot
        last = next(reversed(self.train.values()), None)
        self.train[slot.lease.lease_id] = slot
        self.untrained[slot.oldest_version] += 1
        if last is not None and slot.turn < last.turn:
            self.train = dict(sorted(self.train.items(), key=lambda item: item[1].turn))
        return slot

    def buffer(self, slot: Slot, group: TrajectoryGroup) -> None:
        """A training lease that was out has its group."""
        _count_down(self.untrained, slot.oldest_version)
        slot.group, slot.partial, slot.oldest_version = group, None, group.oldest_version
        self.buffered[slot.lease.lease_id] = slot
        self.untrained[slot.oldest_version] += 1
        self.arrived[slot.oldest_version] += 1

    def remove(self, slot: Slot) -> None:
        lease_id = slot.lease.lease_id
        if slot.lease.purpose is Purpose.EVAL:
            del self.evaluation[lease_id]
            return
        del self.train[lease_id]
        _count_down(self.untrained, slot.oldest_version)
        if slot.group is not None:
            del self.buffered[lease_id]
            _count_down(self.arrived, slot.oldest_version)


def train_lease(
    config: Config, lease_id: int, prompt: Prompt, token_ids: Sequence[int] | Int32Array, partial: Partial | None
) -> Lease:
    return Lease(
        lease_id=lease_id,
        purpose=Purpose.TRAIN,
        prompt_uid=prompt.uid,
        prompt_token_ids=np.asarray(token_ids, dtype=np.int32),
        reference=prompt.reference,
        row=prompt.row,
        num_samples=config.rollout.group_size,
        seed=hashed(f"{config.seed}/lease/{lease_id}"),
        temperature=config.rollout.temperature,
        max_tokens=config.rollout.max_tokens,
        stop=tuple(config.rollout.stop),
        **_prefix(partial, config.rollout.group_size),
    )


def eval_lease(
    config: Config,
    lease_id: int,
    prompt: Prompt,
    token_ids: Sequence[int] | Int32Array,
    partial: Partial | None,
    evaluation: Evaluation,
) -> Lease:
    """Every evaluation of a run uses the same seeds, so that two of them differ by their weights alone."""
    return Lease(
        lease_id=lease_id,
        purpose=Purpose.EVAL,
        prompt_uid=prompt.uid,
        prompt_token_ids=np.asarray(token_ids, dtype=np.int32),
        reference=prompt.reference,
        row=prompt.row,
        num_samples=evaluation.samples_per_prompt,
        seed=eval_seed(config.seed, prompt.uid),
        temperature=evaluation.temperature,
        max_tokens=config.rollout.max_tokens,
        stop=tuple(config.rollout.stop),
        top_p=config.eval.top_p,
        top_k=config.eval.top_k,
        **_prefix(partial, evaluation.samples_per_prompt),
    )


def _prefix(partial: Partial | None, num_samples: int) -> dict[str, Any]:
    return (partial or Partial(num_samples)).prefix()


def grown(lengths: Int32Array, lease: Lease) -> int:
    """Tokens by which the completion that grew most has grown beyond its prefix. `lengths` are those of today."""
    return int((lengths - lease.prefix_lengths).max())


def is_over_age(staleness: StalenessConfig, group: TrajectoryGroup, version: int) -> bool:
    """Whether the group is too old to be trained at `version`; with over_age=mask the trainer masks tokens instead."""
    is_old = version - group.oldest_version > staleness.max_staleness
    return is_old and staleness.over_age is OverAge.drop


def _count_down(counts: Counter[int], version: int) -> None:
    counts[version] -= 1
    if not counts[version]:
        del counts[version]

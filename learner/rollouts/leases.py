"""Leases: making one, and keeping those that are out or buffered."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.config import Config, OverAge, StalenessConfig
from common.types import Int32Array, Lease, Prompt, Purpose, TrajectoryGroup
from learner.rollouts.evaluation import Evaluation

LEASES_PER_LIFE = 1 << 20  # a longer life only takes ids of the next one, which begins after them


@dataclass(frozen=True)
class Pending:
    """A training prompt that waits to be leased, or, after a resume, to be buffered with what was sampled for it."""

    prompt: Prompt
    group: TrajectoryGroup | None = None


@dataclass
class Slot:
    """A lease that is out (group is None) or buffered."""

    lease: Lease
    prompt: Prompt
    actor: str
    granted_s: float
    oldest_version: int  # of its tokens: of those that may come while it is out, then of those that came
    group: TrajectoryGroup | None = None


class Slots:
    """The leases that are out or buffered, by id.

    `untrained` and `arrived` count the groups in `train` and in `buffered` by their oldest version; none is 0.

    Ids count up and are never used twice in a run: each life (incarnation) of its learner begins a range of its own.
    """

    def __init__(self, incarnation: int) -> None:
        self.train: dict[int, Slot] = {}  # ascending
        self.buffered: dict[int, Slot] = {}  # those of them that have a group, in order of arrival
        self.evaluation: dict[int, Slot] = {}
        self.untrained: Counter[int] = Counter()
        self.arrived: Counter[int] = Counter()
        self.next_lease_id = incarnation * LEASES_PER_LIFE

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

    def add(self, slot: Slot) -> Slot:
        """`slot` under next_lease_id, which its lease must have."""
        assert slot.lease.lease_id == self.next_lease_id
        self.next_lease_id += 1
        if slot.lease.purpose is Purpose.EVAL:
            self.evaluation[slot.lease.lease_id] = slot
        else:
            self.train[slot.lease.lease_id] = slot
            self.untrained[slot.oldest_version] += 1
        return slot

    def buffer(self, slot: Slot, group: TrajectoryGroup) -> None:
        """A training lease that was out has its group."""
        _count_down(self.untrained, slot.oldest_version)
        slot.group, slot.oldest_version = group, group.oldest_version
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


def train_lease(config: Config, lease_id: int, prompt: Prompt, token_ids: Sequence[int] | Int32Array) -> Lease:
    return Lease(
        lease_id=lease_id,
        purpose=Purpose.TRAIN,
        prompt_uid=prompt.uid,
        prompt_token_ids=np.asarray(token_ids, dtype=np.int32),
        reference=prompt.reference,
        row=prompt.row,
        num_samples=config.rollout.group_size,
        seed=_hashed(f"{config.seed}/lease/{lease_id}"),
        temperature=config.rollout.temperature,
        max_tokens=config.rollout.max_tokens,
        stop=tuple(config.rollout.stop),
    )


def eval_lease(
    config: Config, lease_id: int, prompt: Prompt, token_ids: Sequence[int] | Int32Array, evaluation: Evaluation
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
        seed=_hashed(f"{config.seed}/eval/{prompt.uid}"),
        temperature=evaluation.temperature,
        max_tokens=config.rollout.max_tokens,
        stop=tuple(config.rollout.stop),
        top_p=config.eval.top_p,
        top_k=config.eval.top_k,
    )


def is_over_age(staleness: StalenessConfig, group: TrajectoryGroup, version: int) -> bool:
    """Whether the group is too old to be trained at `version`; with over_age=mask the trainer masks tokens instead."""
    is_old = version - group.oldest_version > staleness.max_staleness
    return is_old and staleness.over_age is OverAge.drop


def _count_down(counts: Counter[int], version: int) -> None:
    counts[version] -= 1
    if not counts[version]:
        del counts[version]


def _hashed(text: str) -> int:
    """31 bits. Neighbouring leases must not get neighbouring seeds: an engine may add the sample's index."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") >> 1

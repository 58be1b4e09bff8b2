"""One lease and what comes back for it: making the lease, and checking a group against it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.config import Config
from common.types import CompletedGroup, Lease, Prompt, Purpose, TrajectoryGroup
from learner.rollouts.evaluation import Evaluation


@dataclass
class Slot:
    """A lease that is out (group is None) or buffered."""

    lease: Lease
    prompt: Prompt
    actor: str
    granted_s: float
    group: TrajectoryGroup | None = None


def train_lease(config: Config, lease_id: int, prompt: Prompt, token_ids: Sequence[int]) -> Lease:
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
    )


def eval_lease(
    config: Config, lease_id: int, prompt: Prompt, token_ids: Sequence[int], evaluation: Evaluation
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
    )


def problem_with(group: CompletedGroup, lease: Lease, newest_version: int) -> str | None:
    """Why this group cannot be what was leased, or None. CompletedGroup has checked that its lengths add up."""
    if len(group.lengths) != lease.num_samples:
        return f"{len(group.lengths)} completions instead of {lease.num_samples}"
    if int(group.lengths.max()) > lease.max_tokens:
        return f"a completion of {group.lengths.max()} tokens, the limit is {lease.max_tokens}"
    if int(group.token_ids.min()) < 0:
        return f"token id {group.token_ids.min()}"
    if int(group.versions.min()) < 0 or int(group.versions.max()) > newest_version:
        return f"versions {group.versions.min()} to {group.versions.max()}, but its newest is {newest_version}"
    if not (np.isfinite(group.behavior_logprobs).all() and np.isfinite(group.rewards).all()):
        return "log-probs or rewards that are not finite"
    return None


def _hashed(text: str) -> int:
    """31 bits. Neighbouring leases must not get neighbouring seeds: an engine may add the sample's index."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") >> 1

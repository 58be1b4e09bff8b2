"""What an actor does with one lease: sample the group, verify every response, put it into one message."""

import asyncio
import time

import numpy as np

from actors.engine import Engine
from actors.verifier.pool import VerifierPool
from actors.verifier.rewards import reward
from common.config import RewardConfig
from common.types import CompletedGroup, Lease


async def complete(lease: Lease, engine: Engine, verifier: VerifierPool, rewards: RewardConfig) -> CompletedGroup:
    """The completed group of a lease. Truncated responses are graded as they stand.

    Raises RequestRefused when the engine cannot sample it; cancelling it aborts the engine's requests.
    """
    started = time.monotonic()
    completions = await engine.sample(lease)
    sampled = time.monotonic()
    verdicts = await asyncio.gather(
        *(verifier.verify(completion.text, lease.reference, lease.row) for completion in completions)
    )
    values = [
        reward(verdict, len(completion.token_ids), lease.max_tokens, rewards)
        for verdict, completion in zip(verdicts, completions, strict=True)
    ]
    return CompletedGroup(
        lease_id=lease.lease_id,
        lengths=np.array([len(completion.token_ids) for completion in completions], dtype=np.int32),
        token_ids=np.concatenate([completion.token_ids for completion in completions]),
        behavior_logprobs=np.concatenate([completion.behavior_logprobs for completion in completions]),
        versions=np.concatenate([completion.versions for completion in completions]),
        rewards=np.array(values, dtype=np.float32),
        verdicts=tuple(verdicts),
        finish_reasons=tuple(completion.finish_reason for completion in completions),
        generation_s=sampled - started,
        verification_s=time.monotonic() - sampled,
    )

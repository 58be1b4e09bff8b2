"""What an actor does with one lease: sample the group, verify every response, put it into one message."""

import asyncio
import time

import numpy as np

from actors.engine import Engine
from actors.sampling import Completion
from actors.verifier.pool import VerifierPool
from actors.verifier.rewards import reward
from common.config import RewardConfig
from common.types import CompletedGroup, Int32Array, Lease

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
TAIL_TOKENS = 32  # of a prompt, in which a chat template's opened tag and the white space after it have room


async def complete(lease: Lease, engine: Engine, verifier: VerifierPool, rewards: RewardConfig) -> CompletedGroup:
    """The completed group of a lease. Truncated responses are graded as they stand.

    Raises RequestRefused when the engine cannot sample it; cancelling it aborts the engine's requests.
    """
    try:
        return await _complete(lease, engine, verifier, rewards)
    finally:
        engine.forget(lease.lease_id)  # what it has drawn could be asked for until here


async def _complete(lease: Lease, engine: Engine, verifier: VerifierPool, rewards: RewardConfig) -> CompletedGroup:
    started = time.monotonic()
    completions = await engine.sample(lease)
    sampled = time.monotonic()
    opened = opened_reasoning(lease.prompt_token_ids, engine)
    judgements = await asyncio.gather(
        *(verifier.judge(_seen(completion, opened, engine), lease.reference, lease.row) for completion in completions)
    )
    values = [
        reward(judgement, len(completion.token_ids), lease.max_tokens, rewards)
        for judgement, completion in zip(judgements, completions, strict=True)
    ]
    return CompletedGroup(
        lease_id=lease.lease_id,
        lengths=np.array([len(completion.token_ids) for completion in completions], dtype=np.int32),
        token_ids=np.concatenate([completion.token_ids for completion in completions]),
        behavior_logprobs=np.concatenate([completion.behavior_logprobs for completion in completions]),
        versions=np.concatenate([completion.versions for completion in completions]),
        rewards=np.array(values, dtype=np.float32),
        verdicts=tuple(judgement.verdict for judgement in judgements),
        verifier_error=next((judgement.error for judgement in judgements if judgement.error is not None), None),
        finish_reasons=tuple(completion.finish_reason for completion in completions),
        generation_s=sampled - started,
        verification_s=time.monotonic() - sampled,
    )


def opened_reasoning(prompt_token_ids: Int32Array, engine: Engine) -> str:
    """The tag, with the white space after it, when the prompt ends with a <think> that its chat template opened."""
    tail = engine.decode(prompt_token_ids[-TAIL_TOKENS:])
    _, tag, space = tail.rpartition(THINK_OPEN)
    return tag + space if tag and not space.strip() else ""


def _seen(completion: Completion, opened: str, engine: Engine) -> str:
    """What the verifier sees: the response as if it had opened the tag itself.

    Where the closing tag is a special token, which texts leave out, a response that has closed it is seen without
    either.
    """
    if opened and THINK_CLOSE not in completion.text and THINK_CLOSE in engine.decode(completion.token_ids):
        return completion.text
    return opened + completion.text

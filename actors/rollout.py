"""What an actor does with one lease: sample the group, verify every response, put it into one message."""

import asyncio
import time
from dataclasses import dataclass

import numpy as np

from actors.engine import Engine
from actors.sampling import Completion
from actors.verifier.judgement import Judgement
from actors.verifier.pool import VerifierPool
from actors.verifier.rewards import reward
from common.config import RewardConfig
from common.types import CompletedGroup, Int32Array, Lease

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
TAIL_TOKENS = 32  # of a prompt, in which a chat template's opened tag and the white space after it have room


@dataclass(frozen=True, kw_only=True)
class Judged:
    """All n completions of a lease with what the verifier saw and said of each."""

    completions: list[Completion]
    texts: list[str]
    judgements: list[Judgement]
    generation_s: float  # of the engine's clock, which publications stop: an actor is not slow because of them
    verification_s: float


async def complete(lease: Lease, engine: Engine, verifier: VerifierPool, rewards: RewardConfig) -> CompletedGroup:
    """The completed group of a lease. Truncated responses are graded as they stand. Raises as `sample_and_judge`."""
    judged = await sample_and_judge(lease, engine, verifier)
    completions, judgements = judged.completions, judged.judgements
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
        generation_s=judged.generation_s,
        verification_s=judged.verification_s,
    )


async def sample_and_judge(lease: Lease, engine: Engine, verifier: VerifierPool) -> Judged:
    """Raises RequestRefused when the engine cannot sample it; cancelling it aborts the engine's requests."""
    try:
        return await _sample_and_judge(lease, engine, verifier)
    finally:
        engine.forget(lease.lease_id)  # what it has drawn could be asked for until here


async def _sample_and_judge(lease: Lease, engine: Engine, verifier: VerifierPool) -> Judged:
    completions = await engine.sample(lease)
    generation_s = engine.sampling_s(lease.lease_id)
    sampled = time.monotonic()
    opened = opened_reasoning(lease.prompt_token_ids, engine)
    texts = [_seen(completion, opened, engine) for completion in completions]
    judgements = await asyncio.gather(*(verifier.judge(text, lease.reference, lease.row) for text in texts))
    return Judged(
        completions=completions,
        texts=texts,
        judgements=judgements,
        generation_s=generation_s,
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

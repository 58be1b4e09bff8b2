"""Whether what an actor sent can be what it was leased: everything that would be trained on is looked at."""

import math

from common.config import Config
from common.rewards import overlong_penalty, verdict_reward
from common.tasks import is_own_verifier
from common.types import LARGEST_REWARD, CompletedGroup, Float32Array, Int32Array, Lease, Verdict
from common.validation import LONGEST_S

MAX_LOGPROB = 1e-3  # a log-softmax may round a little above 0
MIN_LOGPROB = -150.0  # in float32 a probability is 0 from e^-104 on, and what has probability 0 is never drawn
REWARD_TOLERANCE = 1e-4  # of a reward that travelled as float32, relative above 1


def problem_with(
    group: CompletedGroup, lease: Lease, newest_version: int, config: Config, vocab_size: int | None
) -> str | None:
    """Why this group cannot be what was leased, or None. CompletedGroup has checked that its lengths add up.

    `newest_version` is the newest that its actor can hold; `vocab_size` None leaves token ids without upper bound.
    """
    if len(group.lengths) != lease.num_samples:
        return f"{len(group.lengths)} completions instead of {lease.num_samples}"
    if int(group.lengths.max()) > lease.max_tokens:
        return f"a completion of {group.lengths.max()} tokens, the limit is {lease.max_tokens}"
    for seconds in (group.generation_s, group.verification_s):
        if not 0 <= seconds <= LONGEST_S:
            return f"a duration of {seconds:g} s"
    problem = problem_with_tokens(group.token_ids, group.behavior_logprobs, group.versions, newest_version, vocab_size)
    return problem or _problem_with_rewards(group, lease.max_tokens, config)


def problem_with_tokens(
    token_ids: Int32Array,
    behavior_logprobs: Float32Array,
    versions: Int32Array,
    newest_version: int,
    vocab_size: int | None,
) -> str | None:
    """Why no engine with this vocabulary can have drawn these tokens, at least one, or None. All are [T]."""
    if int(token_ids.min()) < 0:
        return f"token id {token_ids.min()}"
    if vocab_size is not None and int(token_ids.max()) >= vocab_size:
        return f"token id {token_ids.max()}, but the model has {vocab_size} tokens"
    if int(versions.min()) < 0 or int(versions.max()) > newest_version:
        return f"versions {versions.min()} to {versions.max()}, but its newest is {newest_version}"
    lowest, highest = float(behavior_logprobs.min()), float(behavior_logprobs.max())
    if not MIN_LOGPROB <= lowest <= highest <= MAX_LOGPROB:  # also when they are not numbers
        return f"log-probs from {lowest:g} to {highest:g}, outside [{MIN_LOGPROB:g}, 0]"
    return None


def _problem_with_rewards(group: CompletedGroup, max_tokens: int, config: Config) -> str | None:
    """Our own verifiers give verdicts, which fix the rewards; a user's function may give any number with either."""
    settings, are_fixed = config.reward, is_own_verifier(config)
    for verdict, reward, length in zip(group.verdicts, group.rewards.tolist(), group.lengths.tolist(), strict=True):
        if not math.isfinite(reward):
            return f"a reward of {reward}"
        if verdict is Verdict.ERROR:
            continue  # such a group is dropped
        penalty = overlong_penalty(length, max_tokens, settings.overlong_buffer) if settings.overlong_penalty else 0.0
        expected = verdict_reward(verdict, settings) + penalty
        tolerance = REWARD_TOLERANCE * max(1.0, abs(expected))
        if are_fixed and abs(reward - expected) > tolerance:
            return f"a reward of {reward:g} for a response of {length} tokens that is {verdict}: it is {expected:g}"
        if abs(reward - penalty) > LARGEST_REWARD + 1.0:
            return f"a reward of {reward:g}, more than {LARGEST_REWARD:g} in magnitude"
    return None

"""What a verdict is worth, which actors compute and the learner checks: the configured value of the verdict, plus
DAPO's soft penalty for overlong responses."""

from common.config import RewardConfig
from common.types import Verdict

NO_REWARD = 0.0  # of a response on which the verifier failed: its group is not trained on


def verdict_reward(verdict: Verdict, config: RewardConfig) -> float:
    """The configured reward of `verdict`, without the penalty."""
    return {
        Verdict.CORRECT: config.correct,
        Verdict.WRONG: config.wrong,
        Verdict.UNANSWERED: config.unanswered,
        Verdict.TIMED_OUT: config.timed_out,
        Verdict.ERROR: NO_REWARD,
    }[verdict]


def overlong_penalty(num_tokens: int, max_tokens: int, buffer: int) -> float:
    """Soft overlong punishment in [-1, 0] (DAPO, arXiv 2503.14476, eq. 13), with |y| = num_tokens:

        0                                     |y| <= max_tokens - buffer
        ((max_tokens - buffer) - |y|) / buffer   up to max_tokens
        -1                                    beyond

    Raises ValueError when the buffer does not fit into the response limit.
    """
    if not 0 < buffer <= max_tokens:
        raise ValueError(
            f"reward.overlong_buffer is {buffer}, but must be between 1 and rollout.max_tokens = {max_tokens}"
        )
    return max(-1.0, min(0.0, (max_tokens - buffer - num_tokens) / buffer))

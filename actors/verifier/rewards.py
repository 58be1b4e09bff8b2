"""From judgement to reward: the verifier's own number, or what its verdict is worth, plus the overlong penalty."""

from actors.verifier.judgement import Judgement
from common.config import RewardConfig
from common.rewards import NO_REWARD, overlong_penalty, verdict_reward
from common.types import Verdict


def reward(judgement: Judgement, num_tokens: int, max_tokens: int, config: RewardConfig) -> float:
    """Returns the reward of one response of `num_tokens` tokens out of at most `max_tokens`.

    A truncated response is rewarded by its verdict like any other.
    """
    if judgement.verdict is Verdict.ERROR:
        return NO_REWARD
    value = verdict_reward(judgement.verdict, config) if judgement.reward is None else judgement.reward
    if config.overlong_penalty:
        value += overlong_penalty(num_tokens, max_tokens, config.overlong_buffer)
    return float(value)

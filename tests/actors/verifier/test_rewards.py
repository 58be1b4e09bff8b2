"""Rewards: verdict values from the configuration, and DAPO's soft overlong punishment at its corners."""

import pytest

from actors.verifier.judgement import Judgement
from actors.verifier.rewards import reward
from common.config import RewardConfig
from common.rewards import overlong_penalty
from common.types import Verdict


def test_each_verdict_has_its_configured_reward() -> None:
    config = RewardConfig(correct=2.0, wrong=-0.5, unanswered=-0.75, timed_out=0.25)
    values = [reward(Judgement(verdict), 10, 100, config) for verdict in Verdict]
    assert values == [2.0, -0.5, -0.75, 0.25, 0.0]


def test_defaults_are_plus_and_minus_one_without_a_length_penalty() -> None:
    values = {verdict: reward(Judgement(verdict), 100, 100, RewardConfig()) for verdict in Verdict}
    assert values.pop(Verdict.CORRECT) == 1.0
    assert values.pop(Verdict.ERROR) == 0.0, "its group is not trained on"
    assert set(values.values()) == {-1.0}


@pytest.mark.parametrize(
    ("num_tokens", "penalty"), [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (130, -1.0)]
)
def test_the_overlong_penalty_grows_linearly_over_the_buffer(num_tokens: int, penalty: float) -> None:
    assert overlong_penalty(num_tokens, 100, 20) == pytest.approx(penalty)


def test_the_penalty_is_added_to_the_verdicts_reward() -> None:
    config = RewardConfig(overlong_penalty=True, overlong_buffer=20)
    assert reward(Judgement(Verdict.CORRECT), 90, 100, config) == pytest.approx(0.5)
    assert reward(Judgement(Verdict.WRONG), 90, 100, config) == pytest.approx(-1.5)


def test_a_buffer_longer_than_the_response_limit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"overlong_buffer is 4096.*max_tokens = 128"):
        reward(Judgement(Verdict.CORRECT), 1, 128, RewardConfig(overlong_penalty=True))

"""What a group may hold: each number that would be trained on, at its bounds."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.verifier.judgement import Judgement
from actors.verifier.rewards import reward
from common.config import Config, RewardConfig, VerifierConfig
from common.types import LARGEST_REWARD, CompletedGroup, Prompt, Verdict
from learner.rollouts.contents import problem_with
from learner.rollouts.leases import train_lease
from tests.support.fake_actors import group

VOCAB_SIZE = 100
OWN = Config()
USERS = replace(OWN, verifier=VerifierConfig(function="my_module:grade"))


def problem(changed: CompletedGroup, config: Config = OWN) -> str | None:
    num_samples = len(changed.lengths)
    config = replace(config, rollout=replace(config.rollout, group_size=num_samples))
    lease = train_lease(config, 0, Prompt(uid="p", text="", reference=""), [1], None)
    return problem_with(changed, lease, newest_version=5, config=config, vocab_size=VOCAB_SIZE)


def filled(name: str, value: float, verdict: Verdict = Verdict.CORRECT) -> CompletedGroup:
    good = group(0, [4, 5], num_correct=2)
    changed: dict[str, Any] = {name: np.full_like(getattr(good, name), value), "verdicts": (verdict,) * 2}
    return replace(good, **changed)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("token_ids", 100, "token id 100, but the model has 100 tokens"),
        ("token_ids", 2**31 - 1, "token id 2147483647"),
        ("token_ids", -1, "token id -1"),
        ("versions", 6, "versions 6 to 6, but its newest is 5"),
        ("behavior_logprobs", 50.0, "log-probs from 50 to 50"),
        ("behavior_logprobs", -1e38, "log-probs from -1e+38"),
        ("behavior_logprobs", np.nan, "log-probs from nan"),
        ("behavior_logprobs", -np.inf, "log-probs from -inf"),
        ("rewards", 1e38, "a reward of 1e+38 for a response of 2 tokens that is correct: it is 1"),
        ("rewards", -1.0, "a reward of -1 for a response of 2 tokens that is correct: it is 1"),
        ("rewards", np.nan, "a reward of nan"),
    ],
)
def test_what_no_actor_can_have_sampled_or_judged_is_named(name: str, value: float, words: str) -> None:
    found = problem(filled(name, value))
    assert found is not None and words in found


@pytest.mark.parametrize(
    ("name", "value"), [("token_ids", 99), ("versions", 5), ("behavior_logprobs", 1e-4), ("behavior_logprobs", -103.0)]
)
def test_what_is_at_its_bound_is_taken(name: str, value: float) -> None:
    assert problem(filled(name, value)) is None


@pytest.mark.parametrize("seconds", [-1.0, 1e7])
def test_a_duration_that_cannot_be_is_refused(seconds: float) -> None:
    assert problem(replace(group(0, [4]), generation_s=seconds)) == f"a duration of {seconds:g} s"


def test_a_users_function_may_give_any_number_of_a_reasonable_size() -> None:
    assert problem(filled("rewards", 0.3), USERS) is None
    assert problem(filled("rewards", -LARGEST_REWARD), USERS) is None
    assert problem(filled("rewards", 1e7), USERS) == "a reward of 1e+07, more than 1e+06 in magnitude"


def test_a_group_on_which_the_verifier_failed_is_no_fault_of_its_actor() -> None:
    assert problem(filled("rewards", 0.0, Verdict.ERROR)) is None


@given(
    verdicts=st.lists(st.sampled_from(Verdict), min_size=1, max_size=4),
    length=st.integers(1, 128),
    values=st.tuples(*[st.floats(-100, 100, width=32)] * 4),
    buffer=st.integers(1, 127),
    has_penalty=st.booleans(),
    offset=st.sampled_from([0.0, 0.5]),
)
def test_what_an_actor_computes_is_what_the_learner_expects(
    verdicts: list[Verdict],
    length: int,
    values: tuple[float, float, float, float],
    buffer: int,
    has_penalty: bool,
    offset: float,
) -> None:
    """For all verdicts, lengths and reward settings; half a point beside it is refused."""
    config = replace(OWN, reward=RewardConfig(*values, overlong_penalty=has_penalty, overlong_buffer=buffer))
    rewards = [reward(Judgement(verdict), length, 128, config.reward) + offset for verdict in verdicts]
    sent = replace(
        group(0, [4] * length, num_samples=len(verdicts)),
        rewards=np.array(rewards, np.float32),
        verdicts=tuple(verdicts),
    )
    is_refused = problem(sent, config) is not None
    assert is_refused == (offset > 0 and any(verdict is not Verdict.ERROR for verdict in verdicts))

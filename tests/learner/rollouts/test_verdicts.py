"""When the verdicts end a run: a verifier that fails, or prompts from which dynamic sampling leaves nothing."""

from dataclasses import replace

import pytest

from common.config import AlgorithmConfig, Config, RolloutConfig, VerifierConfig
from common.types import CompletedGroup, DropReason, Purpose, Verdict
from learner.rollouts.verdicts import Verdicts, is_informative
from tests.support.fake_actors import group

FUNCTION = "mine:verify"


def make(share: float = 0.25, max_uninformative: int = 5, prompts_per_step: int = 4) -> Verdicts:
    """A step has 2 responses a prompt, 8 in all."""
    return Verdicts(
        Config(
            rollout=RolloutConfig(prompts_per_step=prompts_per_step, group_size=2, max_tokens=3),
            algorithm=AlgorithmConfig(dynamic_sampling=True, max_uninformative=max_uninformative),
            verifier=VerifierConfig(function=FUNCTION, max_error_share=share),
        )
    )


def failed(num_errors: int = 1) -> CompletedGroup:
    verdicts = (*[Verdict.ERROR] * num_errors, *[Verdict.CORRECT] * (2 - num_errors))
    return replace(group(0, [0]), verdicts=verdicts, verifier_error="returned None (NoneType)")


def test_errors_up_to_their_share_of_a_step_are_counted_and_end_nothing() -> None:
    verdicts = make(share=0.25)
    for _ in range(2):
        verdicts.add(failed(), Purpose.TRAIN)
    assert verdicts.problem is None
    assert verdicts.counts == {Verdict.ERROR: 2, Verdict.CORRECT: 2}
    assert verdicts.stats()["verdicts/error"] == 2
    assert verdicts.describe() == [
        f"verifier.function={FUNCTION} failed on 2 of 4 responses (it returned None (NoneType))"
    ]


def test_more_errors_end_the_run_with_a_sentence_that_says_what_of_whom_and_how_often() -> None:
    verdicts = make(share=0.25)
    for _ in range(3):
        verdicts.add(failed(), Purpose.TRAIN)
    assert verdicts.problem == (
        "verifier.function=mine:verify failed on 3 of 6 responses (it returned None (NoneType)) since the last step, "
        "more than verifier.max_error_share=0.25 of 8: correct the function"
    )


def test_the_share_is_of_what_has_arrived_where_that_is_more_than_a_step() -> None:
    verdicts = make(share=0.25)
    for i in range(40):  # one error in eight responses
        verdicts.add(failed() if i % 4 == 0 else group(i, [0]), Purpose.TRAIN)
    assert verdicts.problem is None


def test_each_step_has_a_share_of_its_own() -> None:
    verdicts = make(share=0.25)
    for _ in range(10):
        verdicts.add(failed(2), Purpose.TRAIN)
        verdicts.batch_taken()
    assert verdicts.problem is None


def test_errors_in_an_evaluation_end_the_run_as_well_but_are_no_training_responses() -> None:
    verdicts = make()
    for _ in range(3):
        verdicts.add(failed(), Purpose.EVAL)
    assert verdicts.problem is not None
    assert verdicts.counts.total() == 0


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_0_tolerates_no_error_and_of_1_tolerates_all(share: float) -> None:
    verdicts = make(share=share)
    verdicts.add(group(0, [0]), Purpose.TRAIN)
    assert verdicts.problem is None
    for _ in range(50):
        verdicts.add(failed(2), Purpose.TRAIN)
    assert (verdicts.problem is None) == (share == 1.0)


def test_a_group_with_an_error_is_dropped_whatever_else_is_in_it() -> None:
    for is_filtering in (False, True):
        assert make().reason_to_drop(failed(), is_filtering) is DropReason.VERIFIER_ERROR


@pytest.mark.parametrize(("num_correct", "is_kept"), [(0, False), (1, True), (2, False)])
def test_dynamic_sampling_keeps_groups_with_both_verdicts(num_correct: int, is_kept: bool) -> None:
    completed = group(0, [0], num_correct=num_correct)
    assert is_informative(completed) == is_kept
    assert make().reason_to_drop(completed, True) == (None if is_kept else DropReason.UNINFORMATIVE)
    assert make().reason_to_drop(completed, False) is None


def test_too_many_dropped_groups_in_a_row_end_the_run_and_say_why_they_were_dropped() -> None:
    verdicts = make(max_uninformative=5)
    for num_correct in (0, 2, 0, 0):
        verdicts.reason_to_drop(group(0, [0], num_correct=num_correct), True)
    assert verdicts.problem is None
    assert verdicts.describe() == [
        "algorithm.dynamic_sampling dropped 4 groups (3 with all responses wrong, 1 with all right) in a row"
    ]
    verdicts.reason_to_drop(group(0, [0], num_correct=0), True)
    assert verdicts.problem is not None
    assert verdicts.problem.startswith(
        "algorithm.dynamic_sampling dropped 5 groups (4 with all responses wrong, 1 with all right) in a row: "
    )
    assert "rollout.max_tokens=3" in verdicts.problem


def test_one_group_that_is_kept_begins_the_row_anew() -> None:
    verdicts = make(max_uninformative=5)
    for i in range(50):
        verdicts.reason_to_drop(group(0, [0], num_correct=1 if i % 5 == 4 else 0), True)
    assert verdicts.problem is None


def test_counts_are_kept_over_a_checkpoint() -> None:
    before, after = make(), make()
    before.add(failed(), Purpose.TRAIN)
    after.load_state_dict(before.state_dict())
    assert after.counts == before.counts

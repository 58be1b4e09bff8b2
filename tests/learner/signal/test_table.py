"""The sentence that is made of a table, and the text of its rows."""

from dataclasses import replace

import numpy as np
import pytest

from common.config import AlgorithmConfig
from learner.signal.estimators import CRITIC, usual
from learner.signal.moments import Estimate
from learner.signal.table import Row, Table, best_lambda, render, responses_for, sentence, table


def row(name: str, aim: float, fixed_lambda: float | None = None, ratio: float = 0.1, bias: float = 1.0) -> Row:
    return Row(
        name=name,
        fixed_lambda=fixed_lambda,
        signal_to_noise=Estimate(ratio, 0.01),
        bias=Estimate(bias, 0.1),
        aim=Estimate(aim, 0.02),
    )


SEEN = Estimate(1.0, 0.1)


def made(gain: Estimate | None, *rows: Row, power: Estimate = SEEN) -> Table:
    return Table(rows=rows, truth="lambda 1", truth_power=power, gain=gain, num_batches=36)


LAMBDAS = (row("lambda 0.95", 0.37, 0.95), row("lambda 1", 0.24, 1.0))
GRPO = row("GRPO", 0.24, ratio=0.06)


def test_a_gain_beyond_twice_its_error_is_help() -> None:
    text = sentence(made(Estimate(0.13, 0.05), *LAMBDAS, GRPO))
    assert text == (
        "The critic helps here: lambda 0.95 has the best aim of all lambdas, 0.37 ± 0.02, and it is 0.13 ± 0.05 above "
        "GRPO (0.24 ± 0.02), which would need about 2.6 times the responses for that."
    )


def test_a_gain_within_its_error_is_none_that_was_seen_and_a_loss_is_harm() -> None:
    unseen = sentence(made(Estimate(0.09, 0.05), *LAMBDAS, GRPO))
    assert (
        unseen.startswith("Whether the critic helps is not seen in 36 batches: ") and "0.09 ± 0.05 above GRPO" in unseen
    )
    worse = (row("lambda 0.95", 0.1, 0.95), row("lambda 1", 0.25, 1.0))
    harm = sentence(made(Estimate(-0.14, 0.05), *worse, GRPO))
    assert harm.startswith("The critic does harm here: lambda 1 has the best aim of all lambdas, 0.25 ± 0.02, and ")
    assert "lambda 0.95 (0.10 ± 0.02) is 0.14 ± 0.05 below GRPO" in harm


def test_without_a_true_gradient_a_critic_or_groups_there_is_no_verdict() -> None:
    blind = made(Estimate(0.13, 0.05), *LAMBDAS, GRPO, power=Estimate(0.1, 0.06))
    assert sentence(blind).startswith("The true gradient does not stand out of the noise of 36 batches")
    assert sentence(made(None, GRPO)) == "GRPO has the best aim, 0.24 ± 0.02; there is no critic to compare it with."
    assert "nothing without a critic is there" in sentence(made(None, *LAMBDAS))


def test_responses_solve_for_the_aim() -> None:
    """At k times the responses: bias sqrt(k s / (1 + k s)) = aim."""
    one = row("GRPO", 0.2, ratio=0.05, bias=0.9)
    times = responses_for(one, 0.4)
    assert times is not None and 0.9 * np.sqrt(times * 0.05 / (1 + times * 0.05)) == pytest.approx(0.4)
    assert responses_for(one, 0.95) is None, "the bias is in the way"
    assert responses_for(replace(one, bias=Estimate(None, None)), 0.4) is None


def test_the_best_lambda_is_that_of_the_largest_aim() -> None:
    unseen = replace(LAMBDAS[0], name="lambda 0.5", fixed_lambda=0.5, aim=Estimate(None, None))
    assert best_lambda([unseen, *LAMBDAS[::-1], GRPO]) == LAMBDAS[0]
    assert best_lambda([GRPO, LAMBDAS[1]], below=1.0) is None


def test_the_text_has_a_line_for_each_estimator_but_the_truth() -> None:
    estimators = usual(AlgorithmConfig(length_adaptive_alpha=0.5), CRITIC, 8, (0.9, 1.0))
    gradients = np.random.default_rng(0).normal(size=(len(estimators), 8, 20)) * 0.1
    gradients[:, :, 0] += 1.0
    found = table(estimators, np.einsum("aid,bjd->aibj", gradients, gradients))
    lines = render(found).splitlines()
    assert [line.split("  ")[0] for line in lines[1:-2]] == [one.name for one in estimators[1:]]
    assert lines[0].split() == ["estimator", "signal/noise", "bias", "aim", "responses"]
    assert lines[-1].startswith("true gradient: the mean of 8 batches by lambda 1; its power is ")
    assert found.gain is not None and found.gain.error is not None
    best = best_lambda(found.rows, below=1.0)
    grpo = next(one for one in found.rows if one.name == "GRPO")
    assert best is not None and best.aim.value is not None and grpo.aim.value is not None
    assert found.gain.value == pytest.approx(best.aim.value - grpo.aim.value)

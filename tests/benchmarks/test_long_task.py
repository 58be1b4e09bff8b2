"""The task of letters, the value that is computed for it, and the tables."""

import math
from collections import Counter
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import letters, long_task
from benchmarks.miniature.run import Outcome, Point
from common.types import Verdict


@pytest.mark.parametrize("k", [4, 8, 26])
def test_a_quarter_of_the_pairs_is_worth_one_and_as_many_are_worth_minus_one(k: int) -> None:
    for first in letters.letters(k):
        worths = Counter(letters.worth(k)[first + second] for second in letters.letters(k))
        assert worths == {1: k // 4, -1: k // 4, 0: k - 2 * (k // 4)}


def best(k: int, first: str) -> str:
    """A response all of whose pairs are worth 1."""
    text = first
    while len(text) < letters.LENGTH:
        text += next(second for second in letters.letters(k) if letters.worth(k)[text[-1] + second] == 1)
    return text


def test_right_is_what_reaches_the_target_with_all_its_letters() -> None:
    text = best(8, "a")
    assert letters.total(text, 8) == letters.LENGTH - 1
    rows = {target: {"k": 8, "target": target} for target in (letters.LENGTH - 1, letters.LENGTH)}
    assert letters.verify(text, "", rows[letters.LENGTH - 1]) is Verdict.CORRECT
    assert letters.verify(text, "", rows[letters.LENGTH]) is Verdict.WRONG
    assert letters.verify(text[:-1], "", {"k": 8, "target": 0}) is Verdict.WRONG
    assert letters.verify("=" + text[1:], "", {"k": 8, "target": letters.LENGTH - 3}) is Verdict.CORRECT, (
        "one pair lost"
    )
    assert letters.verify("=" + text[1:], "", {"k": 8, "target": letters.LENGTH - 2}) is Verdict.WRONG


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """With a base model that has learned next to nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_task, "BASE_STEPS", 2)
        patch.setattr(letters, "NUM_HELDOUT", 4)
        patch.setattr(letters, "NUM_TRAIN", 50)
        return long_task.base(tmp_path_factory.mktemp("long_task"), 8)


def test_the_value_is_the_probability_to_reach_the_target(task: tuple[str, ...]) -> None:
    config = long_task.job(task, 8, long_task.COMPUTED, seed=0, steps=1).config()
    run = long_task.Computed(config, 0, 8)
    batch, tokenizer = run.batch(), run.sampler.tokenizer
    mean, variance = run._mean, run._variance
    assert run.trainer.critic is not None
    values_BT = run._values(run.trainer.critic.network, batch).split(batch.response_lengths_B.tolist())
    prompt, response = next(long_task._sequences(batch))  # the mean moves from one response to the next
    text = tokenizer.decode(response.tolist()).replace("<eos>", "=")
    target = letters.targets(8)[tokenizer.decode(prompt.tolist())[0]]
    for time in sorted({0, 1, 2, len(response) // 2, len(response) - 1} & set(range(len(response)))):
        left = letters.LENGTH - time
        distance = letters.total(text[:time], 8) + mean * left - target
        expected = math.erf(distance / math.sqrt(2 * variance * left))  # 2 Phi(z) - 1
        assert values_BT[0][time].item() == pytest.approx(expected, abs=1e-3)
    gradient = torch.autograd.grad(
        torch.cat(list(values_BT)).sum(), list(run.trainer.critic.network.parameters()), allow_unused=True
    )
    assert all(part is None or not part.any() for part in gradient), "the critic learns nothing"


@given(st.lists(st.tuples(st.floats(-1, 1), st.integers(-50, 50), st.sampled_from([-1, 1])), min_size=2, max_size=9))
def test_levels_whose_rewards_are_all_the_same_say_nothing(level: list[tuple[float, float, float]]) -> None:
    same = [(value, done, 1.0) for value, done, _ in level]
    informative = [(0.1, 3.0, 1.0), (-0.2, -3.0, -1.0), (0.0, 1.0, -1.0)]
    assert long_task._within([same, informative]) == long_task._within([informative])


def test_the_tables_and_the_drawing_have_every_row(task: tuple[str, ...]) -> None:
    def outcome(rate: float, before: int) -> Outcome:
        points = [
            Point(step=s, accuracy=rate * s, tokens=1000 * s, cpu_s=0.0, metrics={})
            for s in range(0, 41, long_task.EVERY)
        ]
        return Outcome(points=points, alarms=[], pretraining_tokens=before, pretraining_cpu_s=0.0, failure=None)

    rates = {"VAPO": (0.02, 5000), "GRPO": (0.01, 0)}
    outcomes = {long_task.job(task, 8, row, seed, 40): outcome(*rates[row]) for row in rates for seed in (0, 1)}
    text = long_task.render(outcomes)
    assert "| VAPO | 0.00 ± 0.00 | 0.40 ± 0.00 | 0.80 ± 0.00 |" in text
    assert "| VAPO | 20 ± 0 | 30 ± 0 | 45 ± 0 |" in text, "pretraining counts"
    assert "| GRPO | 30 ± 0 | - | - |" in text
    drawn = ElementTree.fromstring(long_task.drawing(outcomes))
    assert {"VAPO", "GRPO"} <= {element.text for element in drawn.iter() if element.tag.endswith("text")}

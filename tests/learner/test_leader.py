"""What rank 0 asks of the service and writes of its answers."""

from pathlib import Path
from typing import Any

import pytest

from common.config import Config, EvalConfig, ModelConfig
from common.metrics import RunLog, read_jsonl
from common.types import Prompt
from learner.leader import Leader
from learner.rollouts.evaluation import EvalResult

HELDOUT = [Prompt(uid=f"h{i}", text=str(i), reference="") for i in range(9)]
RESULT = EvalResult(
    version=3,
    oldest_version=3,
    newest_version=3,
    accuracy=0.25,
    length_mean=7.0,
    truncated_fraction=0.0,
    num_prompts=8,
    num_samples=30,
    num_failed=1,
    num_errors=2,
    seconds=1.0,
)


class AskedService:
    """Stands for the service; remembers how it was asked to evaluate."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, float]] = []

    def evaluate(self, prompts: list[Prompt], samples_per_prompt: int, temperature: float, version: int) -> None:
        self.asked.append((len(prompts), samples_per_prompt, temperature))

    def wait_evaluation(self, timeout_s: float) -> EvalResult:
        return RESULT


def make(folder: Path, service: Any, **settings: Any) -> Leader:
    config = Config(model=ModelConfig(path="none"), eval=EvalConfig(num_prompts=8, **settings))
    return Leader(config, service, RunLog(folder), HELDOUT, trained_tokens=0)


@pytest.mark.parametrize(("temperature", "num_samples"), [(1.0, 4), (0.01, 4), (0.0, 1)])
def test_a_greedy_evaluation_takes_one_response_a_prompt(tmp_path: Path, temperature: float, num_samples: int) -> None:
    service = AskedService()
    make(tmp_path, service, temperature=temperature, samples_per_prompt=4).evaluate(version=3)
    assert service.asked == [(8, num_samples, temperature)]


def test_an_evaluation_is_logged_with_what_is_missing_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leader = make(tmp_path, AskedService())
    leader.evaluate(version=3)
    leader.finish_evaluation(step=5, version=3)
    (row,) = read_jsonl(tmp_path / "metrics.jsonl")
    logged = {
        name: row[name] for name in ("accuracy/heldout", "eval/num_prompts", "eval/num_failed", "eval/num_errors")
    }
    assert logged == {
        "accuracy/heldout": 0.25,
        "eval/num_prompts": 8,
        "eval/num_failed": 1,
        "eval/num_errors": 2,
    }
    line = capsys.readouterr().out
    assert "accuracy 0.250  of 8" in line and "PROMPTS FAILED 1" in line and "ERRORS IN EVALUATION 2" in line

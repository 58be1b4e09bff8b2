"""What an actor takes from its learner, and what it is refused for."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.agreement import agreed, agreed_again, shared_settings
from common.config import (
    ActorsConfig,
    Config,
    ConfigError,
    Device,
    DType,
    KVCache,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    TaskConfig,
    VerifierConfig,
    WeightsConfig,
)
from common.types import AnswerForm


def travelled(config: Config) -> dict[str, Any]:
    """As the wire would bring it."""
    settings: dict[str, Any] = json.loads(json.dumps(shared_settings(config)))
    return settings


def test_an_actor_that_was_started_with_other_settings_takes_the_learners() -> None:
    learner = Config(
        model=ModelConfig(path="m", dtype=DType.bfloat16, max_model_len=512),
        verifier=VerifierConfig(timeout_s=9.0, memory_mb=2048, answer_form=AnswerForm.ANY),
        reward=RewardConfig(correct=2.0, overlong_penalty=True, overlong_buffer=32),
        rollout=RolloutConfig(group_size=16),
        weights=WeightsConfig(kv_cache=KVCache.recompute),
        task=TaskConfig(name="number_walk"),
    )
    actor = replace(Config(), model=ModelConfig(path="elsewhere"), actors=ActorsConfig(groups_in_flight=3))
    taken = agreed(actor, travelled(learner))
    assert taken.reward == learner.reward and taken.weights == learner.weights
    assert taken.model == replace(learner.model, path="elsewhere"), "what is of its machine stays"
    assert taken.actors.groups_in_flight == 3
    assert taken.verifier == replace(learner.verifier, function="common.tasks.number_walk:verify")
    assert shared_settings(taken) == shared_settings(learner)
    assert agreed(taken, travelled(learner)) == taken


def test_an_actor_on_another_kind_of_device_is_refused_with_both_values() -> None:
    with pytest.raises(ConfigError, match="device=cpu here, but cuda at the learner"):
        agreed(Config(), travelled(replace(Config(), device=Device.cuda)))


def test_another_version_of_the_program_is_named() -> None:
    with pytest.raises(ConfigError, match=r"other settings to agree on \(reward.new\): run the same version"):
        agreed(Config(), travelled(Config()) | {"reward.new": 1})


def grader(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A configuration whose verifier is this file in `folder`, which is on the path of this "host" alone."""
    package = folder / "graders"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('nothing of it is run')")
    (package / "mine.py").write_text(text)
    monkeypatch.setattr(sys, "path", [str(folder), *(p for p in sys.path if "host" not in p)])
    return Config(verifier=VerifierConfig(function="graders.mine:verify"))


def test_a_verifier_is_compared_by_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = travelled(grader(tmp_path / "host1", "def verify(): ...", monkeypatch))
    same = grader(tmp_path / "host2", "def verify(): ...", monkeypatch)
    assert agreed(Config(), settings).verifier.function == "graders.mine:verify"
    assert agreed(same, settings) == same
    other = grader(tmp_path / "host3", "def verify(): return 1", monkeypatch)
    for config in (other, Config()):
        with pytest.raises(ConfigError, match=r"verifier.function=graders.mine:verify is other code here \(SHA-256 "):
            agreed(config, settings)


def test_a_verifier_that_is_missing_here_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = travelled(grader(tmp_path / "host1", "def verify(): ...", monkeypatch))
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "host" not in p])
    with pytest.raises(ConfigError, match=r"verifier.function=graders.mine:verify is not to be found here"):
        agreed(Config(), settings)


def test_a_running_actor_takes_other_rewards_and_nothing_else() -> None:
    changed = replace(Config(), reward=RewardConfig(correct=3.0))
    assert agreed_again(Config(), travelled(changed)) == changed
    with pytest.raises(ConfigError, match=r"model\.dtype was float32 and is bfloat16 since the learner was started"):
        agreed_again(Config(), travelled(replace(Config(), model=ModelConfig(dtype=DType.bfloat16))))

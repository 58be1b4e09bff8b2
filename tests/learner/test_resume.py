"""What a resume may change, and what it refuses in one sentence with both values before anything starts."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import run
from common.config import Config, ConfigError
from common.loading import load_config, save_config
from learner.checkpoint import Checkpointer
from learner.checksums import MANIFEST, manifest_of, write_manifest
from learner.resume import Standing, settings, standing

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

RUN = [
    "name=run",
    "model.path=configs/models/chain_sum",
    "algorithm.critic_warmup_steps=4",
    "learner.steps=6",
    "task.num_train=50",
]


@dataclass
class State:
    """What the learner's state dict says of the run, without its networks."""

    config: Config
    warmup_steps: int

    def state_dict(self) -> dict[str, Any]:
        return {"warmup_steps": self.warmup_steps, "settings": settings(self.config)}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        raise AssertionError("nothing is loaded to see where a run stands")


def configured(tmp_path: Path, *overrides: str) -> Config:
    return load_config([], [*RUN, f"runs_dir={tmp_path}", *overrides])


def begun(tmp_path: Path, step: int, warmup_steps: int = 4, overrides: Sequence[str] = ()) -> Path:
    """A run that was saved after `step`."""
    config = configured(tmp_path, *overrides)
    config.run_dir.mkdir()
    save_config(config, config.run_dir / "config.yaml")
    Checkpointer(config.run_dir / "checkpoints", keep=1).save(step, 0, State(config, warmup_steps))
    return config.run_dir


def deliver(run_dir: Path, step: int, version: int) -> None:
    """The export and the evaluation that follow the last checkpoint."""
    (run_dir / "checkpoints" / "final").mkdir()
    (run_dir / "checkpoints" / "final" / "config.json").write_text("{}")
    row = {"step": step, "accuracy/heldout": 0.5, "accuracy/version": version}
    (run_dir / "metrics.jsonl").write_text(json.dumps(row) + "\n")


def test_a_run_without_a_checkpoint_begins_anew_with_any_settings(tmp_path: Path) -> None:
    assert standing(configured(tmp_path, "seed=7")) is None


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["learner.steps=3"],
        ["learner.steps=100"],
        ["rollout.prompts_per_step=3", "rollout.group_size=5", "learner.mini_batches=2"],
        ["staleness.max_staleness=0"],
        ["weights.publish_every=3", "learner.ranks=2", "eval.every=1", "checkpoint.every=1", "actors.count=4"],
        ["learner.policy.learning_rate=1e-3", "reward.wrong=0.0", "algorithm.clip_high=0.3"],
    ],
)
def test_most_settings_may_change(tmp_path: Path, overrides: list[str]) -> None:
    begun(tmp_path, step=7)
    found = standing(configured(tmp_path, *overrides))
    assert found is not None and (found.step, found.policy_steps) == (7, 3)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["seed=7"], ("seed=7", "began with 0")),
        (["task.seed=3"], ("task.seed=3", "began with 0")),
        (["task.num_train=60"], ("task.num_train=60", "began with 50")),
        (["task.name=number_walk"], ("task.name=number_walk", "began with chain_sum")),
        (["lora.rank=8"], ("lora.rank=8", "began with 0")),
        (["model.num_critics=2"], ("num_critics=2", "began with 1")),
        (["model.critic_frozen=attention"], ("critic_frozen=attention", "began with none")),
        (["model.tie_word_embeddings=true"], ("tie_word_embeddings=True", "began with None")),
        (
            ["algorithm.advantage=grpo", "algorithm.critic_warmup_steps=0"],
            ("algorithm.advantage=grpo", "began with gae"),
        ),
        (["learner.steps=2"], ("learner.steps=2", "the 3 policy steps")),
        (["algorithm.critic_warmup_steps=9"], ("critic_warmup_steps=9 comes too late", "over after 4 steps")),
        (["algorithm.critic_warmup_steps=0"], ("critic_warmup_steps=0 comes too late", "over after 4 steps")),
    ],
)
def test_what_would_be_another_run_is_refused_with_both_values_and_nothing_is_written(
    tmp_path: Path, overrides: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = begun(tmp_path, step=7)
    before = sorted(tmp_path.rglob("*")), (run_dir / "config.yaml").read_bytes()
    assert run.main(["train", "--resume", str(run_dir), *overrides]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and all(word in message for word in words), message
    assert (sorted(tmp_path.rglob("*")), (run_dir / "config.yaml").read_bytes()) == before


def test_adapters_go_on_only_upon_the_weights_that_they_were_trained_on(tmp_path: Path) -> None:
    """Checkpoints hold adapters alone."""
    model = tmp_path / "model"
    shutil.copytree("configs/models/chain_sum", model)
    settings = [f"model.path={model}", "lora.rank=8"]
    begun(tmp_path, 7, overrides=settings)
    assert standing(configured(tmp_path, *settings)) is not None
    model = model.rename(tmp_path / "moved")
    settings[0] = f"model.path={model}"
    assert standing(configured(tmp_path, *settings)) is not None
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(ConfigError, match=r"moved holds other weights than those that .*/run trains adapters of"):
        standing(configured(tmp_path, *settings))


@pytest.mark.parametrize("override", ["name=other", "runs_dir=elsewhere"])
def test_a_resume_stays_in_its_folder(tmp_path: Path, override: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["train", "--resume", str(begun(tmp_path, step=7)), override]) == 2
    assert f"{override} does not go with --resume" in capsys.readouterr().err


@pytest.mark.parametrize("step", [2, 4])
def test_before_the_first_policy_step_the_warm_up_may_be_made_longer_or_shorter(tmp_path: Path, step: int) -> None:
    begun(tmp_path, step)
    for steps in (step, 9):
        found = standing(configured(tmp_path, f"algorithm.critic_warmup_steps={steps}"))
        assert found == Standing(step=step, policy_steps=0, is_complete=False)
    with pytest.raises(ConfigError, match=f"critic_warmup_steps=1 is less than the {step} warm-up steps"):
        standing(configured(tmp_path, "algorithm.critic_warmup_steps=1"))


def test_a_warm_up_that_its_gate_ended_stays_ended(tmp_path: Path) -> None:
    begun(tmp_path, step=3, warmup_steps=2)
    found = standing(configured(tmp_path))
    assert found is not None and found.policy_steps == 1


def test_a_run_is_complete_when_it_is_trained_exported_and_evaluated(tmp_path: Path) -> None:
    run_dir = begun(tmp_path, step=10)
    config = configured(tmp_path)

    def is_complete(config: Config) -> bool:
        found = standing(config)
        assert found is not None
        return found.is_complete

    assert not is_complete(config), "it was killed before its export"
    deliver(run_dir, step=10, version=0)
    assert is_complete(config)
    assert not is_complete(replace(config, learner=replace(config.learner, steps=7)))
    (run_dir / "metrics.jsonl").write_text("")
    assert not is_complete(config), "it was killed before its evaluation"


def test_a_checkpoint_that_says_nothing_of_its_settings_is_refused(tmp_path: Path) -> None:
    run_dir = begun(tmp_path, step=7)
    (state,) = run_dir.glob("checkpoints/step_*/state.json")
    content = json.loads(state.read_text())
    del content["values"]["settings/seed"]
    state.write_text(json.dumps(content))
    write_manifest(state.parent, manifest_of(file for file in state.parent.iterdir() if file.name != MANIFEST))
    with pytest.raises(ConfigError, match=r"lacks settings/seed, it was made by another version"):
        standing(configured(tmp_path))

"""What a resume may change, and what it refuses in one sentence with both values before anything starts."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import run
from common import lastsettings, launcher
from common.config import Config, ConfigError
from common.loading import load_config, read_config, save_config
from common.processes import Outcome
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


@pytest.mark.parametrize(
    ("before", "damaged"),
    [(b'"settings/seed": 0', b'"settings/seed": 1'), (b'"step": 7', b'"step": 9'), (b"{", b"\xff")],
    ids=["a setting", "the step", "no text"],
)
def test_a_state_that_was_damaged_is_not_believed_and_the_checkpoint_before_is_taken(
    tmp_path: Path, before: bytes, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = begun(tmp_path, step=5)
    Checkpointer(run_dir / "checkpoints", keep=2).save(7, 0, State(configured(tmp_path), 4))
    state = run_dir / "checkpoints" / "step_00000007" / "state.json"
    assert before in state.read_bytes()
    state.write_bytes(state.read_bytes().replace(before, damaged, 1))
    assert standing(configured(tmp_path)) == Standing(step=5, policy_steps=1, is_complete=False)
    assert "step_00000007 lacks or has other bytes in state.json: it is left out" in caplog.text
    (run_dir / "checkpoints" / "step_00000005" / "state.json").unlink()
    with pytest.raises(ConfigError, match=r"no checkpoint in .* is complete \(.*00000005 .*state\.json; .*00000007 "):
        standing(configured(tmp_path))


def test_an_older_checkpoint_that_is_torn_is_not_spoken_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run goes on from a newer one in any case."""
    run_dir = begun(tmp_path, step=5)
    Checkpointer(run_dir / "checkpoints", keep=2).save(7, 0, State(configured(tmp_path), 4))
    (run_dir / "checkpoints" / "step_00000005" / "__0_0.distcp").unlink()
    assert standing(configured(tmp_path)) == Standing(step=7, policy_steps=3, is_complete=False)
    assert "left out" not in caplog.text


def test_a_run_whose_checkpoints_are_elsewhere_is_refused_and_nothing_is_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beginning anew would delete what it has done."""
    run_dir = begun(tmp_path, step=7)
    (run_dir / "metrics.jsonl").write_text('{"step": 7}\n')
    (run_dir / "checkpoints").rename(tmp_path / "elsewhere")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run.main(["train", "--resume", str(run_dir)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the 7 steps that" in line and f"bring {run_dir / 'checkpoints'} back" in line and "--overwrite" in line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("has_begun", "exit_code", "kept"),
    [
        (False, 2, "old"),
        (False, 1, "old"),
        (False, 130, "new"),
        (False, 141, "new"),
        (True, 2, "new"),
        (True, 0, "new"),
    ],
)
def test_the_settings_of_a_resume_stay_once_it_has_begun_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_begun: bool, exit_code: int, kept: str
) -> None:
    """Or a plain --resume would be refused in the words that refused them. Other processes are left out."""
    run_dir = begun(tmp_path, step=7)
    before = (run_dir / "config.yaml").read_bytes()

    def supervise(config: Config, specs: object, room: object) -> Outcome:
        assert read_config(run_dir / "config.yaml").learner.steps == 9, "the children read it there"
        if has_begun:
            lastsettings.drop(run_dir)
        return Outcome(exit_code=exit_code, message=None)

    monkeypatch.setattr(launcher, "_supervise", supervise)
    monkeypatch.setattr(launcher, "check", lambda *_: None)
    monkeypatch.setattr(run, "_report", lambda config, outcome: outcome.exit_code)
    assert run.main(["train", "--resume", str(run_dir), "learner.steps=9"]) == exit_code
    assert ((run_dir / "config.yaml").read_bytes() == before) == (kept == "old")
    if exit_code in (130, 141):  # the next one tries them again, and what it cannot begin with is not kept either
        exit_code = 2
        assert run.main(["train", "--resume", str(run_dir)]) == exit_code
        assert (run_dir / "config.yaml").read_bytes() == before
    assert not (run_dir / lastsettings.BEFORE).exists()


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

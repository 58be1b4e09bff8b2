"""What a learner that follows another one finds."""

from pathlib import Path

import pytest

from common.config import Config, ConfigError, ModelConfig
from common.processes import RESTARTED
from learner.restart import former_port, refuse_loss, write_endpoint
from learner.resume import Standing


def test_the_port_of_the_learner_before_is_in_its_address(tmp_path: Path) -> None:
    assert former_port(tmp_path) == 0
    write_endpoint(tmp_path, "tcp://[::1]:4711")
    assert former_port(tmp_path) == 4711
    for damaged in (b"tcp://[::1]:\xff4711", "tcp://[::1]:\u00b2".encode(), b"tcp://[::1]:99999", b"4711", bytes(9)):
        (tmp_path / "endpoint").write_bytes(damaged)
        assert former_port(tmp_path) == 0, damaged


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Of a run that has done seven steps."""
    config = Config(name="a", runs_dir=str(tmp_path), model=ModelConfig(path="m"))
    config.run_dir.mkdir()
    (config.run_dir / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 8)))
    return config


@pytest.mark.parametrize("is_restarted", [True, False], ids=["by train", "by hand"])
def test_a_start_without_a_checkpoint_says_what_is_lost(
    config: Config, monkeypatch: pytest.MonkeyPatch, is_restarted: bool
) -> None:
    if is_restarted:
        monkeypatch.setenv(RESTARTED, "1")
    with pytest.raises(ConfigError, match=r"the 7 steps that .* had done are lost.*checkpoint\.every=0"):
        refuse_loss(config, None)
    (config.run_dir / "metrics.jsonl").write_text('{"step": 0, "accuracy/heldout": 0.1}\n{}\n{"step": "many"}\n')
    refuse_loss(config, None)  # nothing was trained: it begins
    (config.run_dir / "metrics.jsonl").unlink()
    refuse_loss(config, None)


def test_a_restart_says_which_steps_are_done_again(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(RESTARTED, "1")
    refuse_loss(config, Standing(step=5, policy_steps=5, is_complete=False))
    assert "goes on after step 5, 2 steps are done again" in caplog.text

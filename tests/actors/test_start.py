"""An engine that does not get ready: its actor ends by itself, since a remote one has nobody else who would end it."""

import logging
import time
from pathlib import Path

import pytest

from common.config import ActorsConfig, Config, ModelConfig
from common.transport import model_fingerprints
from common.types import Prompt
from learner.rollouts.service import LearnerService
from tests.support.runs import ROOT
from tests.support.stuck_actor import stuck_actor
from tests.support.transfer_process import start

LIMIT_S = 2.0  # actors.start_timeout_s of all but "asked", which has a year
PATIENCE_S = 60.0  # for processes that start on a busy machine
SENTENCE = f"the engine was not ready within actors.start_timeout_s={LIMIT_S:g}"


def until_greeted(service: LearnerService, names: set[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not names <= set(service._reception.names):
        assert time.monotonic() < deadline, service._reception.names
        time.sleep(0.01)


def test_an_actor_whose_engine_is_not_ready_in_time_says_so_and_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also one whose engine is up and does not answer, and one that is asked to leave while its engine starts."""
    caplog.set_level(logging.INFO)
    model = ModelConfig(path=str(ROOT / "configs/models/chain_sum"))
    patient = Config(model=model, actors=ActorsConfig(start_timeout_s=1e6))
    config = Config(model=model, actors=ActorsConfig(start_timeout_s=LIMIT_S))
    prompts = [Prompt(uid="p", text="", reference="")]
    with LearnerService(patient, prompts, lambda prompt: [1], model_fingerprints(model.path), [1, 2]) as service:
        actors = {
            name: start(stuck_actor, patient if name == "asked" else config, service.endpoint, name, tmp_path / name)
            for name in ("stuck", "deaf", "asked")
        }
        try:
            until_greeted(service, {"asked"})
            actors["asked"].terminate()
            for process in actors.values():
                process.join(PATIENCE_S)
            assert {name: process.exitcode for name, process in actors.items()} == {"stuck": 1, "deaf": 1, "asked": 143}
        finally:
            for process in actors.values():
                process.kill()
        for name in ("stuck", "deaf"):
            assert (tmp_path / name).read_text().endswith(f"error: actor {name}: {SENTENCE}\n")
            assert f"actor {name} says bye: {SENTENCE}" in caplog.text, "the learner is told"
        assert "actor asked says bye: interrupted" in caplog.text
        assert service._reception.names == ()

"""The probe after a publication: who is dismissed, and what the sentence blames. Publications move no weights here."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.config import WeightsConfig
from common.types import WeightsPhase, WeightsReport
from learner.networks.model import load_policy
from learner.publication.publisher import Publisher
from tests.support.tiny_models import tiny_run, write_tiny_model

TOLERANCE = 1e-3
PROBE = torch.arange(12)


class NoTransfer:
    """A transfer engine for members that have the weights already."""

    def send_weights(self) -> None:
        """Nothing travels."""

    def shutdown(self) -> None:
        """Nothing is open."""


class Actors:
    """Control over actors that score the probe as the learner does, plus what is in `errors` (None: no answer)."""

    def __init__(self, expected: np.ndarray[Any, Any], *names: str) -> None:
        self.expected = expected
        self.errors: dict[str, float | str | None] = dict.fromkeys(names, 0.0)
        self.dismissed: dict[str, str] = {}

    def members(self) -> tuple[str, ...]:
        return tuple(sorted(self.errors))

    def quarantine(self, actor: str, reason: str) -> None:
        self.dismissed[actor] = reason
        del self.errors[actor]

    def command(
        self, phase: WeightsPhase, version: int, payloads: dict[str, dict[str, Any]], timeout_s: float
    ) -> dict[str, WeightsReport]:
        errors = self.errors if phase is WeightsPhase.RESUME else dict.fromkeys(payloads, 0.0)
        answers = {name: errors[name] for name in payloads}
        return {name: self._report(phase, version, e) for name, e in answers.items() if e is not None}

    def _report(self, phase: WeightsPhase, version: int, error: float | str) -> WeightsReport:
        if isinstance(error, str):
            return WeightsReport(phase=phase, version=version, error=error, probe_logprobs=np.empty(0, np.float32))
        off = np.zeros_like(self.expected)
        off[3] = error
        return WeightsReport(phase=phase, version=version, error=None, probe_logprobs=self.expected + off)


@pytest.fixture
def publisher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publisher:
    config = replace(
        tiny_run(write_tiny_model(tmp_path)), weights=WeightsConfig(probe_tolerance=TOLERANCE, timeout_s=5.0)
    )
    monkeypatch.setattr(Publisher, "_trainer_engine", lambda *arguments, **keywords: NoTransfer())
    policy = load_policy(config, torch.device("cpu"), None)
    publisher = Publisher(config, policy, None, 0, PROBE)
    publisher.control = Actors(publisher._own_probe(), "a", "b")
    return publisher


def actors(publisher: Publisher) -> Actors:
    assert isinstance(publisher.control, Actors)
    return publisher.control


def test_members_that_agree_stay(publisher: Publisher) -> None:
    actors(publisher).errors["b"] = TOLERANCE / 2
    publication = publisher.publish(0)
    assert publication.members == ("a", "b")
    assert publication.probe_difference == pytest.approx(TOLERANCE / 2, rel=1e-2)
    assert actors(publisher).dismissed == {}


def test_an_engine_that_never_agreed_computes_another_function_and_lost_nothing(publisher: Publisher) -> None:
    actors(publisher).errors["b"] = 4.4
    assert publisher.publish(0).members == ("a",)
    sentence = actors(publisher).dismissed["b"]
    assert "never agreed" in sentence and "differ by 4.4 nats at version 0, the first that it was sent" in sentence
    assert "computes this model otherwise" in sentence
    assert "a tensor was not loaded" not in sentence


def test_an_engine_that_stopped_agreeing_lost_a_tensor(publisher: Publisher) -> None:
    publisher.publish(0)
    publisher.publish(1)
    actors(publisher).errors["a"] = 0.025
    assert publisher.publish(2).members == ("b",)
    sentence = actors(publisher).dismissed["a"]
    assert "agreed with the learner's at version 1 and differ by 0.025 nats after version 2" in sentence
    assert "a tensor was not loaded" in sentence and "never agreed" not in sentence


def test_whoever_comes_later_is_not_judged_by_what_others_were_sent(publisher: Publisher) -> None:
    publisher.publish(0)
    actors(publisher).errors["c"] = 0.5
    assert publisher.publish(1).members == ("a", "b")
    sentence = actors(publisher).dismissed["c"]
    assert "never agreed" in sentence and "at version 1, the first" in sentence
    assert "or a tensor was not loaded" in sentence  # at version 0 it could not be that


def test_a_member_that_missed_a_publication_starts_anew(publisher: Publisher) -> None:
    """A process of the same name may be another one."""
    publisher.publish(0)
    del actors(publisher).errors["a"]
    publisher.publish(1)
    actors(publisher).errors["a"] = 0.5
    publisher.publish(2)
    assert "never agreed" in actors(publisher).dismissed["a"]


@pytest.mark.parametrize(("answer", "words"), [(None, "it did not answer"), ("engine died", "engine died")])
def test_a_probe_that_did_not_come_is_not_called_a_difference(
    publisher: Publisher, answer: str | None, words: str
) -> None:
    actors(publisher).errors["b"] = answer
    assert publisher.publish(0).members == ("a",)
    assert actors(publisher).dismissed["b"] == f"no log-probs of the probe after version 0: {words}"


def test_nan_never_passes(publisher: Publisher) -> None:
    actors(publisher).errors["a"] = float("nan")
    assert publisher.publish(0).members == ("b",)
    assert "differ by nan nats" in actors(publisher).dismissed["a"]

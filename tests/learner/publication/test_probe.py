"""The probe after a publication: who is dismissed, and what the sentence blames. Publications move no weights here."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.config import WeightsConfig
from common.types import MemberId, WeightsPhase, WeightsReport
from learner.networks.model import load_policy
from learner.publication.buckets import Bucket
from learner.publication.control import Channel
from learner.publication.publisher import Publication, Publisher
from tests.support.tiny_models import tiny_run, write_tiny_model

TOLERANCE = 1e-3
PROBE = torch.arange(12)


class NoTransfer:
    """A transfer to members that have the weights already."""

    def meet(self, channel: Channel) -> None:
        """Nobody has to come."""

    def send(self, channel: Channel, bucket: Bucket) -> None:
        """Nothing travels."""

    def close(self) -> None:
        """Nothing is open."""


class Actors:
    """Control over actors that score the probe as the learner does, plus what is in `errors` (None: no answer)."""

    def __init__(self, expected: np.ndarray[Any, Any], *names: str) -> None:
        self.expected = expected
        self.errors: dict[str, float | str | None] = dict.fromkeys(names, 0.0)
        self.dismissed: dict[str, str] = {}

    def member_ids(self) -> tuple[MemberId, ...]:
        return tuple(sorted(MemberId(name, 1) for name in self.errors))

    def quarantine(self, member: MemberId, reason: str) -> None:
        self.dismissed[member.name] = reason
        del self.errors[member.name]

    dismiss = quarantine

    def command(
        self,
        phase: WeightsPhase,
        version: int,
        payloads: Mapping[MemberId, dict[str, Any]],
        timeout_s: float,
        meanwhile: Callable[[], None] | None = None,
    ) -> dict[MemberId, WeightsReport]:
        answers = {m: self.errors[m.name] if phase is WeightsPhase.RESUME else 0.0 for m in payloads}
        return {member: self._report(phase, version, e) for member, e in answers.items() if e is not None}

    def _report(self, phase: WeightsPhase, version: int, error: float | str) -> WeightsReport:
        off = np.zeros_like(self.expected)
        off[3] = 0.0 if isinstance(error, str) else error
        return WeightsReport(
            command_id=0,
            phase=phase,
            version=version,
            error=error if isinstance(error, str) else None,
            is_shared=False,
            probe_logprobs=self.expected + off,
        )


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    config = replace(
        tiny_run(write_tiny_model(tmp_path)), weights=WeightsConfig(probe_tolerance=TOLERANCE, timeout_s=5.0)
    )
    policy = load_policy(config, torch.device("cpu"), None)
    publisher = Publisher(config, policy, None, 0, PROBE, new_transfer=lambda config: NoTransfer())
    publisher.control = Actors(publisher._own_probe(), "a", "b")
    return publisher


def names(publication: Publication) -> tuple[str, ...]:
    return tuple(member.name for member in publication.members)


def actors(publisher: Publisher) -> Actors:
    assert isinstance(publisher.control, Actors)
    return publisher.control


def test_members_that_agree_stay(publisher: Publisher) -> None:
    actors(publisher).errors["b"] = TOLERANCE / 2
    publication = publisher.publish(0)
    assert names(publication) == ("a", "b")
    assert publication.probe_difference == pytest.approx(TOLERANCE / 2, rel=1e-2)
    assert actors(publisher).dismissed == {}


def test_an_engine_that_never_agreed_computes_another_function_and_lost_nothing(publisher: Publisher) -> None:
    actors(publisher).errors["b"] = 4.4
    assert names(publisher.publish(0)) == ("a",)
    sentence = actors(publisher).dismissed["b"]
    assert "never agreed" in sentence and "differ by 4.4 nats at version 0, the first that it was sent" in sentence
    assert "computes this model otherwise" in sentence
    assert "a tensor was not loaded" not in sentence


def test_an_engine_that_stopped_agreeing_lost_a_tensor(publisher: Publisher) -> None:
    publisher.publish(0)
    publisher.publish(1)
    actors(publisher).errors["a"] = 0.025
    assert names(publisher.publish(2)) == ("b",)
    sentence = actors(publisher).dismissed["a"]
    assert "agreed with the learner's at version 1 and differ by 0.025 nats after version 2" in sentence
    assert "a tensor was not loaded" in sentence and "never agreed" not in sentence


def test_whoever_comes_later_is_not_judged_by_what_others_were_sent(publisher: Publisher) -> None:
    publisher.publish(0)
    actors(publisher).errors["c"] = 0.5
    assert names(publisher.publish(1)) == ("a", "b")
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
    assert names(publisher.publish(0)) == ("a",)
    assert actors(publisher).dismissed["b"] == f"no log-probs of the probe after version 0: {words}"


def test_nan_never_passes(publisher: Publisher) -> None:
    actors(publisher).errors["a"] = float("nan")
    assert names(publisher.publish(0)) == ("b",)
    assert "differ by nan nats" in actors(publisher).dismissed["a"]

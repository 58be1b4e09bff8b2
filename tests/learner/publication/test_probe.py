"""The probe: what is scored, who is dismissed, and what the sentence blames. Log-probs are made up: right actors differ
from the learner as two engines were measured to, in nats: 2e-6 in float32, in bfloat16 0.04 on average and up to 0.35.
"""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.config import Config, DType, ModelConfig, WeightsConfig
from common.types import Float32Array, WeightsPhase, WeightsReport
from learner.prepare import build_tokenizer
from learner.publication.probe import Probe, Verdict, probe_token_ids

NUM_TOKENS = 256
NOISE = {DType.float32: 2e-6, DType.bfloat16: 0.05}  # of each engine: standard deviation, nats


class Run:
    """A learner and what its actors report, with log-probs that are given."""

    def __init__(self, dtype: DType = DType.bfloat16, seed: int = 0, noise: float | None = None) -> None:
        self.config = Config(model=ModelConfig(dtype=dtype))
        self.noise = NOISE[dtype] if noise is None else noise
        self.rng = np.random.default_rng(seed)
        self.probe = Probe(self.config, torch.arange(NUM_TOKENS))
        self.policy = self.rng.gumbel(-3.0, 2.0, NUM_TOKENS - 1)  # exact log-probs of the present policy

    def engine(self, policy: np.ndarray[Any, Any] | None = None) -> Float32Array:
        """What an engine, the learner's included, makes of a policy: off by its own rounding."""
        exact = self.policy if policy is None else policy
        return (exact + self.rng.normal(0.0, self.noise / np.sqrt(2), exact.shape)).astype(np.float32)

    def train(self, distance: float) -> None:
        """The log-probs move by `distance` nats a token on average."""
        self.policy = self.policy + self.rng.laplace(0.0, distance, NUM_TOKENS - 1)

    def publish(self, version: int, **logprobs: Float32Array | str | None) -> Verdict[str]:
        """Reports by name; a string is an error, None is no answer."""
        mine = torch.from_numpy(self.engine())
        self.probe.measure(cast(Any, lambda *_, **__: (mine, None)), version)
        reports = {name: report(version, found) for name, found in logprobs.items() if found is not None}
        return self.probe.judge(version, tuple(logprobs), reports)


def report(version: int, found: Float32Array | str) -> WeightsReport:
    error, probe = (found, np.empty(0, np.float32)) if isinstance(found, str) else (None, found)
    phase = WeightsPhase.RESUME
    return WeightsReport(command_id=0, phase=phase, version=version, error=error, is_shared=False, probe_logprobs=probe)


# ---- the text


def write_folder(folder: Path, characters: str, vocab_size: int) -> Config:
    build_tokenizer(characters).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": vocab_size}))
    return Config(model=ModelConfig(path=str(folder), max_model_len=128), weights=WeightsConfig(probe_tokens=200))


def test_a_tokenizer_of_a_few_characters_scores_what_it_knows_of_the_text(tmp_path: Path) -> None:
    config = write_folder(tmp_path, "0123456789+-=>#", 17)
    ids = probe_token_ids(config)
    assert len(ids) == 127  # one more token is drawn
    assert torch.equal(ids, probe_token_ids(config))
    assert set(ids.tolist()) == set(range(2, 17))  # all but pad and end of sequence
    assert ids[:7].tolist() == [int(digit) + 2 for digit in "1275127"]  # of 12 baskets, 7 coins, 5 baskets, 12*7


def test_a_tokenizer_that_knows_nothing_of_the_text_scores_its_own_tokens(tmp_path: Path) -> None:
    assert probe_token_ids(write_folder(tmp_path, "~^|", 5))[:6].tolist() == [2, 3, 4, 2, 3, 4]


def test_tokens_that_the_model_does_not_have_are_not_scored(tmp_path: Path) -> None:
    assert set(probe_token_ids(write_folder(tmp_path, "0123456789+-=>#", 9)).tolist()) == set(range(2, 9))


# ---- right actors


@pytest.mark.parametrize("dtype", DType)
def test_right_actors_stay_while_the_policy_is_trained_far_away(dtype: DType) -> None:
    run = Run(dtype)
    for version in range(60):
        verdict = run.publish(version, a=run.engine(), b=run.engine())
        assert verdict.good == ("a", "b") and verdict.refused == {}
        run.train(0.03)
    assert run.probe.floor == pytest.approx(0.8 * NOISE[dtype], rel=0.2)  # mean of a normal distribution's magnitude
    assert verdict.difference is not None and verdict.largest is not None
    assert verdict.difference < 1.3 * run.probe.floor < run.probe.limit
    assert verdict.largest > 3 * run.probe.floor  # a right actor's largest says nothing


@given(seed=st.integers(0, 10**6), growth=st.floats(1.0, 2.5))
def test_rounding_alone_is_never_called_a_standstill_even_when_it_grows(seed: int, growth: float) -> None:
    run = Run(seed=seed)
    run.publish(0, a=run.engine())
    run.noise *= growth
    for version in range(1, 20):
        run.train(0.002)
        assert run.publish(version, a=run.engine()).refused == {}


def test_the_floor_is_measured_once_at_version_0_and_is_the_largest_of_those_who_agree() -> None:
    run = Run(DType.float32)
    far = run.engine() + np.float32(4e-4)
    first = run.publish(0, near=run.engine(), far=far, wrong=run.engine() + np.float32(1.2))
    assert first.good == ("near", "far")
    assert run.probe.floor == pytest.approx(4e-4, rel=0.01)
    run.publish(1, near=run.engine())
    assert run.probe.floor == pytest.approx(4e-4, rel=0.01)


def test_luck_does_not_make_a_floor() -> None:
    run = Run(DType.float32, noise=0.0)
    run.publish(0, a=run.engine())
    assert run.probe.floor == pytest.approx(0.0, abs=1e-7)
    run.noise = NOISE[DType.float32]
    assert run.publish(1, a=run.engine()).refused == {}


# ---- wrong ones


@pytest.mark.parametrize(("dtype", "off"), [(DType.float32, 0.02), (DType.bfloat16, 0.4), (DType.bfloat16, 4.4)])
def test_an_engine_that_never_agreed_computes_another_function_and_is_no_floor(dtype: DType, off: float) -> None:
    run = Run(dtype)
    verdict = run.publish(0, right=run.engine(), wrong=run.engine() + np.float32(off))
    assert verdict.good == ("right",)
    sentence = verdict.refused["wrong"]
    assert "never agreed" in sentence and f"differ by {off:.3g}"[:12] in sentence
    assert "at version 0, the first that it was sent" in sentence and "computes this model otherwise" in sentence
    assert f"arithmetic explains with model.dtype={dtype}" in sentence
    assert "a tensor was not loaded" not in sentence
    alone = Run(dtype)
    assert alone.publish(0, wrong=alone.engine() + np.float32(off)).good == ()
    assert alone.probe.floor is None


def test_an_engine_that_stopped_agreeing_lost_a_tensor_and_float32_shows_it_at_once() -> None:
    """A tied GPT-2 whose output layer goes stale: 0.025 nats off after eight versions, so about 0.003 after one."""
    run = Run(DType.float32)
    for version in range(2):
        run.publish(version, a=run.engine(), b=run.engine())
    stale = run.engine()
    stale[::7] += np.float32(0.003)
    verdict = run.publish(2, a=stale, b=run.engine())
    assert verdict.good == ("b",)
    sentence = verdict.refused["a"]
    assert "agreed with the learner's at version 1 and differ by 0.000437 nats a token after version 2" in sentence
    assert "weights.probe_factor=4 times what was seen at version 0" in sentence
    assert "a tensor was not loaded" in sentence and "never agreed" not in sentence


def test_bfloat16_shows_an_old_output_layer_when_it_is_beyond_the_rounding() -> None:
    run = Run()
    run.publish(0, a=run.engine())
    assert run.probe.limit == pytest.approx(4 * 0.04, rel=0.1)
    assert run.publish(1, a=run.engine() + np.float32(0.2)).good == ()


@pytest.mark.parametrize("dtype", DType)
def test_an_actor_that_silently_samples_from_the_initial_policy_is_found_within_the_limit(dtype: DType) -> None:
    run = Run(dtype)
    initial = run.policy
    assert run.publish(0, stale=run.engine(initial), right=run.engine()).refused == {}
    run.train({DType.float32: 2.5e-5, DType.bfloat16: 0.1}[dtype])
    verdict = run.publish(1, stale=run.engine(initial), right=run.engine())
    assert verdict.difference is not None and verdict.difference < run.probe.limit  # it would not do by itself
    assert verdict.good == ("right",)
    assert "nats a token away from those of version 0 after version 1, and" in verdict.refused["stale"]
    assert "updates do not reach the model that it samples from" in verdict.refused["stale"]


def test_whoever_comes_later_is_not_judged_by_what_others_were_sent() -> None:
    run = Run()
    run.publish(0, a=run.engine())
    sentence = run.publish(1, a=run.engine(), c=run.engine() + np.float32(0.5)).refused["c"]
    assert "never agreed" in sentence and "at version 1, the first" in sentence
    assert "or a tensor was not loaded" in sentence  # at version 0 it could not be that


def test_joiners_that_are_judged_alone_change_nothing_for_the_others() -> None:
    run = Run()
    run.publish(0, a=run.engine())
    run.publish(1, a=run.engine())
    served = run.publish(1, late=run.engine(), wrong=run.engine() + np.float32(0.5))
    assert served.good == ("late",) and "never agreed" in served.refused["wrong"]
    refused = run.publish(2, a=run.engine() + np.float32(0.5), late=run.engine() + np.float32(0.5)).refused
    assert all("agreed with the learner's at version 1" in refused[name] for name in ("a", "late"))


def test_a_member_that_missed_a_publication_starts_anew() -> None:
    """A process of the same name may be another one."""
    run = Run()
    run.publish(0, a=run.engine(), b=run.engine())
    run.publish(1, b=run.engine())
    assert "never agreed" in run.publish(2, a=run.engine() + np.float32(0.5), b=run.engine()).refused["a"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "it did not answer"),
        ("engine died", "engine died"),
        (np.zeros(3, np.float32), "it scored another sequence"),
    ],
)
def test_a_probe_that_did_not_come_is_not_called_a_difference(answer: Any, words: str) -> None:
    run = Run()
    verdict = run.publish(0, a=run.engine(), b=answer)
    assert verdict.good == ("a",)
    assert verdict.refused == {"b": f"no log-probs of the probe after version 0: {words}"}
    nobody = run.publish(1, b=answer)
    assert nobody.difference is None and nobody.largest is None


def test_nan_never_passes() -> None:
    run = Run()
    broken = run.engine()
    broken[3] = np.nan
    verdict = run.publish(0, a=broken, b=run.engine())
    assert verdict.good == ("b",) and "differ by nan nats" in verdict.refused["a"]
    assert verdict.difference is not None and np.isnan(verdict.difference)


# ---- when an actor is ready, and after a resume


def test_an_actor_is_judged_at_ready_by_the_initial_policy_whatever_is_published_meanwhile() -> None:
    run = Run()
    run.publish(0)
    judge, initial = run.probe.at_ready(), run.policy
    run.train(1.0)
    run.publish(1, a=run.engine())
    assert judge(run.engine(initial)) is None
    refusal = judge(run.engine())
    assert refusal is not None and "differ from those of the learner's initial policy by 0.9" in refusal
    assert "give it the learner's model.path" in refusal
    assert judge(np.zeros(3, np.float32)) == "it scored 3 tokens of the probe, not 255"


def test_a_resumed_run_judges_by_what_it_saw_at_version_0() -> None:
    run = Run()
    initial = run.policy
    run.publish(0, a=run.engine())
    state = json.loads(json.dumps(run.probe.state_dict()))
    resumed = Run(seed=1)
    resumed.probe.load_state_dict(state)
    resumed.policy = initial
    resumed.train(0.1)
    verdict = resumed.publish(0, stale=resumed.engine(initial))  # the version under way, as trained so far
    assert resumed.probe.state_dict() == state
    verdict = resumed.publish(1, stale=resumed.engine(initial), right=resumed.engine())
    assert verdict.good == ("right",) and "away from those of version 0" in verdict.refused["stale"]


def test_a_resumed_run_with_another_length_of_probe_keeps_the_floor_alone() -> None:
    run = Run()
    run.publish(0, a=run.engine())
    other = Probe(run.config, torch.arange(64))
    other.load_state_dict(run.probe.state_dict())
    assert other.floor == run.probe.floor
    assert other.state_dict()["initial"] is None

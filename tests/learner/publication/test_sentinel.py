import logging

import pytest
import torch
from torch import nn

from common.config import ConfigError, DType
from learner.publication.sentinel import LARGEST_FLOOR, SMALLEST_FLOOR, DriftSentinel, describe_tensors


def observe(sentinel: DriftSentinel, mismatch: float | None, is_untrained: bool = False) -> dict[str, float]:
    return sentinel.observe(mismatch, is_untrained=is_untrained, policy=nn.Linear(2, 2))


def test_the_floor_is_the_largest_mismatch_of_the_untrained_model() -> None:
    sentinel = DriftSentinel(10.0, DType.float32)
    for mismatch in (2e-5, 5e-5, 3e-5):
        observe(sentinel, mismatch, is_untrained=True)
    assert sentinel.limit == pytest.approx(5e-4)


def test_a_floor_that_is_small_by_luck_does_not_make_a_hair_trigger() -> None:
    sentinel = DriftSentinel(10.0, DType.float32)
    observe(sentinel, 1e-9, is_untrained=True)
    assert sentinel.limit == pytest.approx(10.0 * SMALLEST_FLOOR)


def test_the_alarm_sounds_above_the_limit_only_and_names_tensors(caplog: pytest.LogCaptureFixture) -> None:
    sentinel = DriftSentinel(10.0, DType.float32)
    observe(sentinel, 1e-4, is_untrained=True)
    with caplog.at_level(logging.ERROR):
        assert observe(sentinel, 9e-4)["offpolicy/mismatch_alarm"] == 0.0
        assert caplog.records == []
        assert observe(sentinel, 2e-3)["offpolicy/mismatch_alarm"] == 1.0
    assert "weight rms" in caplog.text


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("mismatch", [1.16, 5.5, float("nan"), float("inf")])
def test_an_untrained_model_that_differs_by_more_than_arithmetic_is_refused(dtype: DType, mismatch: float) -> None:
    sentinel = DriftSentinel(10.0, dtype)
    with pytest.raises(ConfigError, match=r"nats a token.*do not compute the same policy"):
        observe(sentinel, mismatch, is_untrained=True)
    assert sentinel.floor is None


@pytest.mark.parametrize(("dtype", "mismatch"), [(DType.float32, 3e-6), (DType.bfloat16, 0.067)])
def test_what_was_measured_of_right_engines_is_a_floor(dtype: DType, mismatch: float) -> None:
    sentinel = DriftSentinel(10.0, dtype)
    observe(sentinel, mismatch, is_untrained=True)
    assert sentinel.floor == mismatch


def test_a_high_floor_does_not_lift_the_limit_above_what_arithmetic_explains() -> None:
    sentinel = DriftSentinel(10.0, DType.bfloat16)
    observe(sentinel, 0.067, is_untrained=True)
    assert sentinel.limit == LARGEST_FLOOR[DType.bfloat16]
    assert observe(sentinel, 0.3)["offpolicy/mismatch_alarm"] == 1.0


def test_a_first_measurement_of_a_trained_model_is_judged_as_well() -> None:
    sentinel = DriftSentinel(10.0, DType.float32)
    assert observe(sentinel, float("nan"))["offpolicy/mismatch_alarm"] == 1.0
    assert observe(sentinel, 0.02)["offpolicy/mismatch_alarm"] == 1.0
    assert observe(DriftSentinel(10.0, DType.float32), 1e-4)["offpolicy/mismatch_alarm"] == 0.0


def test_nan_is_an_alarm_and_nothing_measured_is_none() -> None:
    sentinel = DriftSentinel(10.0, DType.float32)
    assert observe(sentinel, None) == {}
    observe(sentinel, 1e-4, is_untrained=True)
    assert observe(sentinel, float("nan"))["offpolicy/mismatch_alarm"] == 1.0


def test_tensors_that_are_not_finite_are_named_first() -> None:
    network = nn.ModuleDict({"big": nn.Linear(2, 2), "bad": nn.Linear(2, 2)})
    with torch.no_grad():
        network["big"].weight.fill_(100.0)
        network["bad"].bias[0] = float("nan")
    assert describe_tensors(network).startswith("bad.bias") and "1 not finite" in describe_tensors(network)

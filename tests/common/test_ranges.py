"""Every number of the configuration at its extremes: used, or refused in one sentence that names it."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import Config, ConfigError, ModelConfig
from common.validation import LARGEST_INTEGER, RANGES, validate

MODEL = str(Path(__file__).resolve().parents[2] / "configs/models/chain_sum")
BASE = Config(model=ModelConfig(path=MODEL))


def numbers(section: Any = BASE, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Full key and type (int or float) of every setting that holds a number or may hold one."""
    for name, hint in get_type_hints(type(section)).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            yield from numbers(value, f"{prefix}{name}.")
        elif hint in (int, int | None):
            yield prefix + name, int
        elif hint in (float, float | None):
            yield prefix + name, float


NUMBERS = dict(numbers())


def changed(section: Any, key: str, value: float) -> Any:
    name, _, rest = key.partition(".")
    return dataclasses.replace(section, **{name: changed(getattr(section, name), rest, value) if rest else value})


def refusal(key: str, value: float) -> str | None:
    try:
        validate(changed(BASE, key, value))
    except ConfigError as error:
        return str(error)
    return None


def test_every_number_has_a_range() -> None:
    assert sorted(NUMBERS) == sorted(RANGES)


@pytest.mark.parametrize("key", [key for key, kind in NUMBERS.items() if kind is float])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_everywhere(key: str, value: float) -> None:
    message = refusal(key, value)
    assert message is not None and f"{key}={value}" in message and "finite" in message


@pytest.mark.parametrize("key", [key for key, kind in NUMBERS.items() if kind is int])
@pytest.mark.parametrize("value", [LARGEST_INTEGER + 1, 10**30, -(10**30)])
def test_integers_that_no_array_or_seed_can_hold_are_refused_everywhere(key: str, value: int) -> None:
    message = refusal(key, value)
    assert message is not None and f"{key}={value}" in message


@given(data=st.data(), key=st.sampled_from(sorted(RANGES)))
def test_outside_its_range_a_number_is_refused_by_name_in_one_sentence(data: st.DataObject, key: str) -> None:
    low, high, _ = RANGES[key]
    kind = NUMBERS[key]
    outside = [(end, step) for end, step in ((low, -1), (high, 1)) if math.isfinite(end)]
    if not outside:
        return
    end, step = data.draw(st.sampled_from(outside))
    distance = data.draw(st.integers(1, 10**6) if kind is int else st.floats(1e-3, 1e6))
    value = kind(end + step * distance)
    message = refusal(key, value)
    assert message is not None and f"{key}={value}" in message and "\n" not in message


@given(data=st.data(), key=st.sampled_from(sorted(RANGES)))
def test_any_number_is_used_or_refused_in_one_sentence(data: st.DataObject, key: str) -> None:
    value = data.draw(st.integers() if NUMBERS[key] is int else st.floats())
    message = refusal(key, value)
    assert message is None or (key.rpartition(".")[2] in message and "\n" not in message)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_numpy_refuses_are_refused(seed: int) -> None:
    message = refusal("seed", seed)
    assert message is not None and f"seed={seed}" in message


def test_the_reason_why_a_low_temperature_cannot_be_sampled_is_given() -> None:
    assert refusal("rollout.temperature", 0.001) == (
        "rollout.temperature=0.001 must be at least 0.01: vLLM samples at 0.01 when it is asked for less, and the "
        "learner computes at what is configured"
    )
    for value in (0.0, -1.0):
        assert "at least 0.01" in str(refusal("rollout.temperature", value))
    assert refusal("rollout.temperature", 0.01) is None


def test_evaluation_is_greedy_at_0_or_at_a_temperature_that_vllm_samples_at() -> None:
    assert refusal("eval.temperature", 0.0) is None
    assert "must be 0, which is greedy, or at least 0.01" in str(refusal("eval.temperature", 0.005))

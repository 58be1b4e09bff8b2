"""The alarm against a slow reference, and what a user sees of it: one line for each time that a limit is crossed."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import AlarmConfig, Config
from common.limits import LIMITS
from common.metrics import RunLog, read_jsonl
from learner.alarm import Alarm, Crossing

ONLY_M2 = AlarmConfig(window=3, max_m2=1.0)


def crossings(alarm: Alarm, name: str, values: list[float | None], first_step: int = 1) -> list[int]:
    """Steps in which the metric crosses a limit, when these are its values from `first_step` on."""
    found = []
    for step, value in enumerate(values, start=first_step):
        _, crossed = alarm.observe(step, {} if value is None else {name: value})
        found += [step] * len(crossed)
    return found


@given(values=st.lists(st.floats(0, 2), max_size=40), window=st.integers(1, 5))
def test_a_limit_is_crossed_when_the_median_leaves_it_and_again_only_after_a_window_inside(
    values: list[float], window: int
) -> None:
    expected, is_crossed = [], False
    outside = [
        step >= window and median(values[step - window : step]) > 1.0 for step in range(len(values) + 1)
    ]  # after `step` values
    for step in range(window, len(values) + 1):
        if is_crossed and not any(outside[step - window + 1 : step + 1]):
            is_crossed = False
        if outside[step] and not is_crossed:
            is_crossed = True
            expected.append(step)
    alarm = Alarm(replace(ONLY_M2, window=window))
    assert crossings(alarm, "offpolicy/m2", list(values)) == expected


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.setting)
def test_every_limit_speaks_when_it_is_crossed_and_says_what_to_do(limit: Any) -> None:
    config = AlarmConfig(window=3)
    setting = getattr(config, limit.setting)
    inside, outside = (0.5, 0.5 * setting * (0.5 if limit.is_lowest else 2.0)) if limit.is_relative else (
        (setting + 0.1, setting - 0.1) if limit.is_lowest else (0.9 * setting, 1.1 * setting)
    )  # fmt: skip
    alarm = Alarm(config)
    for step in range(1, 8):
        metrics, crossed = alarm.observe(step, {limit.metric: inside if step <= 4 else outside})
        assert [crossing.name for crossing in crossed] == ([limit.metric] if step == 6 else [])
        assert metrics == {"alarm/active": float(step >= 6)}
        if crossed:
            (crossing,) = crossed
            assert crossing.value == outside and "\n" not in crossing.text
            for words in (f"after step 6: {limit.metric} is", f"alarm.{limit.setting}", limit.meaning, limit.remedy):
                assert words in crossing.text


def test_what_is_not_finite_is_as_bad_as_can_be_and_what_was_not_measured_counts_for_nothing() -> None:
    assert crossings(Alarm(ONLY_M2), "offpolicy/m2", [0.1, math.nan, None, math.inf]) == [4]
    assert crossings(Alarm(ONLY_M2), "offpolicy/ess", [0.9, math.nan, math.nan]) == [3]
    assert crossings(Alarm(ONLY_M2), "offpolicy/m2", [9.0, None, 9.0, None]) == []


def test_null_and_enabled_switch_limits_off() -> None:
    assert crossings(Alarm(replace(ONLY_M2, max_m2=None)), "offpolicy/m2", [9.0] * 5) == []
    off = Alarm(replace(ONLY_M2, enabled=False))
    assert off.observe(1, {"offpolicy/m2": 9.0}) == ({}, [])


def test_a_resume_neither_repeats_an_alarm_nor_forgets_the_first_steps() -> None:
    values = [1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0, 9.0, 9.0, 9.0]
    config = AlarmConfig(window=3)
    assert crossings(Alarm(config), "policy/grad_norm", list(values)) == [5, 12]
    for cut in range(len(values)):
        before, after = Alarm(config), Alarm(config)
        found = crossings(before, "policy/grad_norm", list(values[:cut]))
        after.load_state_dict(before.state_dict())
        assert found + crossings(after, "policy/grad_norm", list(values[cut:]), cut + 1) == [5, 12]


def test_a_checkpoint_that_is_written_while_training_goes_on_does_not_see_later_steps() -> None:
    alarm = Alarm(AlarmConfig(window=3))
    crossings(alarm, "policy/grad_norm", [1.0])
    state = alarm.state_dict()
    taken = json.dumps(state)
    crossings(alarm, "policy/grad_norm", [2.0], 2)
    assert json.dumps(state) == taken
    alarm.load_state_dict(state)
    crossings(alarm, "policy/grad_norm", [2.0], 2)
    assert json.dumps(state) == taken


def test_the_log_has_an_alarm_as_an_event_and_the_console_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crossing = Crossing(name="offpolicy/m2", value=math.inf, limit=0.2, text="ALARM after step 3: ...")
    with RunLog(tmp_path, keep_through=0) as log:
        log.event(3, "alarm", **asdict(crossing))
        log.event(4, "alarm", **asdict(replace(crossing, value=0.5)))
    assert capsys.readouterr().out == "ALARM after step 3: ...\n" * 2
    with RunLog(tmp_path, keep_through=3):
        """Step 4 is done again."""
    (event,) = read_jsonl(tmp_path / "events.jsonl")
    assert event.pop("time") > 0
    assert event == {"step": 3, "kind": "alarm", "name": "offpolicy/m2", "value": None, "limit": 0.2,
                     "text": "ALARM after step 3: ..."}  # fmt: skip


def test_the_defaults_are_in_the_configuration_and_every_limit_has_one() -> None:
    settings = asdict(Config().alarm)
    assert {limit.setting for limit in LIMITS} | {"enabled", "window"} == settings.keys()

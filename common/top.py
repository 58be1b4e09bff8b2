"""`run.py top`: how a run stands that was started elsewhere, asked of its learner. It changes nothing there."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TypeAlias

import numpy as np
from rich.console import Console
from rich.text import Text

from common.config import Config, ConfigError, TransportConfig
from common.dashboard import SILENT_S, dashboard
from common.keys import actor_keys
from common.loading import config_of_run, read_config
from common.metrics import format_progress
from common.observer import NAME, Observer, RunOver, endpoint_of
from common.region import Region, can_draw
from common.types import JSON, RunStatus

TURN_S = 1.0
SNAPSHOT = (100, 1000)  # columns and lines of Form.ONCE

Show: TypeAlias = Callable[[RunStatus | None, float, str], None]  # status, seconds since it came, who is waited for


class Form(StrEnum):
    """How it is shown."""

    LIVE = "live"  # renewed every second; where there is no terminal a line for each step
    ONCE = "once"  # one drawing, without colours
    JSON = "json"  # one RunStatus


def top(run: Path | None, endpoint: str | None, keys: Path | None, form: Form, timeout_s: float) -> None:
    """Until the run is over, or once. `keys` take the place of the run's own.

    Raises ConfigError for what cannot be asked, TimeoutError when the learner has been silent for `timeout_s`.
    """
    if run is None and endpoint is None:
        raise ConfigError("no run is named: give its directory, or --connect tcp://HOST:PORT")
    config = _config(run, keys)
    observer = Observer(
        lambda: endpoint or endpoint_of(config.run_dir),
        lambda: actor_keys(config, NAME, keys),
        config.transport.max_message_mb,
    )
    with observer:
        try:
            if form is Form.LIVE:
                _follow(observer, _drawing() if can_draw() else _lines(), timeout_s)
            else:
                _print_once(_first(observer, timeout_s), form)
        except RunOver as end:
            print(f"the run is over: {end}")
        except TimeoutError as error:
            way_out = "" if run is None else f"; what the run did says run.py inspect {run}"
            raise TimeoutError(f"{error}{way_out}") from None


def _config(run: Path | None, keys: Path | None) -> Config:
    """What of it is needed: the run's address and keys. Without its directory there is encryption if there are keys."""
    if run is None:
        return Config(transport=TransportConfig(curve=keys is not None))
    config = read_config(config_of_run(run))
    return replace(config, runs_dir=str(run.resolve().parent), name=run.resolve().name)  # where the folder is now


def _first(observer: Observer, timeout_s: float) -> RunStatus:
    while (status := observer.look(time.monotonic())) is None:
        _check_silence(observer, timeout_s)
        observer.wait(TURN_S)
    return status


def _follow(observer: Observer, show: Show, timeout_s: float) -> None:
    while True:
        now = time.monotonic()
        status, silent_s = observer.look(now), now - observer.heard_s
        show(status, silent_s, f"waiting for {_who(observer)} to answer, {timeout_s:g} s at most")
        _check_silence(observer, timeout_s)
        observer.wait(TURN_S)


def _check_silence(observer: Observer, timeout_s: float) -> None:
    if time.monotonic() - observer.heard_s > timeout_s:
        raise TimeoutError(f"{_who(observer)} has not answered for {timeout_s:g} s")


def _who(observer: Observer) -> str:
    return "a learner" if observer.endpoint is None else f"the learner at {observer.endpoint}"


def _print_once(status: RunStatus, form: Form) -> None:
    if form is Form.JSON:
        print(json.dumps({name: _jsonable(value) for name, value in asdict(status).items()}, indent=1))
        return
    width, height = SNAPSHOT
    console = Console(width=width, color_system=None, highlight=False)
    with console.capture() as drawn:
        console.print(dashboard(status, width, height))
    print("\n".join(line.rstrip() for line in drawn.get().splitlines()))


def _drawing() -> Show:
    """On a terminal, in the place of what was drawn before. The last drawing stays."""
    region = Region()

    def show(status: RunStatus | None, silent_s: float, waiting: str) -> None:
        width, height = region.size
        text = Text(waiting, no_wrap=True, overflow="ellipsis")
        region.draw(text if status is None else dashboard(status, width, height, silent_s))

    return show


def _lines() -> Show:
    """A line for each step that is seen, as `train` prints them; waiting is said on standard error, once."""
    last_step, is_waiting = -1, False

    def show(status: RunStatus | None, silent_s: float, waiting: str) -> None:
        nonlocal last_step, is_waiting
        if silent_s > SILENT_S and not is_waiting:
            print(waiting, file=sys.stderr, flush=True)
        is_waiting = silent_s > SILENT_S
        if status is not None and status.step != last_step:
            last_step = status.step
            print(_line(status), flush=True)

    return show


def _line(status: RunStatus) -> str:
    if status.step <= status.warmup_steps:
        return format_progress(status.step, status.warmup_steps, status.metrics, stage="critic warm-up")
    done, num_steps = status.step - status.warmup_steps, status.num_steps - status.warmup_steps
    return format_progress(done, num_steps, status.metrics)


def _jsonable(value: JSON) -> JSON:
    return value.tolist() if isinstance(value, np.ndarray) else value

"""A run's training once more, from its record: `run.py train --replay RUN`. Nothing is sampled or evaluated.

The same model, seed and settings give the same networks after every step, whatever the actors did and in whatever order
their groups came: a loss that jumps can be looked at again, with other settings or under a debugger.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from common.config import Config
from common.metrics import RunLog, Value
from common.types import JSON, Float32Array, TrajectoryGroup
from learner.rollouts.record import Record

# What the numbers of a step depend on besides the batch, by section or name.
_SECTIONS = ("model", "lora", "algorithm", "learner", "reward", "staleness", "weights.publish_every")
_SINGLE = ("seed", "device", "rollout.temperature")
_IRRELEVANT = ("learner.record", "learner.replay", "learner.batch_timeout_s")


class Nobody:
    """The actors of a replay, in the place of LearnerService."""

    def set_version(self, version: int, steps_done: int) -> None:
        """Nobody samples with it."""

    def set_warmup(self, steps: int) -> None:
        """Nobody is paced by it."""

    def judge_ready(self, judge: Callable[[Float32Array], str | None]) -> None:
        """Nobody becomes ready."""

    def stop(self, reason: str) -> None:
        """Nobody has to leave."""


class Replay:
    """In the Leader's place on rank 0: the groups of each step come from the record of config.learner.replay."""

    def __init__(self, config: Config, record: Record, log: RunLog) -> None:
        self.service = Nobody()
        self._config = config
        self._record = record
        self.log = log
        self._settings = replayed_settings(config)
        self._differing: str | None = None  # the setting that has been said to differ
        self._recorded_at = time.monotonic()

    def begin(self) -> None:
        run, through = self._config.learner.replay, self._record.last_step
        print(
            f"{run} has recorded the steps {self._record.spans}: 1 to {through} are trained again, and nothing is "
            "sampled or evaluated",
            flush=True,
        )
        self._recorded_at = time.monotonic()

    def next_groups(self, step: int) -> list[TrajectoryGroup]:
        """The groups of `step`, counted from 1. Raises ConfigError when its file is damaged."""
        self._compare(step)
        return self._record.groups(step)

    def before_publication(self) -> None:
        """There is nobody to wait for."""

    def state(self) -> Callable[[Path], None]:
        """A checkpoint holds nothing of the data side: the step says where the replay is."""
        return lambda folder: None

    def evaluate(self, version: int) -> None:
        """Nobody could sample it."""

    def finish_evaluation(self, step: int, version: int) -> None:
        """There is none."""

    def record(
        self,
        step: int,
        version: int,
        warmup_steps: int,
        groups: Sequence[TrajectoryGroup],
        values: dict[str, Value],
    ) -> None:
        """Writes what Leader.record writes, but for what is measured of actors."""
        now = time.monotonic()
        values |= {"time/step_s": now - self._recorded_at, "version": version}
        self._recorded_at = now
        self.log.log(step, values)
        for group in groups:
            self.log.ledger(group, step)
        num_steps = min(warmup_steps + self._config.learner.steps, self._record.last_step)
        self.log.progress(step, num_steps, values, stage="replayed")

    def _compare(self, step: int) -> None:
        """Says once of each setting from where on it is not what it was."""
        before = self._record.settings(step)
        keys = [key for key in before.keys() | self._settings.keys() if before.get(key) != self._settings.get(key)]
        if keys and min(keys) != self._differing:
            key = self._differing = min(keys)
            print(
                f"step {step} was trained with {key}={before.get(key)}, now it is {self._settings.get(key)}: from here "
                "on the numbers are other ones",
                flush=True,
            )


def replayed_settings(config: Config) -> dict[str, JSON]:
    """What a replay must have in common with its record to get the same numbers, by name."""
    flat = dict(_flat(asdict(config), ""))
    chosen = {
        key: str(value) if isinstance(value, str) else value
        for key, value in flat.items()
        if key in _SINGLE or any(key == name or key.startswith(f"{name}.") for name in _SECTIONS)
    }
    for key in _IRRELEVANT:
        del chosen[key]
    return chosen | {"threads": torch.get_num_threads()}


def _flat(settings: JSON, prefix: str) -> Sequence[tuple[str, JSON]]:
    if not isinstance(settings, dict):
        return [(prefix.removesuffix("."), settings)]
    return [pair for key, value in settings.items() for pair in _flat(value, f"{prefix}{key}.")]

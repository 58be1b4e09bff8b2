"""What only rank 0 does: it speaks to actors through the service, evaluates, and writes the run's logs."""

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from common import control
from common.config import Config, ConfigError
from common.metrics import RunLog, Value, is_evaluated
from common.types import JSON, Prompt, TrajectoryGroup
from learner.rollouts.evaluation import Begun, EvalResult
from learner.rollouts.history import History
from learner.rollouts.record import Recorder
from learner.rollouts.selection import selection_metrics
from learner.rollouts.service import LearnerService, StillWaiting
from learner.rollouts.snapshot import Snapshot, write_snapshot

logger = logging.getLogger(__name__)

SAY_S = 60.0  # between two lines that say who is waited for
ROLLOUTS = "rollouts.bin"  # in a checkpoint: the data side (learner/rollouts/snapshot.py) and what the leader knows

T = TypeVar("T")


class NobodyLeft(TimeoutError):
    """No actor takes part, and none may come."""


class Leader:
    """The service and the logs of one run. Calls in the order begin, (next_groups, record)*, finish_evaluation.

    What waits for actors raises StillWaiting between two turns of the wait, and is then to be called again. Such a wait
    ends with NobodyLeft when no actor takes part and `train`, which has started this learner, has given up its own.
    Where nobody is started here (actors.count=0, or `run.py actors --count 0`) it waits for actors from elsewhere,
    without end.
    Rates and idle shares of a step are differences between the service's counters at the ends of two steps.
    """

    def __init__(
        self,
        config: Config,
        service: LearnerService,
        log: RunLog,
        heldout: Sequence[Prompt],
        recorder: Recorder | None = None,
    ) -> None:
        self._config = config
        self.service = service
        self.log = log
        self._recorder = recorder
        self._heldout = list(heldout[: config.eval.num_prompts])
        self._timeout_s = config.learner.batch_timeout_s
        self._is_evaluating = False
        self._evaluated_version: int | None = None  # the last that was started
        self._counters: dict[str, float] = {}
        self._recorded_at = time.monotonic()
        self._trained_tokens = 0
        self._say_at = -math.inf
        self._history = History(config.run_dir)

    def begin(self) -> None:
        """Waits for the first actor."""
        self.service.show(self._history.course())
        self._patiently(lambda: self.service.wait_for_members(1, self._config.actors.start_timeout_s))
        self._counters, self._recorded_at = self.service.stats(), time.monotonic()

    def next_groups(self, step: int) -> list[TrajectoryGroup]:
        """The groups of `step`, counted from 1. Raises MembersWaiting when an actor has to be served with weights
        first."""
        groups = self._patiently(lambda: self.service.take_batch(self._timeout_s))
        if self._recorder is not None:
            self._recorder.write(step, groups)
        return groups

    def before_publication(self) -> None:
        """With staleness.exact, lets the actors fill the admission window first. Raises MembersWaiting."""
        if self._config.staleness.exact:
            self._patiently(lambda: self.service.wait_window_sampled(self._timeout_s))

    def state(self) -> Callable[[Path], None]:
        """What a checkpoint has to hold of now, as a function that writes it into the folder."""
        about = {"trained_tokens": self._trained_tokens, "evaluated_version": self._evaluated_version}
        return partial(_write, self.service.snapshot(), about)

    def resume(self, snapshot: Snapshot, about: JSON) -> None:
        """Goes on with the counters and the evaluation of a checkpoint, which the service has restored.

        But not with one whose result is logged: at the end of a run it comes after the last checkpoint, under its step.
        """
        self._trained_tokens, version = about["trained_tokens"], about["evaluated_version"]
        if snapshot.evaluation is not None and not is_evaluated(self._config.run_dir, version):
            self._start_evaluation(version, snapshot.evaluation)
        self._evaluated_version = version

    def evaluate(self, version: int) -> None:
        """Starts a held-out evaluation, unless one is still running or was of this version. Training goes on."""
        if version == self._evaluated_version:
            return
        if self._is_evaluating:
            logger.info("version %d is not evaluated: the evaluation before it is still running", version)
            return
        self._start_evaluation(version)

    def _start_evaluation(self, version: int, begun: Begun | None = None) -> None:
        settings = self._config.eval
        num_samples = settings.samples_per_prompt if settings.temperature > 0 else 1  # greedy ones are all alike
        self.service.evaluate(self._heldout, num_samples, settings.temperature, version, begun)
        self._is_evaluating, self._evaluated_version = True, version

    def record(
        self,
        step: int,
        version: int,
        warmup_steps: int,
        groups: Sequence[TrajectoryGroup],
        values: dict[str, Value],
    ) -> None:
        """Writes the metrics, ledger lines and console line of `step`, counted from 1, warm-up included."""
        self._trained_tokens += sum(len(group.completed.token_ids) for group in groups)
        values |= self._since_last_step(values) | {"version": version, "tokens/trained": self._trained_tokens}
        if self._is_evaluating and (result := self.service.poll_evaluation()) is not None:
            values |= self._evaluated(result)
        self._log(step, values)
        for group in groups:
            self.log.ledger(group, step)
        if step <= warmup_steps:
            self.log.progress(step, warmup_steps, values, stage="critic warm-up")
        else:
            self.log.progress(step - warmup_steps, self._config.learner.steps, values)

    def finish_evaluation(self, step: int, version: int) -> None:
        """Waits for the evaluation that is running, if one is, and logs it under `step`. Raises MembersWaiting."""
        if self._is_evaluating:
            result = self._patiently(lambda: self.service.wait_evaluation(self._timeout_s))
            values = self._evaluated(result) | {"version": version}
            self._log(step, values)
            self.log.progress(self._config.learner.steps, self._config.learner.steps, values, stage="done")

    def _log(self, step: int, values: dict[str, Value]) -> None:
        self.log.log(step, values)
        self._history.add(step, values, time.monotonic())
        self.service.show(self._history.course())

    def _patiently(self, ask: Callable[[], T]) -> T:
        """One turn of a wait, see the class."""
        try:
            return ask()
        except StillWaiting:
            if not self._check_company():
                self.service.begin_anew()  # the time counts from when actors from elsewhere begin to come
            raise
        except TimeoutError as error:
            if self._check_company():
                raise
            raise StillWaiting(str(error)) from None

    def _check_company(self) -> bool:
        """Whether the time-out holds: an actor takes part, or is to be started here. Raises NobodyLeft."""
        if self.service.has_company():
            return True
        local = _local_actors()
        if (self._config.actors.count if local is None else local.wanted) == 0:
            self._say_who_is_waited_for()
            return False
        if local is not None and local.active == 0:
            raise NobodyLeft(
                f"no actor takes part and none is started again: {'; '.join(local.given_up) or 'all left'}"
            )
        return True

    def _say_who_is_waited_for(self) -> None:
        now = time.monotonic()
        if now >= self._say_at:
            self._say_at = now + SAY_S
            print(
                f"waiting for actors: run.py actor --connect {self.service.endpoint} "
                f"-c {self._config.run_dir / 'config.yaml'} --name NAME",
                flush=True,
            )

    def _evaluated(self, result: EvalResult) -> dict[str, Value]:
        self._is_evaluating = False
        return {
            "accuracy/heldout": result.accuracy,
            "accuracy/heldout_low": result.accuracy_low,
            "accuracy/heldout_high": result.accuracy_high,
            "accuracy/version": result.version,
            "accuracy/version_newest": result.newest_version,
            "accuracy/publications": result.newest_version - result.oldest_version,
            "accuracy/length_mean": result.length_mean,
            "accuracy/truncated_fraction": result.truncated_fraction,
            "time/evaluation_s": result.seconds,
            "eval/num_prompts": result.num_prompts,
            "eval/num_failed": result.num_failed,
            "eval/num_errors": result.num_errors,
        }

    def _since_last_step(self, values: dict[str, Value]) -> dict[str, Value]:
        now, counters = time.monotonic(), self.service.stats()
        elapsed = now - self._recorded_at
        change = {name: value - self._counters.get(name, 0.0) for name, value in counters.items()}
        waited = values.get("time/wait_for_batch_s", 0.0)
        assert isinstance(waited, float)
        rates: dict[str, Value] = {
            "time/step_s": elapsed,
            "throughput/generated_tokens_per_s": change["generated_tokens"] / elapsed,
            "learner/idle_fraction": waited / elapsed,
            "tokens/generated": counters["generated_tokens"],
            "actors/connected": counters["actors_connected"],
            "actors/too_slow": counters["actors_too_slow"],
            "actors/dismissed": counters["actors_dismissed"],
            "actors/forgotten": counters["actors_forgotten"],
            "staleness/dropped_groups": counters["dropped/stale"],
            "verifier/num_errors": change["verdicts/error"],
            "verifier/num_timed_out": change["verdicts/timed_out"],
            "queue/buffered_groups": counters["buffered_groups"],
            "queue/in_flight_groups": counters["in_flight_groups"],
        }
        if "window_fill" in counters:
            rates["queue/window_fill"] = counters["window_fill"]
        if change["uptime_s"] > 0:  # both are read one after the other
            rates["actors/idle_fraction"] = max(0.0, 1.0 - change["busy_s"] / change["uptime_s"])
        rates |= {
            f"drops/{name.removeprefix('dropped/')}": count
            for name, count in counters.items()
            if name.startswith("dropped/")
        }
        shown = ("verdicts/", "transport/", "dropped_tokens/")
        rates |= {name: count for name, count in counters.items() if name.startswith(shown)}
        rates["tokens/prefix"] = counters["prefix_tokens"]
        rates |= selection_metrics(change)
        self._counters, self._recorded_at = counters, now
        return rates


def _local_actors() -> control.Status | None:
    """What the supervisor of this process says of its actors; None when there is none, or it is about to end."""
    run_dir = os.environ.get(control.CONTROL_VARIABLE)
    if run_dir is None:
        return None
    try:
        return control.status(Path(run_dir))
    except (ConfigError, TimeoutError) as error:
        logger.warning("the supervisor does not say which actors it has: %s", error)
        return None


def _write(snapshot: Snapshot, about: JSON, folder: Path) -> None:
    write_snapshot(folder / ROLLOUTS, snapshot, about)


def version_gaps(groups: Sequence[TrajectoryGroup], version: int) -> dict[int, float]:
    """Tokens per version gap when the groups are trained at `version`."""
    gaps = version - np.concatenate([group.completed.versions for group in groups])
    values, counts = np.unique(gaps, return_counts=True)
    return dict(zip(values.tolist(), counts.astype(float).tolist(), strict=True))

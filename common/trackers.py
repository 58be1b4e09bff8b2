"""Experiment trackers (logging.trackers): W&B, MLflow and trackio are told what metrics.jsonl holds.

Each is an adapter in a thread of its own behind a queue of QUEUE_LINES. Nothing that a tracker does reaches the run:
one that is slow or cannot be reached loses lines, which are counted, its first failure is said once, and at the end it
has END_S to finish. RUN/trackers.json keeps the id that a run has at each, so that a resume goes on with it.

Where a tracker stores things, and as whom, is its own business: WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_DIR, ...
"""

import importlib
import importlib.util
import json
import logging
import math
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias

from common.config import Config, ConfigError, TrackerName
from common.types import JSON

logger = logging.getLogger(__name__)

FILE = "trackers.json"
QUEUE_LINES = 1000  # a line a step: hours of an outage
RETRY_S = 60.0  # between two attempts to begin
END_S = 30.0  # for all trackers together, at the end of a run
INTERRUPTED_S = 10.0  # the same, of a run that does not end well
MLFLOW_BATCH = 100  # of values in one request: its limit for parameters, below that for metrics
MLFLOW_LETTERS = 6000  # of a parameter's value

Values: TypeAlias = Mapping[str, float | Mapping[int, float]]


class Tracker(Protocol):
    """A run at one tracker. One thread calls `begin`, then the others; each may raise anything, and take long."""

    def begin(self, config: Config, run_id: str | None) -> str:
        """Starts the run with the configuration as its hyper-parameters, or goes on with the one of this id; its id."""

    def log(self, step: int, time_s: float, values: Values) -> None:
        """The line of a step; a mapping is a histogram, bin to count. All numbers are finite."""

    def attach(self, file: Path) -> None:
        """Keeps a file with the run."""

    def end(self) -> None:
        """Sends what is left."""


class Wandb:
    """`step` is a metric of its own and the axis of the others: W&B's own steps cannot go back, as a resume does."""

    def begin(self, config: Config, run_id: str | None) -> str:
        wandb: Any = importlib.import_module("wandb")
        self._histogram = wandb.Histogram
        self._artifact = wandb.Artifact
        self._run = wandb.init(
            project=config.logging.project,
            name=config.name,
            id=run_id,
            resume="allow",
            dir=str(config.run_dir),
            config=_plain(asdict(config)),
            settings=wandb.Settings(console="off"),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        return str(self._run.id)

    def log(self, step: int, time_s: float, values: Values) -> None:
        self._run.log({"step": step, **_with_histograms(values, self._histogram)})

    def attach(self, file: Path) -> None:
        artifact = self._artifact(f"{file.stem}-{self._run.id}", type="report")
        artifact.add_file(str(file))
        self._run.log_artifact(artifact)

    def end(self) -> None:
        self._run.finish()


class Mlflow:
    """Has no histograms: they are left out."""

    def begin(self, config: Config, run_id: str | None) -> str:
        mlflow: Any = importlib.import_module("mlflow")
        entities: Any = importlib.import_module("mlflow.entities")
        self._metric = entities.Metric
        self._client = mlflow.MlflowClient()
        if run_id is not None:
            self._id = run_id
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        name = config.logging.project
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        self._id = str(self._client.create_run(experiment_id, run_name=config.name).info.run_id)
        settings = _flat(_plain(asdict(config)))
        params = [entities.Param(key, str(value)[:MLFLOW_LETTERS]) for key, value in settings]
        for start in range(0, len(params), MLFLOW_BATCH):
            self._client.log_batch(self._id, params=params[start : start + MLFLOW_BATCH])
        return self._id

    def log(self, step: int, time_s: float, values: Values) -> None:
        now_ms = round(time_s * 1000)
        metrics = [self._metric(name, value, now_ms, step) for name, value in _scalars(values)]
        for start in range(0, len(metrics), MLFLOW_BATCH):
            self._client.log_batch(self._id, metrics=metrics[start : start + MLFLOW_BATCH])

    def attach(self, file: Path) -> None:
        self._client.log_artifact(self._id, str(file))

    def end(self) -> None:
        self._client.set_terminated(self._id)


class Trackio:
    """Knows a run by its name, which therefore gets a random end."""

    def begin(self, config: Config, run_id: str | None) -> str:
        trackio: Any = importlib.import_module("trackio")
        self._histogram = trackio.Histogram
        name = run_id or f"{config.name}-{secrets.token_hex(4)}"
        settings = _plain(asdict(config))
        self._run = trackio.init(
            project=config.logging.project, name=name, config=settings, resume="allow", embed=False
        )
        return name

    def log(self, step: int, time_s: float, values: Values) -> None:
        self._run.log(_with_histograms(values, self._histogram), step=step)

    def attach(self, file: Path) -> None:
        self._run.log_artifact(file, name=file.stem, type="report")

    def end(self) -> None:
        self._run.finish()


ADAPTERS: dict[TrackerName, type[Tracker]] = {
    TrackerName.wandb: Wandb,
    TrackerName.mlflow: Mlflow,
    TrackerName.trackio: Trackio,
}


def check_trackers(config: Config) -> None:
    """Raises ConfigError for one that is not installed, before anything starts."""
    for name in config.logging.trackers:
        spec = importlib.util.find_spec(name.value)
        if spec is None or spec.origin is None:  # nothing, or a mere folder of that name, as W&B makes them
            raise ConfigError(
                f"logging.trackers has {name.value}, which is not installed: pip install {name.value}, or leave it out"
            )


def attach(config: Config, file: Path) -> None:
    """Keeps a file, if it is there, with a run that has ended, at each of its trackers."""
    if config.logging.trackers and file.is_file():
        print(f"{file} goes to {', '.join(config.logging.trackers)}", flush=True)
        with Trackers(config) as trackers:
            trackers.attach(file)


class Trackers:
    """All trackers of a run, a context manager. Nothing here waits but its end."""

    def __init__(self, config: Config, adapters: Mapping[TrackerName, type[Tracker]] = ADAPTERS) -> None:
        check_trackers(config)
        self._ids = _Ids(config.run_dir / FILE)
        names = dict.fromkeys(config.logging.trackers)  # each once
        self._feeds = [_Feed(name, adapters[name](), config, self._ids) for name in names]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(END_S if error is None else INTERRUPTED_S)

    def log(self, step: int, time_s: float, values: Values) -> None:
        """Hand over the line of a step; returns at once."""
        finite = dict(_finite(values))
        for feed in self._feeds:
            feed.put((step, time_s, finite))

    def attach(self, file: Path) -> None:
        """Hand over a file; returns at once."""
        for feed in self._feeds:
            feed.put(file)

    def counts(self) -> dict[str, float]:
        """Lines that have not reached each tracker, and will not."""
        return {f"trackers/{feed.name}_lost": float(feed.num_lost) for feed in self._feeds}

    def close(self, timeout_s: float) -> None:
        """Let them finish; who does not within `timeout_s` is left behind, and named."""
        deadline = time.monotonic() + timeout_s
        for feed in self._feeds:
            feed.end()
        for feed in self._feeds:
            feed.join(deadline, timeout_s)


_Line: TypeAlias = tuple[int, float, Values]


class _Feed:
    """One tracker's thread and queue. The queue ends with None."""

    def __init__(self, name: TrackerName, tracker: Tracker, config: Config, ids: "_Ids") -> None:
        self.name = name.value
        self._tracker = tracker
        self._config = config
        self._ids = ids
        self._queue: queue.Queue[_Line | Path | None] = queue.Queue(QUEUE_LINES + 1)  # one place is for the end
        self._num_refused = 0  # by a full queue; written by the owner's thread
        self._num_failed = 0  # written by our thread
        self._begin_at = -math.inf  # monotonic, of the next attempt
        self._has_begun = False
        self._said: set[str] = set()
        self._thread = threading.Thread(target=self._run, name=f"tracker-{self.name}", daemon=True)
        self._thread.start()

    @property
    def num_lost(self) -> int:
        """Lines and files that the tracker will not have."""
        return self._num_refused + self._num_failed

    def put(self, item: _Line | Path) -> None:
        if self._queue.qsize() < QUEUE_LINES:
            self._queue.put_nowait(item)
        else:
            self._num_refused += 1
            self._say_once(f"is too slow, {QUEUE_LINES} lines wait for it: those that follow are left out")

    def end(self) -> None:
        self._queue.put_nowait(None)

    def join(self, deadline: float, timeout_s: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._say_once(
                f"has not finished within {timeout_s:g} s: {max(0, self._queue.qsize() - 1)} lines wait for it still"
            )
        elif self.num_lost:
            self._say_once(f"lacks {self.num_lost} lines")

    def _run(self) -> None:
        self._begins()  # while the learner loads
        while (item := self._queue.get()) is not None:
            if not (self._begins() and self._succeeds(partial(self._hand_over, item))):
                self._num_failed += 1
        if self._has_begun:
            self._succeeds(self._tracker.end)

    def _begins(self) -> bool:
        if not self._has_begun and time.monotonic() >= self._begin_at:
            self._has_begun = self._succeeds(self._begin)
            self._begin_at = time.monotonic() + RETRY_S
        return self._has_begun

    def _begin(self) -> None:
        known = self._ids.get(self.name)
        if (run_id := self._tracker.begin(self._config, known)) != known:
            self._ids.put(self.name, run_id)

    def _hand_over(self, item: _Line | Path) -> None:
        if isinstance(item, Path):
            self._tracker.attach(item)
        else:
            self._tracker.log(*item)

    def _succeeds(self, act: Callable[[], None]) -> bool:
        try:
            act()
        except Exception as error:  # whatever a library and a network may come up with
            logger.warning("tracker %s", self.name, exc_info=error)
            first = (str(error).strip().splitlines() or [""])[0]
            self._say_once(f"fails, and the run goes on without it ({type(error).__name__}: {first[:200]})")
            return False
        return True

    def _say_once(self, what: str) -> None:
        """Of each kind, which is what stands before the first comma or bracket."""
        kind = re.split(r"[,(\d]", what)[0]
        if kind not in self._said:
            self._said.add(kind)
            print(f"warning: tracker {self.name} {what}", flush=True)


class _Ids:
    """RUN/trackers.json: the run's id at each tracker."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def get(self, name: str) -> str | None:
        with self._lock:
            run_id = self._read().get(name)
        return run_id if isinstance(run_id, str) else None

    def put(self, name: str, run_id: str) -> None:
        with self._lock:
            temporary = self._path.with_name(f".{self._path.name}.tmp")
            temporary.write_text(json.dumps(self._read() | {name: run_id}))
            temporary.replace(self._path)

    def _read(self) -> dict[str, JSON]:
        return json.loads(self._path.read_text()) if self._path.is_file() else {}


def _finite(values: Mapping[str, JSON]) -> Iterator[tuple[str, float | Mapping[int, float]]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield name, dict(value)
        elif math.isfinite(value):
            yield name, float(value)


def _scalars(values: Values) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if not isinstance(value, Mapping):
            yield name, value


def _with_histograms(values: Values, make: Callable[..., Any]) -> dict[str, Any]:
    """In the place of each mapping a histogram with a bin of width 1 around each whole number of its range."""
    shown: dict[str, Any] = dict(_scalars(values))
    for name, counts in values.items():
        if isinstance(counts, Mapping) and counts:
            bins = range(min(counts), max(counts) + 1)
            edges = [key - 0.5 for key in (*bins, bins.stop)]
            shown[name] = make(np_histogram=([counts.get(key, 0.0) for key in bins], edges))
    return shown


def _plain(settings: JSON) -> JSON:
    """Without our own types, which a tracker would write as it likes."""
    if isinstance(settings, dict):
        return {key: _plain(value) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [_plain(value) for value in settings]
    return str(settings) if isinstance(settings, str) else settings


def _flat(settings: Mapping[str, JSON], prefix: str = "") -> list[tuple[str, JSON]]:
    """("section.key", value) of each setting."""
    pairs = []
    for key, value in settings.items():
        is_section = isinstance(value, dict) and value
        pairs += _flat(value, f"{prefix}{key}.") if is_section else [(prefix + key, value)]
    return pairs

"""Trackers by what they are called with (modules that record it), and the real ones where they are installed."""

import json
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from common import trackers as trackers_module
from common.catalogue import find
from common.config import Config, ConfigError, LoggingConfig, ModelConfig, RolloutConfig, TrackerName
from common.loading import load_config
from common.metrics import RunLog, read_jsonl
from common.trackers import Trackers, attach, check_trackers
from tests.support.runs import ROOT

VALUES = {"reward/mean": 0.5, "loss": float("nan"), "staleness/hist": {0: 5.0, 2: 7.0}}
LONG_S = 20.0


def make_config(folder: Path, *names: TrackerName) -> Config:
    config = Config(
        name="r",
        runs_dir=str(folder),
        model=ModelConfig(path="none"),
        rollout=RolloutConfig(stop=["</a>"]),
        logging=LoggingConfig(trackers=list(names), project="p"),
    )
    config.run_dir.mkdir(exist_ok=True)
    return config


class Recorded:
    """Stands for a module, an object or a function of a tracker's library: notes every call under its full name."""

    def __init__(self, calls: list[tuple[str, Any]], name: str, answers: dict[str, Any]) -> None:
        self._calls, self._name, self._answers = calls, name, answers

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        full = f"{self._name}.{name}"
        return self._answers[full] if full in self._answers else Recorded(self._calls, full, self._answers)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self._calls.append((self._name, (*arguments, named) if named else arguments))
        return Recorded(self._calls, f"{self._name}()", self._answers)


def install(monkeypatch: pytest.MonkeyPatch, *names: str, **answers: Any) -> list[tuple[str, Any]]:
    """A library of these module names; the calls that are made of it."""
    calls: list[tuple[str, Any]] = []
    for name in names:
        module = Recorded(calls, name, {key.replace("__", "."): value for key, value in answers.items()})
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: types.SimpleNamespace(origin="here"))
    return calls


def log_twice(config: Config, report: Path | None = None) -> None:
    with Trackers(config) as trackers:
        trackers.log(1, 1.5, VALUES)
        trackers.log(2, 2.5, VALUES)
        if report is not None:
            trackers.attach(report)
    assert set(trackers.counts().values()) == {0.0}


def ids(config: Config) -> dict[str, str]:
    found: dict[str, str] = json.loads((config.run_dir / "trackers.json").read_text())
    return found


def test_wandb_is_told_steps_as_an_axis_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, TrackerName.wandb)
    answers = {"wandb.init().id": "w1", "wandb.Histogram": lambda np_histogram: np_histogram}
    calls = install(monkeypatch, "wandb", **answers)
    log_twice(config, tmp_path / "report.html")
    started = dict(calls)["wandb.init"][0]
    assert (started["project"], started["name"], started["id"], started["resume"]) == ("p", "r", None, "allow")
    assert started["config"]["rollout"]["stop"] == ["</a>"] and started["config"]["device"] == "cpu"
    assert type(started["config"]["device"]) is str
    histogram = ([5.0, 0.0, 7.0], [-0.5, 0.5, 1.5, 2.5])
    logged = [arguments[0] for name, arguments in calls if name == "wandb.init().log"]
    assert logged == [{"step": step, "reward/mean": 0.5, "staleness/hist": histogram} for step in (1, 2)]
    assert ("wandb.Artifact().add_file", (str(tmp_path / "report.html"),)) in calls
    assert calls[-1] == ("wandb.init().finish", ())
    log_twice(config)
    assert [arguments[0]["id"] for name, arguments in calls if name == "wandb.init"] == [None, "w1"]
    assert ids(config) == {"wandb": "w1"}


def test_mlflow_is_told_in_batches_and_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, TrackerName.mlflow)
    answers = {
        "mlflow.MlflowClient().create_run().info.run_id": "m1",
        "mlflow.entities.Metric": lambda *metric: metric,
        "mlflow.entities.Param": lambda *param: param,
    }
    calls = install(monkeypatch, "mlflow", "mlflow.entities", **answers)
    monkeypatch.setattr(trackers_module, "MLFLOW_BATCH", 7)
    log_twice(config)
    batches = [arguments for name, arguments in calls if name == "mlflow.MlflowClient().log_batch"]
    params = [param for _, named in batches for param in named.get("params", ())]
    assert ("rollout.max_tokens", "128") in params and ("rollout.stop", "['</a>']") in params
    assert all(len(named.get("params", ())) <= 7 for _, named in batches)
    metrics = [metric for _, named in batches for metric in named.get("metrics", ())]
    assert metrics == [("reward/mean", 0.5, 1500, 1), ("reward/mean", 0.5, 2500, 2)]
    assert calls[-1] == ("mlflow.MlflowClient().set_terminated", ("m1",))
    num_calls = len(calls)
    log_twice(config)
    assert ("mlflow.MlflowClient().update_run", ("m1", {"status": "RUNNING"})) in calls[num_calls:]
    assert not any("create_run" in name for name, _ in calls[num_calls:])


def test_trackio_knows_a_run_by_a_name_that_nobody_else_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, TrackerName.trackio)
    calls = install(monkeypatch, "trackio", **{"trackio.Histogram": lambda np_histogram: "a histogram"})
    log_twice(config)
    log_twice(config)
    names = [arguments[0]["name"] for name, arguments in calls if name == "trackio.init"]
    assert names[0] == names[1] == ids(config)["trackio"] and names[0].startswith("r-")
    logged = [arguments for name, arguments in calls if name == "trackio.init().log"]
    assert logged[0] == ({"reward/mean": 0.5, "staleness/hist": "a histogram"}, {"step": 1})


def test_the_report_goes_to_the_run_that_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, report = make_config(tmp_path, TrackerName.wandb), tmp_path / "report.html"
    calls = install(monkeypatch, "wandb", **{"wandb.init().id": "w1"})
    attach(config, report)
    assert calls == [], "there is none"
    report.write_text("<p>a report")
    attach(config, report)
    names = [name for name, _ in calls]
    assert names.index("wandb.Artifact().add_file") < names.index("wandb.init().log_artifact") < len(names) - 1
    assert names[-1] == "wandb.init().finish"


# ---- trackers that do not do what they should


class Tracker:
    """Raises in `begin` or `log`, or waits there, as it is told."""

    begins: Callable[[], None] = staticmethod(lambda: None)
    logs: Callable[[], None] = staticmethod(lambda: None)

    def begin(self, config: Config, run_id: str | None) -> str:
        self.begins()
        return "id"

    def log(self, step: int, time_s: float, values: Any) -> None:
        self.logs()

    def attach(self, file: Path) -> None:
        """Takes it."""

    def end(self) -> None:
        """Has nothing left."""


def fails() -> None:
    raise ConnectionError("no route to host\nat some address")


def feed(folder: Path, tracker: type[Tracker]) -> Trackers:
    return Trackers(make_config(folder, TrackerName.wandb), {TrackerName.wandb: tracker})


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: types.SimpleNamespace(origin="here"))


@pytest.mark.parametrize("where", ["begins", "logs"])
def test_a_failure_is_said_once_and_what_is_lost_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(Tracker, where, staticmethod(fails))
    trackers = feed(tmp_path, Tracker)
    for step in range(5):
        trackers.log(step, 0.0, VALUES)
    trackers.close(LONG_S)
    assert trackers.counts() == {"trackers/wandb_lost": 5.0}
    assert capsys.readouterr().out.splitlines() == [
        "warning: tracker wandb fails, and the run goes on without it (ConnectionError: no route to host)",
        "warning: tracker wandb lacks 5 lines",
    ]


def test_one_that_could_not_begin_is_tried_again_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers_module, "RETRY_S", 0.0)
    attempts = iter([fails, fails, lambda: None])
    monkeypatch.setattr(Tracker, "begins", staticmethod(lambda: next(attempts)()))
    trackers = feed(tmp_path, Tracker)
    for step in range(5):
        trackers.log(step, 0.0, VALUES)
    trackers.close(LONG_S)
    assert trackers.counts() == {"trackers/wandb_lost": 1.0}, "the first attempt is made before there is a line"


def test_one_that_hangs_costs_the_run_nothing_but_the_time_at_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = threading.Event()
    monkeypatch.setattr(trackers_module, "QUEUE_LINES", 10)
    monkeypatch.setattr(Tracker, "begins", staticmethod(lambda: assert_true(let_go.wait(LONG_S))))
    trackers = feed(tmp_path, Tracker)
    for step in range(30):
        trackers.log(step, 0.0, VALUES)
    assert trackers.counts() == {"trackers/wandb_lost": 20.0}
    trackers.close(0.05)
    let_go.set()
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "warning: tracker wandb is too slow, 10 lines wait for it: those that follow are left out"
    assert said[1].startswith("warning: tracker wandb has not finished within 0.05 s")


def assert_true(value: bool) -> None:
    assert value


def test_a_run_log_tells_trackers_and_notes_what_they_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tracker, "logs", staticmethod(fails))
    trackers = feed(tmp_path, Tracker)
    with RunLog(tmp_path / "r", trackers=trackers) as log:
        log.log(1, {"reward/mean": 0.5})
        trackers.close(LONG_S)
    (row,) = read_jsonl(tmp_path / "r" / "metrics.jsonl")
    assert row["reward/mean"] == 0.5 and row["trackers/wandb_lost"] in (0, 1)
    assert all(find(f"trackers/{name}_lost") for name in TrackerName)


# ---- settings


def test_a_tracker_that_is_not_installed_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(logging=LoggingConfig(trackers=[TrackerName.trackio]))
    for found in (None, types.SimpleNamespace(origin=None)):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=found: found)
        with pytest.raises(ConfigError, match=r"trackio, which is not installed: pip install trackio, or leave it out"):
            check_trackers(config)


def test_trackers_are_named_in_the_configuration() -> None:
    model = f"model.path={ROOT / 'configs' / 'models' / 'chain_sum'}"
    assert load_config([], [model, "logging.trackers=[wandb,mlflow]"]).logging.trackers == ["wandb", "mlflow"]
    with pytest.raises(ConfigError, match=r"logging\.trackers"):
        load_config([], [model, "logging.trackers=[tensorboard]"])


# ---- the real ones, where they are installed


@pytest.mark.parametrize("name", list(TrackerName))
def test_a_real_tracker_takes_two_steps_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: TrackerName
) -> None:
    pytest.importorskip(name.value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.chdir(tmp_path)
    config = make_config(tmp_path, name)
    report = tmp_path / "report.html"
    report.write_text("<p>a report")
    log_twice(config, report)
    first = ids(config)
    log_twice(config)
    assert ids(config) == first and list(asdict(config))

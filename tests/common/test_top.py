"""Watching a run over its socket, and `run.py top`."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.config import Config, ModelConfig
from common.keys import actor_keys, learner_keys, make_keys
from common.loading import save_config
from common.observer import NAME, Observer, RunOver, endpoint_of
from common.transport import HandshakeError, LearnerSocket
from common.types import Refused, RunStatus, Stop, Watch
from common.wire import WireError
from run import main
from tests.support.statuses import make_status

LIMIT_S = 20.0


class FakeLearner:
    """Answers each Watch with what `answers` has next, again and again with its last."""

    def __init__(self, config: Config, *answers: RunStatus | Stop | Refused, port: int = 0) -> None:
        self.num_asked = 0
        self._answers = list(answers)
        self._socket = LearnerSocket("127.0.0.1", port, 1, learner_keys(config))
        self.port = self._socket.port
        (config.run_dir / "endpoint").write_text(self._socket.endpoint)
        self._is_ending = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __enter__(self) -> "FakeLearner":
        return self

    def __exit__(self, *_: object) -> None:
        self._is_ending = True
        self._socket.wake()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_ending:
            self._socket.poll(0.5)
            for identity, message in self._socket.receive():
                assert isinstance(message, Watch)
                self.num_asked += 1
                self._socket.send(identity, self._answers.pop(0) if len(self._answers) > 1 else self._answers[0])
        self._socket.close()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config(name="r", runs_dir=str(tmp_path), model=ModelConfig(path="none"))
    config.run_dir.mkdir()
    save_config(config, config.run_dir / "config.yaml")
    return config


def observer_of(config: Config) -> Observer:
    return Observer(lambda: endpoint_of(config.run_dir), lambda: actor_keys(config, NAME), 1)


def until(observer: Observer, condition: Callable[[RunStatus | None], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition(observer.look(time.monotonic())):
        assert time.monotonic() < deadline, "not in time"
        observer.wait(0.05)


def test_an_observer_finds_the_learner_and_the_one_after_it_elsewhere(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.observer.ASK_S", 0.05)
    monkeypatch.setattr("common.observer.LOST_S", 0.2)
    with observer_of(config) as observer:
        assert observer.look(time.monotonic()) is None, "nobody is there yet"
        with FakeLearner(config, make_status(version=1)) as first:
            until(observer, lambda status: status is not None and status.version == 1)
        with FakeLearner(config, make_status(version=2)) as second:
            assert second.port != first.port
            until(observer, lambda status: status is not None and status.version == 2)


def test_an_observer_with_another_key_is_told_what_to_do(config: Config, tmp_path: Path) -> None:
    make_keys(tmp_path / "other")
    with FakeLearner(config, make_status()), Observer(
        lambda: endpoint_of(config.run_dir), lambda: actor_keys(config, NAME, tmp_path / "other"), 1
    ) as observer, pytest.raises(HandshakeError, match="--keys a copy of its own keys"):  # fmt: skip
        until(observer, lambda status: status is not None)


def test_what_the_learner_says_instead_of_a_status_is_passed_on(config: Config) -> None:
    with FakeLearner(config, Refused(reason="16 observers", fatal=True), Stop(reason="complete")):
        with observer_of(config) as observer, pytest.raises(WireError, match="refuses to be watched: 16 observers"):
            until(observer, lambda status: False)
        with observer_of(config) as observer, pytest.raises(RunOver, match="complete"):
            until(observer, lambda status: False)


# ---- the command


def test_top_prints_a_run_once(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeLearner(config, make_status()) as learner:
        assert main(["top", str(config.run_dir), "--once"]) == 0
        text = capsys.readouterr().out
        assert text.startswith("demo  step 10/20") and "far-away" in text and "\x1b" not in text
        address = ["--connect", f"tcp://127.0.0.1:{learner.port}", "--keys", str(config.run_dir / "keys")]
        assert main(["top", *address, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["member_states"] == ["sampling", "idle", "lost"] and told["accuracies"] == pytest.approx([0.2, 0.4])


def test_top_without_a_terminal_prints_a_line_for_each_step_until_the_run_is_over(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.observer.ASK_S", 0.05)
    monkeypatch.setattr("common.top.TURN_S", 0.05)
    said = [make_status(step=step) for step in (3, 4, 5, 5, 5)]
    with FakeLearner(config, *said, Stop(reason="the run is complete")):
        assert main(["top", str(config.run_dir)]) == 0
    assert [line.partition("  stale")[0] for line in capsys.readouterr().out.splitlines()] == [
        "critic warm-up 3/4",
        "critic warm-up 4/4",
        "step  1/20",
        "the run is over: the run is complete",
    ]


@pytest.mark.parametrize("form", [[], ["--once"]])
def test_top_waits_for_a_learner_so_long(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, form: list[str]
) -> None:
    monkeypatch.setattr("common.top.TURN_S", 0.05)
    (config.run_dir / "endpoint").write_text("tcp://127.0.0.1:1")
    make_keys(config.run_dir / "keys")
    assert main(["top", str(config.run_dir), "--timeout", "0.2", *form]) == 1
    assert capsys.readouterr().err == (
        "error: the learner at tcp://127.0.0.1:1 has not answered for 0.2 s; what the run did says run.py inspect "
        f"{config.run_dir}\n"
    )


def test_top_needs_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top"]) == 2
    assert "no run is named: give its directory, or --connect" in capsys.readouterr().err
    assert main(["top", str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err

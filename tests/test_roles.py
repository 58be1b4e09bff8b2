"""A role that is started alone: what it leaves behind when it is killed, and what its end says."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import psutil
import pytest

import run
from common.causes import CRASHED
from common.config import Config, ConfigError, ModelConfig
from common.loading import load_config
from common.processtree import LOOK_S
from common.stopping import is_crash
from tests.support.runs import ROOT

LIMIT_S = 60.0
# An engine process in a session of its own, and a daemon below it that has neither session nor parent in common. The
# title of the first is written over its environment, as vLLM does.
ENGINE = """
import os, sys, time
import setproctitle
if os.fork() == 0:
    os.setsid()
    os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(1000)", "daemon", sys.argv[1]])
setproctitle.setproctitle("ENGINE " + sys.argv[1])
time.sleep(1000)
"""
ROLE = f"""
import subprocess, sys, time
import run
with run._role("actor-7"):
    subprocess.Popen([sys.executable, "-c", {ENGINE!r}, sys.argv[1]], start_new_session=True)
    time.sleep(1000)
"""


def family(word: str) -> list[psutil.Process]:
    found = psutil.process_iter(["cmdline", "status"])
    return [p for p in found if word in " ".join(p.info["cmdline"] or ()) and p.info["status"] != psutil.STATUS_ZOMBIE]


def wait_for(number: int, word: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while len(family(word)) != number:
        assert time.monotonic() < deadline, family(word)
        time.sleep(0.02)


def test_nobody_outlives_a_role_that_was_started_alone_and_is_killed(tmp_path: Path) -> None:
    """Not even when its guardian was asked to stop too: Slurm tells every process of a job."""
    word = str(tmp_path / "family")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ASYNC_VAPO")}
    role = subprocess.Popen(
        [sys.executable, "-c", ROLE, word],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )
    try:
        wait_for(4, word)  # the role, its guardian, the engine, the daemon
        wait_for(1, "ENGINE " + word)
        itself = psutil.Process(role.pid)
        (guardian,) = [child for child in itself.children() if child.cmdline() == itself.cmdline()]
        for number in (signal.SIGTERM, signal.SIGINT):
            guardian.send_signal(number)
        time.sleep(3 * LOOK_S)  # that is what the guardian may take to notice an engine that has changed its title
        role.kill()
        role.wait(LIMIT_S)
        wait_for(0, word)
    finally:
        for process in family(word):
            process.kill()


def outcome_of(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    def role() -> int:
        raise error

    code = run._crash_safely(role, Config(name="a", model=ModelConfig(path="m")))
    return code, capsys.readouterr().err


def test_a_full_disk_is_one_sentence_and_a_crash_has_a_code_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = outcome_of(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), capsys)
    assert code == 1
    assert "error: runs/a cannot be written, no space is left on its file system: free some\n" in text
    assert outcome_of(RuntimeError("a tensor"), capsys)[0] == CRASHED
    with pytest.raises(ConfigError):  # `main` says it, with its own code
        run._crash_safely(lambda: bool(load_config(["demo"], ["nope=1"])), Config(model=ModelConfig(path="m")))


def _of_numpy() -> object:
    return np.zeros(3).reshape(2, 2)


def _of_a_socket() -> object:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(0.01)
        return silent.accept()


def _of_a_user() -> object:
    return load_config(["demo"], ["nope=1"])


def _of_a_file() -> object:
    return Path("no-such-file").read_text()


@pytest.mark.parametrize(
    ("fails", "is_one"), [(_of_numpy, True), (_of_a_socket, True), (_of_a_user, False), (_of_a_file, False)]
)
def test_actors_are_kept_where_the_learner_is_started_again_and_nowhere_else(
    fails: Callable[[], object], is_one: bool
) -> None:
    """The exit code and LearnerService are of one mind."""
    with pytest.raises((ValueError, OSError)) as caught:
        fails()
    assert is_crash(caught.value) == is_one

    def role() -> int:
        fails()
        return 0

    try:
        code = run._crash_safely(role, Config(name="a", model=ModelConfig(path="m")))
    except (ValueError, OSError):
        code = 2
    assert (code == CRASHED) == is_one


def test_a_run_directory_that_is_not_writable_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", "runs/a/logs")

    monkeypatch.setitem(run.COMMANDS, "inspect", refused)
    assert run.main(["inspect", "runs/a"]) == 1
    sentence = "error: runs/a/logs cannot be read or written, this user may not: change its owner or mode, or choose "
    assert capsys.readouterr().err == f"{sentence}another place\n"


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (["inspect", "runs/a", "--html", "page.html"], "page.html"),
        (["check", "-c", "demo", "--data", "tokens"], "tokens"),
        (["export", "runs/a", "--out", "model"], "model"),
        (["keygen", "keys"], "keys"),
        (["eval", "runs/a", "--data", "rows.jsonl"], "a file"),
    ],
)
def test_a_disk_that_is_full_while_an_open_file_is_written_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], place: str
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setitem(run.COMMANDS, arguments[0], full)
    assert run.main(arguments) == 1
    assert (
        capsys.readouterr().err == f"error: {place} cannot be written, no space is left on its file system: free some\n"
    )


def test_output_that_nobody_takes_is_no_traceback_and_does_not_hide_the_exit_code(tmp_path: Path) -> None:
    """As with `run.py keygen | true`, and of a role whose log is on a full disk."""
    reader, writer = os.pipe()
    os.close(reader)

    def code(stdout: IO[str] | int, stderr: IO[str] | int, *arguments: str) -> tuple[int, str | None]:
        command = [sys.executable, "run.py", *arguments]
        done = subprocess.run(command, cwd=ROOT, stdout=stdout, stderr=stderr, text=True, timeout=LIMIT_S, check=False)
        return done.returncode, done.stderr

    with os.fdopen(writer, "w") as gone, open("/dev/full", "w") as full:
        assert code(gone, subprocess.PIPE, "keygen", str(tmp_path / "keys")) == (128 + signal.SIGPIPE, "")
        assert code(subprocess.PIPE, full, "actors", str(tmp_path)) == (2, None)


def test_ctrl_c_before_anything_is_started_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(run.COMMANDS, "inspect", interrupted)
    assert run.main(["inspect", "runs/a"]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == ""


def test_local_actors_of_a_run_that_nobody_trains_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["actors", str(tmp_path), "--count", "2"]) == 2
    assert "no `train` that runs on this machine answers" in capsys.readouterr().err
    assert run.main(["actors", str(tmp_path / "nowhere")]) == 2

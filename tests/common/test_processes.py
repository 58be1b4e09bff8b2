"""The supervisor against children that fail in every way; each test then looks for processes that are left over."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from common.processes import deal_cores, last_error

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 60.0  # for anything that should take a moment; two cores may be busy

SLEEP = "import time; time.sleep(1000)"
READY = "from common.processes import announce_ready; announce_ready(); "
IGNORE_TERM = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
# A grandchild that leaves its session and its parent, as a daemon does.
DAEMON = f"""
import os, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-c", {IGNORE_TERM + SLEEP!r}, sys.argv[1]])
    os._exit(0)
"""


@pytest.fixture
def log_dir(tmp_path: Path) -> Iterator[Path]:
    """Also proves, after the test, that no process of the family is left."""
    folder = tmp_path / "family"
    yield folder
    deadline = time.monotonic() + 5.0
    while (left := family(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in left:
        process.kill()
    assert not left


def family(folder: Path) -> list[psutil.Process]:
    """Living processes with `folder` on their command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        is_alive = process.info["status"] != psutil.STATUS_ZOMBIE
        if is_alive and str(folder) in (process.info["cmdline"] or []):
            found.append(process)
    return found


def start(log_dir: Path, rows: list[dict[str, object]], stop_s: float | None = 1.0) -> "subprocess.Popen[str]":
    arguments = [] if stop_s is None else [str(stop_s)]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "support" / "fake_run.py"), str(log_dir), json.dumps(rows), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Exit code and message of the outcome, and all that was on the console before it."""
    output, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, errors
    *lines, last = output.splitlines()
    outcome = json.loads(last)
    return outcome["exit_code"], outcome["message"], "\n".join(lines) + errors


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def leader(code: str, name: str = "learner-0", **options: object) -> dict[str, object]:
    return {"name": name, "code": code, "is_leader": True, **options}


def follower(code: str, name: str = "actor-0", **options: object) -> dict[str, object]:
    return {"name": name, "code": code, **options}


def test_a_run_succeeds_when_the_leaders_do_and_stops_the_followers(log_dir: Path) -> None:
    rows = [leader("print('step 1')", is_echoed=True), leader("pass", "learner-1"), follower(READY + SLEEP)]
    code, message, console = finish(start(log_dir, rows))
    assert (code, message) == (0, None)
    assert console == "step 1"
    assert (log_dir / "learner-0.log").read_text() == "step 1\n"


def test_followers_may_leave_by_themselves_after_the_leaders(log_dir: Path) -> None:
    leaves = READY + "import time; time.sleep(0.3); print('left by myself')"
    finish(start(log_dir, [leader("import time; time.sleep(0.1)"), follower(leaves)], stop_s=10.0))
    assert "left by myself" in (log_dir / "actor-0.log").read_text()


def test_the_first_failure_ends_the_run_with_its_code_reason_and_log(log_dir: Path) -> None:
    fails = "import sys; print('error: the disk is full', file=sys.stderr); print('bye'); sys.exit(3)"
    code, message, _ = finish(start(log_dir, [leader(SLEEP), leader(fails, "learner-1"), follower(SLEEP)]))
    assert code == 3
    assert message == f"learner-1 ended with exit code 3: the disk is full (log: {log_dir / 'learner-1.log'})"


def test_a_signal_is_named_and_becomes_the_code_of_a_shell(log_dir: Path) -> None:
    dies = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    code, message, _ = finish(start(log_dir, [leader(dies)]))
    assert code == 128 + signal.SIGKILL
    assert message.startswith("learner-0 ended with signal SIGKILL: no output")


def test_a_follower_that_dies_at_start_ends_the_run(log_dir: Path) -> None:
    rows = [leader(SLEEP), follower("raise RuntimeError('no such model')", restarts=3)]
    code, message, _ = finish(start(log_dir, rows))
    assert code == 1
    assert "actor-0 ended with exit code 1: RuntimeError: no such model" in message


def test_a_follower_that_was_ready_is_started_again(log_dir: Path, tmp_path: Path) -> None:
    mark = tmp_path / "second"
    second_life = (
        f"import pathlib, sys; p = pathlib.Path({str(mark)!r})\nif p.exists():\n  p.with_suffix('.ok').touch()"
    )
    dies_once = READY + second_life + f"\n  {SLEEP}\np.touch(); sys.exit(7)"
    waits = f"import pathlib, time\nwhile not pathlib.Path({str(mark) + '.ok'!r}).exists(): time.sleep(0.02)"
    code, message, console = finish(start(log_dir, [leader(waits), follower(dies_once, restarts=1)]))
    assert (code, message) == (0, None)
    assert "actor-0 ended with exit code 7" in console and "starting it again in 1 s" in console


def test_restarts_are_limited(log_dir: Path) -> None:
    rows = [leader(SLEEP), follower(READY + "raise SystemExit(7)", restarts=1)]
    code, message, _ = finish(start(log_dir, rows))
    assert code == 7
    assert message.endswith("its 1 restarts are used up")


def test_a_follower_that_never_gets_ready_is_named(log_dir: Path) -> None:
    rows = [leader(SLEEP), follower("print('loading'); " + SLEEP, start_timeout_s=0.5)]
    code, message, _ = finish(start(log_dir, rows))
    assert code == 1
    assert message.startswith("actor-0 was not ready within 0.5 s; its last words: loading")


def test_stubborn_children_and_daemons_are_killed(log_dir: Path) -> None:
    """The fixture finds what is left over."""
    rows = [leader(DAEMON + "import time; time.sleep(0.5)"), follower(READY + DAEMON + IGNORE_TERM + SLEEP)]
    assert finish(start(log_dir, rows))[0] == 0


def test_the_leftovers_of_a_dead_follower_are_gone_before_its_next_life(log_dir: Path, tmp_path: Path) -> None:
    pid, verdict = tmp_path / "pid", tmp_path / "verdict"
    grandchild = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(1000)"
    first_life = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {grandchild!r}, sys.argv[1]], start_new_session=True)
while not pid.exists() or not pid.read_text(): time.sleep(0.02)
sys.exit(7)"""
    second_life = f"""
import pathlib, psutil, time
pid = pathlib.Path({str(pid)!r})
if pid.exists():
    pathlib.Path({str(verdict)!r}).write_text(str(psutil.pid_exists(int(pid.read_text()))))
    time.sleep(1000)"""
    waits = f"import pathlib, time\nwhile not pathlib.Path({str(verdict)!r}).exists(): time.sleep(0.02)"
    rows = [leader(waits), follower(READY + second_life + first_life, restarts=1)]
    assert finish(start(log_dir, rows))[0] == 0
    assert verdict.read_text() == "False"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_everything_within_10_s(log_dir: Path, number: signal.Signals) -> None:
    """With the real deadlines, and children that do not listen."""
    stubborn = IGNORE_TERM + "print('up', flush=True); " + SLEEP
    process = start(log_dir, [leader(stubborn, is_echoed=True), follower(DAEMON + stubborn)], stop_s=None)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    began = time.monotonic()
    process.send_signal(number)
    code, message, _ = finish(process)
    assert time.monotonic() - began < 10.0
    assert (code, message) == (128 + number, f"interrupted by {number.name}")


def test_a_second_interrupt_ends_the_patience(log_dir: Path) -> None:
    stubborn = IGNORE_TERM + "print('up', flush=True); " + SLEEP
    process = start(log_dir, [leader(stubborn, is_echoed=True)], stop_s=LIMIT_S)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)  # two signals at once would be one
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 128 + signal.SIGINT
    assert time.monotonic() - began < 5.0


def test_children_and_grandchildren_die_with_a_killed_supervisor(log_dir: Path) -> None:
    grandchild = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}, sys.argv[1]]); "
    process = start(log_dir, [leader(grandchild + SLEEP), follower(grandchild + IGNORE_TERM + SLEEP)])
    wait_until(lambda: len(family(log_dir)) == 6)  # supervisor, guardian, two children, two grandchildren
    process.kill()
    process.communicate(timeout=LIMIT_S)
    wait_until(lambda: not family(log_dir))


def test_a_child_runs_on_its_cores(log_dir: Path) -> None:
    core = max(os.sched_getaffinity(0))
    prints = "import os; print(sorted(os.sched_getaffinity(0)))"
    _, _, console = finish(start(log_dir, [leader(prints, is_echoed=True, cores=[core])]))
    assert console == f"[{core}]"


def test_a_console_that_goes_away_ends_the_run(log_dir: Path) -> None:
    chatty = "import time\nwhile True: print('x' * 1000, flush=True); time.sleep(0.01)"
    process = start(log_dir, [leader(chatty, is_echoed=True)])
    assert process.stdout is not None and process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=LIMIT_S) == 0


def test_cores_are_dealt_in_shares_or_in_turns() -> None:
    assert deal_cores([0, 1], 2) == [(0,), (1,)]
    assert deal_cores([0, 1, 2, 3, 4], 2) == [(0, 1, 2), (3, 4)]
    assert deal_cores([4, 6], 3) == [(4,), (6,), (4,)]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("starting\nerror: no such file\n[W] shutting down\n", "no such file"),
        ("Traceback (most recent call last):\n  File ...\nKeyError: 'x'\nlast line\n", "KeyError: 'x'"),
        ("\x1b[31mtorch.OutOfMemoryError: 3 GiB\x1b[0m\n", "torch.OutOfMemoryError: 3 GiB"),
        ("just this\n\n", "just this"),
        ("", "no output"),
    ],
)
def test_the_reason_is_the_line_that_says_most(tmp_path: Path, text: str, line: str) -> None:
    log = tmp_path / "role.log"
    log.write_text(text)
    assert last_error(log) == line

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

from common.causes import CRASHED
from common.child import Child, ChildSpec
from common.config import ConfigError
from common.console import Console
from common.control import PACKET_BYTES, Status, ask, status
from common.family import Family
from common.processes import MAX_FOLLOWERS, Supervisor, deal_cores
from common.processtree import Guardian
from common.stopping import ECHO_S
from tests.support.fake_run import to_spec

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 60.0  # for anything that should take a moment; two cores may be busy

SLEEP = "import time; time.sleep(1000)"
READY = "from common.child import announce_ready; announce_ready(); "
IGNORE_TERM = (
    "import signal, time; [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)]; "
)
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
    dies = "import os, signal; print('checkpoint is complete', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    code, message, _ = finish(start(log_dir, [leader(dies)]))
    assert code == 128 + signal.SIGKILL
    assert message.startswith("learner-0 was killed with SIGKILL, from outside or because memory ran out")
    assert "checkpoint" not in message, "the last line of its log is no reason"


def test_a_follower_that_dies_at_start_is_given_up_and_does_not_end_the_run(log_dir: Path) -> None:
    asks = (
        "import time; from pathlib import Path; from common.control import status\n"
        f"while not (said := status(Path({str(log_dir)!r}))).given_up: time.sleep(0.02)\nprint(said)"
    )
    rows = [leader(asks, is_echoed=True), follower("raise RuntimeError('no such model')", restarts=3)]
    code, message, console = finish(start(log_dir, rows))
    assert (code, message) == (0, None)
    why = "actor-0 ended with exit code 1: RuntimeError: no such model"
    assert f"warning: {why}" in console and "before it was ready; it is not started again" in console
    assert f"Status(wanted=1, active=0, given_up=('{why}" in console


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


WAITS_FOR_GIVEN_UP = """
import sys, time
from pathlib import Path
from common.control import status
while not status(Path(sys.argv[1])).given_up: time.sleep(0.02)
"""


def test_a_follower_s_restarts_are_limited_and_the_run_goes_on_without_it(log_dir: Path) -> None:
    rows = [leader(WAITS_FOR_GIVEN_UP), follower(READY + "raise SystemExit(7)", restarts=1)]
    code, message, console = finish(start(log_dir, rows))
    assert (code, message) == (0, None)
    assert "actor-0 ended with exit code 7" in console and "its 1 restarts within 3600 s are used up" in console


def test_a_status_fits_into_an_answer_however_many_followers_were_given_up(tmp_path: Path) -> None:
    names = ["learner-0", *(f"actor-{i}" for i in range(MAX_FOLLOWERS))]
    specs = [ChildSpec(name=name, command=(), environment={}, is_leader=name == "learner-0") for name in names]
    supervisor = Supervisor(specs, tmp_path)
    for child in supervisor._followers:
        child.why_given_up = "x" * 500
    told = supervisor._command({"command": "status"})
    assert len(json.dumps(told)) <= PACKET_BYTES and told["given_up"][-1].endswith(" more")


def test_a_follower_that_never_gets_ready_is_named(log_dir: Path) -> None:
    rows = [leader(WAITS_FOR_GIVEN_UP), follower("print('loading'); " + SLEEP, start_timeout_s=0.5)]
    code, _, console = finish(start(log_dir, rows))
    assert code == 0
    assert "actor-0 was not ready within 0.5 s" in console


class Dying(Child):
    """SIGKILL was sent, and the kernel still frees its memory."""

    is_running, is_ready, started_at = True, False, 0.0  # type: ignore[assignment]

    def send_signal(self, number: int) -> None:
        """As good as sent."""


def test_that_a_follower_was_not_ready_in_time_is_said_once(log_dir: Path) -> None:
    specs = [to_spec(row, str(log_dir)) for row in (leader("pass"), follower("pass"))]
    supervisor, said = Supervisor(specs, log_dir), list[str]()
    supervisor._family.say = said.append  # type: ignore[method-assign]
    child = Dying(specs[1], log_dir)
    for _ in range(3):
        supervisor._look_after(child, time.monotonic())
    assert len(said) == 1 and "actor-0 was not ready within 300 s" in said[0]


# ---- leaders that are started again


def lives(tmp_path: Path, *codes: str) -> str:
    """A program that does something else in each of its lives; they are counted in `tmp_path`."""
    return f"""
import os, signal, sys, time
from pathlib import Path
count = Path({str(tmp_path / "lives")!r})
life = len(count.read_text()) if count.exists() else 0
count.write_text("x" * (life + 1))
exec({list(codes)!r}[life])
"""


KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


def test_a_killed_leader_is_started_again_and_the_followers_stay(log_dir: Path, tmp_path: Path) -> None:
    again = "print('restarted', os.environ['ASYNC_VAPO_RESTARTED'])"
    rows = [
        leader(lives(tmp_path, "time.sleep(0.5); " + KILLED, again), restarts=1, is_echoed=True),
        follower("print('started', flush=True); " + READY + SLEEP),
    ]
    code, message, console = finish(start(log_dir, rows))
    assert (code, message) == (0, None)
    assert "learner-0 was killed with SIGKILL" in console and "starting the learner again in 1 s" in console
    assert "restarted 1" in console
    assert (log_dir / "actor-0.log").read_text().count("started") == 1


def test_all_ranks_are_started_again_and_the_one_that_was_killed_is_blamed(log_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    suffers = f"time.sleep(0.3); sys.exit({CRASHED})"
    rows = [
        leader(lives(tmp_path, suffers, "pass"), restarts=1),
        leader(lives(tmp_path / "one", KILLED, "pass"), "learner-1", restarts=1),
    ]
    code, message, console = finish(start(log_dir, rows))
    assert (code, message) == (0, None)
    assert "learner-1 was killed with SIGKILL" in console and "learner-0 ended" not in console


def test_a_rank_that_waits_for_a_lost_one_does_not_keep_the_learner_from_its_restart(
    log_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    rows = [
        leader(lives(tmp_path, "time.sleep(1000)", "pass"), restarts=1),
        leader(lives(tmp_path / "one", KILLED, "pass"), "learner-1", restarts=1),
    ]
    assert finish(start(log_dir, rows))[0] == 0


def test_a_follower_that_lost_leaders_have_sent_home_is_started_again_also_when_it_leaves_after_their_restart(
    log_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    again, back = tmp_path / "again", tmp_path / "back"
    wait = "[time.sleep(0.02) for _ in range(1500) if not Path({!r}).exists()]; "
    at_work = (
        f"Path({str(again)!r}).touch(); {wait.format(str(back))}sys.exit(0 if Path({str(back)!r}).exists() else 3)"
    )
    leaves = READY + wait.format(str(again)) + "sys.exit(0)"
    rows = [
        leader(lives(tmp_path, f"time.sleep(0.5); sys.exit({CRASHED})", at_work), restarts=1),
        follower(lives(tmp_path / "one", leaves, f"Path({str(back)!r}).touch(); time.sleep(1000)")),
    ]
    assert finish(start(log_dir, rows))[0] == 0


def test_who_is_sent_home_by_leaders_that_were_started_again_and_are_done_stays_at_home(
    log_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    again = tmp_path / "again"
    wait = f"[time.sleep(0.02) for _ in range(1500) if not Path({str(again)!r}).exists()]; "
    rows = [
        leader(lives(tmp_path, KILLED, f"Path({str(again)!r}).touch(); time.sleep(1.5)"), restarts=1),
        follower(lives(tmp_path / "one", READY + wait, READY + SLEEP)),
    ]
    assert finish(start(log_dir, rows, stop_s=30.0))[0] == 0
    assert (tmp_path / "one" / "lives").read_text() == "x"


def test_a_leader_that_cannot_be_started_again_ends_the_run_with_a_sentence(log_dir: Path, tmp_path: Path) -> None:
    blocks = "import pathlib; log = pathlib.Path(sys.argv[1], 'learner-0.log'); log.unlink(); log.mkdir(); "
    code, message, _ = finish(start(log_dir, [leader(lives(tmp_path, blocks + KILLED), restarts=1), follower(SLEEP)]))
    assert (
        code == 1
        and message.startswith("learner-0 cannot be started: ")
        and "a folder is where a file should" in message
    )


def test_a_leader_s_restarts_are_limited(log_dir: Path, tmp_path: Path) -> None:
    crash = f"print('ValueError: x'); sys.exit({CRASHED})"
    code, message, console = finish(start(log_dir, [leader(lives(tmp_path, crash, crash), restarts=1)]))
    assert code == CRASHED
    assert "ValueError: x" in message and message.endswith("its 1 restarts within 3600 s are used up")
    assert console.count("starting the learner again") == 1


@pytest.mark.parametrize("exit_code", [1, 2, 143])
def test_a_leader_that_gives_up_by_itself_is_not_started_again(log_dir: Path, tmp_path: Path, exit_code: int) -> None:
    ends = f"print('error: as configured'); sys.exit({exit_code})"
    code, message, _ = finish(start(log_dir, [leader(lives(tmp_path, ends), restarts=3)]))
    assert code == exit_code and "as configured" in message


# ---- followers that come and go by command


def test_followers_are_added_and_removed_while_the_run_goes_on(log_dir: Path) -> None:
    drains = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('drained'))); "
    ends = "import signal, sys; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0)); "
    process = start(
        log_dir, [leader(ends + "print('up', flush=True); " + SLEEP, is_echoed=True), follower(drains + READY + SLEEP)]
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    assert (log_dir / "control").stat().st_mode & 0o777 == 0o600
    assert ask(log_dir, {"command": "resize", "count": 3})["done"] == [
        "actor-1 is started on cores any",
        "actor-2 is started on cores any",
    ]
    wait_until(lambda: all((log_dir / f".actor-{i}.ready").exists() for i in range(3)))
    with pytest.raises(ConfigError, match="there is room for three"):
        ask(log_dir, {"command": "resize", "count": 5})
    with pytest.raises(ConfigError, match="100000 local actors are more than 512"):
        ask(log_dir, {"command": "resize", "count": 100_000})
    assert status(log_dir) == Status(wanted=3, active=3)
    assert ask(log_dir, {"command": "resize", "count": 1})["done"] == [
        "actor-1 leaves; it has 30 s to finish what it samples",
        "actor-2 leaves; it has 30 s to finish what it samples",
    ]
    wait_until(lambda: "drained" in (log_dir / "actor-2.log").read_text())
    assert status(log_dir) == Status(wanted=1, active=1)
    with pytest.raises(ConfigError, match="does not know the request"):
        ask(log_dir, {"command": "resize", "count": -1})
    wait_until(lambda: sum(child.info["cmdline"][2].startswith(drains) for child in family(log_dir)) == 1)
    (log_dir / "actor-1.log").rename(log_dir / "old.log")
    (log_dir / "actor-1.log").mkdir()  # as if there were no descriptor left for it
    (line,) = ask(log_dir, {"command": "resize", "count": 2})["done"]
    assert line.startswith("actor-1 cannot be started: ") and "a folder is where a file should be" in line
    assert status(log_dir) == Status(
        wanted=2, active=1, given_up=(f"{line}; its 0 restarts within 3600 s are used up",)
    )
    (leads,) = [child for child in family(log_dir) if child.info["cmdline"][2].startswith(ends)]
    leads.send_signal(signal.SIGUSR1)
    assert finish(process)[0] == 0
    with pytest.raises(ConfigError, match="no `train` that runs on this machine answers"):
        status(log_dir)


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


def finishes(code: int, after_s: float = 0.5) -> str:
    """A leader that takes its time to finish when it is asked to."""
    return f"""
import signal, sys, time
def finish(number, frame):
    time.sleep({after_s}); print("saved", flush=True); sys.exit({code})
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, finish)
print("up", flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_lets_the_leaders_finish_while_the_followers_stay(log_dir: Path, number: signal.Signals) -> None:
    asked = "import signal, sys, time; signal.signal(signal.SIGINT, lambda *_: sys.exit(print(time.time()))); "
    process = start(
        log_dir, [leader(finishes(128 + number), is_echoed=True), follower(asked + READY + SLEEP)], stop_s=2.0
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    wait_until((log_dir / ".actor-0.ready").exists)
    began = time.time()
    process.send_signal(number)
    code, message, console = finish(process)
    assert (code, message, console) == (128 + number, f"interrupted by {number.name}", "saved")
    assert float((log_dir / "actor-0.log").read_text()) > began + 0.5


def test_leaders_that_do_not_finish_are_killed_and_that_is_said(log_dir: Path) -> None:
    process = start(log_dir, [leader(IGNORE_TERM + "print('up', flush=True); " + SLEEP, is_echoed=True)], stop_s=0.5)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    code, message, _ = finish(process)
    assert code == 143
    assert message.startswith("interrupted by SIGTERM; learner-0 did not stop within 0.5 s (learner.stop_timeout_s)")


def test_a_sigterm_that_comes_twice_within_a_moment_is_one_interrupt(log_dir: Path) -> None:
    process = start(log_dir, [leader(finishes(143, after_s=1.0), is_echoed=True)], stop_s=LIMIT_S)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)  # two signals at once would be one
    process.send_signal(signal.SIGTERM)
    assert finish(process) == (143, "interrupted by SIGTERM", "saved")


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


def test_a_run_goes_on_without_its_guardian(log_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    gone = tmp_path / "gone"
    wait = f"[time.sleep(0.02) for _ in range(1500) if not Path({str(gone)!r}).exists()]; "
    rows = [
        leader(f"from pathlib import Path; import time; {wait}time.sleep(4)"),
        follower(lives(tmp_path / "one", READY + wait + KILLED, READY + "time.sleep(1000)"), restarts=1),
    ]
    process = start(log_dir, rows)
    wait_until(lambda: len(family(log_dir)) == 4)
    supervisor = psutil.Process(process.pid)
    (guardian,) = [child for child in supervisor.children() if child.cmdline() == supervisor.cmdline()]
    guardian.kill()
    gone.touch()
    code, message, console = finish(process)
    assert (code, message) == (0, None)
    assert "actor-0 is started" in console or "starting it again" in console
    assert console.count("the guardian was killed") == 1


def test_a_guardian_is_made_without_losing_a_signal_that_comes_meanwhile() -> None:
    code = (
        "import os, signal\n"
        "from common.processtree import Guardian\n"
        "from common.stopping import Interrupted, stopped_by_signals\n"
        "os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
        "try:\n"
        "    with stopped_by_signals(), Guardian(): print('goes on')\n"
        "except Interrupted as interrupt: print(interrupt)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.stdout, done.stderr) == ("interrupted by SIGTERM\n", "")


def test_the_guardian_forgets_who_has_ended_as_its_number_may_be_a_stranger_s(
    log_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, pids = list[tuple[str, int]](), list[int]()
    monkeypatch.setattr(Guardian, "protect", lambda _, session: told.append(("protect", session)))
    monkeypatch.setattr(Guardian, "forget", lambda _, session: told.append(("forget", session)))
    ends = to_spec(follower("pass"), str(log_dir))
    stays = to_spec(leader("import time; time.sleep(1000)"), str(log_dir))
    children = [Child(spec, log_dir) for spec in (ends, stays)]
    log_dir.mkdir()
    with Family(lambda: children, lambda _: None, None, Console()) as supervised:
        for child in children:
            supervised.start(child)
            pids.append(child.popen.pid)
        children[0].popen.wait(LIMIT_S)
        supervised.kill_orphans()
        supervised.kill_orphans()
        assert told == [("protect", pids[0]), ("protect", pids[1]), ("forget", pids[0])]


def test_a_guardian_kills_whom_it_was_told_of_but_for_those_that_it_was_to_forget(log_dir: Path) -> None:
    def stranger() -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, "-c", SLEEP, str(log_dir)], start_new_session=True)

    forgotten, mine = stranger(), stranger()
    holds = (
        "import os, signal, sys; from common.processtree import Guardian\n"
        "with Guardian() as guardian:\n"
        "    for pid in sys.argv[1:]: guardian.protect(int(pid))\n"
        "    guardian.forget(int(sys.argv[1]))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    try:
        subprocess.run([sys.executable, "-c", holds, str(forgotten.pid), str(mine.pid)], cwd=ROOT, timeout=LIMIT_S)
        assert mine.wait(timeout=LIMIT_S) == -signal.SIGKILL
        assert forgotten.poll() is None, "all are killed in one go"
    finally:
        for process in (forgotten, mine):
            process.kill()
            process.wait()


def test_logs_that_somebody_removed_are_begun_anew_and_the_run_goes_on(log_dir: Path, tmp_path: Path) -> None:
    removes = f"import shutil; shutil.rmtree({str(log_dir)!r}); sys.exit({CRASHED})"
    rows = [leader(lives(tmp_path, removes, "print('done')"), restarts=1, is_echoed=True)]
    code, message, console = finish(start(log_dir, rows))
    assert (code, message) == (0, None)
    assert "learner-0 ended with exit code 70: its log cannot be read (No such file or directory)" in console
    assert (log_dir / "learner-0.log").read_text() == "done\n"


def test_who_was_ready_stays_so_without_its_file_until_its_next_life(log_dir: Path) -> None:
    log_dir.mkdir()
    child = Child(to_spec(follower("pass"), str(log_dir)), log_dir)
    for _ in range(2):
        child.start({})
        assert child.popen.wait(LIMIT_S) == 0 and not child.is_ready
        child.ready_path.touch()
        assert child.is_ready
        child.ready_path.unlink()
        assert child.is_ready


def test_the_reason_of_an_end_is_not_an_earlier_run_s(log_dir: Path) -> None:
    log_dir.mkdir()
    (log_dir / "learner-0.log").write_text("error: no space is left\n")
    _, message, _ = finish(start(log_dir, [leader("raise KeyError('x')")]))
    assert message.startswith("learner-0 ended with exit code 1: KeyError: 'x'")


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


def test_a_console_that_goes_away_with_an_interrupt_does_not_end_the_patience(log_dir: Path) -> None:
    """Ctrl-C ends `tee` too, in `train | tee`."""
    saves = "import pathlib, sys; pathlib.Path(sys.argv[1], 'saved').touch()"
    chatty = "import time\nwhile not asked: print('x' * 1000, flush=True); time.sleep(0.01)\n"
    asked = (
        "import signal\nasked = []\nsignal.signal(signal.SIGINT, lambda *_: asked.append(1))\n"
        "signal.signal(signal.SIGTERM, lambda *_: asked.append(1))\n"
    )
    more = "for _ in range(50): print('y' * 1000, flush=True); time.sleep(0.01)\n"
    process = start(log_dir, [leader(asked + chatty + more + saves, is_echoed=True)])
    assert process.stdout is not None and process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.stdout.close()
    assert process.wait(timeout=LIMIT_S) == 0
    (log_dir / "saved").unlink()  # it is there: the leader had its time


def test_ctrl_c_is_no_second_request_when_the_console_went_first(
    log_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("common.family.time.monotonic", lambda: now)
    supervised = Family(list, lambda _: None, None, Console())
    for number in (signal.SIGPIPE, signal.SIGINT, signal.SIGPIPE):
        supervised._note(number)
    assert supervised.interrupts == [signal.SIGPIPE]
    now += ECHO_S
    for number in (signal.SIGPIPE, signal.SIGINT):
        supervised._note(number)
    assert supervised.interrupts == [signal.SIGPIPE, signal.SIGINT]


def test_cores_are_dealt_in_shares_or_in_turns() -> None:
    assert deal_cores([0, 1], 2) == [(0,), (1,)]
    assert deal_cores([0, 1, 2, 3, 4], 2) == [(0, 1, 2), (3, 4)]
    assert deal_cores([4, 6], 3) == [(4,), (6,), (4,)]

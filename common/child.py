"""One process of a run as its supervisor sees it: how it is started, whether it is ready, how it ended."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.causes import CRASHED, count_oom_kills, disk_problem, how_it_ended
from common.processtree import child_setup
from common.restarts import RestartBudget

READY_FILE = "ASYNC_VAPO_READY_FILE"  # environment variable: file that a follower makes when it is ready


def announce_ready() -> None:
    """Called by a follower that has started up, so that it is started again if it dies later."""
    path = os.environ.get(READY_FILE)
    if path:
        Path(path).touch()


class CannotStart(RuntimeError):
    """The system does not let a process begin, for want of memory, processes or descriptors; one sentence."""


@dataclass(frozen=True, kw_only=True)
class ChildSpec:
    """How to start one process of a run."""

    name: str  # also of its log file
    command: tuple[str, ...]
    environment: Mapping[str, str]  # on top of the supervisor's own
    cores: tuple[int, ...] = ()  # that it may run on; empty: any
    is_leader: bool = False
    is_echoed: bool = False  # its standard output also goes to the console
    restarts: int = 0  # within any restart_window_s; of leaders, of all together
    restart_window_s: float = 3600.0
    start_timeout_s: float = 300.0  # followers: from start to announce_ready
    leave_timeout_s: float = 30.0  # followers: from being asked to leave while the run goes on, to being killed


class Child:
    """One process and its log. States: started -> (ready ->) exited, and back to started.

    Of a follower that is not running: `start_again_at` is set while it waits for its next life, `why_given_up` when
    there is none. `leave_by` is set when it was asked to leave.
    """

    def __init__(self, spec: ChildSpec, log_dir: Path) -> None:
        self.spec = spec
        self.budget = RestartBudget(spec.restarts, spec.restart_window_s)
        self.log_path = log_dir / f"{spec.name}.log"
        self.ready_path = log_dir / f".{spec.name}.ready"
        self.was_ready = False  # in this or an earlier life
        self.is_settled = False  # its end was dealt with
        self._has_announced = False  # in this life, that it is ready
        self.start_again_at: float | None = None  # monotonic
        self.leave_by: float | None = None  # monotonic
        self.why_given_up: str | None = None
        self._popen: subprocess.Popen[bytes] | None = None

    def start(self, environment: Mapping[str, str]) -> None:
        """Start in a session of its own, with `environment` on top; output to the log, stdout of an echoed child to a
        pipe. Raises CannotStart."""
        self.ready_path.unlink(missing_ok=True)
        self.start_again_at, self.is_settled, self._has_announced = None, False, False
        own = {READY_FILE: str(self.ready_path.absolute()), "PYTHONUNBUFFERED": "1"}
        try:
            self.log_path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have removed it
            with self.log_path.open("ab") as log:
                self._log_before = log.tell()  # of earlier lives and runs
                self._popen = subprocess.Popen(
                    self.spec.command,
                    env={**os.environ, **self.spec.environment, **environment, **own},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE if self.spec.is_echoed else log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=child_setup(self.spec.cores),
                )
        except (OSError, subprocess.SubprocessError) as error:
            why = disk_problem(error, self.log_path) or str(error)
            raise CannotStart(f"{self.spec.name} cannot be started: {why}") from error
        self.started_at = time.monotonic()
        self._oom_kills_before = count_oom_kills()

    @property
    def popen(self) -> "subprocess.Popen[bytes]":
        assert self._popen is not None
        return self._popen

    @property
    def was_started(self) -> bool:
        return self._popen is not None

    @property
    def is_running(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    @property
    def is_ready(self) -> bool:
        self._has_announced = self._has_announced or self.ready_path.exists()
        self.was_ready = self.was_ready or self._has_announced
        return self._has_announced

    @property
    def is_active(self) -> bool:
        """Takes part in the run, or will again."""
        return self.leave_by is None and (self.is_running or self.start_again_at is not None)

    @property
    def was_sent_home(self) -> bool:
        """It ended well and was not asked to by the supervisor."""
        return self.is_settled and self.leave_by is None and self._returncode == 0

    def send_signal(self, number: int) -> None:
        """To the process itself; its own children are its business as long as it lives."""
        if self.is_running:
            self.popen.send_signal(number)

    def how_it_ended(self) -> str:
        """One sentence with its name, the reason and the log."""
        oom_kills = count_oom_kills() - self._oom_kills_before
        return how_it_ended(self.spec.name, self._returncode, self.log_path, oom_kills, self._log_before)

    @property
    def exit_code(self) -> int:
        """As a shell reports it: 128 + n for signal n."""
        return self._returncode if self._returncode >= 0 else 128 - self._returncode

    @property
    def has_crashed(self) -> bool:
        """It ended in a way that it has not chosen, so that another life may fare better."""
        asked = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
        return self._returncode == CRASHED or (self._returncode < 0 and self._returncode not in asked)

    @property
    def has_finished(self) -> bool:
        """It ended well, or as it was asked to."""
        asked = (128 + signal.SIGTERM, 128 + signal.SIGINT)
        return self.was_started and not self.is_running and self._returncode in (0, *asked)

    @property
    def was_killed(self) -> bool:
        return self._returncode < 0

    @property
    def _returncode(self) -> int:
        code = self.popen.poll()
        assert code is not None
        return code

"""What a measurement cost, and on what: the last line of every benchmark."""

import os
import platform
import resource
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


WRITTEN = ("docs", "benchmarks/results")  # no measurement depends on what is here


def commit() -> str:
    """The commit that is checked out, "+" behind it when files that are measured differ from it; "unknown" without
    git."""
    try:
        head = _git("rev-parse", "--short=7", "HEAD").strip()
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *(f":!{path}" for path in WRITTEN))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True, kw_only=True)
class Cost:
    wall_s: float
    cpu_s: float  # of this process and of all its children that have ended
    cores: int  # that this process may use
    load: float  # of the machine when it began, a mean over a minute
    commit: str
    machine: str

    def __str__(self) -> str:
        return (
            f"cost: {self.wall_s:.0f} s, {self.cpu_s:.0f} CPU s on {self.cores} cores ({self.machine}), load "
            f"{self.load:.1f} before it; commit {self.commit}"
        )


class Meter:
    """Started when it is made."""

    def __init__(self) -> None:
        self._wall_s, self._cpu_s, self._load = time.monotonic(), _cpu_s(), os.getloadavg()[0]
        self._own_s, self._commit = time.process_time(), commit()

    def cost(self, started_s: float | None = None) -> Cost:
        """`started_s`: CPU seconds of the processes that were started, where nobody waits for some of them."""
        cpu_s = _cpu_s() - self._cpu_s
        if started_s is not None:
            cpu_s = time.process_time() - self._own_s + started_s
        return Cost(
            wall_s=round(time.monotonic() - self._wall_s, 1),
            cpu_s=round(cpu_s, 1),
            cores=len(os.sched_getaffinity(0)),
            load=round(self._load, 2),
            commit=self._commit,
            machine=platform.machine(),
        )


def _cpu_s() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )

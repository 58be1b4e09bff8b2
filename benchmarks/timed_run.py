"""A run of `run.py train`, and what tells whether to believe its times: others on the machine, and its speed."""

import hashlib
import os
import resource
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil

from benchmarks.cost import commit
from benchmarks.demo import train

YARDSTICK = 256 << 20  # bytes


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """Of one run, its start and its evaluations included."""

    wall_s: float
    cpu_s: float
    others: float  # share of the machine's CPU time that was not the run's
    load: float  # of the machine before it, a mean over a minute
    yardstick_s: float  # what fixed work on both cores took before it
    commit: str


def timed(arguments: Sequence[str], timeout_s: float, cores: Sequence[int]) -> RunCost:
    """Runs the command. Raises as benchmarks.demo.train does."""
    yardstick_s = _yardstick_s(cores)
    load, started_s, machine_s, own_s = os.getloadavg()[0], time.monotonic(), _machine_s(), _children_s()
    train(arguments, timeout_s)
    wall_s, cpu_s = time.monotonic() - started_s, _children_s() - own_s
    others = max(0.0, _machine_s() - machine_s - cpu_s) / (wall_s * (os.cpu_count() or 1))
    return RunCost(wall_s=wall_s, cpu_s=cpu_s, others=others, load=load, yardstick_s=yardstick_s, commit=commit())


def _yardstick_s(cores: Sequence[int]) -> float:
    """Seconds to hash YARDSTICK bytes on each core, all at once."""
    content = bytes(YARDSTICK)

    def hashed(core: int) -> float:
        os.sched_setaffinity(0, {core})  # of this thread
        started_s = time.perf_counter()
        hashlib.sha256(content).digest()
        return time.perf_counter() - started_s

    with ThreadPoolExecutor(len(cores)) as pool:
        return statistics.mean(pool.map(hashed, cores))


def _machine_s() -> float:
    """CPU seconds of everything since the machine was started."""
    times = psutil.cpu_times()
    return float(sum(times[:7]) - times.idle - times.iowait)


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

"""Runs a command on given cores and follows the CPU seconds of all its processes."""

import os
import re
import subprocess
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from common.processtree import child_setup

CPU_EVERY_S = 0.5  # between two looks
STOP_S = 60.0  # from SIGTERM to SIGKILL


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a command used. Times are Unix seconds."""

    launched: float
    load: float  # of the machine when it was launched, a mean over a minute
    samples: list[list[float]]  # [time, CPU seconds of all processes until then], in the order of time

    def cpu_at(self, at: float) -> float:
        """CPU seconds until then, on a straight line between two looks; none before the launch."""
        points = [[self.launched, 0.0], *self.samples]
        index = bisect_right(points, at, key=lambda point: point[0])
        if index == 0 or index == len(points):
            return points[min(index, len(points) - 1)][1]
        (before, low), (after, high) = points[index - 1 : index + 1]
        return low + (high - low) * (at - before) / (after - before)


def run_measured(
    command: Sequence[str], environment: Mapping[str, str], cores: Sequence[int], log: Path, timeout_s: float
) -> Usage:
    """Runs `command` to its end; when this process is stopped, so is the command. Its output goes to `log`.

    Raises RuntimeError, with the last error of the log, for another exit code than 0 or after `timeout_s`.
    """
    launched, load = time.time(), os.getloadavg()[0]
    seconds: dict[int, float] = {}  # by pid; those that have ended stay
    samples: list[list[float]] = []
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, preexec_fn=child_setup(cores)
        ) as child,
    ):
        try:
            while child.poll() is None:
                if time.time() - launched > timeout_s:
                    raise RuntimeError(f"still running after {timeout_s:.0f} s")
                seconds |= cpu_seconds(child.pid)
                samples.append([time.time(), sum(seconds.values())])
                time.sleep(CPU_EVERY_S)
        except BaseException:
            child.terminate()
            try:
                child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()
            raise
    if child.returncode != 0:
        raise RuntimeError(last_error(log.read_text(errors="replace")) or f"exit code {child.returncode}")
    return Usage(launched=launched, load=load, samples=samples)


def cpu_seconds(pid: int) -> dict[int, float]:
    """Of a process and of all below it, by pid."""
    found = {}
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            found[process.pid] = times.user + times.system
    except psutil.NoSuchProcess:
        pass
    return found


def last_error(log: str) -> str:
    """The last error that an exception's traceback in `log` ends with, "" if there is none."""
    found: list[str] = re.findall(r"^(?:\[rank\d+\]: )?((?:\w+\.)*\w*(?:Error|Exception)(?:: .*)?)$", log, flags=re.M)
    return found[-1] if found else ""

"""Why a process ended, in one sentence: its exit status, the last error in its log, what the kernel has counted."""

import errno
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

CRASHED = 70  # EX_SOFTWARE: exit code of a role that ends with an error that nobody foresaw; its log has the traceback
TAIL_BYTES = 64 * 1024

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_RANK = re.compile(r"^\[rank\d+\]:\s*")  # torch puts it before every line of a rank's traceback
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Interrupt|Timeout|Exit)\b")
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # the log cannot know why
_CGROUPS = Path("/sys/fs/cgroup")

_DISK = {
    errno.ENOSPC: "no space is left on its file system: free some",
    errno.EDQUOT: "the quota of its file system is used up: free some space",
    errno.EFBIG: "the file would be larger than allowed: raise the limit (ulimit -f)",
    errno.EROFS: "its file system is read-only: choose another runs_dir",
    errno.EACCES: "this user may not write there: choose another runs_dir",
    errno.EPERM: "this user may not write there: choose another runs_dir",
    errno.EIO: "its file system reports an input/output error: look at the kernel's log",
    errno.ESTALE: "its network file system has lost the file: look at the server",
    errno.EEXIST: "a file is where a folder should be: move it",
    errno.ENOTDIR: "a file is where a folder should be: move it",
    errno.EISDIR: "a folder is where a file should be: move it",
}


def how_it_ended(name: str, returncode: int, log: Path, oom_kills: int = 0) -> str:
    """ "actor-0 ended with exit code 2: <its last error> (log: ...)"; `returncode` is subprocess's, -n for signal n.

    `oom_kills` is how many processes of this cgroup the kernel has killed for want of memory during its life.
    """
    if returncode >= 0:
        how = f"ended with exit code {returncode}: {last_error(log)}"
    elif -returncode == signal.SIGKILL and oom_kills:
        how = "was killed with SIGKILL by the kernel, because memory ran out: give the run more, or ask for less"
    elif -returncode == signal.SIGKILL:
        how = "was killed with SIGKILL, from outside or because memory ran out (the kernel's log would say so)"
    elif -returncode in _FROM_OUTSIDE:
        how = f"was ended with {signal.Signals(-returncode).name} from outside"
    else:
        how = f"died of {signal.Signals(-returncode).name}: {last_error(log)}"
    return f"{name} {how} (log: {log})"


def last_error(log: Path) -> str:
    """The line of a log that says best why its process ended: "error: ...", an exception, or the last."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        text = _ANSI.sub("", file.read().decode(errors="replace"))
    lines = [_RANK.sub("", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    for line in reversed(lines):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    exceptions = [line for line in lines if _EXCEPTION.match(line)]
    return (exceptions or lines or ["no output"])[-1]


def count_oom_kills() -> int:
    """Processes of this process's cgroup that the kernel has killed for want of memory so far; 0 where nobody tells."""
    for path in _memory_files():
        try:
            fields = dict(line.split() for line in path.read_text().splitlines())
        except (OSError, ValueError):  # not there, not readable, or of another kernel's format: the next one
            continue
        if "oom_kill" in fields:
            return int(fields["oom_kill"])
    return 0


def _memory_files() -> Iterator[Path]:
    """Where the kernel may count it: the cgroup itself, or as it looks from inside a container (cgroup 2, then 1)."""
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from (_CGROUPS / path.lstrip("/") / "memory.events", _CGROUPS / "memory.events")
        elif "memory" in controllers.split(","):
            root = _CGROUPS / "memory"
            yield from (root / path.lstrip("/") / "memory.oom_control", root / "memory.oom_control")


def disk_problem(error: BaseException, place: str | Path | None = None) -> str | None:
    """The sentence for an error of the file system, or one that it caused; None for any other.

    `place` is named where the error names no file (a write to an open one does not).
    """
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in _DISK and (name := cause.filename or place) is not None:
            return f"{os.fsdecode(name)} cannot be written, {_DISK[cause.errno]}"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """`error`, what it was raised from or during, and what torch's CheckpointException collects of several ranks."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        found = waiting.pop(0)
        if isinstance(found, tuple):  # (exception, traceback summary)
            found = found[0]
        if not isinstance(found, BaseException) or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        waiting += [found.__cause__, found.__context__, *getattr(found, "failures", {}).values()]

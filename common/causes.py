"""Why a process ended, in one sentence: its exit status, the last error in its log, what the kernel has counted."""

import errno
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CRASHED = 70  # EX_SOFTWARE: exit code of a role that ends with an error that nobody foresaw; its log has the traceback
TAIL_BYTES = 64 * 1024

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_RANK = re.compile(r"^\[rank\d+\]:\s*")  # torch puts it before every line of a rank's traceback
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Interrupt|Timeout|Exit)\b")
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # the log cannot know why
_CGROUPS = Path("/sys/fs/cgroup")
_HOME = Path(__file__).resolve().parents[1]
_OWN = {_HOME / "run.py", *(_HOME / package for package in ("actors", "common", "configs", "learner"))}

# Only what writes meets these, so that they need no name of a file to be understood.
_WRITING = {
    errno.ENOSPC: "no space is left on its file system: free some",
    errno.EDQUOT: "the quota of its file system is used up: free some space",
    errno.EFBIG: "the file would be larger than allowed: raise the limit (ulimit -f)",
    errno.EROFS: "its file system is read-only: choose another place",
    errno.EEXIST: "a file is where a folder should be: move it",
}
# And these also what reads.
_FAILING = {
    errno.EIO: "its file system reports an input/output error: look at the kernel's log",
    errno.ESTALE: "its network file system has lost the file: look at the server",
}
_REFUSED = {
    errno.EACCES: "this user may not: change its owner or mode, or choose another place",
    errno.EPERM: "this user may not: change its owner or mode, or choose another place",
    errno.ENOTDIR: "a file is where a folder should be: move it",
    errno.EISDIR: "a folder is where a file should be: move it",
}
_NAMELESS = {*_WRITING, *_FAILING} - {errno.EEXIST}
_DISK_LINE = re.compile(r"OSError: \[Errno (\d+)\][^:]*(?:: '(.*)')?$")


class CannotWrite(OSError):
    """Files that could not be written; its text is a sentence for the user."""


def how_it_ended(name: str, returncode: int, log: Path, oom_kills: int = 0, since: int = 0) -> str:
    """ "actor-0 ended with exit code 2: <its last error> (log: ...)"; `returncode` is subprocess's, -n for signal n.

    `oom_kills` is how many processes of this cgroup the kernel has killed for want of memory during its life, which
    begins at byte `since` of the log.
    """
    if returncode >= 0:
        how = f"ended with exit code {returncode}: {last_error(log, since)}"
    elif -returncode == signal.SIGKILL and oom_kills:
        how = "was killed with SIGKILL by the kernel, because memory ran out: give the run more, or ask for less"
    elif -returncode == signal.SIGKILL:
        how = "was killed with SIGKILL, from outside or because memory ran out (the kernel's log would say so)"
    elif -returncode in _FROM_OUTSIDE:
        how = f"was ended with {signal_name(-returncode)} from outside"
    else:
        how = f"died of {signal_name(-returncode)}: {last_error(log, since)}"
    return f"{name} {how} (log: {log})"


def signal_name(number: int) -> str:
    """SIGTERM for 15; most real-time signals have no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def is_raised_by_library(error: BaseException) -> bool:
    """Then it takes the traceback to understand it; what our own code raises is a sentence for the user."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and _OWN.isdisjoint(_and_parents(Path(trace.tb_frame.f_code.co_filename).resolve()))


def _and_parents(path: Path) -> set[Path]:
    return {path, *path.parents}


def last_error(log: Path, since: int = 0) -> str:
    """The line of a log, from byte `since` on, that says best why its process ended: "error: ...", an exception, or the
    last."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(since if since <= size else 0, size - TAIL_BYTES))  # less is there when it was begun anew
            is_full = os.statvfs(log).f_bavail == 0
            text = _ANSI.sub("", file.read(TAIL_BYTES).decode(errors="replace"))
    except OSError as error:
        return f"its log cannot be read ({error.strerror})"
    lines = [_RANK.sub("", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    for line in reversed(lines):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    exceptions = [line for line in lines if _EXCEPTION.match(line)]
    said = (exceptions or lines or ["no output"])[-1]
    if (found := _DISK_LINE.search(said)) and (problem := _sentence(int(found[1]), found[2] or str(log.parent))):
        return problem
    return f"no output, as no space is left for it in {log.parent}" if is_full and not lines else said


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
        if isinstance(cause, CannotWrite):
            return str(cause)
        if isinstance(cause, OSError) and cause.errno is not None and (name := _name(cause, place)) is not None:
            problem = _sentence(cause.errno, name)
            if problem is not None:
                return problem
    return None


@contextmanager
def naming(place: str | Path) -> Iterator[None]:
    """An error of the file system that names no file says from now on that it was in `place`."""
    try:
        yield
    except OSError as error:
        if error.errno in _NAMELESS and error.filename is None:
            error.filename = os.fspath(place)
        raise


def _name(error: OSError, place: str | Path | None) -> str | None:
    """Of what it is about. Where one file is made of another the second is written, and either may be read."""
    first, second = (None if name is None else os.fsdecode(name) for name in (error.filename, error.filename2))
    if second is not None:
        return second if first is None or error.errno in _WRITING else f"{first} or {second}"
    return str(place) if first is None and place is not None and error.errno in _NAMELESS else first


def _sentence(number: int, name: str) -> str | None:
    if number in _WRITING:
        return f"{name} cannot be written, {_WRITING[number]}"
    known = {**_FAILING, **_REFUSED}
    return f"{name} cannot be read or written, {known[number]}" if number in known else None


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

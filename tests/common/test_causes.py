"""What a user is told of a process that ended."""

import errno
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import causes
from common.causes import CannotWrite, count_oom_kills, disk_problem, how_it_ended, last_error, naming


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("starting\nerror: no such file\n[W] shutting down\n", "no such file"),
        ("Traceback (most recent call last):\n  File ...\nKeyError: 'x'\nlast line\n", "KeyError: 'x'"),
        ("\x1b[31mtorch.OutOfMemoryError: 3 GiB\x1b[0m\n", "torch.OutOfMemoryError: 3 GiB"),
        ("[rank0]: Traceback\n[rank0]: RuntimeError: a collective\n[rank0]:\n", "RuntimeError: a collective"),
        ("just this\n\n", "just this"),
        ("", "no output"),
    ],
)
def test_the_reason_is_the_line_that_says_most(tmp_path: Path, text: str, line: str) -> None:
    log = tmp_path / "role.log"
    log.write_text(text)
    assert last_error(log) == line


def test_the_log_explains_an_exit_code_and_a_crash_but_not_a_kill(tmp_path: Path) -> None:
    log = tmp_path / "role.log"
    log.write_text("INFO checkpoint 30 is complete\n")
    assert how_it_ended("a", 3, log) == f"a ended with exit code 3: INFO checkpoint 30 is complete (log: {log})"
    assert how_it_ended("a", -signal.SIGSEGV, log).startswith("a died of SIGSEGV: INFO checkpoint")
    assert how_it_ended("a", -40, log).startswith("a died of signal 40: INFO checkpoint"), "it has no name"
    assert how_it_ended("a", -signal.SIGTERM, log) == f"a was ended with SIGTERM from outside (log: {log})"
    assert "from outside or because memory ran out" in how_it_ended("a", -signal.SIGKILL, log)
    assert "by the kernel, because memory ran out" in how_it_ended("a", -signal.SIGKILL, log, oom_kills=1)


@pytest.mark.parametrize("file", ["memory.events", "memory/memory.oom_control"])
def test_the_kernel_s_count_is_read_from_either_kind_of_cgroup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.setattr(causes, "_CGROUPS", tmp_path)
    assert count_oom_kills() == 0
    (tmp_path / "memory").mkdir()
    (tmp_path / file).write_text("low 0\noom 3\noom_kill 2\n")
    assert count_oom_kills() == 2


def test_of_a_copy_the_file_that_is_written_is_to_blame_for_a_full_disk() -> None:
    def problem(number: int) -> str | None:
        return disk_problem(OSError(number, os.strerror(number), "from", None, "to"))

    assert problem(errno.ENOSPC) == "to cannot be written, no space is left on its file system: free some"
    assert str(problem(errno.EIO)).startswith("from or to cannot be read or written, its file system reports")


def test_an_error_of_the_disk_without_a_name_gets_one_and_others_do_not() -> None:
    def named(number: int, *names: str) -> object:
        with pytest.raises(OSError) as raised, naming(Path("runs/a")):
            raise OSError(number, "", *names)
        return raised.value.filename

    assert named(errno.ENOSPC) == "runs/a"
    assert named(errno.ENOSPC, "runs/a/logs") == "runs/a/logs"
    assert named(errno.EACCES) is None and named(errno.ECONNRESET) is None


def test_the_reason_is_looked_for_in_the_present_life(tmp_path: Path) -> None:
    log = tmp_path / "role.log"
    log.write_text("error: of an earlier life\n")
    since = log.stat().st_size
    assert last_error(log, since) == "no output"
    log.write_text("error: of an earlier life\nTraceback\nKeyError: 'x'\n")
    assert how_it_ended("a", 70, log, since=since) == f"a ended with exit code 70: KeyError: 'x' (log: {log})"
    log.write_text("error: anew\n")
    assert last_error(log, since) == "anew", "somebody has emptied it"
    log.unlink()
    assert last_error(log, since) == "its log cannot be read (No such file or directory)"


def test_a_log_that_is_cut_off_by_a_full_disk_still_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "role.log"
    log.write_text("Traceback\nOSError: [Errno 28] No space left on device\n")
    assert last_error(log) == f"{tmp_path} cannot be written, no space is left on its file system: free some"
    log.write_text("Traceback\nOSError: [Errno 5] Input/output error: 'runs/x'\n")
    assert last_error(log).startswith("runs/x cannot be read or written, its file system reports an input/output error")
    log.write_text("OSError: [Errno 98] Address already in use\n")
    assert last_error(log) == "OSError: [Errno 98] Address already in use"
    log.write_text("")
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=0))
    assert last_error(log) == f"no output, as no space is left for it in {tmp_path}"


def test_a_full_disk_is_found_behind_what_it_caused() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    try:
        try:
            raise full
        except OSError as error:
            raise RuntimeError("writing failed") from error
    except RuntimeError as error:
        assert disk_problem(error, "runs/a") == (
            "runs/a cannot be written, no space is left on its file system: free some"
        )
    collected = type("CheckpointException", (Exception,), {"failures": {1: (full, None)}})()
    assert disk_problem(collected, "runs/a") is not None
    assert disk_problem(CannotWrite("a sentence")) == "a sentence"
    assert disk_problem(OSError(errno.EACCES, "Permission denied", "runs/a/logs"), "runs/a") == (
        "runs/a/logs cannot be read or written, this user may not: change its owner or mode, or choose another place"
    )
    assert disk_problem(OSError(errno.EACCES, "Permission denied"), "runs/a") is None, "a socket's, maybe"
    assert disk_problem(OSError(errno.ECONNRESET, "reset"), "runs/a") is None
    assert disk_problem(KeyError("x"), "runs/a") is None

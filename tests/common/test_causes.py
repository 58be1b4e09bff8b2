"""What a user is told of a process that ended."""

import errno
import signal
from pathlib import Path

import pytest

from common import causes
from common.causes import count_oom_kills, disk_problem, how_it_ended, last_error


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
    assert disk_problem(OSError(errno.EACCES, "Permission denied", "runs/a/logs"), "runs/a") == (
        "runs/a/logs cannot be written, this user may not write there: choose another runs_dir"
    )
    assert disk_problem(OSError(errno.ECONNRESET, "reset"), "runs/a") is None
    assert disk_problem(KeyError("x"), "runs/a") is None

"""One `train` and one learner per run directory: an advisory lock that dies with the process that holds it."""

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from common.config import ConfigError

logger = logging.getLogger(__name__)

LEARNER_LOCK = "learner.lock"  # in RUN; held by the learner's rank 0, and by `train` while it changes RUN
ENDING_S = 5.0  # that a killed learner may take until the kernel has released its lock
POLL_S = 0.1
# What file systems answer that know no locks, such as Lustre without its mount option `flock`.
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def held(
    path: Path,
    run_dir: Path,
    wait_s: float = 0.0,
    *,
    use: str = "is being trained now by",
    way_out: str = "choose another name=...",
) -> Iterator[None]:
    """Holds the lock of `run_dir` in the file `path`, whose content names the holder for others.

    It is flock's, which NFS keeps on its server for all hosts. Where the file system has no locks, a warning says so.

    Raises ConfigError when another process holds it for all of `wait_s`, or when the file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")  # not truncated: until the lock is ours, the content is the holder's
    except OSError as error:
        raise ConfigError(
            f"{run_dir} cannot be made ({error.strerror}): choose another runs_dir={run_dir.parent} or name"
        ) from error
    with file:
        deadline = time.monotonic() + wait_s
        while not _is_taken(file):
            if time.monotonic() >= deadline:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise ConfigError(f"{run_dir} {use} {holder}: stop that one, or {way_out}")
            time.sleep(POLL_S)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _is_taken(file: IO[str]) -> bool:
    """Takes the lock if it is free."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        logger.warning("%s is on a file system without locks: do not start a second learner there", file.name)
    return True

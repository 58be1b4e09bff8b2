"""Nothing is left behind: who is below this process, how to kill all of it, and what if we are killed.

Orphans are adopted (PR_SET_CHILD_SUBREAPER, Linux) so that a dead child's children are still found,
children die with their parent (PR_SET_PDEATHSIG), and a guardian process ends the sessions of a supervisor, or the
descendants of a role that was started alone, when that was killed with SIGKILL and could not do it itself.
"""

import ctypes
import logging
import os
import secrets
import select
import signal
import time
from collections.abc import Callable, Collection, Iterable
from types import TracebackType
from typing import Self

import psutil

from common.stopping import postponed_signals

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LOOK_S = 1.0  # between two looks of a guardian at who is below a role
FAMILY = "ASYNC_VAPO_FAMILY"  # environment variable: marks the descendants of a role, whatever sessions they make

# Loaded at import: a child between fork and exec must not load libraries.
_LIBC = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """From now on the orphaned descendants of this process become its own children. Raises OSError."""
    if _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def child_setup(cores: Collection[int]) -> Callable[[], None]:
    """What a child does between fork and exec: die with this process, run on `cores` (empty: any), and hear the signals
    that this process hears now."""
    parent, blocked = os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def setup() -> None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # the parent died before the line above
            os._exit(1)
        if cores:
            os.sched_setaffinity(0, cores)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    return setup


def descendants(ignore: Iterable[int] = ()) -> list[psutil.Process]:
    """All living processes below this one but those with an `ignore` pid."""
    skip = set(ignore)
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if process.pid not in skip and _is_alive(process)
    ]


def family(pids: Iterable[int]) -> set[int]:
    """These processes and all below them."""
    members = set(pids)
    for pid in list(members):
        try:
            members.update(process.pid for process in psutil.Process(pid).children(recursive=True))
        except psutil.NoSuchProcess:
            continue
    return members


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL; a process that is gone already is fine, and a reused pid is never hit."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def reap_adopted(direct: Collection[int]) -> None:
    """Collect the exit status of adopted orphans, so that no zombie stays, but not of `direct` children."""
    for process in psutil.Process().children():
        if process.pid in direct:  # subprocess.Popen wants their status itself
            continue
        try:
            os.waitpid(process.pid, os.WNOHANG)
        except ChildProcessError:
            continue


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Guardian:
    """A small process that outlives a SIGKILL of this one and kills what it was told about.

    It blocks on a pipe whose other end only this process holds: end of file without a farewell means that
    this process is gone. Use as a context manager, before there is a second thread; a clean exit sends the farewell.
    """

    FAREWELL = b"farewell\n"
    _is_missed = False  # it is gone, and that was said

    def __enter__(self) -> Self:
        reader, self._writer = os.pipe()
        with postponed_signals():
            self._pid = os.fork()
            if self._pid == 0:
                os.close(self._writer)
                _guard(reader)
        os.close(reader)
        return self

    @property
    def pid(self) -> int:
        return self._pid

    def _tell(self, line: bytes) -> None:
        try:
            os.write(self._writer, line)
        except BrokenPipeError:
            if not self._is_missed:
                logger.warning("the guardian was killed: if this process is killed too, what it has started stays")
            self._is_missed = True

    def protect(self, session: int) -> None:
        """Tell it of one more session (the pid of a child started with start_new_session)."""
        self._tell(b"session %d\n" % session)

    def forget(self, session: int) -> None:
        """Nobody is left in it, so that the kernel may give its number to a stranger."""
        self._tell(b"forget %d\n" % session)

    def protect_descendants(self) -> None:
        """Whatever this process starts from now on, and what that starts, dies with it.

        The young ones are known by a variable in the environment that they begin with: it is inherited where a session,
        a process group or a parent is not. A process that changes its title (vLLM's do) overwrites that, so the
        guardian also looks every LOOK_S who is there.
        """
        mark = os.environ[FAMILY] = secrets.token_hex(16)
        self._tell(f"mark {mark}\n".encode())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tell(self.FAREWELL)
        os.close(self._writer)
        os.waitpid(self._pid, 0)


def _guard(reader: int) -> None:
    """The guardian's life, in the forked child: it must end in os._exit and touch nothing of the parent's."""
    try:
        os.setsid()
        # Slurm tells it too, and it must stay to the end
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        parent, known, text = psutil.Process(os.getppid()), set[psutil.Process](), b""
        while True:
            is_readable, _, _ = select.select([reader], [], [], LOOK_S if b"mark" in text else None)
            if is_readable:
                chunk = os.read(reader, 4096)
                if not chunk:
                    break
                text += chunk
            if b"mark" in text:
                known = {process for process in known if _is_alive(process)} | set(_below(parent))
        if not text.endswith(Guardian.FAREWELL):
            kill([process for one in known for process in (one, *_below(one))])
            _kill_all(_told(text.decode()))
    finally:
        os._exit(0)


def _told(text: str) -> set[str]:
    """The sessions and marks that the guardian was told of, less those that it was to forget."""
    told = set[str]()
    for line in text.splitlines():
        kind, _, session = line.partition(" ")
        if kind == "forget":
            told.discard(f"session {session}")
        else:
            told.add(line)
    return told


def _below(process: psutil.Process) -> list[psutil.Process]:
    """Its descendants but for this process; none when it is gone."""
    try:
        return [below for below in process.children(recursive=True) if below.pid != os.getpid()]
    except psutil.NoSuchProcess:
        return []


def _kill_all(told: set[str], rounds: int = 20) -> None:
    """SIGKILL every process of a session or with a mark in `told`, again until none is found (some may be forking)."""
    for _ in range(rounds):
        found = [p for p in psutil.process_iter() if p.pid != os.getpid() and not told.isdisjoint(_labels(p))]
        alive = [process for process in found if _is_alive(process)]
        if not alive:
            return
        kill(alive)
        time.sleep(0.05)


def _labels(process: psutil.Process) -> set[str]:
    """Of which session it is, and its mark if it has one and is ours to read."""
    try:
        return {f"session {os.getsid(process.pid)}", f"mark {process.environ().get(FAMILY)}"}
    except (ProcessLookupError, PermissionError, psutil.Error):
        return set()

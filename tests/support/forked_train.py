"""`run.py ARGUMENTS`, usually `train`, whose children are forked with their libraries loaded: each is up in a second.

    python -m tests.support.forked_train train runs_dir=... name=...

The actors have the learner's own network in the place of vLLM (network_engine.py; with SAMPLE=1 sampling_engine.py);
everything else is real. A child is
called what its log is called, so that others find it by `psutil.Process.name`.
"""

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from subprocess import DEVNULL, PIPE
from types import SimpleNamespace
from typing import IO, Any

import torch

import actors.main
import common.child
import learner.main  # noqa: F401  to be loaded before the first fork
import run
from tests.support.network_engine import NetworkEngine
from tests.support.sampling_engine import SamplingEngine

PR_SET_NAME = 15
_LIBC = ctypes.CDLL(None, use_errno=True)


class Forked:
    """What common/child.py uses of subprocess.Popen; `command` is (python, run.py, ROLE, ...)."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: int,
        stdout: int | IO[bytes],
        stderr: IO[bytes],
        start_new_session: bool,
        preexec_fn: Callable[[], None],
    ) -> None:
        assert stdin == DEVNULL and start_new_session
        reader, writer = os.pipe() if stdout == PIPE else (None, os.dup(stdout.fileno()))  # type: ignore[union-attr]
        self.stdout = None if reader is None else os.fdopen(reader, "rb", buffering=0)
        self.returncode: int | None = None
        name = os.path.basename(os.path.realpath(f"/proc/self/fd/{stderr.fileno()}")).removesuffix(".log")
        is_set_up, setting_up = os.pipe()  # until then a signal to the child would look like one to its parent
        self.pid = os.fork()
        if self.pid == 0:
            _become(command[2:], name, env, writer, stderr.fileno(), preexec_fn)
        os.close(setting_up)
        os.read(is_set_up, 1)
        os.close(is_set_up)
        os.close(writer)

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        code = self._wait(0)
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _become(
    arguments: Sequence[str], name: str, env: Mapping[str, str], out: int, err: int, setup: Callable[[], None]
) -> None:
    """The child's life; it must not return into its parent's frames."""
    code = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)  # until there is an engine
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, err)):
            os.dup2(source, stream)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        setup()
        _LIBC.prctl(PR_SET_NAME, name.encode(), 0, 0, 0)
        os.environ.clear()
        os.environ.update(env)
        torch.set_num_threads(1)
        code = run.main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> int:
    fake: Any = SimpleNamespace(Popen=Forked, PIPE=PIPE, DEVNULL=DEVNULL)
    common.child.subprocess = fake  # type: ignore[attr-defined]
    actors.main.Engine = SamplingEngine if os.environ.get("SAMPLE") else NetworkEngine  # type: ignore[assignment,misc]
    return run.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

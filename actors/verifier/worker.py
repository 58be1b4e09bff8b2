"""One verifier worker: answers requests from its template process, one at a time, until the channel closes.

A request is a line of JSON with `response`, `reference` and `row`; the reply is one line: a verdict, `cold <module>`
when the verifier raised HeavyImportNeeded, or `failed` when it raised anything else (the traceback goes to stderr).
"""

import ctypes
import json
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from actors.verifier import heavy
from common.types import Verdict

VerifyFunction = Callable[[str, str, dict[str, Any]], Verdict]
COLD = b"cold "
FAILED = b"failed\n"
_CHANNEL_FD = 3
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None)  # loaded here, in the template: after the fork it would cost each worker 0.3 ms


def run_worker(verify: VerifyFunction, channel: socket.socket, memory_mb: int) -> NoReturn:
    """Serves `channel` in a freshly forked process and leaves it; never returns.

    Only stderr and the channel stay open, so that the death of the template or of a sibling is seen as the
    end of the stream. Standard output is turned to stderr: a verifier that prints cannot break the protocol.
    """
    status = 1
    try:
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(2, 1)
        os.dup2(channel.detach(), _CHANNEL_FD)
        os.closerange(_CHANNEL_FD + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        limit = memory_mb * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        _die_with_parent()
        heavy.defer()
        with socket.socket(fileno=_CHANNEL_FD) as stream:
            _serve(verify, stream)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _die_with_parent() -> None:
    """Asks the kernel to kill this worker with its template, even while it hangs or is stopped."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(verify: VerifyFunction, channel: socket.socket) -> None:
    with channel.makefile("rb") as requests:
        for line in requests:
            channel.sendall(_answer(verify, line))


def _answer(verify: VerifyFunction, line: bytes) -> bytes:
    try:
        request = json.loads(line)
        verdict = verify(request["response"], request["reference"], request["row"])
        return f"{Verdict(verdict).value}\n".encode()
    except heavy.HeavyImportNeeded as needed:
        return COLD + f"{needed}\n".encode()
    except Exception:
        # Reported and counted by the pool as an answer without a verdict; the template replaces this worker,
        # because what a MemoryError left behind cannot be trusted.
        traceback.print_exc()
        return FAILED

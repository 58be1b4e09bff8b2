"""One verifier worker: answers requests from its template process, one at a time, until the channel closes.

A request is a line of JSON with `response`, `reference` and `row`; the reply is one line: a verdict, `cold <module>`
when the verifier raised HeavyImportNeeded, or `failed` when it raised anything else (the traceback goes to stderr).
"""

import json
import os
import resource
import signal
import socket
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from actors.verifier import heavy
from common.types import Verdict

VerifyFunction = Callable[[str, str, dict[str, Any]], Verdict]
COLD = b"cold "
FAILED = b"failed\n"
_CHANNEL_FD = 3


def run_worker(verify: VerifyFunction, channel: socket.socket, timeout_s: float, memory_mb: int) -> NoReturn:
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
        heavy.defer()
        with socket.socket(fileno=_CHANNEL_FD) as stream:
            _serve(verify, stream, timeout_s)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _serve(verify: VerifyFunction, channel: socket.socket, timeout_s: float) -> None:
    with channel.makefile("rb") as requests:
        for line in requests:
            # The template kills this worker at timeout_s. Should the template itself have been killed, nobody
            # would: then the kernel does, for no handler is installed.
            signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 5)
            reply = _answer(verify, line)
            signal.setitimer(signal.ITIMER_REAL, 0)
            channel.sendall(reply)


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

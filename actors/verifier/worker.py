"""One verifier worker: answers requests from its template process, one at a time, until the channel closes.

A request is a line `<processor us> <wall us> <is hurried> <json>`; the JSON has `response`, `reference` and `row`, the
numbers say how much time the answer may take (0: as long as it likes) and whether (1) it may not begin what takes long.
The reply is one line:

    judged <processor s> <wall s> <judgement>   what the answer took, and the line of judgement.encode
    again <processor s>                it had its time, was interrupted, and may be tried again
    spoilt <processor s>               the same, but this worker must not be used any more
    later <processor s>                it was about to begin what takes long
    cold <module>                      the verifier raised HeavyImportNeeded
    full                               the memory limit was reached; the worker leaves

An exception of the verifier is a judgement (the traceback goes to stderr), except for MemoryError: what that left
behind cannot be trusted. An async verifier is served by actors/verifier/async_worker.py instead.
"""

import asyncio
import ctypes
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from typing import NoReturn

from actors.verifier import async_worker, heavy
from actors.verifier.judgement import encode, judgement_of, raised
from actors.verifier.limits import Interrupted, Limits, TakesTime
from actors.verifier.plugin import Verifier

JUDGED, AGAIN, SPOILT, LATER, COLD, FULL = b"judged", b"again", b"spoilt", b"later", b"cold", b"full"
_CHANNEL_FD = 3
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None)  # loaded here, in the template: after the fork it would cost each worker 0.3 ms


def run_worker(verifier: Verifier, channel: socket.socket, memory_mb: int, timeout_s: float) -> NoReturn:
    """Serves `channel` in a freshly forked process and leaves it; never returns. `timeout_s` is for async verifiers.

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
        with socket.socket(fileno=_CHANNEL_FD) as stream:
            if verifier.is_async:
                asyncio.run(async_worker.serve(verifier, stream, timeout_s))
            else:
                heavy.defer()
                _serve(verifier, stream)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _die_with_parent() -> None:
    """Asks the kernel to kill this worker with its template, even while it hangs or is stopped."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(verifier: Verifier, channel: socket.socket) -> None:
    limits = Limits() if verifier.interruptible else None
    with channel.makefile("rb") as requests:
        for line in requests:
            try:
                reply = _answer(verifier, limits, line)
            except MemoryError:
                channel.sendall(FULL + b"\n")
                raise
            channel.sendall(reply)


def _answer(verifier: Verifier, limits: Limits | None, line: bytes) -> bytes:
    cpu_us, wall_us, is_hurried, body = line.split(b" ", 3)
    if limits is None:
        return _judge(verifier, body)
    started_cpu_s = time.process_time()
    try:
        limits.start(int(cpu_us) / 1e6, int(wall_us) / 1e6, is_hurried == b"1")
        reply = _judge(verifier, body)
        # After an interruption that the verifier swallowed, its verdict is one of a computation cut short.
        return _cut_short(SPOILT, started_cpu_s) if limits.stop() else reply
    except Interrupted as interruption:
        limits.is_judging = False  # by no call, at whose beginning there could be a second one
        if isinstance(interruption, TakesTime):
            return _cut_short(LATER, started_cpu_s)
        # Where one before this was swallowed is not known.
        is_whole = limits.num_interruptions == 1 and verifier.survives(interruption.__traceback__)
        return _cut_short(AGAIN if is_whole else SPOILT, started_cpu_s)


def _cut_short(kind: bytes, started_cpu_s: float) -> bytes:
    return b"%s %.6f\n" % (kind, time.process_time() - started_cpu_s)


def _judge(verifier: Verifier, body: bytes) -> bytes:
    started_cpu_s, started_s = time.process_time(), time.monotonic()
    request = json.loads(body)
    try:
        returned = verifier.verify(request["response"], request["reference"], request["row"])
        judgement = judgement_of(returned, verifier.correct_from)
    except heavy.HeavyImportNeeded as needed:
        return b"%s %s\n" % (COLD, str(needed).encode())
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        judgement = raised(error)
    took_cpu_s, took_s = time.process_time() - started_cpu_s, time.monotonic() - started_s
    return b"%s %.6f %.6f %s\n" % (JUDGED, took_cpu_s, took_s, encode(judgement))

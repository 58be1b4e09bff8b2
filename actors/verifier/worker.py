"""One verifier worker: answers requests from its template process, one at a time, until the channel closes.

A request is a line `<processor us> <wall us> <json>`; the JSON has `response`, `reference` and `row`, the numbers say
how much time the answer may take (0: as long as it likes). The reply is one line:

    <verdict> <processor s> <wall s>   what the answer took
    again <processor s>                it had its time, was interrupted, and may be tried again
    spoilt <processor s>               the same, but this worker must not be used any more
    cold <module>                      the verifier raised HeavyImportNeeded
    failed                             it raised anything else (the traceback goes to stderr)
"""

import ctypes
import json
import math
import os
import resource
import signal
import socket
import sys
import time
import traceback
from types import FrameType
from typing import NoReturn

from actors.verifier import heavy
from actors.verifier.plugin import Verifier, VerifyFunction
from common.types import Verdict

COLD, FAILED, AGAIN, SPOILT = b"cold", b"failed", b"again", b"spoilt"
_CHANNEL_FD = 3
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_INSIST_S = 0.001  # processor time after which an interruption that was swallowed is repeated
_SHORTEST_PAUSE_S = 1e-4
_LIBC = ctypes.CDLL(None)  # loaded here, in the template: after the fork it would cost each worker 0.3 ms


def run_worker(verifier: Verifier, channel: socket.socket, memory_mb: int) -> NoReturn:
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
            channel.sendall(_answer(verifier, limits, line))


def _answer(verifier: Verifier, limits: "Limits | None", line: bytes) -> bytes:
    cpu_us, wall_us, body = line.split(b" ", 2)
    started_cpu_s = time.process_time()
    try:
        if limits is not None:
            limits.start(int(cpu_us) / 1e6, int(wall_us) / 1e6)
        reply = _judge(verifier.verify, body)
        if limits is not None and limits.stop():
            # The verifier swallowed the interruption: its verdict is one of a computation cut short.
            return _cut_short(SPOILT, started_cpu_s)
        return reply
    except Interrupted as interruption:
        assert limits is not None
        limits.stop()
        return _cut_short(AGAIN if verifier.survives(interruption.__traceback__, __name__) else SPOILT, started_cpu_s)


def _cut_short(kind: bytes, started_cpu_s: float) -> bytes:
    return b"%s %.6f\n" % (kind, time.process_time() - started_cpu_s)


def _judge(verify: VerifyFunction, body: bytes) -> bytes:
    started_cpu_s, started_s = time.process_time(), time.monotonic()
    try:
        request = json.loads(body)
        verdict = Verdict(verify(request["response"], request["reference"], request["row"])).value
        took_cpu_s, took_s = time.process_time() - started_cpu_s, time.monotonic() - started_s
        return b"%s %.6f %.6f\n" % (verdict.encode(), took_cpu_s, took_s)
    except heavy.HeavyImportNeeded as needed:
        return b"%s %s\n" % (COLD, str(needed).encode())
    except Exception:
        # Reported and counted by the pool as an answer without a verdict; the template replaces this worker,
        # because what a MemoryError left behind cannot be trusted.
        traceback.print_exc()
        return FAILED + b"\n"


class Interrupted(BaseException):
    """The answer has had its time. No Exception: a verifier that catches those does not catch this."""


class Limits:
    """Raises Interrupted in the answer that is being judged once it has had its time, and again if that is swallowed.

    Only between `start` and `stop`. Uses SIGALRM and the real-time timer: the kernel looks at timers of processor time
    only every few milliseconds.
    """

    def __init__(self) -> None:
        self._is_judging = self._has_interrupted = False
        self._end_cpu_s = self._end_s = math.inf
        self._looked_cpu_s = self._pause_s = 0.0  # processor time at the last look, and wall-clock time to the next
        signal.signal(signal.SIGALRM, self._check)

    def start(self, cpu_s: float, wall_s: float) -> None:
        """From now on the process may use that much processor time and time in all; both 0: as much as it likes."""
        self._has_interrupted = False
        self._end_cpu_s = time.process_time() + (cpu_s or math.inf)
        self._end_s = time.monotonic() + (wall_s or math.inf)
        self._is_judging = True
        if cpu_s:
            self._look_again(cpu_s)

    def stop(self) -> bool:
        """No more interruptions; returns whether there was one since the start."""
        self._is_judging = False
        return self._has_interrupted

    def _look_again(self, after_s: float) -> None:
        self._looked_cpu_s, self._pause_s = time.process_time(), max(after_s, _SHORTEST_PAUSE_S)
        signal.setitimer(signal.ITIMER_REAL, min(self._pause_s, max(self._end_s - time.monotonic(), _SHORTEST_PAUSE_S)))

    def _check(self, signum: int, frame: FrameType | None) -> None:
        if not self._is_judging or self._end_cpu_s == math.inf:  # an alarm of the answer before
            return
        now_cpu_s = time.process_time()
        if now_cpu_s < self._end_cpu_s and time.monotonic() < self._end_s:
            # Looking takes time as well: at an answer that is asleep, less and less often.
            is_asleep = now_cpu_s - self._looked_cpu_s < self._pause_s / 2
            self._look_again(2 * self._pause_s if is_asleep else self._end_cpu_s - now_cpu_s)
            return
        # Again, but not at once: the first is on its way to where it is caught, and a second must not overtake it.
        self._end_cpu_s, self._end_s = now_cpu_s + _INSIST_S, math.inf
        self._has_interrupted = True
        self._look_again(_INSIST_S)
        raise Interrupted

"""Signals to a role, in processes of their own; the main thread is where no Python handler can run."""

import errno
import signal
import subprocess
import sys

import pytest

from common.stopping import Interrupted, RunEnds, is_crash
from tests.support.runs import ROOT

LIMIT_S = 60.0
BLOCKED = """
import ctypes, threading
from common.stopping import Interrupted, StopSignals
with StopSignals({timeout_s}) as signals:
    signals.defer(lambda: print("noted", signals.number, flush=True))
    print("up", flush=True)
    libc = ctypes.CDLL(None)
    while True: libc.sleep(1000)  # what a collective is: it goes on when a signal has come
"""
EARLY = """
import time
from common.stopping import Interrupted, StopSignals
try:
    with StopSignals(60.0):
        print("up", flush=True)
        time.sleep(1000)
except Interrupted as interrupt:
    print(interrupt, interrupt.number)
"""


def start(code: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    return process


def test_the_first_signal_is_noted_and_the_second_ends_the_process_at_once() -> None:
    process = start(BLOCKED.format(timeout_s=60.0))
    assert process.stdout is not None
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "noted 15\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert errors.startswith("error: ended at once by a second signal, SIGINT; what was done since")


def test_who_does_not_stop_in_time_is_ended_and_says_so() -> None:
    process = start(BLOCKED.format(timeout_s=0.3))
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, output) == (143, "noted 15\n")
    assert errors.startswith("error: no stop within 0.3 s of SIGTERM: killed")


def test_a_signal_before_there_is_work_is_an_exception() -> None:
    process = start(EARLY)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=LIMIT_S)[0] == "interrupted by SIGTERM 15\n"


FORESEEN = [ValueError(), TimeoutError(), Interrupted(2), RunEnds(None), OSError(errno.ENOSPC, "")]


@pytest.mark.parametrize("error", FORESEEN)
def test_what_was_foreseen_is_no_crash(error: Exception) -> None:
    assert not is_crash(error)
    assert not is_crash(None) and not is_crash(KeyboardInterrupt())
    assert is_crash(RuntimeError("a tensor"))

"""Signals to a role, in processes of their own; the main thread is where no Python handler can run."""

import errno
import pickle
import signal
import subprocess
import sys

import pytest

from common.stopping import ECHO_S, Interrupted, RunEnds, is_crash, is_echo, stop_numbers, stopped_by_signals
from tests.support.runs import ROOT

LIMIT_S = 60.0
BLOCKED = """
import ctypes
import common.stopping
from common.stopping import StopSignals
common.stopping.ECHO_S = {echo_s}
with StopSignals({timeout_s}) as signals:
    signals.defer(lambda: print("noted", signals.number, flush=True))
    print("up", flush=True)
    libc = ctypes.CDLL(None)
    while True: libc.sleep(1000)  # what a collective is: it goes on when a signal has come
"""
EARLY = """
import signal, time
from common.stopping import Interrupted, StopSignals
try:
    with StopSignals(60.0):
        try:
            print("up", flush=True)
            time.sleep(1000)
        finally:
            signal.raise_signal(signal.SIGTERM)
            print("cleaned up")
except Interrupted as interrupt:
    print(interrupt, interrupt.number)
"""


def start(code: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    return process


def blocked(timeout_s: float = LIMIT_S, echo_s: float = ECHO_S) -> "subprocess.Popen[str]":
    return start(BLOCKED.format(timeout_s=timeout_s, echo_s=echo_s))


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_a_second_sigint_ends_the_process_at_once(first: signal.Signals) -> None:
    process = blocked()
    assert process.stdout is not None
    process.send_signal(first)
    assert process.stdout.readline() == f"noted {first}\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert errors.startswith("error: ended at once by a second signal, SIGINT; what was done since")


def test_a_sigterm_that_comes_twice_within_a_moment_asks_once() -> None:
    """From Slurm, and from torchrun, which Slurm has told too."""
    process = blocked(timeout_s=1.0)
    assert process.stdout is not None
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "noted 15\n"
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, output) == (143, "")
    assert errors.startswith("error: no stop within 1 s of SIGTERM"), "the second has neither ended nor prolonged it"


def test_a_sigterm_that_comes_again_later_ends_the_process_at_once() -> None:
    process = blocked(echo_s=0.0)
    assert process.stdout is not None
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "noted 15\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 143
    assert errors.startswith("error: ended at once by a second signal, SIGTERM")


def test_only_sigterm_has_an_echo_and_not_for_long() -> None:
    assert is_echo(signal.SIGTERM, 0.0) and is_echo(signal.SIGTERM, ECHO_S - 0.01)
    assert not is_echo(signal.SIGTERM, ECHO_S)
    assert is_echo(signal.SIGHUP, 0.0) and not is_echo(signal.SIGHUP, ECHO_S)
    assert not is_echo(signal.SIGINT, 0.0) and not is_echo(signal.SIGPIPE, 0.0)


def test_who_does_not_stop_in_time_is_ended_and_says_so() -> None:
    process = blocked(timeout_s=0.3)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, output) == (143, "noted 15\n")
    assert errors.startswith("error: no stop within 0.3 s of SIGTERM: killed")


def test_a_signal_before_there_is_work_is_an_exception_and_its_echo_is_none() -> None:
    process = start(EARLY)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=LIMIT_S)[0] == "cleaned up\ninterrupted by SIGTERM 15\n"


FORESEEN = [
    ValueError(),
    TimeoutError(),
    Interrupted(2),
    RunEnds(None),
    RunEnds(TimeoutError()),
    OSError(errno.ENOSPC, ""),
    FileNotFoundError(errno.ENOENT, "", "data.jsonl"),
]


@pytest.mark.parametrize("error", FORESEEN)
def test_what_was_foreseen_is_no_crash(error: Exception) -> None:
    assert not is_crash(error)
    assert not is_crash(None) and not is_crash(KeyboardInterrupt())
    assert is_crash(RuntimeError("a tensor"))


def test_an_interrupt_travels_between_ranks() -> None:
    there = pickle.loads(pickle.dumps(Interrupted(signal.SIGTERM)))
    assert isinstance(there, Interrupted) and (there.number, str(there)) == (15, "interrupted by SIGTERM")


def test_a_lost_terminal_asks_to_stop_unless_that_is_ignored_as_under_nohup() -> None:
    assert stop_numbers() == (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert stop_numbers() == (signal.SIGINT, signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)
    process = blocked()
    process.send_signal(signal.SIGHUP)
    assert process.stdout is not None and process.stdout.readline() == "noted 1\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=LIMIT_S) == 128 + signal.SIGINT


def test_the_first_signal_is_raised_and_the_next_ones_are_for_naught() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="interrupted by SIGHUP"), stopped_by_signals():
        try:
            signal.raise_signal(signal.SIGHUP)
        finally:
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before

"""A plug-in verifier for the pool's tests: the response says how to behave."""

import os
import signal
import sys
import time
from typing import Any

from actors.verifier.heavy import load
from common.types import Verdict

_HEAVY = "xml.dom.minidom"  # stands for a large module that only some answers need

_warmed_up: list[str] = []


def warm_up(module: str) -> None:
    """Called in the template process; that it fails must not matter."""
    _warmed_up.append(module)
    raise RuntimeError("a bug in the warm-up")


def behave(response: str, reference: str, row: dict[str, Any]) -> Verdict:
    match response:
        case "echo":
            return Verdict.CORRECT if row["expected"] == reference else Verdict.WRONG
        case "length":
            return Verdict.CORRECT if len(row["text"]) == int(reference) else Verdict.WRONG
        case "work":
            started_s = time.process_time()
            while time.process_time() - started_s < row["cpu_s"]:
                pass
            return Verdict.CORRECT
        case "sleep":
            time.sleep(row["s"])
            return Verdict.CORRECT
        case "print":
            print("7 wrong\n" * 1000, flush=True)
            return Verdict.CORRECT
        case "is warm":
            return Verdict.CORRECT if _HEAVY in sys.modules else Verdict.WRONG
        case "is warmed up":
            return Verdict.CORRECT if _warmed_up == [_HEAVY] else Verdict.WRONG
        case "need warmth":
            load(_HEAVY)
            return Verdict.CORRECT
    _ruin(response)
    return Verdict.UNANSWERED


def _ruin(response: str) -> None:
    match response:
        case "hang":
            while True:
                pass
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "load what is not there":
            load("no_such_module")
        case "raise":
            raise KeyError("a bug in the verifier")
        case "exit":
            raise SystemExit(0)
        case "eat memory":
            chunks = []
            while True:
                chunks.append(bytearray(2**24))
        case "close descriptors":
            os.closerange(0, 100)
            time.sleep(100)

"""Verifiers of users: each returns its verdict in another way, or goes wrong in another way, as the row says."""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.types import Verdict


@dataclass
class Score:
    reward: float
    verdict: object


VALUES: dict[str, Any] = {
    "verdict": Verdict.UNANSWERED,
    "name": "unanswered",
    "true": True,
    "false": False,
    "numpy bool": np.bool_(True),
    "number": 0.25,
    "integer": 1,
    "numpy number": np.float32(0.5),
    "object": Score(0.3, Verdict.CORRECT),
    "dict": {"reward": -0.5, "verdict": "wrong", "why": "ignored"},
    "dict with bool": {"reward": 0.1, "verdict": True},
    "none": None,
    "text": "yes",
    "nan": float("nan"),
    "infinite": float("inf"),
    "huge": 10**400,
    "half a dict": {"reward": 1.0},
    "reward that is none": {"reward": None, "verdict": "correct"},
    "reward that is true": {"reward": True, "verdict": "correct"},
    "list": [1.0],
    "error": Verdict.ERROR,
    "surrogate": "\ud800\nsecond line",
}


def verify(response: str, reference: str, row: dict[str, Any]) -> Any:
    if response == "raise":
        return row["no such column"]
    if response == "raise elsewhere":
        return int("no number", base=99)
    return VALUES[response]


async def verify_async(response: str, reference: str, row: dict[str, Any]) -> Any:
    match response:
        case "wait":
            await asyncio.sleep(row["s"])
            return row["s"]
        case "block":
            time.sleep(row["s"])
            return True
        case "time out by itself":
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)
        case "cancel":
            raise asyncio.CancelledError
        case "exit":
            raise SystemExit(1)
        case "echo":
            return len(row["text"]) == int(reference)
    return verify(response, reference, row)


class Judge:
    async def __call__(self, response: str, reference: str, row: dict[str, Any]) -> bool:
        await asyncio.sleep(0)
        return True


judge = Judge()


def with_two_arguments(response: str, reference: str) -> bool:
    return True


def without_a_name() -> None: ...

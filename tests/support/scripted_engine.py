"""A stand-in for the engine of an evaluation: one token a character, and texts from a function of the test's."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np

from actors.sampling import Completion
from common.types import FinishReason, Lease

Script = Callable[[Lease, int], str]  # the text of one response; it may raise


class ScriptedEngine:
    """`script` and `leases` are the class's, because the command makes its engine itself."""

    script: Script
    leases: list[Lease]  # in the order in which they were asked for
    generated_tokens = 0
    busy_s = 0.0

    def __init__(self, config: Any) -> None:
        self.config = config

    async def start(self) -> None:
        pass

    async def shutdown(self) -> None:
        pass

    async def sample(self, lease: Lease) -> list[Completion]:
        type(self).leases.append(lease)
        await asyncio.sleep(0)
        return [_completion(type(self).script(lease, index), lease.max_tokens) for index in range(lease.num_samples)]

    def sampling_s(self, lease_id: int) -> float:
        return 0.5

    def forget(self, lease_id: int) -> None:
        pass

    def decode(self, token_ids: Any) -> str:
        return "".join(map(chr, token_ids))


def scripted(script: Script) -> type[ScriptedEngine]:
    """A class of engines that answer by `script`."""
    return type("Scripted", (ScriptedEngine,), {"script": staticmethod(script), "leases": []})


def _completion(text: str, max_tokens: int) -> Completion:
    is_cut = len(text) >= max_tokens
    length = min(len(text), max_tokens)
    return Completion(
        token_ids=np.array([ord(character) for character in text[:length]], dtype=np.int32),
        behavior_logprobs=np.zeros(length, dtype=np.float32),
        versions=np.zeros(length, dtype=np.int32),
        finish_reason=FinishReason.LENGTH if is_cut else FinishReason.STOP,
        text=text[:length],
    )

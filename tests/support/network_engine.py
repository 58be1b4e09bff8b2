"""The learner's own network in the place of an actor's vLLM engine: up in a second.

It draws random tokens and scores them, so that the learner finds its own log-probs in them.
"""

import asyncio
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from actors.engine import Completion
from common.broadcast import BrokenTransfer
from common.config import Config
from common.types import FinishReason, Float32Array, Int32Array, Lease, WeightsPhase
from learner.networks.model import load_policy
from tests.support.transfer_actors import TransferActor

FIRST_TOKEN, LAST_TOKEN = 3, 12  # of chain_sum: digits and signs
SECONDS_PER_LEASE = 0.2


class NetworkEngine:
    """The calls of actors.engine.Engine. What is sampled between `pause` and `resume` waits."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._sampling = asyncio.Lock()  # held while paused: one request at a time, and none while weights change
        self._is_paused = False
        self.version = 0
        self.generated_tokens = 0
        self.busy_s = 0.0

    async def start(self) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(self._config.model.path)
        policy = load_policy(self._config, torch.device("cpu"), None)
        self._transfer = TransferActor(policy, torch.empty(0, dtype=torch.long))

    async def shutdown(self) -> None:
        self._transfer.receiver.close()

    async def sample(self, lease: Lease) -> list[Completion]:
        async with self._sampling:
            await asyncio.sleep(SECONDS_PER_LEASE)
            draw = np.random.default_rng(lease.seed)
            completions = [self._complete(lease, draw) for _ in range(lease.num_samples)]
        self.generated_tokens += sum(len(completion.token_ids) for completion in completions)
        return completions

    def _complete(self, lease: Lease, draw: np.random.Generator) -> Completion:
        length = int(draw.integers(1, lease.max_tokens))
        token_ids = draw.integers(FIRST_TOKEN, LAST_TOKEN, length).astype(np.int32)
        return Completion(
            token_ids=token_ids,
            behavior_logprobs=self._logprobs(lease.prompt_token_ids, token_ids),
            versions=np.full(length, self.version, np.int32),
            finish_reason=FinishReason.STOP,
            text=self._tokenizer.decode(token_ids.tolist()),
        )

    def progress(self, lease_id: int) -> None:
        """A lease is drawn at once."""

    def num_drawn(self, lease_id: int) -> int:
        return 0

    def progress_again(self) -> None:
        """Nothing was reported."""

    def forget(self, lease_id: int) -> None:
        """Nothing is kept."""

    def decode(self, token_ids: Int32Array) -> str:
        text: str = self._tokenizer.decode(token_ids.tolist())
        return text

    async def score(self, token_ids: Int32Array) -> Float32Array:
        return self._logprobs(token_ids[:1], token_ids[1:])

    @torch.no_grad()
    def _logprobs(self, prompt: Int32Array, response: Int32Array) -> Float32Array:
        tokens = torch.from_numpy(np.concatenate([prompt, response])).long()
        ends = torch.tensor([0, len(tokens)])
        logprobs: Float32Array = self._transfer.policy(tokens, ends, torch.tensor([len(prompt)]), 1.0)[0].numpy()
        return logprobs

    async def pause(self) -> None:
        if not self._is_paused:  # a broken publication begins anew
            await self._sampling.acquire()
            self._is_paused = True

    async def resume(self) -> None:
        self._sampling.release()
        self._is_paused = False

    async def init_transfer(self, payload: dict[str, Any]) -> None:
        await self._obey(WeightsPhase.INIT, payload)

    async def start_update(self) -> None:
        await self._obey(WeightsPhase.START, {})

    async def update(self, payload: dict[str, Any]) -> None:
        await self._obey(WeightsPhase.UPDATE, payload)

    async def finish_update(self, version: int) -> None:
        self.version = version

    async def _obey(self, phase: WeightsPhase, payload: dict[str, Any]) -> None:
        error, _, _ = await asyncio.to_thread(self._transfer.obey, phase, payload)
        if error is not None:
            raise BrokenTransfer(error)

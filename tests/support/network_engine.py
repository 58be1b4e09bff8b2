"""The learner's own network in the place of an actor's vLLM engine: up in a second.

It draws a few tokens at a time and sleeps in between. Each token tells the version that drew it (`stamp`), and its
log-prob is the network's, so that the learner finds its own in it.

    SIGUSR1   the engine draws nothing any more, and does what it is told
    SIGUSR2   it does not answer either
"""

import asyncio
import itertools
import signal
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from actors.sampling import Completion, Sample, Sampling, drawn_by
from common.broadcast import BrokenTransfer
from common.config import Config
from common.types import FinishReason, Float32Array, Int32Array, Lease, Progress, WeightsPhase
from learner.algorithm.packing import boundaries
from learner.networks.model import load_policy
from tests.support.transfer_actors import TransferActor

FIRST_TOKEN, LAST_TOKEN = 3, 12  # of chain_sum: digits and signs
TURN_S = 0.1
TOKENS_A_TURN = 2  # of each response


def stamp(version: int) -> int:
    """The token that this version draws; versions that are less than 9 apart draw different ones."""
    return FIRST_TOKEN + version % (LAST_TOKEN - FIRST_TOKEN)


class Response:
    """One request: what it has drawn after its prompt and prefix, and what it will end with."""

    def __init__(self, lease: Lease, sample: Sample) -> None:
        self.before = np.concatenate([lease.prompt_token_ids, sample.prefix.token_ids])
        length = int(np.random.default_rng(sample.seed).integers(1, lease.max_tokens + 1))
        self.num_missing = max(1, length - len(sample.prefix))
        self.generator = torch.Generator().manual_seed(sample.seed % 2**63)
        self.limit = lease.max_tokens - len(sample.prefix)
        self.reason = FinishReason.LENGTH if length == lease.max_tokens else FinishReason.STOP
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.version_starts: list[tuple[str, int]] = []
        self.has_ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def note_version(self, version: int) -> None:
        """Of what is drawn from here on."""
        if not self.version_starts or self.version_starts[-1][0] != str(version):
            self.version_starts.append((str(version), len(self.token_ids)))

    def draw(self, version: int) -> None:
        """Log-probs follow."""
        self.note_version(version)
        self.token_ids += [stamp(version)] * min(TOKENS_A_TURN, self.num_missing - len(self.token_ids))

    def state(self) -> Any:
        """As vLLM's output processor keeps it."""
        return SimpleNamespace(
            detokenizer=SimpleNamespace(output_token_ids=self.token_ids, num_output_tokens=lambda: len(self.token_ids)),
            logprobs_processor=SimpleNamespace(logprobs=SimpleNamespace(logprobs=self.logprobs)),
            weight_version_starts=self.version_starts,
        )


class NetworkEngine:
    """The calls of actors.engine.Engine."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._request_ids = itertools.count()
        self._is_paused = self._is_hung = False
        self._answers = asyncio.Event()
        self._answers.set()
        self._responses: dict[str, Response] = {}
        self._sampling: dict[int, Sampling] = {}
        self._forgotten_tokens = 0
        self.version = 0
        self.busy_s = 0.0

    async def start(self) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(self._config.model.path)
        policy = load_policy(self._config, torch.device("cpu"), None)
        self._transfer = TransferActor(policy, torch.empty(0, dtype=torch.long))
        self._turns = asyncio.create_task(self._take_turns())
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, setattr, self, "_is_hung", True)
        loop.add_signal_handler(signal.SIGUSR2, self._hang_up)

    def _hang_up(self) -> None:
        self._is_hung = True
        self._answers.clear()

    async def shutdown(self) -> None:
        self._turns.cancel()
        self._transfer.receiver.close()

    @property
    def generated_tokens(self) -> int:
        return self._forgotten_tokens + sum(sampling.num_drawn() for sampling in self._sampling.values())

    async def sample(self, lease: Lease) -> list[Completion]:
        request_ids = [f"{lease.lease_id}-{next(self._request_ids)}" for _ in range(lease.num_samples)]
        sampling = self._sampling[lease.lease_id] = Sampling(lease, request_ids, self._state_of)
        sampling.begin(self.busy_s)
        return list(await asyncio.gather(*(self._complete(lease, sample) for sample in sampling.samples)))

    async def _complete(self, lease: Lease, sample: Sample) -> Completion:
        drawn, reason = sample.prefix, sample.prefix_finish_reason
        if reason is None:
            response = self._responses[sample.request_id] = Response(lease, sample)
            try:
                await response.has_ended
            finally:
                del self._responses[sample.request_id]
            ends = [start for _, start in response.version_starts[1:]] + [len(response.token_ids)]
            spans = [(version, start, end) for (version, start), end in zip(response.version_starts, ends, strict=True)]
            drawn, reason = drawn.then(drawn_by(response.token_ids, response.logprobs, spans)), response.reason
        sample.completion = Completion.of(drawn, reason, self.decode(drawn.token_ids))
        return sample.completion

    async def _take_turns(self) -> None:
        """Its clock counts turns, so that a machine that is busy does not look like an engine that hangs."""
        while True:
            await asyncio.sleep(TURN_S)
            if self._responses and not self._is_paused:
                self.busy_s += TURN_S
                if not self._is_hung:
                    self._draw([response for response in self._responses.values() if not response.has_ended.done()])

    def _draw(self, responses: list[Response]) -> None:
        for response in responses:
            response.draw(self.version)
        whole = [np.concatenate([r.before, np.array(r.token_ids, np.int32)]) for r in responses]
        logprobs = self._logprobs(whole, [len(response.before) for response in responses])
        for response, its_own in zip(responses, logprobs, strict=True):
            response.logprobs += its_own[len(response.logprobs) :].tolist()
            if len(response.token_ids) == response.num_missing:
                response.has_ended.set_result(None)

    def _state_of(self, request_id: str) -> Any:
        return self._responses[request_id].state() if request_id in self._responses else None

    def sampling_s(self, lease_id: int) -> float:
        began_s = self._sampling[lease_id].began_s
        return 0.0 if began_s is None else self.busy_s - began_s

    def num_drawn(self, lease_id: int) -> int:
        return self._sampling[lease_id].num_drawn() if lease_id in self._sampling else 0

    def progress(self, lease_id: int) -> Progress | None:
        return self._sampling[lease_id].progress() if lease_id in self._sampling else None

    def progress_again(self) -> None:
        for sampling in self._sampling.values():
            sampling.send_again()

    def forget(self, lease_id: int) -> None:
        if (sampling := self._sampling.pop(lease_id, None)) is not None:
            self._forgotten_tokens += sampling.num_drawn()

    def decode(self, token_ids: Int32Array) -> str:
        text: str = self._tokenizer.decode(token_ids.tolist())
        return text

    async def score(self, token_ids: Int32Array) -> Float32Array:
        await self._answers.wait()
        return self._logprobs([token_ids], [1])[0]

    @torch.no_grad()
    def _logprobs(self, sequences: list[Int32Array], num_before: list[int]) -> list[Float32Array]:
        """Of the tokens of each sequence that follow its first `num_before`."""
        if not sequences:
            return []
        tokens = torch.from_numpy(np.concatenate(sequences)).long()
        ends = boundaries(torch.tensor([len(sequence) for sequence in sequences]))
        logprobs = self._transfer.policy(tokens, ends, torch.tensor(num_before), 1.0)[0].numpy()
        lengths = [len(sequence) - before for sequence, before in zip(sequences, num_before, strict=True)]
        return np.split(logprobs, np.cumsum(lengths)[:-1])

    async def pause(self) -> None:
        await self._answers.wait()
        self._is_paused = True

    async def resume(self) -> None:
        await self._answers.wait()
        self._is_paused = False

    async def init_transfer(self, payload: dict[str, Any]) -> None:
        await self._obey(WeightsPhase.INIT, payload)

    async def start_update(self) -> None:
        await self._obey(WeightsPhase.START, {})

    async def update(self, payload: dict[str, Any]) -> None:
        await self._obey(WeightsPhase.UPDATE, payload)

    async def finish_update(self, version: int) -> None:
        await self._answers.wait()
        self.version = version

    async def _obey(self, phase: WeightsPhase, payload: dict[str, Any]) -> None:
        await self._answers.wait()
        error, _, _ = await asyncio.to_thread(self._transfer.obey, phase, payload)
        if error is not None:
            raise BrokenTransfer(error)

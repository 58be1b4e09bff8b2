"""An actor of benchmarks/weights.py: vLLM, or a stand-in for its engine that takes weights and samples nothing."""

import asyncio
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM

from actors.greeting import Session
from actors.main import Actor
from actors.main import main as run_actor
from actors.receiver import Receiver
from common.broadcast import BrokenTransfer, join_gloo
from common.config import Config
from common.transport import ActorConnection
from common.types import Float32Array, Int32Array
from learner.networks.attention import IMPLEMENTATION
from learner.networks.model import Policy
from learner.networks.pretrained import read_config


class ReceivingEngine:
    """The calls of actors.engine.Engine. Its requests wait for ever; its weights are those of a policy."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._weights = dict(policy.model.named_parameters())
        self._receiver = Receiver()
        self.version = 0
        self.generated_tokens = 0
        self.busy_s = 0.0

    async def sample(self, lease: object) -> None:
        await asyncio.Event().wait()

    def progress(self, lease_id: int) -> None:
        """Nothing is drawn."""

    def num_drawn(self, lease_id: int) -> int:
        return 0

    def forget(self, lease_id: int) -> None:
        """Nothing is kept."""

    async def score(self, token_ids: Int32Array) -> Float32Array:
        return _logprobs(self._policy, torch.tensor(token_ids, dtype=torch.int64))

    async def pause(self) -> None:
        """Nothing is under way."""

    async def init_transfer(self, payload: dict[str, Any]) -> None:
        where = (payload["master_address"], payload["master_port"], payload["rank_offset"])
        group = (payload["world_size"], payload["timeout_s"])
        await asyncio.to_thread(self._receiver.join, lambda: join_gloo(*where, *group))
        self._raise_if_broken()

    async def start_update(self) -> None:
        """The parameters take what comes."""

    async def update(self, payload: dict[str, Any]) -> None:
        await asyncio.to_thread(self._load, payload)
        self._raise_if_broken()

    async def finish_update(self, version: int) -> None:
        self.version = version

    async def resume(self) -> None:
        """Nothing waits."""

    @torch.no_grad()
    def _load(self, payload: dict[str, Any]) -> None:
        dtype = getattr(torch, payload["dtype_name"])
        for name, tensor in self._receiver.receive(payload["names"], dtype, payload["shapes"], torch.device("cpu")):
            self._weights[name].copy_(tensor)

    def _raise_if_broken(self) -> None:
        if self._receiver.problem is not None:
            raise BrokenTransfer(self._receiver.problem)


@torch.no_grad()
def _logprobs(policy: Policy, token_ids: torch.Tensor) -> Float32Array:
    ends = torch.tensor([0, len(token_ids)])
    logprobs: Float32Array = policy(token_ids, ends, torch.tensor([1]), 1.0)[0].float().numpy()
    return logprobs


def act(engine: str, config: Config, endpoint: str, name: str) -> None:
    """One actor, until the learner stops it."""
    torch.set_num_threads(1)
    if engine == "vllm":
        run_actor(config, endpoint, name)
    else:
        asyncio.run(_receive(config, endpoint, name))


async def _receive(config: Config, endpoint: str, name: str) -> None:
    engine = ReceivingEngine(random_policy(config))
    async with ActorConnection(endpoint, name, config.transport.max_message_mb) as connection:
        session = Session(config, connection)
        await session.begin()
        actor = Actor(session, cast(Any, engine), cast(Any, None))
        await actor.serve(asyncio.Event(), await engine.score(session.welcome.probe_token_ids))


def random_policy(config: Config) -> Policy:
    """The model of the folder, in the type that travels."""
    torch.manual_seed(0)
    shape, dtype = read_config(config.model.path, trust_remote_code=False), getattr(torch, config.model.dtype.value)
    model = AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation=IMPLEMENTATION)
    return Policy(model.requires_grad_(False), config.learner.logprob_chunk_tokens)

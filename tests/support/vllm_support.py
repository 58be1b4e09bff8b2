"""Pieces that the tests with a real engine share: small random models, an event loop in a thread, a local control."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from actors.engine import Engine
from common.broadcast import BrokenTransfer
from common.config import ActorsConfig, Config, ModelConfig, RolloutConfig, WeightsConfig
from common.types import Lease, MemberId, Purpose, WeightsPhase, WeightsReport

Result = TypeVar("Result")

LOCAL = MemberId("local", 1)

CHARACTERS = "0123456789+-=#>ab"
VOCABULARY = len(CHARACTERS) + 2


def make_model(path: Path, tied: bool, seed: int = 0, positions: int = 512) -> str:
    """A random two-layer Qwen2 with one token per character, as a Hugging Face folder."""
    write_tokenizer(path)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=96,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.5 if not tied else 0.1)
    model.save_pretrained(path)
    return str(path)


def make_mixture(path: Path) -> str:
    """A random Qwen3 with four experts in each layer, of which a token takes two; untied."""
    write_tokenizer(path)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=False,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    return str(path)


def make_gpt2(path: Path) -> str:
    """A random GPT-2: tied, its embedding and output layer under names of their own, learned positions."""
    write_tokenizer(path)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=2, n_positions=512, eos_token_id=1, bos_token_id=1
    )
    model = GPT2LMHeadModel(config)
    torch.nn.init.normal_(model.transformer.wte.weight, std=0.1)
    model.save_pretrained(path)
    return str(path)


def write_tokenizer(path: Path) -> None:
    vocabulary = {"<pad>": 0, "<eos>": 1} | {character: i + 2 for i, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(path)


def engine_config(path: str, **weights: Any) -> Config:
    return Config(
        model=ModelConfig(path=path, max_model_len=512),
        rollout=RolloutConfig(group_size=4, max_tokens=400),
        actors=ActorsConfig(groups_in_flight=8),
        weights=WeightsConfig(timeout_s=30.0, **weights),
    )


def lease(lease_id: int, **changes: Any) -> Lease:
    values: dict[str, Any] = {
        "purpose": Purpose.TRAIN,
        "prompt_uid": f"p{lease_id}",
        "prompt_token_ids": np.array([3, 4, 5, 6], dtype=np.int32),
        "reference": "",
        "row": {},
        "num_samples": 4,
        "seed": lease_id,
        "temperature": 1.0,
        "max_tokens": 40,
    }
    return Lease(lease_id=lease_id, **(values | changes))


class LoopThread:
    """An event loop in a thread of its own, as the actor process has one to itself."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, Result]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Coroutine[Any, Any, Result], timeout_s: float = 240.0) -> Result:
        result: Result = self.submit(coroutine).result(timeout_s)
        return result

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10.0)


class LocalControl:
    """What the learner's service does for publication, with one engine behind it and no sockets between."""

    def __init__(self, engine: Engine, thread: LoopThread, probe_token_ids: np.ndarray[Any, Any]) -> None:
        self._engine, self._thread, self._probe = engine, thread, probe_token_ids
        self.quarantined: dict[MemberId, str] = {}

    def member_ids(self) -> tuple[MemberId, ...]:
        return (LOCAL,)

    def lost_ids(self) -> tuple[MemberId, ...]:
        return ()

    def waiting_ids(self) -> tuple[MemberId, ...]:
        return ()

    def quarantine(self, member: MemberId, reason: str, version: int) -> None:
        self.quarantined[member] = reason

    def dismiss(self, member: MemberId, reason: str) -> None:
        raise AssertionError(f"dismissed: {reason}")

    def command(
        self,
        phase: WeightsPhase,
        version: int,
        payloads: Mapping[MemberId, dict[str, Any]],
        timeout_s: float,
        meanwhile: Callable[[], None] | None = None,
    ) -> dict[MemberId, WeightsReport]:
        answer = self._thread.submit(self._phase(phase, version, payloads[LOCAL]))
        if meanwhile is not None:
            meanwhile()
        error, is_shared, probe = None, False, np.empty(0, dtype=np.float32)
        try:
            probe = answer.result(timeout_s)
        except BrokenTransfer as problem:
            error, is_shared = str(problem), True
        return {
            LOCAL: WeightsReport(
                command_id=0, phase=phase, version=version, error=error, is_shared=is_shared, probe_logprobs=probe
            )
        }

    async def _phase(self, phase: WeightsPhase, version: int, payload: dict[str, Any]) -> np.ndarray[Any, Any]:
        engine = self._engine
        match phase:
            case WeightsPhase.PAUSE:
                await engine.pause()
            case WeightsPhase.INIT:
                await engine.init_transfer(payload)
            case WeightsPhase.START:
                await engine.start_update()
            case WeightsPhase.UPDATE:
                await engine.update(payload)
            case WeightsPhase.FINISH:
                await engine.finish_update(version)
            case WeightsPhase.RESUME:
                await engine.resume()
                return await engine.score(self._probe)
        return np.empty(0, dtype=np.float32)

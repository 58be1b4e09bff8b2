"""vLLM's engine core over an executor without a model: the scheduler is real, and tokens are those of a script."""

import os
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from vllm import AsyncEngineArgs, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

MODEL = "configs/models/contrary_walk"


class ScriptedExecutor(Executor):
    """Draws 3, 4, 5, ... for every request; the log-prob of token t is -t."""

    def _init_executor(self) -> None:
        self.drawn: dict[str, list[int]] = {}

    def get_kv_cache_specs(self) -> Any:
        return [{"layer": FullAttentionSpec(block_size=128, num_kv_heads=1, head_size=32, dtype=torch.float32)}]

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        return [["NHD"]]

    def determine_available_memory(self) -> list[int]:
        return [1 << 26]

    def initialize_from_config(self, kv_cache_configs: Any) -> None:
        """There is no cache."""

    def compile_or_warm_up_model(self) -> None:
        """There is no model."""

    def collective_rpc(self, *_: Any, **__: Any) -> list[None]:
        return [None]

    def check_health(self) -> None:
        """It is well."""

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        self._scheduled = list(scheduler_output.num_scheduled_tokens)
        future: Future[Any] = Future()
        future.set_result(None if self._scheduled else ModelRunnerOutput(req_ids=[], req_id_to_index={}))
        return future if non_block else future.result()

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        tokens = []
        for name in self._scheduled:
            drawn = self.drawn.setdefault(name, [])
            drawn.append(3 + len(drawn))
            tokens.append([drawn[-1]])
        values = -np.array(tokens, np.float32)
        return ModelRunnerOutput(
            req_ids=self._scheduled,
            req_id_to_index={name: row for row, name in enumerate(self._scheduled)},
            sampled_token_ids=tokens,
            logprobs=LogprobsLists(np.array(tokens, np.int32), values, np.zeros(len(tokens), np.int32)),
        )


class ScriptedCore:
    """An engine core; `sent` has what it said: (version, output)."""

    def __init__(self, scheduler: str) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        arguments = AsyncEngineArgs(
            model=MODEL, dtype="float32", max_model_len=128, gpu_memory_utilization=0.3, scheduler_cls=scheduler
        )
        self.core = EngineCore(arguments.create_engine_config(), ScriptedExecutor, log_stats=False)
        self.sent: list[tuple[str | None, EngineCoreOutput]] = []

    @property
    def drawn(self) -> dict[str, list[int]]:
        executor: Any = self.core.model_executor
        return dict(executor.drawn)

    def add(self, name: str, max_tokens: int) -> None:
        values = {
            "request_id": name,
            "external_req_id": name,
            "prompt_token_ids": [3, 4, 5],
            "sampling_params": SamplingParams(max_tokens=max_tokens, logprobs=0),
            "arrival_time": 0.0,
        }
        others = dict.fromkeys(("mm_features", "pooling_params", "lora_request", "cache_salt", "data_parallel_rank"))
        self.core.add_request(*self.core.preprocess_add_request(EngineCoreRequest(**values, **others)))

    def run(self, steps: int = 1000) -> None:
        """Until nothing is left to do, or for so many steps."""
        while self.core.scheduler.has_requests() and steps:
            outputs, _ = self.core.step()
            self.sent += [(each.weight_version, output) for each in outputs.values() for output in each.outputs]
            steps -= 1

    def arrived(self, name: str) -> list[tuple[str | None, int, float]]:
        """(version, token, log-prob) of each token that was sent."""
        return [
            (version, token, logprob)
            for version, output in self.sent
            if output.request_id == name and output.new_logprobs is not None
            for token, logprob in zip(output.new_token_ids, output.new_logprobs.logprobs[:, 0].tolist(), strict=True)
        ]

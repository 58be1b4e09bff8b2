"""The generation engine of one actor: vLLM's AsyncLLM behind the few calls that an actor needs.

Owns the version that the engine holds, and the clock of its busy time. Everything here runs on the actor's event
loop except the engine's construction, which blocks for tens of seconds and therefore runs in a thread.
"""

import asyncio
import gc
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from actors.sampling import Completion, Drawn, EngineError, RequestRefused, Sample, Sampling, drawn_by, read
from common.broadcast import BrokenTransfer
from common.config import Config, Device, KVCache
from common.memory import num_sequences, utilization
from common.placement import plan_here
from common.types import FinishReason, Float32Array, Int32Array, Lease, Progress

TRANSFER_ENGINE = "async_vapo_{}"  # our name in vLLM's registry for the engine of a weights.backend
SMALLEST_CPU_BLOCK = 32  # tokens
_BINDING = "VLLM_CPU_OMP_THREADS_BIND"
_SOCKETS = "VLLM_RPC_BASE_PATH"
MAX_REASON = 500  # characters of what the engine says that travel to the learner


class Engine:
    """One AsyncLLM. `start` before anything else, `shutdown` at the end; weight phases in WeightsPhase's order.

    Requests that are in flight when generation pauses stay in the engine and continue after `resume`; what happens to
    their key-value cache is `weights.kv_cache`. Prefix-cache entries never cross updates: every request is salted
    with their number when it is submitted.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._request_ids = itertools.count()
        self._llm: Any = None
        self._special_tokens: dict[str, int] = {}
        self._in_flight = 0
        self._places = asyncio.Semaphore(num_sequences(config))  # first come, first served
        self._paused = False
        self._busy_since: float | None = None
        self._busy_s = 0.0
        self._is_updating = False  # between the phases START and FINISH
        self.version = 0
        self._num_updates = 0  # tells weights apart: two learners, one after the other, may publish the same version
        self._sampling: dict[int, Sampling] = {}  # by lease id, until `forget`
        self._forgotten_tokens = 0

    async def start(self) -> None:
        """Starts the engine with the model folder's weights as version 0. Raises EngineError when that fails."""
        _set_environment(self._config)
        try:
            with _no_sockets_left():
                await asyncio.to_thread(self._start_llm)
                await self._llm.update_weight_version("0")
        except Exception as error:
            raise EngineError(f"the engine did not start on model {self._config.model.path!r}: {error}") from error

    def _start_llm(self) -> None:
        """Returns nothing, because what a pool's thread returns it also keeps, and the engine must be let go of."""
        self._llm = _build(self._config)
        tokens = self._llm.get_tokenizer().added_tokens_decoder
        self._special_tokens = {token.content: index for index, token in tokens.items() if token.special}

    async def shutdown(self) -> None:
        """Stops the engine's processes; blocks for some seconds, when nothing else is left to do."""
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = None
            await asyncio.sleep(0)  # lets the cancelled output handler let go of the engine ...
            gc.collect()  # ... so that its finaliser runs now and not while the interpreter is torn down

    @property
    def busy_s(self) -> float:
        """Seconds since start with at least one response in the engine and generation not paused."""
        running = time.monotonic() - self._busy_since if self._busy_since is not None else 0.0
        return self._busy_s + running

    @property
    def generated_tokens(self) -> int:
        """Tokens drawn since start, those of leases under way included."""
        return self._forgotten_tokens + sum(sampling.num_drawn() for sampling in self._sampling.values())

    async def sample(self, lease: Lease) -> list[Completion]:
        """All `lease.num_samples` completions of the lease, in order, each continued from its prefix.

        Until `forget`, `num_drawn` and `progress` tell how far it is. Raises RequestRefused when this lease cannot be
        sampled, EngineError when the engine is dead.
        """
        request_ids = [f"lease-{lease.lease_id}-{next(self._request_ids)}" for _ in range(lease.num_samples)]
        sampling = self._sampling[lease.lease_id] = Sampling(lease, request_ids, self._state_of)
        tasks = [asyncio.create_task(self._complete(sampling, sample)) for sample in sampling.samples]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def sampling_s(self, lease_id: int) -> float:
        """Busy seconds since the first of its completions got a place, until `forget`; 0 when none has needed one."""
        sampling = self._sampling.get(lease_id)
        return 0.0 if sampling is None or sampling.began_s is None else self.busy_s - sampling.began_s

    def num_drawn(self, lease_id: int) -> int:
        """Tokens drawn for this lease so far, its prefix not counted; 0 when it has not begun."""
        return self._sampling[lease_id].num_drawn() if lease_id in self._sampling else 0

    def progress(self, lease_id: int) -> Progress | None:
        """What has been drawn for this lease since the last call, a bounded part of it; None when that is nothing."""
        return self._sampling[lease_id].progress() if lease_id in self._sampling else None

    def progress_again(self) -> None:
        """`progress` of every lease begins anew: what it returned may not have arrived."""
        for sampling in self._sampling.values():
            sampling.send_again()

    def forget(self, lease_id: int) -> None:
        """The lease is done, or nobody waits for it. Its tokens stay counted."""
        if (sampling := self._sampling.pop(lease_id, None)) is not None:
            self._forgotten_tokens += sampling.num_drawn()

    def decode(self, token_ids: Int32Array) -> str:
        """The text of these tokens, special ones included."""
        text: str = self._llm.get_tokenizer().decode(token_ids.tolist(), skip_special_tokens=False)
        return text

    async def score(self, token_ids: Int32Array) -> Float32Array:
        """Log-prob of each token of a sequence given those before it, first token left out: float32 [tokens - 1]."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            max_tokens=1, temperature=1.0, prompt_logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY
        )
        with self._refusing():
            output = await self._run(token_ids, parameters, f"probe-{next(self._request_ids)}")
        pairs = zip(token_ids[1:].tolist(), output.prompt_logprobs[1:], strict=True)
        return np.array([entry[token].logprob for token, entry in pairs], dtype=np.float32)

    async def _complete(self, sampling: Sampling, sample: Sample) -> Completion:
        """Samples what its prefix lacks, as soon as there is a place for it."""
        lease = sampling.lease
        with self._refusing():
            parameters = self._parameters(lease, sample)
            sample.completion = self._read_prefix(lease, sample, parameters)
            if sample.completion is None:
                token_ids = np.concatenate([lease.prompt_token_ids, sample.prefix.token_ids])
                async with self._places:
                    sampling.begin(self.busy_s)
                    with self._drawing():
                        output = (await self._run(token_ids, parameters, sample.request_id)).outputs[0]
                sample.completion = self._joined(lease, sample, parameters, output)
        return sample.completion

    def _read_prefix(self, lease: Lease, sample: Sample, parameters: Any) -> Completion | None:
        """The completion, when the prefix is all of it."""
        prefix, reason = sample.prefix, sample.prefix_finish_reason
        if not len(prefix):
            return None
        reading = self._read(lease, prefix, parameters, ends_with_token=False)
        if reason is FinishReason.STOP and not reading.is_stopped:
            reading = self._read(lease, prefix, parameters, ends_with_token=True)
        if reading.is_stopped:
            reason = FinishReason.STOP
        elif reason is None and len(prefix) >= lease.max_tokens:
            reason = FinishReason.LENGTH
        return None if reason is None else Completion.of(prefix.cut(0, reading.num_tokens), reason, reading.text)

    def _joined(self, lease: Lease, sample: Sample, parameters: Any, output: Any) -> Completion:
        """Prefix and output. A stop string that lies across the seam, which the engine could not see, ends it there."""
        completion = _completion(output)
        if not len(sample.prefix):
            return completion
        joined = sample.prefix.then(completion)
        ends_with_token = completion.finish_reason is FinishReason.STOP and not isinstance(output.stop_reason, str)
        reading = self._read(lease, joined, parameters, ends_with_token=ends_with_token)
        reason = FinishReason.STOP if reading.is_stopped else completion.finish_reason
        return Completion.of(joined.cut(0, reading.num_tokens), reason, reading.text)

    def _read(self, lease: Lease, drawn: Drawn, parameters: Any, *, ends_with_token: bool) -> Any:
        tokenizer = self._llm.get_tokenizer()
        return read(tokenizer, lease.prompt_token_ids, drawn.token_ids, parameters, ends_with_token=ends_with_token)

    def _state_of(self, request_id: str) -> Any:
        """What vLLM's output processor has of a running request; None before it has begun and after its end."""
        processor = self._llm.output_processor
        for internal_id in processor.external_req_ids.get(request_id, ()):
            return processor.request_states.get(internal_id)
        return None

    def _parameters(self, lease: Lease, sample: Sample) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        special = self._special_tokens
        return SamplingParams(
            temperature=lease.temperature,
            max_tokens=max(1, lease.max_tokens - len(sample.prefix)),
            seed=sample.seed,
            top_p=lease.top_p,
            top_k=lease.top_k,
            min_p=0.0,
            # Special tokens never appear in the text in which the engine looks for stop strings.
            stop=[text for text in lease.stop if text not in special],
            stop_token_ids=[special[text] for text in lease.stop if text in special],
            logprobs=0,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    async def pause(self) -> None:
        """Stops scheduling; running requests stay. Their cache is kept, or emptied to be recomputed."""
        recompute = self._config.weights.kv_cache is KVCache.recompute
        # AsyncLLM.pause_generation is this and 20 ms of sleep, so that outputs have come before it returns. They may
        # come later: each of them carries the version that drew it.
        await self._llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=recompute)
        self._paused = True
        self._track()

    async def init_transfer(self, payload: dict[str, Any]) -> None:
        """Joins a transfer group. Raises BrokenTransfer when the others do not come."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=payload))
        await self._check_transfer()

    async def start_update(self) -> None:
        """Begins anew when an update before was broken off."""
        if self._is_updating:
            await self._llm.finish_weight_update()
        self._is_updating = True
        await self._llm.start_weight_update()

    async def update(self, payload: dict[str, Any]) -> None:
        """Receives and loads one bucket. Raises BrokenTransfer when it did not come."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._llm.update_weights(WeightTransferUpdateRequest(update_info=payload))
        await self._check_transfer()

    async def finish_update(self, version: int) -> None:
        await self._llm.finish_weight_update(weight_version=str(version))
        self._is_updating = False
        self.version = version
        self._num_updates += 1

    async def _check_transfer(self) -> None:
        problems = await self._llm.collective_rpc("transfer_problem")
        if broken := [problem for problem in problems if problem is not None]:
            raise BrokenTransfer(broken[0])

    async def resume(self) -> None:
        await self._llm.resume_generation()
        self._paused = False
        self._track()

    async def sleep(self) -> None:
        """Stops scheduling and gives the GPU's memory back. Running requests stay, but are computed again later."""
        await self._llm.sleep(level=1, mode="keep")
        self._paused = True
        self._track()

    async def wake(self) -> None:
        """Takes the memory again and goes on as before `sleep`."""
        await self._llm.wake_up()
        self._paused = False
        self._track()

    async def _run(self, token_ids: Int32Array, parameters: Any, request_id: str) -> Any:
        """The final output of one request. Cancelling the caller aborts the request in the engine."""
        from vllm.inputs import tokens_input

        prompt = tokens_input(token_ids.tolist(), cache_salt=f"weights-{self._num_updates}")
        final = None
        async for output in self._llm.generate(prompt, parameters, request_id):
            final = output
        if final is None or not final.finished:
            raise EngineError(f"request {request_id} ended without an output")
        return final

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """While one response is in the engine."""
        self._in_flight += 1
        self._track()
        try:
            yield
        finally:
            self._in_flight -= 1
            self._track()

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Tells a dead engine, which ends the actor, from a request that could not be served, which does not.

        vLLM raises ValueError and VLLMError for a request that it does not accept, and an empty EngineGenerateError
        around whatever else went wrong with one; a dead engine says so itself.
        """
        from vllm.exceptions import VLLMError

        try:
            yield
        except (ValueError, VLLMError) as error:
            text = str(error) or repr(error.__cause__)
            if self._llm.errored:
                raise EngineError(f"the engine died: {text}") from error
            raise RequestRefused(text[:MAX_REASON]) from error

    def _track(self) -> None:
        """Keeps the busy clock: it runs while a response is in the engine and generation is not paused. The probe draws
        no token that counts: who only scores it, once a version, would look like an engine that hangs."""
        now, busy = time.monotonic(), self._in_flight > 0 and not self._paused
        if busy and self._busy_since is None:
            self._busy_since = now
        elif not busy and self._busy_since is not None:
            self._busy_s += now - self._busy_since
            self._busy_since = None


def _completion(output: Any) -> Completion:
    """Raises RequestRefused for one that did not end by itself, EngineError for one that does not add up."""
    if output.finish_reason not in set(FinishReason) or not output.token_ids:
        raise RequestRefused(f"a completion of {len(output.token_ids)} tokens ended with {output.finish_reason!r}")
    spans = [(span.version, span.start, span.end) for span in output.weight_versions]
    drawn = drawn_by(output.token_ids, output.logprobs.logprobs, spans)
    # The engine cuts the stop string off the text; the policy drew it, so it is trained and graded.
    text = output.text + (output.stop_reason if isinstance(output.stop_reason, str) else "")
    return Completion.of(drawn, FinishReason(output.finish_reason), text)


@contextmanager
def _no_sockets_left() -> Iterator[None]:
    """While an engine starts. vLLM, and who is killed, would leave the sockets of its processes in the folder for
    temporary files; as soon as both ends hold one, nobody looks for it again."""
    before = os.environ.get(_SOCKETS)
    # a start that was given up may still make files in it, which is no fault of the start
    with TemporaryDirectory(prefix="vllm-", dir=before, ignore_cleanup_errors=True) as folder:
        os.environ[_SOCKETS] = folder
        try:
            yield
        finally:
            os.environ.pop(_SOCKETS)
            if before is not None:
                os.environ[_SOCKETS] = before


def _set_environment(config: Config) -> None:
    """Read by vLLM at import or in the processes that it spawns, so they have to be set before."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if config.device is Device.cpu:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(config.actors.cpu_kv_cache_gib))
        # The launcher has pinned this process; vLLM's own binding would put every engine on the same core.
        os.environ.setdefault(_BINDING, "nobind")
        if config.actors.enforce_eager:
            # vLLM compiles its sampler all the same: 20 s at the first token and a C++ compiler needed, for no speed.
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def block_size(config: Config) -> int | None:
    """Tokens of a block of the key-value cache; None: as vLLM has it.

    What all requests of a group have in common is computed once as far as it fills whole blocks, and vLLM's have 128
    tokens on CPUs. The smallest that its kernels take costs some percent where prompts are too short to share anything.
    """
    longest_prompt = config.model.max_model_len - config.rollout.max_tokens
    return SMALLEST_CPU_BLOCK if config.device is Device.cpu and longest_prompt >= 2 * SMALLEST_CPU_BLOCK else None


def executor(config: Config) -> str | None:
    """The class that runs the model, None: as vLLM has it.

    On CPUs vLLM gives the model a process of its own, for the sake of its threads' cores, which are not its business
    here. Two processes that wait for each other in turns are slower than one, most of all on one core. An actor that
    is started by hand, with cores named for vLLM, gets that process.
    """
    is_alone = config.device is Device.cpu and config.actors.tensor_parallel_size == 1
    is_unbound = os.environ.get(_BINDING, "nobind") == "nobind"
    return "vllm.v1.executor.uniproc_executor.UniProcExecutor" if is_alone and is_unbound else None


def _build(config: Config) -> Any:
    from vllm import AsyncEngineArgs
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.v1.engine import output_processor
    from vllm.v1.engine.async_llm import AsyncLLM

    from actors.outputs import RowProcessor

    output_processor.LogprobsProcessor = RowProcessor  # type: ignore[misc]  # vLLM has no setting for it
    plan = plan_here(config)
    arguments = AsyncEngineArgs(
        model=config.model.path,
        trust_remote_code=config.model.trust_remote_code,
        dtype=config.model.dtype.value,
        max_model_len=config.model.max_model_len,
        # One place more for the probe: while all others are taken, a publication would wait for a response to end.
        max_num_seqs=num_sequences(config) + 1,
        gpu_memory_utilization=utilization(config),
        # On a shared GPU vLLM cannot measure what it may take: the learner's memory comes and goes meanwhile.
        kv_cache_memory_bytes=None if plan is None else plan.kv_cache,
        enable_sleep_mode=config.actors.sleep_while_training,
        enforce_eager=config.actors.enforce_eager,
        tensor_parallel_size=config.actors.tensor_parallel_size,
        distributed_executor_backend=executor(config),
        block_size=block_size(config),
        logprobs_mode="processed_logprobs",
        weight_transfer_config=WeightTransferConfig(backend=TRANSFER_ENGINE.format(config.transfer_backend)),
        worker_extension_cls="actors.weights.TransferWorker",
        scheduler_cls="actors.outputs.HoldingScheduler" if config.device is Device.cpu else None,
        generation_config="vllm",
        seed=config.seed,
        # vLLM rewinds a seeded request's generator after each chunk of its prompt, which CPU generators cannot do.
        enable_chunked_prefill=config.device is Device.cuda,
        disable_log_stats=True,
        enable_log_requests=False,
    )
    return AsyncLLM.from_engine_args(arguments)

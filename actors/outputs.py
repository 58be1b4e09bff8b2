"""Fewer and larger messages from vLLM's engine core to the actor, which needs every token, but not at once.

vLLM sends every token of every request by itself, with three arrays around its log-prob, and takes each apart again
in Python: with a small model that costs as much as the model. HoldingScheduler, in the engine core's process, keeps
what running requests have drawn for up to HOLD_S and then sends it as if one step had drawn it. Nothing is kept of a
request that has ended, nor of one with stop strings, for which vLLM looks in the actor's process; nor while generation
is paused. Weights change in a pause alone, so that all tokens of a message have one version.

On CPUs alone. On GPUs vLLM has another scheduler, which plans a step before the last has ended; nothing of this has run
there, so that one stays as it is.

vLLM imports this module for `scheduler_cls`.
"""

import time
from typing import Any

import numpy as np
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists

HOLD_S = 0.1  # what is told of progress, every transport.heartbeat_s, lacks what is younger


class Held:
    """What one request has drawn and has not been sent: `output` is the first of it, with all tokens."""

    def __init__(self, client: int, output: EngineCoreOutput, logprobs: list[float]) -> None:
        self.client = client
        self.output = output
        self.logprobs = logprobs

    def add(self, output: EngineCoreOutput, logprobs: list[float]) -> None:
        self.output.new_token_ids.extend(output.new_token_ids)
        self.logprobs.extend(logprobs)

    def before(self, output: EngineCoreOutput, logprobs: list[float]) -> EngineCoreOutput:
        """`output`, with what was held in front of it."""
        self.add(output, logprobs)
        output.new_token_ids = self.output.new_token_ids
        output.prefill_stats = self.output.prefill_stats
        return with_logprobs(output, self.logprobs)


def with_logprobs(output: EngineCoreOutput, logprobs: list[float]) -> EngineCoreOutput:
    """`output` with one log-prob for each of its tokens, in vLLM's form; ranks, for which nobody asks, are 0."""
    if logprobs:
        output.new_logprobs = LogprobsLists(
            np.array(output.new_token_ids, np.int32)[:, None],
            np.array(logprobs, np.float32)[:, None],
            np.zeros(len(logprobs), np.int32),
        )
    return output


class HoldingScheduler(Scheduler):
    """vLLM's own, but for when its outputs leave. Invariant: what is held belongs to requests that have not ended."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._held: dict[str, Held] = {}
        self._sent_s = time.monotonic()

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, EngineCoreOutputs]:
        drawn = model_runner_output.logprobs
        model_runner_output.logprobs = None  # so that it is not sliced for every request
        logprobs = [] if drawn is None else drawn.logprobs[:, :1].tolist()  # [requests][1]
        rows = model_runner_output.req_id_to_index
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        for client, of_client in outputs.items():
            sent = []
            for output in of_client.outputs:
                its_own = logprobs[rows[output.request_id]] if logprobs and output.new_token_ids else []
                if self._may_wait(output):
                    self._hold(client, output, its_own)
                else:
                    held = self._held.pop(output.request_id, None)
                    sent.append(held.before(output, its_own) if held else with_logprobs(output, its_own))
            of_client.outputs = sent
        self._release(outputs)
        return {client: of_client for client, of_client in outputs.items() if _says_something(of_client)}

    def has_requests(self) -> bool:
        """Also true while something is held in a pause, which is not complete before it is sent."""
        return bool(super().has_requests() or self._held)

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        finished = super().finish_requests(request_ids, finished_status)
        for request in finished:
            self._held.pop(request.request_id, None)
        return finished

    def _may_wait(self, output: EngineCoreOutput) -> bool:
        if output.finish_reason is not None or output.new_prompt_logprobs_tensors is not None:
            return False
        request = self.requests.get(output.request_id)
        return request is not None and request.sampling_params is not None and not request.sampling_params.stop

    def _hold(self, client: int, output: EngineCoreOutput, logprobs: list[float]) -> None:
        if (held := self._held.get(output.request_id)) is None:
            self._held[output.request_id] = Held(client, output, logprobs)
        else:
            held.add(output, logprobs)

    def _release(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Adds what is held, when its time has come."""
        now = time.monotonic()
        if now - self._sent_s < HOLD_S and self.pause_state is PauseState.UNPAUSED:
            return
        for held in self._held.values():
            of_client = outputs.setdefault(held.client, EngineCoreOutputs())
            of_client.outputs.append(with_logprobs(held.output, held.logprobs))
        self._held.clear()
        self._sent_s = now


def _says_something(outputs: EngineCoreOutputs) -> bool:
    return bool(outputs.outputs or outputs.finished_requests or outputs.scheduler_stats is not None)


class RowProcessor(LogprobsProcessor):
    """Takes the log-probs of many tokens at once; nothing else is kept of them, and `logprobs` is flat."""

    def _update_sample_logprobs(self, logprobs_lists: LogprobsLists) -> None:
        if self.logprobs is not None:  # of a request that is only scored nobody wants them
            self.logprobs.logprobs.extend(logprobs_lists.logprobs[:, 0].tolist())  # type: ignore[union-attr]

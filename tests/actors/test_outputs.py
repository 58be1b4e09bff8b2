"""What leaves the engine core, and when: nothing is lost, late, or under a wrong version."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.logprobs import FlatLogprobs
from vllm.platforms import current_platform
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput
from vllm.v1.request import RequestStatus

from actors import outputs
from actors.outputs import HOLD_S, HoldingScheduler, RowProcessor
from tests.support.scripted_executor import ScriptedCore


class Core:
    """A scheduler whose model is scripted; `step` is one step of the engine core."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **stops: str) -> None:
        self.now_s = 0.0
        self.finishing: set[str] = set()
        self.scheduler: Any = HoldingScheduler.__new__(HoldingScheduler)
        self.scheduler._held, self.scheduler._sent_s, self.scheduler._pause_state = {}, 0.0, PauseState.UNPAUSED
        self.scheduler.requests = {
            name: SimpleNamespace(request_id=name, sampling_params=SamplingParams(stop=stop or None))
            for name, stop in stops.items()
        }
        monkeypatch.setattr(outputs.time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(Scheduler, "update_from_output", lambda *made: self._update(made[0], made[2]))
        monkeypatch.setattr(Scheduler, "finish_requests", lambda *made: self._finish(made[0], made[1]))
        monkeypatch.setattr(Scheduler, "has_requests", lambda scheduler: False)

    def step(self, tokens: dict[str, int], ends: str = "") -> list[tuple[str, list[int], list[float] | None]]:
        """What is sent: (request, tokens, log-probs). The log-prob of token t is -t."""
        self.finishing = {ends}
        values = np.array([-token for token in tokens.values()], np.float32)[:, None]
        drawn = ModelRunnerOutput(
            req_ids=list(tokens),
            req_id_to_index={name: row for row, name in enumerate(tokens)},
            sampled_token_ids=[[token] for token in tokens.values()],
            logprobs=LogprobsLists(np.zeros((len(tokens), 1), np.int32), values, np.zeros(len(tokens), np.int32)),
        )
        sent = self.scheduler.update_from_output(None, drawn)
        return [
            (o.request_id, o.new_token_ids, o.new_logprobs.logprobs[:, 0].tolist() if o.new_logprobs else None)
            for of_client in sent.values()
            for o in of_client.outputs
        ]

    def _update(self, scheduler: Any, drawn: ModelRunnerOutput) -> dict[int, EngineCoreOutputs]:
        assert drawn.logprobs is None
        made = []
        for name, tokens in zip(drawn.req_ids, drawn.sampled_token_ids, strict=True):
            reason = FinishReason.LENGTH if name in self.finishing else None
            made.append(EngineCoreOutput(request_id=name, new_token_ids=tokens, finish_reason=reason))
            if reason is not None:
                del scheduler.requests[name]
        return {0: EngineCoreOutputs(outputs=made)} if made else {}

    def _finish(self, scheduler: Any, names: list[str]) -> list[Any]:
        return [scheduler.requests.pop(name) for name in names]


def test_tokens_wait_and_leave_together(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core(monkeypatch, a="", b="")
    assert core.step({"a": 3, "b": 4}) == [] == core.step({"b": 5, "a": 6})
    core.now_s = HOLD_S
    assert core.step({"a": 7, "b": 8}) == [
        ("a", [3, 6, 7], [-3.0, -6.0, -7.0]),
        ("b", [4, 5, 8], [-4.0, -5.0, -8.0]),
    ]
    assert core.step({"a": 9, "b": 9}) == []


def test_a_request_that_ends_leaves_at_once_with_all_that_it_held(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core(monkeypatch, a="", b="")
    core.step({"a": 3, "b": 4})
    assert core.step({"a": 5, "b": 6}, ends="a") == [("a", [3, 5], [-3.0, -5.0])]
    core.now_s = HOLD_S
    assert core.step({"b": 7}) == [("b", [4, 6, 7], [-4.0, -6.0, -7.0])]


def test_a_request_with_stop_strings_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core(monkeypatch, a="", b="#")
    assert core.step({"a": 3, "b": 4}) == [("b", [4], [-4.0])]


def test_a_pause_is_not_complete_before_everything_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core(monkeypatch, a="")
    core.step({"a": 3})
    core.scheduler._pause_state = PauseState.PAUSED_ALL
    assert core.scheduler.has_requests()
    assert core.step({}) == [("a", [3], [-3.0])]
    assert not core.scheduler.has_requests()
    assert core.step({"a": 4}) == [("a", [4], [-4.0])]  # a step that was under way when the pause began


def test_nothing_is_kept_of_a_request_that_was_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core(monkeypatch, a="")
    core.step({"a": 3})
    core.scheduler.finish_requests(["a"], RequestStatus.FINISHED_ABORTED)
    core.now_s = HOLD_S
    assert core.step({}) == []


def test_log_probs_are_read_in_columns_and_left_out_where_nobody_asked() -> None:
    lists = LogprobsLists(np.zeros((2, 1), np.int32), np.array([[-1.0], [-2.0]], np.float32), np.zeros(2, np.int32))
    rest = {"tokenizer": None, "prompt_logprobs": None, "cumulative_logprob": 0.0, "num_prompt_logprobs": None}
    asked = RowProcessor(logprobs=FlatLogprobs(), num_logprobs=0, **rest)
    asked._update_sample_logprobs(lists)
    asked._update_sample_logprobs(lists)
    assert asked.logprobs.logprobs == [-1.0, -2.0, -1.0, -2.0]  # type: ignore[union-attr]
    silent = RowProcessor(logprobs=None, num_logprobs=None, **rest)
    silent._update_sample_logprobs(lists)
    assert silent.logprobs is None


@pytest.mark.skipif(not current_platform.is_cpu(), reason="a GPU's scheduler is asynchronous")
def test_under_vllms_engine_core_every_token_arrives_once_under_the_version_that_drew_it() -> None:
    core = ScriptedCore("actors.outputs.HoldingScheduler")
    core.core.set_weight_version("0")
    for number, length in enumerate((20, 30, 40)):
        core.add(f"r{number}", length)
    core.run(steps=12)
    core.core.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    core.run()  # what was held is sent before the pause is complete
    assert {name: len(core.arrived(name)) for name in core.drawn} == dict.fromkeys(("r0", "r1", "r2"), 12)
    core.core.set_weight_version("1")
    core.core.scheduler.set_pause_state(PauseState.UNPAUSED)
    core.core.abort_requests(["r1"])
    core.run()
    for name, length in (("r0", 20), ("r2", 40)):
        versions = ["0"] * 12 + ["1"] * (length - 12)
        assert core.arrived(name) == [(version, 3 + k, -3.0 - k) for k, version in enumerate(versions)]
    assert len(core.arrived("r1")) == 12
    assert {output.request_id for _, output in core.sent if output.finish_reason} == {"r0", "r2"}
    assert len(core.sent) < 20  # and not one message for each of the 84 tokens

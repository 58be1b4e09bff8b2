"""What one request provokes fails its lease; only a dead engine ends an actor. No engine is started here."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.outputs import CompletionOutput, WeightVersionSpan
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from actors.engine import Engine, EngineError, RequestRefused
from actors.greeting import Session
from actors.main import Actor, main
from common.config import Config, ModelConfig, VerifierConfig
from common.transport import model_fingerprints
from common.types import CompletedGroup, FinishReason, Heartbeat, LeaseFailed, Progress, Prompt
from common.wire import WireError
from learner.rollouts.service import LearnerService
from tests.support.fake_actors import group, progress
from tests.support.runs import ROOT
from tests.support.vllm_support import lease


def test_an_actor_that_cannot_start_says_so_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    config = Config(
        model=ModelConfig(path=str(ROOT / "configs/models/chain_sum")), verifier=VerifierConfig("nowhere:f")
    )
    prompts = [Prompt(uid="p", text="", reference="")]
    fingerprints = model_fingerprints(config.model.path)
    with LearnerService(config, prompts, lambda prompt: [1], fingerprints, [1, 2]) as service:
        assert main(config, service.endpoint, "a") == 2
    said = capsys.readouterr()
    assert 'error: actor a: verifier.function "nowhere:f" cannot be loaded' in said.err and said.out == ""


def output(**changes: Any) -> CompletionOutput:
    values: dict[str, Any] = {
        "index": 0,
        "text": "ab",
        "token_ids": [5, 6],
        "cumulative_logprob": None,
        "logprobs": SimpleNamespace(logprobs=[-0.5, -1.0]),
        "finish_reason": "stop",
        "weight_versions": [WeightVersionSpan("0", 0, 2)],
    }
    return CompletionOutput(**(values | changes))


class FakeLLM:
    """Answers every request with `result`, or raises it."""

    output_processor = SimpleNamespace(external_req_ids={}, request_states={})

    def __init__(self, result: Any, errored: bool = False) -> None:
        self.result, self.errored = result, errored
        self.parameters: list[Any] = []

    async def generate(self, prompt: Any, parameters: Any, request_id: str) -> AsyncIterator[Any]:
        self.parameters.append(parameters)
        if isinstance(self.result, Exception):
            raise self.result
        yield SimpleNamespace(finished=True, outputs=[self.result])


def engine_of(llm: FakeLLM) -> Engine:
    engine = Engine(Config(model=ModelConfig(path="nowhere")))
    engine._llm, engine._special_tokens = llm, {"<eot>": 3}
    return engine


def wrapped(cause: Exception) -> EngineGenerateError:
    error = EngineGenerateError()
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (VLLMValidationError("The decoder prompt cannot be empty"), "prompt cannot be empty"),
        (ValueError("prompt_token_ids is longer than max_model_len"), "longer than"),
        (wrapped(TypeError("unhashable")), r"TypeError\('unhashable'\)"),
        (output(finish_reason="abort"), "a completion of 2 tokens ended with 'abort'"),
        (output(token_ids=[], finish_reason="length"), "a completion of 0 tokens"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_with_its_reason(result: Any, words: str) -> None:
    with pytest.raises(RequestRefused, match=words):
        asyncio.run(engine_of(FakeLLM(result)).sample(lease(0)))


@pytest.mark.parametrize("error", [EngineDeadError(), ValueError("closed"), wrapped(KeyError("x"))])
def test_a_dead_engine_is_not_the_request_s_fault(error: Exception) -> None:
    with pytest.raises(EngineError, match="the engine died"):
        asyncio.run(engine_of(FakeLLM(error, errored=True)).sample(lease(0)))


def test_a_setting_that_the_engine_does_not_accept_is_refused_too() -> None:
    with pytest.raises(RequestRefused, match="top_p must be in"):
        asyncio.run(engine_of(FakeLLM(output())).sample(lease(0, top_p=0.0)))


def test_stop_strings_and_cut_off_tokens_reach_the_engine() -> None:
    llm = FakeLLM(output(stop_reason="</a>"))
    asked = lease(0, stop=("</a>", "<eot>"), top_p=0.5, top_k=7, num_samples=1)
    (completion,) = asyncio.run(engine_of(llm).sample(asked))
    (parameters,) = llm.parameters
    assert (parameters.top_p, parameters.top_k) == (0.5, 7)
    assert (parameters.stop, parameters.stop_token_ids) == (["</a>"], [3]), "a special token is not seen in a text"
    assert completion.text == "ab</a>", "what the policy drew is what the verifier sees"
    assert completion.finish_reason is FinishReason.STOP


class Mailbox:
    """The actor's connection; `too_large` messages do not fit."""

    def __init__(self, too_large: tuple[type, ...] = ()) -> None:
        self.sent: list[Any] = []
        self._too_large = too_large

    async def send(self, message: Any) -> None:
        if isinstance(message, self._too_large):
            raise WireError("CompletedGroup of 9 bytes: limit 8")
        self.sent.append(message)


class NoVerifier:
    async def verify(self, *_: Any) -> Any:
        raise AssertionError("nothing to verify")


async def work(mailbox: Mailbox, llm: FakeLLM) -> BaseException | None:
    """How the task of one lease ended."""
    actor = Actor(Session(Config(), mailbox), engine_of(llm), NoVerifier())  # type: ignore[arg-type]
    actor._begin(lease(4))
    await asyncio.wait(list(actor._tasks.values()), timeout=10.0)
    assert actor._unacknowledged == {}
    return actor._failure.exception() if actor._failure.done() else None


def test_an_actor_reports_a_refused_lease_and_goes_on() -> None:
    mailbox = Mailbox()
    assert asyncio.run(work(mailbox, FakeLLM(VLLMValidationError("too long")))) is None
    assert mailbox.sent == [LeaseFailed(lease_id=4, reason="too long")]


def test_an_actor_ends_with_its_engine() -> None:
    mailbox = Mailbox()
    assert isinstance(asyncio.run(work(mailbox, FakeLLM(EngineDeadError(), errored=True))), EngineError)
    assert mailbox.sent == []


def test_a_group_that_no_message_can_carry_fails_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    async def complete(*_: Any) -> CompletedGroup:
        return group(4, versions=[0])

    monkeypatch.setattr("actors.main.complete", complete)
    mailbox = Mailbox(too_large=(CompletedGroup,))
    assert asyncio.run(work(mailbox, FakeLLM(output()))) is None
    assert mailbox.sent == [LeaseFailed(lease_id=4, reason="CompletedGroup of 9 bytes: limit 8")]


class GrowingEngine:
    """Has so many messages of news for lease 4."""

    generated_tokens, busy_s = 9, 1.5

    def __init__(self, num_news: int) -> None:
        self._news = [progress(4, [start, 0], [[0], []]) for start in range(num_news)]

    def progress(self, lease_id: int) -> Progress | None:
        return self._news.pop(0) if lease_id == 4 and self._news else None

    def num_drawn(self, lease_id: int) -> int:
        return 7 if lease_id == 4 else 0


async def growing_actor(mailbox: Mailbox, num_news: int) -> Actor:
    session = Session(Config(), mailbox)  # type: ignore[arg-type]
    session.welcome = SimpleNamespace(heartbeat_s=60.0)  # type: ignore[assignment]
    actor = Actor(session, GrowingEngine(num_news), NoVerifier())  # type: ignore[arg-type]
    actor._tasks = {id_: asyncio.create_task(asyncio.sleep(60.0)) for id_ in (5, 4)}
    return actor


def test_a_heartbeat_names_the_leases_under_way_after_what_is_new_of_them() -> None:
    mailbox = Mailbox()

    async def beat() -> None:
        actor = await growing_actor(mailbox, num_news=3)
        with suppress(TimeoutError):
            await asyncio.wait_for(actor._beat(0.0), 0.1)

    asyncio.run(beat())
    news, heartbeat = mailbox.sent
    assert (type(news), news.lease_id, type(heartbeat)) == (Progress, 4, Heartbeat)
    assert (heartbeat.lease_ids.tolist(), heartbeat.lease_tokens.tolist()) == ([4, 5], [7, 0])


def test_an_actor_that_leaves_can_send_all_that_is_new_at_once() -> None:
    mailbox = Mailbox()

    async def flush() -> None:
        await (await growing_actor(mailbox, num_news=3)).flush_progress()

    asyncio.run(flush())
    assert [message.starts.tolist() for message in mailbox.sent] == [[0, 0], [1, 0], [2, 0]]

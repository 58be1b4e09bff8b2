"""A real engine that goes on where another left off: tokens, log-probs, versions, stop strings, seeds."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2ForCausalLM

from actors.sampling import Completion
from common.config import KVCache
from common.types import FinishReason, Lease, Progress
from learner.rollouts.partial import Partial
from tests.actors.test_generation import TOLERANCE, Bench, perturb
from tests.support.vllm_support import CHARACTERS, engine_config, lease, make_model

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

EOS = 1
POSITIONS = 8192 + 64


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    path = make_model(tmp_path_factory.mktemp("model"), tied=False, positions=POSITIONS)
    make_talkative(path)
    config = engine_config(path, kv_cache=KVCache.recompute)
    bench = Bench(replace(config, model=replace(config.model, max_model_len=POSITIONS)))
    yield bench
    bench.close()


def make_talkative(path: str) -> None:
    """Its responses go on to max_tokens: what all hidden states have in common is scored against the end."""
    model = Qwen2ForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] += 5.0
        model.lm_head.weight[EOS, 0] = -2.0
    model.save_pretrained(path)


def reports(bench: Bench, lease_id: int) -> list[Progress]:
    """All that is new of this lease."""

    async def ask() -> list[Progress]:
        return list(iter(lambda: bench.engine.progress(lease_id), None))

    return bench.thread.run(ask())


def num_drawn(bench: Bench, lease_id: int) -> int:
    async def ask() -> int:
        return bench.engine.num_drawn(lease_id)

    return bench.thread.run(ask())


def wait_for_tokens(bench: Bench, lease_id: int, count: int) -> None:
    async def wait() -> None:
        async with asyncio.timeout(120.0):
            while bench.engine.num_drawn(lease_id) < count:
                await asyncio.sleep(0.005)

    bench.thread.run(wait())


def killed(bench: Bench, asked: Lease, num_tokens: int) -> Partial:
    """What the learner knows of a lease whose actor died after so many tokens, with an update in between."""
    running = bench.thread.submit(bench.engine.sample(asked))
    partial = Partial(asked.num_samples)
    partial.add(before(asked), asked, "a")
    for _ in range(2):
        wait_for_tokens(bench, asked.lease_id, num_drawn(bench, asked.lease_id) + num_tokens)
        for progress in reports(bench, asked.lease_id):
            assert partial.add(progress, asked, "a") is None
        perturb(bench.policy)
        remember(bench, bench.publish())
    running.cancel()
    bench.thread.run(forget(bench, asked.lease_id))
    return partial


async def forget(bench: Bench, lease_id: int) -> None:
    bench.engine.forget(lease_id)


def before(asked: Lease) -> Progress:
    """The prefix of a lease, as if it had been reported."""
    lengths = asked.prefix_lengths if len(asked.prefix_lengths) else np.zeros(asked.num_samples, np.int32)
    return Progress(
        lease_id=asked.lease_id,
        starts=np.zeros(asked.num_samples, np.int32),
        lengths=lengths,
        token_ids=asked.prefix_token_ids,
        behavior_logprobs=asked.prefix_behavior_logprobs,
        versions=asked.prefix_versions,
        finish_reasons=asked.prefix_finish_reasons or (None,) * asked.num_samples,
    )


def remember(bench: Bench, publication: Any) -> None:
    """The weights of the current version, to compute with later."""
    assert publication.probe_difference < TOLERANCE
    snapshots = bench.__dict__.setdefault("snapshots", {})
    snapshots[bench.version] = {name: value.clone() for name, value in bench.policy.state_dict().items()}


def recomputed(bench: Bench, completion: Completion) -> np.ndarray[Any, Any]:
    """Each token's log-prob under the weights of its own version."""
    now = {name: value.clone() for name, value in bench.policy.state_dict().items()}
    logprobs = np.full(len(completion.token_ids), np.nan)
    for version in np.unique(completion.versions):
        bench.policy.load_state_dict(bench.__dict__["snapshots"][int(version)])
        own = completion.versions == version
        logprobs[own] = bench.learner_logprobs(completion)[own]
    bench.policy.load_state_dict(now)
    return logprobs


@pytest.mark.parametrize(
    ("num_samples", "max_tokens", "num_before"), [(4, 600, 100), pytest.param(1, 8192, 1500, marks=pytest.mark.long)]
)
def test_a_response_that_moved_twice_has_every_tokens_own_logprob_and_version(
    bench: Bench, num_samples: int, max_tokens: int, num_before: int
) -> None:
    remember(bench, bench.publish())
    asked = {"num_samples": num_samples, "max_tokens": max_tokens}
    first = killed(bench, lease(20, **asked), num_before)
    second = killed(bench, lease(21, **asked, **first.prefix()), num_before)
    completions = bench.sample(22, **asked, **second.prefix())
    assert max(len(completion.token_ids) for completion in completions) == max_tokens
    assert second.num_tokens > first.num_tokens > 0
    starts = np.cumsum([0, *second.prefix()["prefix_lengths"]])
    for index, completion in enumerate(completions):
        known = second.prefix()["prefix_token_ids"][starts[index] : starts[index + 1]]
        assert completion.token_ids[: len(known)].tolist() == known.tolist()
        assert (np.diff(completion.versions) >= 0).all()
        assert np.abs(recomputed(bench, completion) - completion.behavior_logprobs).max() < TOLERANCE
        assert completion.text == "".join(CHARACTERS[token - 2] for token in completion.token_ids if token > 1)
    assert len(np.unique(np.concatenate([completion.versions for completion in completions]))) >= 4


def test_what_is_reported_of_an_undisturbed_lease_is_what_it_ends_with(bench: Bench) -> None:
    asked = lease(30, max_tokens=300)
    running = bench.thread.submit(bench.engine.sample(asked))
    partial = Partial(asked.num_samples)
    for count in (40, 200):
        wait_for_tokens(bench, 30, count)
        for progress in reports(bench, 30):
            assert partial.add(progress, asked, "a") is None
        bench.publish()
    completions = running.result(120.0)
    for progress in reports(bench, 30):
        assert partial.add(progress, asked, "a") is None
    assert reports(bench, 30) == []
    told = partial.prefix()
    assert told["prefix_lengths"].tolist() == [len(completion.token_ids) for completion in completions]
    for field in ("token_ids", "behavior_logprobs", "versions"):
        np.testing.assert_array_equal(told[f"prefix_{field}"], np.concatenate([getattr(c, field) for c in completions]))
    assert told["prefix_finish_reasons"] == tuple(completion.finish_reason for completion in completions)
    generated = bench.engine.generated_tokens
    bench.thread.run(forget(bench, 30))
    assert bench.engine.generated_tokens == generated


def test_an_undisturbed_lease_draws_what_one_request_with_n_samples_would(bench: Bench) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    asked = lease(31, max_tokens=30)

    async def request() -> Any:
        parameters = SamplingParams(
            n=4, seed=asked.seed, max_tokens=30, temperature=1.0, output_kind=RequestOutputKind.FINAL_ONLY
        )
        prompt = {"prompt_token_ids": asked.prompt_token_ids.tolist()}
        return [output async for output in bench.engine._llm.generate(prompt, parameters, "direct")][-1]

    outputs = sorted(bench.thread.run(request()).outputs, key=lambda output: output.index)
    assert [c.token_ids.tolist() for c in bench.sample(31, max_tokens=30)] == [list(o.token_ids) for o in outputs]


def prefixes(*texts: str, ended: dict[int, FinishReason] | None = None) -> dict[str, Any]:
    """A lease's prefix of these texts, "$" for the end of sequence."""
    token_ids = [[EOS if char == "$" else CHARACTERS.index(char) + 2 for char in text] for text in texts]
    num_tokens = sum(map(len, token_ids))
    return {
        "num_samples": len(texts),
        "prefix_lengths": np.array(list(map(len, token_ids)), np.int32),
        "prefix_token_ids": np.array([token for text in token_ids for token in text], np.int32),
        "prefix_behavior_logprobs": np.full(num_tokens, -0.5, np.float32),
        "prefix_versions": np.zeros(num_tokens, np.int32),
        "prefix_finish_reasons": tuple((ended or {}).get(index) for index in range(len(texts))),
    }


def test_a_stop_string_across_the_end_of_a_prefix_ends_the_completion(bench: Bench) -> None:
    completions = bench.sample(40, max_tokens=40, stop=("a+",), **prefixes(*["0a"] * 96))
    stopped = [completion for completion in completions if completion.text.startswith("0a+")]
    assert stopped
    for completion in stopped:
        assert completion.text == "0a+" and CHARACTERS[completion.token_ids[-1] - 2] == "+"
        assert completion.finish_reason is FinishReason.STOP
    assert all("a+" not in completion.text[:-1] for completion in completions)


def test_a_prefix_that_has_ended_is_not_continued(bench: Bench) -> None:
    stop, length = FinishReason.STOP, FinishReason.LENGTH
    given = prefixes("12$", "1234", "1a+2", "1a+", "", ended={0: stop, 1: length, 3: stop})
    ended = bench.sample(41, max_tokens=4, stop=("a+",), **given)
    assert [completion.text for completion in ended[:4]] == ["12", "1234", "1a+", "1a+"]
    assert [len(completion.token_ids) for completion in ended[:4]] == [3, 4, 3, 3]
    assert [completion.finish_reason for completion in ended[:4]] == [stop, length, stop, stop]
    assert (ended[0].behavior_logprobs == -0.5).all() and len(ended[4].token_ids) > 0

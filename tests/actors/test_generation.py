"""A real vLLM engine with the learner's publisher: stamps, log-probs, in-flight updates, untied and tied models.

The tied one is a GPT-2, whose embedding has another name than most, the untied one a mixture of experts;
tests/test_end_to_end.py trains Qwen2, untied and tied.
"""

import os
import time
from collections.abc import Iterator
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch

from actors.engine import Completion, Engine, RequestRefused
from common.broadcast import BrokenTransfer
from common.config import Config, KVCache
from common.memory import num_sequences
from common.types import FinishReason, Int32Array
from learner.networks.model import Policy, load_policy
from learner.publication.buckets import Bucket
from learner.publication.control import Channel
from learner.publication.probe import probe_token_ids
from learner.publication.publisher import Publisher
from learner.publication.transfer import GlooTransfer
from tests.support.vllm_support import (
    CHARACTERS,
    LOCAL,
    LocalControl,
    LoopThread,
    engine_config,
    lease,
    make_gpt2,
    make_mixture,
    make_model,
)

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

TOLERANCE = 1e-4  # float32, as promised for tokens of the learner's own version


class Bench:
    """One engine, one policy and a publisher between them."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.thread = LoopThread()
        self.engine = Engine(config)
        self.thread.run(self.engine.start())
        self.policy = load_policy(config, torch.device("cpu"), None)
        probe = probe_token_ids(config)
        self.control = LocalControl(self.engine, self.thread, probe.numpy().astype(np.int32))
        self.publisher = Publisher(config, self.policy, self.control, 0, probe)
        self.version = 0
        self.publisher.publish(0)

    def publish(self) -> Any:
        self.version += 1
        return self.publisher.publish(self.version)

    def sample(self, lease_id: int, **settings: Any) -> list[Completion]:
        return self.thread.run(self.engine.sample(lease(lease_id, **settings)))

    def learner_logprobs(
        self, completion: Completion, temperature: float = 1.0, prompt: Int32Array | None = None
    ) -> np.ndarray[Any, Any]:
        prompt = lease(0).prompt_token_ids if prompt is None else prompt
        tokens = torch.from_numpy(np.concatenate([prompt, completion.token_ids]).astype(np.int64))
        with torch.no_grad():
            logprobs, _ = self.policy(
                tokens, torch.tensor([0, len(tokens)]), torch.tensor([len(prompt)]), temperature=temperature
            )
        return logprobs.numpy()

    def mismatch(self, completion: Completion, temperature: float = 1.0) -> float:
        return float(np.abs(self.learner_logprobs(completion, temperature) - completion.behavior_logprobs).max())

    def close(self) -> None:
        self.publisher.shutdown()
        self.thread.run(self.engine.shutdown())
        self.thread.close()


def perturb(policy: Policy, scale: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale * parameter.abs().mean())


@pytest.fixture(scope="module", params=["untied mixture", "tied gpt2"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # lets a test reach into the worker process
    folder = tmp_path_factory.mktemp("model")
    path = make_gpt2(folder) if request.param == "tied gpt2" else make_mixture(folder)
    bench = Bench(engine_config(path))
    yield bench
    bench.close()


def test_behavior_logprobs_are_the_learners_at_version_gap_zero(bench: Bench) -> None:
    for temperature in (1.0, 0.7):
        for completion in bench.sample(1, temperature=temperature):
            assert bench.mismatch(completion, temperature) < TOLERANCE
            assert (completion.versions == bench.version).all()


def test_what_a_group_has_in_common_is_computed_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it fills blocks, also when all come at once; and log-probs are the learner's all the same."""
    run, num_cached = bench.engine._run, []

    async def noted(*arguments: Any) -> Any:
        output = await run(*arguments)
        num_cached.append(output.num_cached_tokens)
        return output

    monkeypatch.setattr(bench.engine, "_run", noted)
    prompt = np.resize(np.arange(3, 13, dtype=np.int32), 75)
    completions = bench.sample(17, prompt_token_ids=prompt, max_tokens=8)
    assert sorted(num_cached) == [0, 64, 64, 64]
    for completion in completions:
        learners = bench.learner_logprobs(completion, prompt=prompt)
        assert np.abs(learners - completion.behavior_logprobs).max() < TOLERANCE


def test_a_stop_string_ends_a_completion_and_belongs_to_it(bench: Bench) -> None:
    stopped = [
        completion
        for completion in bench.sample(10, max_tokens=300, num_samples=8, stop=("#", "a+"))
        if completion.text.endswith(("#", "a+"))
    ]
    assert stopped
    for completion in stopped:
        assert completion.finish_reason is FinishReason.STOP
        assert completion.text == "".join(CHARACTERS[token - 2] for token in completion.token_ids if token > 1)
        assert completion.text.count("#") + completion.text.count("a+") == 1
        assert bench.mismatch(completion) < TOLERANCE


def test_evaluation_may_cut_off_tokens(bench: Bench) -> None:
    greedy = bench.sample(11, temperature=0.0, num_samples=1, max_tokens=20)[0]
    for cut in ({"top_k": 1}, {"top_p": 1e-6}):
        for completion in bench.sample(11, max_tokens=20, **cut):
            assert completion.token_ids.tolist() == greedy.token_ids.tolist()


@pytest.mark.parametrize("prompt", [[], [5] * 600, [5, 10**6]])
def test_a_prompt_that_the_engine_does_not_take_is_refused_and_the_engine_goes_on(
    bench: Bench, prompt: list[int]
) -> None:
    with pytest.raises(RequestRefused):
        bench.sample(12, prompt_token_ids=np.array(prompt, dtype=np.int32))
    assert len(bench.sample(13, max_tokens=4)) == 4


def test_publishing_unchanged_weights_changes_nothing(bench: Bench) -> None:
    before = bench.sample(2)
    publication = bench.publish()
    after = bench.sample(2)
    assert publication.probe_difference < TOLERANCE
    for old, new in zip(before, after, strict=True):
        assert old.token_ids.tolist() == new.token_ids.tolist()
        np.testing.assert_array_equal(old.behavior_logprobs, new.behavior_logprobs)


def test_every_tensor_arrives_in_flight_and_tokens_carry_the_version_that_drew_them(bench: Bench) -> None:
    first = bench.version
    running = bench.thread.submit(bench.engine.sample(lease(3, max_tokens=400)))
    for _ in range(2):
        wait_for_progress(bench)
        perturb(bench.policy)
        assert bench.publish().probe_difference < TOLERANCE
    spanning = running.result(120.0)
    for completion in spanning:
        assert (np.diff(completion.versions) >= 0).all()
    seen = set(np.concatenate([completion.versions for completion in spanning]).tolist())
    assert {first, first + 1} <= seen <= {first, first + 1, first + 2}
    for completion in bench.sample(4):
        assert (completion.versions == bench.version).all()
        assert bench.mismatch(completion) < TOLERANCE
    assert bench.control.quarantined == {}


def test_a_publication_waits_for_no_response_where_every_place_is_taken(bench: Bench) -> None:
    """The probe is one request more, while greedy responses that do not end by themselves fill the engine."""
    if not bench.policy.config.tie_word_embeddings:
        pytest.skip("the greedy response of this model ends by itself")
    places = num_sequences(bench.config)
    running = bench.thread.submit(bench.engine.sample(lease(12, num_samples=places, max_tokens=480, temperature=0.0)))
    while bench.engine.num_drawn(12) < 2 * places:
        time.sleep(0.01)
    bench.publish()
    assert not running.done()
    assert [len(completion.token_ids) for completion in running.result(120.0)] == [480] * places


def wait_for_progress(bench: Bench) -> None:
    """Until a request that was submitted now has been answered: the running ones have drawn tokens meanwhile."""
    bench.thread.run(bench.engine.sample(lease(99, num_samples=1, max_tokens=20)))


def test_an_update_that_breaks_off_is_begun_anew_and_leaves_nothing_behind(bench: Bench) -> None:
    """A layer of which a part had come is loaded whole the next time."""
    bench.publisher.bucket_bytes = 10_000
    perturb(bench.policy)
    real, cut = bench.publisher.new_transfer, CutOnce()
    bench.publisher.shutdown()
    bench.publisher.new_transfer = cut.new_transfer
    publication = bench.publish()
    assert cut.sent > 3 and cut.is_cut
    assert [member.name for member in publication.members] == ["local"] and bench.control.quarantined == {}
    assert publication.probe_difference < TOLERANCE
    bench.publisher.new_transfer = real
    for completion in bench.sample(14):
        assert bench.mismatch(completion) < TOLERANCE


class CutOnce:
    """Breaks the first transfer at its third bucket, from the learner's side."""

    def __init__(self) -> None:
        self.sent, self.is_cut = 0, False

    def new_transfer(self, config: Config) -> GlooTransfer:
        cut = self

        class Transfer(GlooTransfer):
            def send(self, channel: Channel, bucket: Bucket) -> None:
                cut.sent += 1
                if cut.sent == 3:
                    cut.is_cut = True
                    self._group = ClosedGroup(self._group)
                super().send(channel, bucket)

        return Transfer(config)


class ClosedGroup:
    def __init__(self, group: Any) -> None:
        self._group = group

    def broadcast(self, buffer: torch.Tensor) -> None:
        raise BrokenTransfer("cut by the test")

    def close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.close()


def test_the_probe_finds_a_tensor_that_was_not_loaded(bench: Bench) -> None:
    """Without the mend for tied models, or with an output layer that was not sent, the actor is quarantined at once."""
    tied = bench.policy.config.tie_word_embeddings
    if tied:
        bench.thread.run(bench.engine._llm.collective_rpc(forget_the_mend))
    else:
        stale = bench.policy.model.lm_head.weight.detach().clone()
        bench.publisher._source._policy = WithStaleHead(bench.policy, stale)
    perturb(bench.policy, scale=0.01)
    publication = bench.publish()
    assert publication.probe_floor < TOLERANCE / 10 < 2 * bench.publisher.probe.limit < publication.probe_difference
    assert publication.members == ()
    sentence = bench.control.quarantined[LOCAL]
    assert "agreed with the learner's at version" in sentence and "a tensor was not loaded" in sentence


def forget_the_mend(worker: Any) -> None:
    import actors.weights

    actors.weights._refresh_tied_heads = lambda model: None


class WithStaleHead:
    """A policy that publishes an old output layer."""

    def __init__(self, policy: Policy, head: torch.Tensor) -> None:
        self._policy, self._head = policy, head

    def hf_specs(self, dtype: torch.dtype) -> Any:
        return self._policy.hf_specs(dtype)

    def named_hf_parameters(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._policy.named_hf_parameters(dtype):
            yield name, self._head if name == "lm_head.weight" else tensor


def test_recompute_makes_tokens_after_an_update_exactly_the_new_weights(tmp_path: Any) -> None:
    bench = Bench(engine_config(make_model(tmp_path, tied=False), kv_cache=KVCache.recompute))
    try:
        running = bench.thread.submit(bench.engine.sample(lease(5, max_tokens=400)))
        wait_for_progress(bench)
        perturb(bench.policy)
        bench.publish()
        completions = running.result(120.0)
        drawn_by_new = [completion for completion in completions if completion.versions[-1] == 1]
        assert drawn_by_new
        for completion in drawn_by_new:
            late = completion.versions == 1
            difference = np.abs(bench.learner_logprobs(completion) - completion.behavior_logprobs)
            assert difference[late].max() < TOLERANCE
            assert completion.versions[0] == 0
    finally:
        bench.close()


def test_vllms_nccl_communicator_is_called_as_it_wants_to_be() -> None:
    """What stands in for it where there is no GPU (tests/common/test_broadcast.py) has the same signatures."""
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group

    assert list(signature(uid_init_process_group).parameters) == [
        "nccl_unique_id_bytes",
        "rank",
        "world_size",
        "device",
    ]
    assert list(signature(PyNcclCommunicator.broadcast).parameters) == ["self", "tensor", "src", "stream"]
    assert list(signature(PyNcclCommunicator.destroy).parameters) == ["self"]

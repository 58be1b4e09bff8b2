"""Leases under way, without an engine: what is reported of them, and the seeds of what goes on after a prefix."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors import sampling
from actors.sampling import Completion, Sample, Sampling
from common.types import FinishReason, Lease, Progress, Purpose
from learner.rollouts.partial import Partial


def lease(num_samples: int = 2, prefix: tuple[int, ...] = (), **changes: Any) -> Lease:
    num_tokens = sum(prefix)
    values: dict[str, Any] = {
        "lease_id": 1,
        "purpose": Purpose.TRAIN,
        "prompt_uid": "p",
        "prompt_token_ids": np.array([3], np.int32),
        "reference": "",
        "row": {},
        "num_samples": num_samples,
        "seed": 11,
        "temperature": 1.0,
        "max_tokens": 100,
        "prefix_lengths": np.array(prefix, np.int32),
        "prefix_token_ids": np.full(num_tokens, 9, np.int32),
        "prefix_behavior_logprobs": np.full(num_tokens, -9.0, np.float32),
        "prefix_versions": np.zeros(num_tokens, np.int32),
        "prefix_finish_reasons": (None,) * len(prefix),
    }
    return Lease(**(values | changes))


@dataclass
class Processor:
    """As much of vLLM's output processor as is looked at: what each request has drawn, and by which version."""

    drawn: dict[str, list[int]] = field(default_factory=dict)
    version: int = 0
    starts: dict[str, list[tuple[str, int]]] = field(default_factory=dict)

    def draw(self, request_id: str, *token_ids: int) -> None:
        tokens, starts = self.drawn.setdefault(request_id, []), self.starts.setdefault(request_id, [])
        if not starts or starts[-1][0] != str(self.version):
            starts.append((str(self.version), len(tokens)))
        tokens.extend(token_ids)

    def state(self, request_id: str) -> Any:
        if request_id not in self.drawn:
            return None
        tokens = self.drawn[request_id]
        return SimpleNamespace(
            detokenizer=SimpleNamespace(output_token_ids=tokens, num_output_tokens=lambda: len(tokens)),
            logprobs_processor=SimpleNamespace(logprobs=SimpleNamespace(logprobs=[-float(t) for t in tokens])),
            weight_version_starts=self.starts[request_id],
        )

    def end(self, sample: Sample, reason: FinishReason = FinishReason.STOP) -> None:
        """The request has ended: its state is gone, its completion is there."""
        state = self.state(sample.request_id)
        whole = sample.prefix.then(sampling._accumulated(state, 0))
        del self.drawn[sample.request_id]
        sample.completion = Completion.of(whole, reason, "")


def told(progress: Progress | None) -> list[tuple[int, list[int], FinishReason | None]]:
    assert progress is not None
    parts = np.split(progress.token_ids, np.cumsum(progress.lengths)[:-1])
    tokens = [part.tolist() for part in parts]
    return list(zip(progress.starts.tolist(), tokens, progress.finish_reasons, strict=True))


def test_only_what_is_new_is_reported() -> None:
    processor = Processor()
    under_way = Sampling(lease(), ["a", "b"], processor.state)
    assert under_way.progress() is None, "it waits in the engine's queue"
    processor.draw("a", 1, 2)
    assert told(under_way.progress()) == [(0, [1, 2], None), (0, [], None)]
    assert under_way.progress() is None
    processor.version = 1
    processor.draw("a", 3)
    processor.draw("b", 4)
    progress = under_way.progress()
    assert told(progress) == [(2, [3], None), (0, [4], None)]
    assert progress is not None and progress.versions.tolist() == [1, 1]
    processor.end(under_way.samples[0])
    assert told(under_way.progress()) == [(3, [], FinishReason.STOP), (1, [], None)]
    assert under_way.progress() is None
    assert under_way.num_drawn() == 4


def test_a_prefix_is_not_reported_and_positions_count_it() -> None:
    processor = Processor()
    under_way = Sampling(lease(prefix=(2, 0)), ["a", "b"], processor.state)
    processor.draw("a", 1)
    processor.draw("b", 5)
    assert told(under_way.progress()) == [(2, [1], None), (0, [5], None)]
    assert under_way.num_drawn() == 2
    processor.end(under_way.samples[0])
    under_way.send_again()
    assert told(under_way.progress()) == [(2, [1], FinishReason.STOP), (0, [5], None)]


def test_tokens_of_a_cancelled_request_stay_counted() -> None:
    processor = Processor()
    under_way = Sampling(lease(), ["a", "b"], processor.state)
    processor.draw("a", 1, 2)
    assert under_way.num_drawn() == 2
    processor.drawn.clear()
    assert under_way.num_drawn() == 2


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 9), st.booleans()), max_size=30), st.integers(1, 7))
def test_messages_are_bounded_and_add_up_to_all_that_was_drawn(steps: list[tuple[str, int, bool]], limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "MAX_PROGRESS_TOKENS", limit)
        processor, asked = Processor(), lease(prefix=(1, 3), max_tokens=1000)
        under_way, partial = Sampling(asked, ["a", "b"], processor.state), Partial(2)
        partial.add(
            Progress(
                lease_id=1,
                starts=np.zeros(2, np.int32),
                lengths=asked.prefix_lengths,
                token_ids=asked.prefix_token_ids,
                behavior_logprobs=asked.prefix_behavior_logprobs,
                versions=asked.prefix_versions,
                finish_reasons=(None, None),
            ),
            asked,
            "a",
        )
        for request_id, count, is_new_version in steps:
            processor.version += is_new_version
            processor.draw(request_id, *range(count))
            if (progress := under_way.progress()) is not None:
                assert len(progress.token_ids) <= limit
                assert partial.add(progress, asked, "a") is None
        for sample in under_way.samples:
            processor.draw(sample.request_id, 7)
            processor.end(sample)
        while (progress := under_way.progress()) is not None:
            assert partial.add(progress, asked, "a") is None
        whole = [sample.completion for sample in under_way.samples]
        assert partial.is_sampled
        for name in ("token_ids", "behavior_logprobs", "versions"):
            expected = np.concatenate([getattr(completion, name) for completion in whole])
            np.testing.assert_array_equal(partial.prefix()[f"prefix_{name}"], expected)


def test_what_goes_on_after_a_prefix_has_random_numbers_of_its_own() -> None:
    undisturbed = [Sample(lease(4), index, "").seed for index in range(4)]
    assert undisturbed == [11, 12, 13, 14]
    seeds = {Sample(lease(4, prefix=(n,) * 4), index, "").seed for n in range(1, 50) for index in range(4)}
    assert len(seeds) == 4 * 49 and seeds.isdisjoint(range(11, 20))
    assert Sample(lease(1, prefix=(3,)), 0, "").seed == Sample(lease(1, prefix=(3,)), 0, "").seed


def test_a_request_that_waits_behind_others_has_drawn_nothing() -> None:
    state = SimpleNamespace(
        detokenizer=SimpleNamespace(output_token_ids=[], num_output_tokens=lambda: 0),
        logprobs_processor=SimpleNamespace(logprobs=SimpleNamespace(logprobs=[])),
        weight_version_starts=[],
    )
    assert len(sampling._accumulated(state, 0)) == 0

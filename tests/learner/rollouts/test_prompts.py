"""The prompt stream of several files: shares of every stretch, epochs of each file, and a checkpoint in between."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import ConfigError
from common.tasks import Share
from common.types import Prompt
from learner.rollouts.prompts import PromptStream


def shares_of(*sizes_and_weights: tuple[int, float]) -> list[Share]:
    return [
        Share(uid_prefix=f"train/{i}", num_prompts=size, weight=weight)
        for i, (size, weight) in enumerate(sizes_and_weights)
    ]


def stream_of(shares: list[Share], seed: int = 0) -> PromptStream:
    uids = [f"{share.uid_prefix}:{line}" for share in shares for line in range(share.num_prompts)]
    return PromptStream([Prompt(uid=uid, text=uid, reference="") for uid in uids], seed, shares)


def file_of(prompt: Prompt) -> int:
    return int(prompt.uid.removeprefix("train/").partition(":")[0])


parts = st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 10.0)), min_size=1, max_size=4)


@given(parts, st.integers(1, 120), st.integers(0, 3))
def test_every_beginning_of_the_stream_is_mixed_by_weight(parts: list[tuple[int, float]], num: int, seed: int) -> None:
    stream = stream_of(shares_of(*parts), seed)
    drawn = Counter(file_of(stream.next()) for _ in range(num))
    total = sum(weight for _, weight in parts)
    for index, (_, weight) in enumerate(parts):
        assert abs(drawn[index] - num * weight / total) < len(parts)


@given(parts, st.integers(0, 120))
def test_the_stream_is_a_function_of_its_position(parts: list[tuple[int, float]], position: int) -> None:
    shares = shares_of(*parts)
    stream, resumed = stream_of(shares), stream_of(shares)
    for _ in range(position):
        stream.next()
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert [stream.next().uid for _ in range(30)] == [resumed.next().uid for _ in range(30)]


def test_a_small_file_with_a_large_share_is_seen_more_often_and_each_epoch_in_another_order() -> None:
    stream = stream_of(shares_of((4, 2.0), (8, 1.0)))
    drawn = [stream.next() for _ in range(24)]  # 16 of the first file, 8 of the second
    first = [prompt.uid for prompt in drawn if file_of(prompt) == 0]
    epochs = [first[i : i + 4] for i in range(0, 16, 4)]
    assert all(len(set(epoch)) == 4 for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) > 1
    assert len({prompt.uid for prompt in drawn if file_of(prompt) == 1}) == 8


def test_a_checkpoint_of_other_files_or_weights_is_refused() -> None:
    state = stream_of(shares_of((4, 2.0), (8, 1.0))).state_dict()
    with pytest.raises(
        ConfigError, match=r"made with 4 \+ 8 training prompts, now there are 4 \+ 7; use the same data"
    ):
        stream_of(shares_of((4, 2.0), (7, 1.0))).load_state_dict(state)
    with pytest.raises(
        ConfigError, match=r"shares 0\.666667 \+ 0\.333333 of task\.train_files, now they are 0\.5 \+ 0"
    ):
        stream_of(shares_of((4, 1.0), (8, 1.0))).load_state_dict(state)

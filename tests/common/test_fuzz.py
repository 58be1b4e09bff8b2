"""Ten thousand mutated messages: nothing but WireError comes out, memory stays small, and all refusals are counted."""

import random
import time
import tracemalloc
from collections import Counter
from typing import get_args

import pytest

from benchmarks.fuzz import fuzz, main, messages, mutated, mutations, outcome
from common.config import Config
from common.types import ActorMessage, CompletedGroup, Prompt
from common.wire import encode, pack
from learner.rollouts.service import LearnerService
from tests.support import strangers
from tests.support.fake_actors import FINGERPRINTS


def test_mutated_messages_are_refused_and_take_little_memory() -> None:
    fuzz(100, seed=1)
    tracemalloc.start()
    try:
        outcomes = fuzz(10_000, seed=0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(outcomes.values()) == 10_000
    assert len(outcomes) > 30, "the mutations reach many checks"
    assert 0 < outcomes["decoded"] < 5_000
    assert peak < 4 << 20


def test_what_is_not_mutated_is_decoded() -> None:
    assert {outcome(pack(encode(message))) for message in messages()} == {"decoded"}


def test_every_kind_of_message_that_may_arrive_is_mutated() -> None:
    refused = Counter(kind for kind, packed in mutations(1000, seed=0) if outcome(packed) != "decoded")
    assert refused.keys() == {kind.__name__ for kind in get_args(ActorMessage)}
    assert min(refused.values()) > 10


def test_the_script_fails_above_its_cap_of_memory_and_on_any_exception(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--count", "200"]
    assert main(few) == 0
    monkeypatch.setattr("benchmarks.fuzz.CAP_MB", -1.0)
    assert main(few) == 1
    assert "memory may grow by -1 MiB" in capsys.readouterr().err

    def decode(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("benchmarks.fuzz.decode", decode)
    with pytest.raises(MemoryError) as raised:
        main(few)
    assert "of seed 1, of a " in raised.value.__notes__[0]


def test_a_frame_that_claims_to_be_huge_takes_no_memory() -> None:
    packed = bytearray(pack(encode(messages()[0])))
    packed[4:8] = (0xFFFFFFF0).to_bytes(4, "little")
    tracemalloc.start()
    try:
        assert outcome(packed).startswith("refused")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_every_refusal_over_a_socket_is_counted() -> None:
    """Of what arrives before the connection is cut off, message by message."""
    draw = random.Random(3)
    source = [bytes(frame) for frame in encode(next(m for m in messages() if isinstance(m, CompletedGroup)))]
    bad = [packed for _ in range(200) if outcome(packed := mutated(source, draw)) != "decoded"]
    prompts = [Prompt(uid="p", text="", reference="")]
    with LearnerService(Config(), prompts, lambda prompt: [1], FINGERPRINTS, [1]) as service:
        port = int(service.endpoint.rpartition(":")[2])
        for start in range(0, 100, 5):  # fewer than one connection may send
            peer = strangers.connect(port)
            strangers.ready(peer, f"p{start}".encode())
            peer.sendall(b"".join(strangers.frame(packed, 0) for packed in bad[start : start + 5]))
            deadline = time.monotonic() + 10.0
            while service.stats()["dropped/malformed"] < start + 5:
                assert time.monotonic() < deadline, service.stats()
                time.sleep(0.005)
            peer.close()
        assert service.stats()["dropped/malformed"] == 100

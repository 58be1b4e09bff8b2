"""What the learner keeps of a group that has been trained or dropped: nothing."""

import gc
import logging
import tracemalloc
from collections.abc import Iterator
from itertools import count

import pytest

from common.config import AlgorithmConfig, Config, LearnerConfig, RolloutConfig
from common.types import ActorMessage, CompletedGroup, Lease, LeaseFailed, Prompt, Ready
from common.wire import decode, encode, pack, unpack
from learner.rollouts import counts
from learner.rollouts.coordinator import Coordinator
from learner.rollouts.prompts import PromptStream
from learner.rollouts.reception import Reception
from tests.support.fake_actors import FINGERPRINTS, NO_PROBE, group, heartbeat, hello, progress

NAMES = [b"a", b"b", b"c"]
FEW, MANY = 500, 1500  # groups, until everything that is bounded has filled up, and from then on


class Run:
    """A learner without sockets that trains a step as soon as a batch is there, and a clock of a second a turn."""

    def __init__(self) -> None:
        config = Config(
            rollout=RolloutConfig(prompts_per_step=4, group_size=2, max_tokens=8),
            algorithm=AlgorithmConfig(critic_warmup_steps=0, dynamic_sampling=True),
            learner=LearnerConfig(steps=1_000_000),
        )
        prompts = [Prompt(uid=f"p{i}", text="", reference="") for i in range(5)]
        self.coordinator = Coordinator(config, PromptStream(prompts, seed=0), lambda prompt: [1])
        self.reception = Reception(config, self.coordinator, FINGERPRINTS, [1])
        self._clock = count()
        self._turn([(name, hello(name.decode())) for name in NAMES])
        self._leases = self._turn([(name, Ready(version=0, probe_logprobs=NO_PROBE)) for name in NAMES])
        self._steps = 0

    def until(self, num_groups: int) -> None:
        while (received := self.coordinator.stats()["received_groups"]) < num_groups:
            assert (now := next(self._clock)) < 2 * num_groups, f"{received} groups in {now} s"
            self._leases = self._turn(list(self._answers(self._leases)))
            while self.coordinator.ledger.take_batch() is not None:
                self._steps += 1
                self.coordinator.set_version(self._steps, self._steps)
                for name in NAMES:
                    self.coordinator.loaded(name.decode(), self._steps)

    def _turn(self, arriving: list[tuple[bytes, ActorMessage]]) -> list[tuple[bytes, Lease]]:
        now = float(next(self._clock))
        for name, message in arriving:
            received = decode(unpack(pack(encode(message))), 1 << 20)
            self.reception.handle(name, received, now)  # type: ignore[arg-type]
        self.reception.tick(now)
        self.coordinator.dispatch(now)
        return [(name, message) for name, message in self.reception.outgoing() if isinstance(message, Lease)]

    def _answers(self, leases: list[tuple[bytes, Lease]]) -> Iterator[tuple[bytes, ActorMessage]]:
        """Mostly a group; some are all wrong, some come twice, some fail, some are reported of before."""
        version = self._steps
        for name, lease in leases:
            whole = group(lease.lease_id, [version] * 3, num_correct=int(lease.lease_id % 5 > 0))
            if lease.lease_id % 29 == 0:
                yield name, LeaseFailed(lease_id=lease.lease_id, reason="no")
                continue
            if lease.lease_id % 3 == 0:
                yield name, progress(lease.lease_id, [0, 0], [whole.token_ids[:2].tolist()] * 2, ())
            yield name, whole
            if lease.lease_id % 11 == 0:
                yield name, whole
        for name in NAMES:
            yield name, heartbeat({}, 0, 1.0, 1.0)


def test_memory_does_not_grow_with_the_groups_of_a_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "learner")  # pytest keeps what is logged
    monkeypatch.setattr(counts, "REMEMBERED_LEASES", 100)
    run = Run()
    tracemalloc.start()
    try:
        run.until(FEW)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        run.until(FEW + MANY)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    stats = run.coordinator.stats()
    assert stats["dropped/uninformative"] and stats["dropped/duplicate"] and stats["lease_failures"]
    assert sum(type(item) is CompletedGroup for item in gc.get_objects()) < 100
    assert after - before < 20 * MANY, "bytes: the id of a group alone takes more"

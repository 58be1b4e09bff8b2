"""Continuous batching on a virtual clock: when sequences end, and of which version their tokens are."""

import numpy as np
import pytest
import simpy

from common.types import CompletedGroup, Lease, Purpose, Verdict
from learner.planning.engine import Engine, EngineSpeed


def lease(lease_id: int, num_samples: int) -> Lease:
    return Lease(
        lease_id=lease_id,
        purpose=Purpose.TRAIN,
        prompt_uid="p",
        prompt_token_ids=np.array([1], np.int32),
        reference="",
        row={},
        num_samples=num_samples,
        seed=0,
        temperature=1.0,
        max_tokens=100,
    )


class Bench:
    """An engine, and what it has delivered at which time."""

    def __init__(self, speed: EngineSpeed, places: int = 8) -> None:
        self.clock = simpy.Environment()
        self.arrived: list[tuple[float, CompletedGroup]] = []
        self.engine = Engine(
            self.clock, speed, places, lambda group: self.arrived.append((float(self.clock.now), group))
        )

    def sample(self, lease_id: int, *lengths: int) -> None:
        wanted = np.array(lengths, np.int32)
        self.engine.sample(lease(lease_id, len(lengths)), wanted, (Verdict.CORRECT,) * len(lengths))

    @property
    def times(self) -> list[float]:
        return [pytest.approx(seconds) for seconds, _ in self.arrived]


def test_a_pass_takes_longer_with_more_sequences() -> None:
    """Two passes of 1 + 2 s with both of them, then two of 1 + 1 s with the longer one alone."""
    bench = Bench(EngineSpeed(base_s=1.0, sequence_s=1.0))
    bench.sample(0, 2, 4)
    bench.clock.run()
    assert bench.times == [2 * 3.0 + 2 * 2.0]
    assert (bench.engine.tokens, bench.engine.busy_s, bench.engine.sequence_s) == pytest.approx((6, 10.0, 16.0))


def test_who_comes_later_slows_down_who_is_there() -> None:
    """Group 0 draws 2 of its 4 tokens in 4 s, and the rest beside group 1 in 6 s; that has 1 left then, for 2 s."""
    bench = Bench(EngineSpeed(base_s=1.0, sequence_s=1.0))
    bench.sample(0, 4)
    bench.clock.run(until=4.0)
    bench.sample(1, 3)
    bench.clock.run()
    assert bench.times == [10.0, 12.0]


def test_sequences_beyond_the_places_wait_in_order() -> None:
    bench = Bench(EngineSpeed(base_s=1.0), places=2)
    bench.sample(0, 3, 1, 4)
    bench.sample(1, 2)
    bench.clock.run()
    assert bench.times == [5.0, 5.0], "the third begins after 1 s and ends after 5, the last begins after 3"
    assert bench.engine.tokens == pytest.approx(10)
    assert [group.generation_s for _, group in bench.arrived] == [2.0, 5.0], "from a group's first place"


def test_a_pause_stops_everything_and_verification_delays_only_the_group() -> None:
    bench = Bench(EngineSpeed(base_s=1.0, verification_s=0.5))
    bench.sample(0, 4)
    bench.clock.run(until=2.0)
    bench.engine.pause()
    bench.clock.run(until=7.0)
    bench.engine.resume()
    bench.clock.run()
    assert bench.times == [9.5]
    assert bench.engine.busy_s == pytest.approx(4.0)
    assert bench.arrived[0][1].generation_s == pytest.approx(9.0)


def test_a_token_is_of_the_version_that_was_loaded_before_it() -> None:
    bench = Bench(EngineSpeed(base_s=1.0), places=2)
    bench.sample(0, 4, 2, 3)  # the last one begins after two passes
    bench.clock.run(until=3.0)
    bench.engine.load()
    bench.clock.run()
    assert bench.arrived[0][1].versions.tolist() == [0, 0, 0, 1, 0, 0, 0, 1, 1]

"""Lengths and pass rates of what is sampled, trained and dropped, worked out by hand."""

import pytest

from common.config import AlgorithmConfig, Config, RolloutConfig, StalenessConfig
from common.types import DropReason, Lease, Prompt
from learner.rollouts.coordinator import Coordinator
from learner.rollouts.prompts import PromptStream
from learner.rollouts.selection import selection_metrics
from learner.rollouts.snapshot import restore, take
from tests.support.fake_actors import NO_PROBE, group


class Steps:
    """One actor that answers all of its leases; metrics of each step as the leader makes them."""

    def __init__(self, **algorithm: bool) -> None:
        config = Config(
            rollout=RolloutConfig(prompts_per_step=2, group_size=2, max_tokens=8),
            staleness=StalenessConfig(max_staleness=1),
            algorithm=AlgorithmConfig(critic_warmup_steps=0, **algorithm),
        )
        prompts = [Prompt(uid=f"p{i}", text="", reference="") for i in range(50)]
        self.coordinator = Coordinator(config, PromptStream(prompts, seed=0), lambda prompt: [1])
        self.coordinator.join("a", 4, 0.0)
        self.coordinator.ready("a", 0, NO_PROBE)
        self.before = self.coordinator.stats()

    def answer(self, *groups: tuple[int, int], version: int = 0) -> None:
        """(length, number of right ones of the two responses) for each lease that is granted now."""
        self.coordinator.dispatch(0.0)
        leases = [message for _, message in self.coordinator.outbox if isinstance(message, Lease)]
        self.coordinator.outbox.clear()
        for lease, (length, num_correct) in zip(leases, groups, strict=True):
            self.coordinator.receive("a", group(lease.lease_id, [version] * length, num_correct=num_correct), 0.0)

    def metrics(self) -> dict[str, float]:
        stats = self.coordinator.stats()
        change = {name: value - self.before.get(name, 0.0) for name, value in stats.items()}
        self.before = stats
        return selection_metrics(change)


def test_the_groups_of_a_step_are_compared_with_those_that_arrived_for_it() -> None:
    steps = Steps()
    steps.answer((2, 1), (4, 2), (6, 0), (8, 1))
    assert steps.coordinator.ledger.take_batch() is not None
    assert steps.metrics() == {
        "selection/length_sampled": 5.0,
        "selection/length_trained": 3.0,
        "selection/length_trained_over_sampled": pytest.approx(3 / 5),
        "selection/pass_rate_sampled": 0.5,
        "selection/pass_rate_trained": 0.75,
        "selection/pass_rate_trained_over_sampled": 1.5,
    }
    assert steps.coordinator.ledger.take_batch() is not None
    assert steps.metrics() == {"selection/length_trained": 7.0, "selection/pass_rate_trained": 0.25}
    assert steps.metrics() == {}


def test_a_filter_shows_in_the_pass_rate_of_what_it_drops() -> None:
    steps = Steps(dynamic_sampling=True)
    steps.answer((2, 1), (8, 2), (2, 1), (4, 2))
    assert steps.coordinator.ledger.take_batch() is not None
    metrics = steps.metrics()
    assert metrics["selection/length_dropped"] == 6.0 and metrics["selection/pass_rate_dropped"] == 1.0
    assert metrics["selection/length_sampled"] == 4.0 and metrics["selection/length_trained"] == 2.0
    assert metrics["selection/pass_rate_sampled"] == 0.75 and metrics["selection/pass_rate_trained"] == 0.5


def test_what_got_too_old_is_dropped_once_and_counts_again_when_it_is_sampled_again() -> None:
    steps = Steps()
    steps.answer((8, 0), (8, 0), (8, 0), (8, 0))
    steps.coordinator.loaded("a", 2)
    steps.coordinator.set_version(2, 0)
    assert steps.coordinator.ledger.take_batch() is None
    assert steps.coordinator.drops == {DropReason.STALE: 4}
    assert steps.metrics()["selection/length_dropped"] == 8.0
    steps.answer((1, 2), (1, 2), (1, 2), (1, 2), version=2)
    assert steps.coordinator.ledger.take_batch() is not None
    metrics = steps.metrics()
    assert metrics["selection/length_sampled"] == metrics["selection/length_trained"] == 1.0
    assert "selection/length_dropped" not in metrics


def test_after_a_resume_what_was_buffered_counts_when_it_is_buffered_again() -> None:
    steps, again = Steps(), Steps()
    steps.answer((2, 1), (4, 1), (6, 1), (8, 1))
    assert steps.coordinator.ledger.take_batch() is not None
    again.coordinator.remove("a", "test")
    restore(again.coordinator, take(steps.coordinator, 0.0))
    stats = again.coordinator.stats()
    assert stats["selection/sampled_tokens"] == stats["selection/trained_tokens"] == 12
    again.coordinator.dispatch(0.0)
    assert again.coordinator.stats()["selection/sampled_tokens"] == 12 + 2 * (6 + 8)

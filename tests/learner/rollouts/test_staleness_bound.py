"""Tries to break the bound on staleness. Ages are read from the tokens, whose ids are the versions that drew them.

Everything that makes tokens old is here: actors that take their time and finish in any order, a learner that trains
whenever it can, several steps a version, a warm-up that ends early, groups that teach nothing, actors that join late or
leave with what they had, publications that reach some of them, and a learner that starts again from an old checkpoint
with other settings.
"""

import json
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from common.config import (
    AlgorithmConfig,
    Batching,
    Config,
    LearnerConfig,
    OverAge,
    RolloutConfig,
    StalenessConfig,
    WeightsConfig,
)
from common.types import Cancel, DropReason, Lease, Prompt, TrajectoryGroup
from learner.rollouts.coordinator import Coordinator
from learner.rollouts.prompts import PromptStream
from learner.rollouts.snapshot import Snapshot, restore, take
from tests.support.fake_actors import NO_PROBE, group

PROMPTS = [Prompt(uid=f"p{i}", text=f"{i}", reference="") for i in range(50)]
CHANGEABLE: dict[str, st.SearchStrategy[Any]] = {
    "prompts_per_step": st.integers(1, 4),
    "max_staleness": st.integers(0, 3),
    "publish_every": st.integers(1, 3),
    "batching": st.sampled_from(Batching),
}


@dataclass
class Actor:
    """`begun`: the version that it held when it began each of its leases."""

    version: int = 0
    leases: dict[int, Lease] = field(default_factory=dict)
    begun: dict[int, int] = field(default_factory=dict)


class Bound(RuleBasedStateMachine):
    @initialize(**CHANGEABLE, warmup=st.integers(0, 3), has_gate=st.booleans(), dynamic=st.booleans())
    def begin(self, warmup: int, has_gate: bool, dynamic: bool, **changeable: Any) -> None:
        gate = 0.5 if has_gate else None
        algorithm = AlgorithmConfig(
            critic_warmup_steps=warmup, critic_warmup_gate=gate, dynamic_sampling=dynamic, max_uninformative=10_000
        )
        self.config = Config(algorithm=algorithm, learner=LearnerConfig(steps=10_000))
        self.warmup, self.steps, self.version = warmup, 0, 0
        self.may_be_stale = 0
        self.checkpoints: list[tuple[Snapshot, int, int, int]] = []
        self.start(changeable, None)

    def start(self, changeable: dict[str, Any], state: Snapshot | None) -> None:
        self.config = replace(
            self.config,
            rollout=RolloutConfig(prompts_per_step=changeable["prompts_per_step"], group_size=2, max_tokens=8),
            staleness=StalenessConfig(max_staleness=changeable["max_staleness"], batching=changeable["batching"]),
            weights=WeightsConfig(publish_every=changeable["publish_every"]),
        )
        self.coordinator = Coordinator(self.config, PromptStream(PROMPTS, seed=0), lambda prompt: [1])
        if state is not None:
            restore(self.coordinator, state)
            # the settings may have changed, and what was young enough for them is not for these
            self.may_be_stale = self.coordinator.drops[DropReason.STALE] + len(state.groups)
        self.actors: dict[str, Actor] = {}
        for name in ("ann", "bob", "cyd"):
            self.join(name, capacity=5)

    def join(self, name: str, capacity: int) -> None:
        self.coordinator.join(name, capacity, 0.0)
        self.coordinator.ready(name, 0, NO_PROBE)
        self.actors[name] = Actor()
        self.publish_again()

    def settle(self) -> None:
        self.coordinator.dispatch(0.0)
        while self.coordinator.outbox:
            name, message = self.coordinator.outbox.popleft()
            actor = self.actors[name]
            if isinstance(message, Lease):
                actor.leases[message.lease_id], actor.begun[message.lease_id] = message, actor.version
            elif isinstance(message, Cancel):
                actor.leases.pop(message.lease_id, None)

    def finish(self, name: str, lease_id: int, num_correct: int) -> None:
        actor = self.actors[name]
        lease = actor.leases.pop(lease_id)
        versions = list(range(actor.begun[lease_id], actor.version + 1))
        drawn = (versions if len(versions) <= 8 else [versions[0], *versions[-7:]])[: lease.max_tokens]
        self.coordinator.receive(name, group(lease_id, drawn, lease.num_samples, num_correct), 0.0)

    @rule(choices=st.lists(st.tuples(st.integers(0, 99), st.sampled_from([0, 1, 1, 1])), min_size=1, max_size=12))
    def some_groups_arrive(self, choices: list[tuple[int, int]]) -> None:
        for choice, num_correct in choices:
            if out := self.out():
                lease_id, name = out[choice % len(out)]
                self.finish(name, lease_id, num_correct)
                if choice % 2:
                    self.settle()
        self.settle()

    @rule(data=st.data(), num_groups=st.integers(1, 12), num_slow=st.integers(0, 4))
    def a_fast_learner_leaves_the_slow_behind(self, data: st.DataObject, num_groups: int, num_slow: int) -> None:
        """The newest leases come back at once and are trained at once, the oldest not at all."""
        for _ in range(num_groups):
            if len(out := self.out()) > num_slow:
                lease_id, name = out[-1]
                self.finish(name, lease_id, num_correct=1)
            self.train(data)
            self.publish_again()

    def out(self) -> list[tuple[int, str]]:
        return sorted((lease_id, name) for name, actor in self.actors.items() for lease_id in actor.leases)

    @rule(data=st.data())
    def train(self, data: st.DataObject) -> None:
        """As long as there are batches."""
        while (batch := self.coordinator.ledger.take_batch()) is not None:
            self.check(batch)
            if data.draw(st.booleans()):
                self.settle()  # leases that are granted while the step is under way
            self.end_step(data)
            self.settle()

    def check(self, batch: list[TrajectoryGroup]) -> None:
        assert len(batch) == self.config.rollout.prompts_per_step
        for item in batch:
            oldest = int(item.completed.token_ids.min())
            assert self.version - oldest <= self.config.staleness.max_staleness, "too old"

    def end_step(self, data: st.DataObject) -> None:
        self.steps += 1
        if self.config.algorithm.critic_warmup_gate and self.steps < self.warmup and data.draw(st.booleans()):
            self.coordinator.ledger.pace.warmup_steps = self.warmup = self.steps
        policy_steps = self.steps - self.warmup
        if policy_steps > 0 and policy_steps % self.config.weights.publish_every == 0:
            self.version += 1
            for name in data.draw(st.sets(st.sampled_from(sorted(self.actors)))) if self.actors else ():
                self.load(name)
        self.coordinator.set_version(self.version, self.steps)

    def load(self, name: str) -> None:
        self.actors[name].version = self.version
        self.coordinator.loaded(name, self.version)

    @rule()
    def publish_again(self) -> None:
        for name in self.coordinator.waiting_for_weights():
            self.load(name)
        self.settle()

    @rule(name=st.sampled_from(["ann", "bob", "cyd"]), capacity=st.integers(1, 9))
    def an_actor_is_replaced(self, name: str, capacity: int) -> None:
        self.join(name, capacity)

    @rule()
    def save(self) -> None:
        kept = take(self.coordinator, 0.0)
        state = replace(kept, state=json.loads(json.dumps(kept.state)))
        self.checkpoints.append((state, self.steps, self.version, self.warmup))

    @rule(data=st.data(), **CHANGEABLE)
    def start_again_from_some_checkpoint(self, data: st.DataObject, **changeable: Any) -> None:
        if self.checkpoints:
            state, self.steps, self.version, self.warmup = data.draw(st.sampled_from(self.checkpoints))
            self.start(changeable, state)

    @invariant()
    def no_order_makes_a_group_too_old(self) -> None:
        assert self.coordinator.drops[DropReason.STALE] <= self.may_be_stale
        assert self.coordinator.drops[DropReason.MALFORMED] == 0

    def teardown(self) -> None:
        """Whatever has happened, the run goes on for two versions and more once everybody finishes what he has."""
        if not hasattr(self, "coordinator"):
            return
        goal = self.steps + 2 * self.config.weights.publish_every + 1
        for _ in range(1000):
            self.publish_again()
            for name, actor in self.actors.items():
                for lease_id in reversed(list(actor.leases)):
                    self.finish(name, lease_id, num_correct=1)
            while (batch := self.coordinator.ledger.take_batch()) is not None:
                self.check(batch)
                self.steps += 1
                policy_steps = self.steps - self.warmup
                self.version += policy_steps > 0 and policy_steps % self.config.weights.publish_every == 0
                self.coordinator.set_version(self.version, self.steps)
            if self.steps >= goal:
                return
        raise AssertionError(f"no batch: {self.coordinator.describe(0.0)}")


Bound.TestCase.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestBound = Bound.TestCase


def test_with_masking_the_first_to_finish_wait_for_nobody() -> None:
    config = Config(
        rollout=RolloutConfig(prompts_per_step=2, group_size=2, max_tokens=8),
        staleness=StalenessConfig(max_staleness=1, over_age=OverAge.mask, batching=Batching.first_finished),
        algorithm=AlgorithmConfig(critic_warmup_steps=0),
    )
    coordinator = Coordinator(config, PromptStream(PROMPTS, seed=0), lambda prompt: [1])
    coordinator.join("a", 9, 0.0)
    coordinator.ready("a", 0, NO_PROBE)
    trained: list[int] = []
    slow: Lease | None = None
    for step in range(1, 6):
        coordinator.dispatch(0.0)
        for lease in [message for _, message in coordinator.outbox if isinstance(message, Lease)]:
            slow = slow or lease
            if lease is not slow:
                coordinator.receive("a", group(lease.lease_id, [step - 1]), 0.0)
        coordinator.outbox.clear()
        batch = coordinator.ledger.take_batch()
        assert batch is not None
        trained += [item.lease.lease_id for item in batch]
        coordinator.loaded("a", step)
        coordinator.set_version(step, step)
    assert slow is not None and slow.lease_id == 0 not in trained
    coordinator.receive("a", group(0, [0, 1, 2, 3, 4, 5]), 0.0)
    coordinator.dispatch(0.0)
    for lease in [message for _, message in coordinator.outbox if isinstance(message, Lease)]:
        coordinator.receive("a", group(lease.lease_id, [5]), 0.0)
    batches = [coordinator.ledger.take_batch() for _ in range(2)]
    assert 0 in [item.lease.lease_id for batch in batches if batch is not None for item in batch]
    assert coordinator.drops[DropReason.STALE] == 0

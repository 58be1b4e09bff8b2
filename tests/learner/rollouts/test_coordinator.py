"""The coordinator as a state machine: random interleavings first, then one behaviour at a time."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.config import (
    AlgorithmConfig,
    Batching,
    Config,
    ConfigError,
    EvalConfig,
    LearnerConfig,
    OverAge,
    RolloutConfig,
    StalenessConfig,
    TransportConfig,
    WeightsConfig,
)
from common.scores import estimate
from common.types import (
    MAX_CAPACITY,
    Ack,
    Cancel,
    CompletedGroup,
    DropReason,
    Float32Array,
    Int32Array,
    Lease,
    LeaseFailed,
    Prompt,
    Pulse,
    Purpose,
    Refused,
    TrajectoryGroup,
    Verdict,
)
from learner.rollouts.coordinator import Coordinator
from learner.rollouts.evaluation import Evaluation
from learner.rollouts.ledger import MAX_FAILURES
from learner.rollouts.prompts import PromptStream
from learner.rollouts.selection import Fate
from learner.rollouts.snapshot import Snapshot, restore, take
from tests.support.fake_actors import NO_PROBE, group, heartbeat, progress

PROMPTS = [Prompt(uid=f"p{i}", text=f"{i}", reference="") for i in range(7)]
MANY = [Prompt(uid=f"p{i}", text=f"{i}", reference="") for i in range(100)]
HELDOUT = [Prompt(uid=f"h{i}", text=f"{i}", reference="") for i in range(3)]
NAMES = ("ann", "bob", "cyd")


class CountingStream(PromptStream):
    """Remembers what was drawn from it."""

    def __init__(self) -> None:
        super().__init__(PROMPTS, seed=0)
        self.drawn: list[str] = []

    def next(self) -> Prompt:
        prompt = super().next()
        self.drawn.append(prompt.uid)
        return prompt


def make_config(
    prompts_per_step: int = 2,
    max_staleness: int = 1,
    publish_every: int = 1,
    warmup: int = 0,
    gate: float | None = None,
    dynamic: bool = False,
    over_age: OverAge = OverAge.drop,
    steps: int = 10_000,
    share: float = 0.5,
    batching: Batching = Batching.admission_order,
) -> Config:
    return Config(
        rollout=RolloutConfig(prompts_per_step=prompts_per_step, group_size=2, max_tokens=8),
        staleness=StalenessConfig(max_staleness=max_staleness, over_age=over_age, batching=batching),
        algorithm=AlgorithmConfig(critic_warmup_steps=warmup, critic_warmup_gate=gate, dynamic_sampling=dynamic),
        learner=LearnerConfig(steps=steps),
        weights=WeightsConfig(publish_every=publish_every),
        eval=EvalConfig(share=share),
        transport=TransportConfig(heartbeat_s=1.0, heartbeat_timeout_s=10.0),
    )


@dataclass
class Process:
    """An actor process as the outside sees it: the version that it holds, and the leases that it works on."""

    name: str
    capacity: int
    version: int = 0
    life: int | None = None  # of the learner whose weights it holds; None: the model folder's
    is_ready: bool = False
    is_lost: bool = False
    is_hung: bool = False
    busy_s: float = 0.0
    generated_tokens: int = 0
    leases: dict[int, Lease] = field(default_factory=dict)
    drawn: dict[int, list[list[int]]] = field(default_factory=dict)  # tokens of each completion of each lease
    reported: dict[int, list[int]] = field(default_factory=dict)  # how many of them the learner has been told of
    sent: list[int] = field(default_factory=list)
    kept: dict[int, CompletedGroup] = field(default_factory=dict)  # finished while it was lost


@dataclass
class Saved:
    """A checkpoint, and what the test knows of its moment."""

    kept: Snapshot
    drawn: list[str]
    trained: list[str]
    trained_tokens: set[int]
    steps: int
    version: int
    warmup: int


def assert_selection(stats: dict[str, float], buffered: list[CompletedGroup]) -> None:
    """What was sampled has been trained, was dropped, or is here."""
    for total, count in (
        ("responses", sum(len(item.lengths) for item in buffered)),
        ("tokens", sum(len(item.token_ids) for item in buffered)),
        ("correct", sum(item.verdicts.count(Verdict.CORRECT) for item in buffered)),
    ):
        sampled, trained, dropped = (stats[f"selection/{fate}_{total}"] for fate in Fate)
        assert sampled - trained - dropped == count


def logprobs_of(token_ids: Int32Array) -> Float32Array:
    """Any, but always the same."""
    return -(token_ids % 100).astype(np.float32)


class Interleavings(RuleBasedStateMachine):
    """Honest actors that join, leave, vanish, hang, come back, fail, and send twice, in any order.

    Each token is drawn once, by one actor with one version: `versions` at its id.
    """

    @initialize(
        prompts_per_step=st.integers(1, 3),
        max_staleness=st.integers(0, 3),
        publish_every=st.integers(1, 2),
        warmup=st.integers(0, 3),
        has_gate=st.booleans(),
        dynamic=st.booleans(),
        share=st.sampled_from([0.1, 0.5, 1.0]),
        batching=st.sampled_from(Batching),
    )
    def begin(self, has_gate: bool, **settings: Any) -> None:
        self.config = make_config(gate=0.5 if has_gate else None, **settings)
        self.stream = CountingStream()
        self.coordinator = Coordinator(self.config, self.stream, lambda prompt: [1], incarnation=1)
        self.warmup = self.config.algorithm.critic_warmup_steps
        self.now, self.steps, self.version, self.life = 0.0, 0, 0, 1
        self.processes: dict[str, Process] = {}
        self.trained: list[str] = []
        self.versions: list[int] = []  # of every token that was ever drawn, by its id
        self.drawers: list[Process] = []  # likewise
        self.num_drawn = 0  # tokens, when the learner has started
        self.distrusted: set[int] = set()  # tokens
        self.trained_tokens: set[int] = set()
        self.trained_leases: set[int] = set()
        self.is_evaluating = False
        self.kept = 0  # finished groups that resumes found in their checkpoints
        self.save()
        for name in NAMES[:2]:
            self.join(name, 4)
            self.get_ready(name)

    def settle(self) -> None:
        """One turn of the service: grant, then deliver everything."""
        self.coordinator.dispatch(self.now)
        assert self.coordinator.ledger.admitted <= self.coordinator.ledger.pace.window
        while self.coordinator.outbox:
            name, message = self.coordinator.outbox.popleft()
            process = self.processes[name]
            if process.is_lost:
                continue  # lost on the way
            match message:
                case Lease():
                    assert process.is_ready and not process.is_hung
                    assert process.version >= self.version, "a lease for an actor without the current version"
                    assert process.life in (None, self.life), "a lease for an actor with weights of a lost future"
                    assert len(process.leases) < process.capacity
                    process.leases[message.lease_id] = message
                    self.begin_lease(process, message)
                case Cancel(lease_id=lease_id):
                    process.leases.pop(lease_id, None)
                    process.kept.pop(lease_id, None)
                case Ack() | Pulse():
                    pass
                case other:
                    raise AssertionError(f"unexpected {other}")
        for name in list(self.coordinator.condemned):
            self.leave_now(name)

    def begin_lease(self, process: Process, lease: Lease) -> None:
        ends = np.cumsum(lease.prefix_lengths)
        parts = np.split(lease.prefix_token_ids, ends[:-1])
        assert all(
            self.versions[token] == v for token, v in zip(lease.prefix_token_ids, lease.prefix_versions, strict=True)
        )
        assert self.distrusted.isdisjoint(lease.prefix_token_ids.tolist())
        process.drawn[lease.lease_id] = [part.tolist() for part in parts]
        process.reported[lease.lease_id] = lease.prefix_lengths.tolist()
        self.draw(process, lease.lease_id, 1)

    def draw(self, process: Process, lease_id: int, count: int) -> None:
        """Some tokens of each completion, of which the last is kept back for the end."""
        for tokens in process.drawn[lease_id]:
            for _ in range(min(count, self.config.rollout.max_tokens - 1 - len(tokens))):
                tokens.append(len(self.versions))
                self.versions.append(process.version)
                self.drawers.append(process)

    def complete(self, name: str, lease_id: int, num_correct: int) -> None:
        self.send(name, self.finished(name, lease_id, num_correct))

    def finished(self, name: str, lease_id: int, num_correct: int) -> CompletedGroup:
        process = self.processes[name]
        lease = process.leases.pop(lease_id)
        for tokens in process.drawn[lease_id]:
            tokens.append(len(self.versions))
            self.versions.append(process.version)
            self.drawers.append(process)
        ends = np.array(list(map(len, process.drawn[lease_id])), np.int32)
        token_ids = np.concatenate(process.drawn[lease_id]).astype(np.int32)
        return replace(
            group(lease_id, [0] * 8, lease.num_samples, num_correct),
            lengths=ends,
            token_ids=token_ids,
            versions=np.array(self.versions, np.int32)[token_ids],
            behavior_logprobs=logprobs_of(token_ids),
        )

    def send(self, name: str, completed: CompletedGroup) -> None:
        self.processes[name].sent.append(completed.lease_id)
        self.coordinator.heard(name, self.now)
        self.coordinator.receive(name, completed, self.now)

    def present(self, condition: Callable[[Process], bool] = lambda process: True) -> list[str]:
        return sorted(n for n, p in self.processes.items() if not p.is_lost and condition(p))

    def working(self) -> list[str]:
        return self.present(lambda process: bool(process.leases) and not process.is_hung)

    # Six rules that get on and one that makes trouble, or no run would get anywhere.

    @rule(data=st.data())
    @precondition(lambda self: self.working())
    def draw_and_report_some_tokens(self, data: st.DataObject) -> None:
        for choice, count in data.draw(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 3)), min_size=1)):
            names = self.working()
            name = names[choice % len(names)]
            leases = sorted(self.processes[name].leases)
            self.report(name, leases[choice // len(names) % len(leases)], count)

    def report(self, name: str, lease_id: int, count: int) -> None:
        process = self.processes[name]
        self.draw(process, lease_id, count)
        starts = process.reported[lease_id]
        new = [tokens[start:] for tokens, start in zip(process.drawn[lease_id], starts, strict=True)]
        message = progress(lease_id, starts, new)
        token_ids = message.token_ids
        versions = np.array(self.versions, np.int32)[token_ids]
        message = replace(message, versions=versions, behavior_logprobs=logprobs_of(token_ids))
        process.reported[lease_id] = [len(tokens) for tokens in process.drawn[lease_id]]
        self.coordinator.heard(name, self.now)
        self.coordinator.progress(name, message)

    @rule(data=st.data())
    @precondition(lambda self: self.working())
    def finish_some_groups(self, data: st.DataObject) -> None:
        """In any order: each choice picks an actor and one of its leases."""
        for choice, num_correct in data.draw(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 2)), min_size=1)):
            names = self.working()
            if names:
                name = names[choice % len(names)]
                leases = sorted(self.processes[name].leases)
                self.complete(name, leases[choice // len(names) % len(leases)], num_correct)
        self.settle()

    @rule()
    def finish_every_group(self) -> None:
        for name in self.working():
            for lease_id in list(self.processes[name].leases):
                self.complete(name, lease_id, num_correct=1)
        self.settle()

    @rule()
    @precondition(lambda self: self.present(lambda p: not p.is_ready))
    def engines_come_up(self) -> None:
        for name in self.present(lambda p: not p.is_ready):
            self.get_ready(name)

    def get_ready(self, name: str) -> None:
        self.processes[name].is_ready = True
        self.coordinator.heard(name, self.now)
        self.coordinator.ready(name, 0, NO_PROBE)
        self.settle()

    @rule(data=st.data())
    def make_trouble(self, data: st.DataObject) -> None:
        troubles: list[Callable[[st.DataObject], None]] = [
            self.restart_the_learner,
            self.greet,
            self.let_time_pass,
            self.distrust,
        ]
        if self.processes:
            troubles.append(self.leave)
        if self.present():
            troubles.append(self.vanish)
        if len(self.present()) < len(self.processes):
            troubles.append(self.come_back)
        if self.working():
            troubles += [self.fail_a_lease, self.hang]
        if self.present(lambda p: p.is_hung):
            troubles.append(self.get_on_again)
        if self.present(lambda p: bool(p.sent)):
            troubles.append(self.send_again)
        data.draw(st.sampled_from(troubles))(data)
        self.settle()

    def greet(self, data: st.DataObject) -> None:
        self.join(data.draw(st.sampled_from(NAMES)), data.draw(st.integers(1, 4)))

    def join(self, name: str, capacity: int) -> None:
        self.coordinator.join(name, capacity, self.now)
        self.processes[name] = Process(name, capacity)

    def send_again(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.present(lambda p: bool(p.sent))))
        lease_id = data.draw(st.sampled_from(self.processes[name].sent))
        self.coordinator.heard(name, self.now)
        self.coordinator.receive(name, group(lease_id, [0]), self.now)

    def fail_a_lease(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.working()))
        lease_id = data.draw(st.sampled_from(sorted(self.processes[name].leases)))
        del self.processes[name].leases[lease_id]
        self.coordinator.heard(name, self.now)
        self.coordinator.fail(name, LeaseFailed(lease_id=lease_id, reason="no"), self.now)

    def let_time_pass(self, data: st.DataObject) -> None:
        """Those who are there say what they sample; those who are not may have been lost for too long."""
        self.now += data.draw(st.sampled_from([0.5, 4.0, 8.0, 20.0]))
        for name in self.present():
            self.beat(name)
        self.coordinator.tick(self.now)

    def hang(self, data: st.DataObject) -> None:
        """Its process heartbeats on."""
        name = data.draw(st.sampled_from(self.working()))
        self.beat(name)
        self.processes[name].is_hung = True
        self.processes[name].busy_s += 2 * self.config.transport.lease_timeout_s
        self.beat(name)
        assert self.coordinator.member(name).is_hung

    def get_on_again(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.present(lambda p: p.is_hung)))
        self.processes[name].is_hung = False
        self.processes[name].generated_tokens += 1
        self.beat(name)

    def beat(self, name: str) -> None:
        process = self.processes[name]
        self.coordinator.heard(name, self.now)
        beat = heartbeat(dict.fromkeys(process.leases, 1), process.generated_tokens, process.busy_s)
        self.coordinator.heartbeat(name, beat, self.now)

    def vanish(self, data: st.DataObject) -> None:
        """It goes on sampling."""
        name = data.draw(st.sampled_from(self.present()))
        if name in self.working():
            for lease_id in self.processes[name].leases:
                self.report(name, lease_id, count=1)
        self.coordinator.lose(name, "test")
        process = self.processes[name]
        process.is_lost = True
        leases = [] if process.is_hung else sorted(process.leases)
        for lease_id in data.draw(st.sets(st.sampled_from(leases))) if leases else ():
            process.kept[lease_id] = self.finished(name, lease_id, num_correct=1)

    def come_back(self, data: st.DataObject) -> None:
        """It says something, is told to greet, and says what it holds."""
        name = data.draw(st.sampled_from(sorted(n for n, p in self.processes.items() if p.is_lost)))
        process = self.processes[name]
        process.is_lost = False
        self.coordinator.heard(name, self.now)
        if process.leases and not process.is_hung and data.draw(st.booleans()):
            self.complete(name, min(process.leases), num_correct=1)
        self.greet_again(name)

    def greet_again(self, name: str) -> None:
        process = self.processes[name]
        self.coordinator.join_again(name, process.leases, process.kept, self.now)
        self.settle()
        for completed in list(process.kept.values()):
            before = self.coordinator.stats()["received_groups"]
            self.send(name, completed)
            assert self.coordinator.stats()["received_groups"] == before + 1, "it was wanted"
        process.kept.clear()

    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.processes)))
        del self.processes[name]
        self.coordinator.remove(name, "test")

    def distrust(self, data: st.DataObject) -> None:
        """It leaves, or has left and its name may be another's, and others may have gone on from what it has drawn."""
        name, version = data.draw(st.sampled_from(NAMES)), data.draw(st.integers(0, self.version))
        self.coordinator.distrust(name, version)
        if name in self.processes and data.draw(st.booleans()):
            self.leave_now(name)
        for token in range(self.num_drawn, len(self.versions)):
            drawer = self.drawers[token]
            if drawer.name == name and drawer is not self.processes.get(name) and self.versions[token] >= version:
                self.distrusted.add(token)

    def restart_the_learner(self, data: st.DataObject) -> None:
        """From a checkpoint, perhaps an old one, perhaps with other settings; the actors live on and greet again."""
        self.config = replace(
            self.config,
            rollout=replace(self.config.rollout, prompts_per_step=data.draw(st.integers(1, 3))),
            staleness=replace(self.config.staleness, max_staleness=data.draw(st.integers(0, 3))),
            weights=WeightsConfig(publish_every=data.draw(st.integers(1, 3))),
        )
        if data.draw(st.booleans()):
            self.save()
        saved, self.life = self.saved, self.life + 1
        self.kept += len(saved.kept.groups)
        self.num_drawn, self.distrusted = len(self.versions), set()  # what a checkpoint holds had been judged
        self.stream = CountingStream()
        self.coordinator = Coordinator(self.config, self.stream, lambda prompt: [1], incarnation=self.life)
        restore(self.coordinator, replace(saved.kept, state=json.loads(json.dumps(saved.kept.state))))
        self.stream.drawn, self.trained = list(saved.drawn), list(saved.trained)
        self.trained_tokens = set(saved.trained_tokens)
        self.steps, self.version, self.warmup = saved.steps, saved.version, saved.warmup
        self.is_evaluating = saved.kept.evaluation is not None
        if saved.kept.evaluation is not None:
            self.coordinator.ledger.evaluate(Evaluation(HELDOUT, 2, 1.0, self.version), saved.kept.evaluation)
        for name, process in self.processes.items():
            process.is_lost, process.life = False, process.life or 0  # nobody knows what it holds
            process.is_hung = False  # which the next learner would have to find out first
            process.sent.clear()
            self.coordinator.join(name, process.capacity, self.now)
            self.coordinator.join_again(name, process.leases, process.kept, self.now)
            if process.is_ready:
                self.coordinator.ready(name, process.version, NO_PROBE)
        self.settle()
        for process in self.processes.values():
            assert not process.kept and all(lease_id >> 20 == self.life for lease_id in process.leases)

    def save(self) -> None:
        self.saved = Saved(
            take(self.coordinator, self.now),
            list(self.stream.drawn),
            list(self.trained),
            set(self.trained_tokens),
            self.steps,
            self.version,
            self.warmup,
        )

    @rule()
    def evaluate(self) -> None:
        if self.is_evaluating:
            result = self.coordinator.ledger.poll_evaluation()
            self.is_evaluating = result is None
            assert result is None or result.num_samples + 2 * result.num_failed == 2 * len(HELDOUT)
        else:
            self.coordinator.ledger.evaluate(Evaluation(HELDOUT, 2, 1.0, self.version))
            self.is_evaluating = True
        self.settle()

    @rule(data=st.data())
    def step_as_often_as_possible(self, data: st.DataObject) -> None:
        while (batch := self.coordinator.ledger.take_batch()) is not None:
            self.step(batch, data)
            self.settle()

    def step(self, batch: list[TrajectoryGroup], data: st.DataObject) -> None:
        assert len(batch) == self.config.rollout.prompts_per_step
        for item in batch:
            assert item.lease.purpose is Purpose.TRAIN
            assert item.lease.lease_id not in self.trained_leases, "trained twice"
            self.trained_leases.add(item.lease.lease_id)
            tokens = item.completed.token_ids.tolist()
            assert [self.versions[token] for token in tokens] == item.completed.versions.tolist()
            assert self.trained_tokens.isdisjoint(tokens), "a token is trained twice"
            self.trained_tokens.update(tokens)
            assert self.distrusted.isdisjoint(tokens)
            assert self.version - item.oldest_version <= self.config.staleness.max_staleness
        self.trained += [item.lease.prompt_uid for item in batch]
        self.steps += 1
        if self.config.algorithm.critic_warmup_gate and self.steps < self.warmup and data.draw(st.booleans()):
            self.coordinator.ledger.pace.warmup_steps = self.warmup = self.steps
        policy_steps = self.steps - self.warmup
        if policy_steps > 0 and policy_steps % self.config.weights.publish_every == 0:
            self.publish(data)
        self.coordinator.set_version(self.version, self.steps)

    def publish(self, data: st.DataObject) -> None:
        """Reaches some of the ready actors; the others wait for `publish_again`."""
        self.version += 1
        ready = self.present(lambda p: p.is_ready)
        for name in data.draw(st.sets(st.sampled_from(ready))) if ready else ():
            self.load(name)

    def load(self, name: str) -> None:
        self.processes[name].version, self.processes[name].life = self.version, self.life
        self.coordinator.loaded(name, self.version)

    @rule()
    @precondition(lambda self: self.coordinator.waiting_for_weights())
    def publish_again(self) -> None:
        for name in self.coordinator.waiting_for_weights():
            self.load(name)
        self.settle()

    @invariant()
    def no_prompt_is_lost_or_doubled(self) -> None:
        undisturbed = PromptStream(PROMPTS, seed=0)
        assert self.stream.drawn == [undisturbed.next().uid for _ in self.stream.drawn]
        untrained = [entry["uid"] for entry in take(self.coordinator, self.now).state["untrained"]]
        rest = Counter(self.stream.drawn)
        rest.subtract(self.trained)
        rest.subtract(untrained)
        assert min(rest.values(), default=0) >= 0, "a prompt is in two places"
        drops = self.coordinator.drops
        assert rest.total() - drops[DropReason.UNINFORMATIVE] <= drops[DropReason.FAILED], "a prompt got lost"

    @invariant()
    def honest_actors_are_never_too_old(self) -> None:
        """But for groups that a resume with a lower bound finds in its checkpoint."""
        assert self.coordinator.drops[DropReason.STALE] <= self.kept
        assert self.coordinator.drops[DropReason.MALFORMED] == 0

    @invariant()
    def sampling_runs_ahead_by_no_more_steps_than_the_staleness_bound_allows(self) -> None:
        ahead = self.coordinator.ledger.admitted / self.config.rollout.prompts_per_step - self.steps
        fresh = (1 + self.config.staleness.max_staleness) * self.config.weights.publish_every
        assert ahead <= (max(2, fresh) if self.steps < self.warmup else fresh)

    @invariant()
    def what_is_kept_up_to_date_is_what_a_look_at_every_member_finds(self) -> None:
        coordinator, version = self.coordinator, self.coordinator.ledger.version
        free = {member.name: member.free(version, self.now) for member in coordinator._members}
        name = coordinator._places.most()
        assert max(0, *free.values(), 0) == (free[name] if name is not None else 0)
        outdated = [name for name in coordinator.members() if not coordinator._members[name].is_current(version)]
        assert coordinator.waiting_for_weights() == tuple(outdated)
        for member in coordinator._members:
            held = [coordinator.ledger.slots[lease_id].lease.purpose for lease_id in member.held]
            assert member.num_evaluating == held.count(Purpose.EVAL)

    @invariant()
    def counters_agree(self) -> None:
        stats = self.coordinator.stats()
        assert stats["trained_groups"] == len(self.trained)
        taken = self.steps * self.config.rollout.prompts_per_step
        assert stats["in_flight_groups"] + stats["buffered_groups"] + taken == stats["admitted_groups"]
        assert stats["actors_connected"] == len(self.present(lambda p: p.is_ready))
        buffered = [
            slot.group.completed for slot in self.coordinator.ledger.slots.train.values() if slot.group is not None
        ]
        assert_selection(stats, buffered)

    def teardown(self) -> None:
        """Whatever happened, one good actor is enough to go on."""
        if not hasattr(self, "coordinator"):
            return
        for name in list(self.processes):
            self.leave_now(name)
        self.coordinator.join("zoe", 5, self.now)
        self.processes["zoe"] = Process("zoe", 5, version=self.version, is_ready=True)
        self.coordinator.ready("zoe", self.version, NO_PROBE)
        if "zoe" in self.coordinator.waiting_for_weights():  # after a resume amid version 0 the folder's are not its
            self.coordinator.loaded("zoe", self.version)
        for _ in range(200):
            self.settle()
            if (batch := self.coordinator.ledger.take_batch()) is not None:
                assert len(batch) == self.config.rollout.prompts_per_step
                return
            for lease_id in list(self.processes["zoe"].leases):
                self.complete("zoe", lease_id, num_correct=1)
        raise AssertionError(f"no batch: {self.coordinator.describe(self.now)}")

    def leave_now(self, name: str) -> None:
        del self.processes[name]
        self.coordinator.remove(name, "end of test")


Interleavings.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestInterleavings = Interleavings.TestCase


# ---- one behaviour at a time


def make(config: Config, *actors: str, capacity: int = 100, prompts: Sequence[Prompt] = PROMPTS) -> Coordinator:
    coordinator = Coordinator(config, PromptStream(prompts, seed=0), lambda prompt: [1])
    for name in actors:
        coordinator.join(name, capacity, 0.0)
        coordinator.ready(name, 0, NO_PROBE)
    return coordinator


def granted(coordinator: Coordinator, now: float = 0.0) -> list[tuple[str, Lease]]:
    coordinator.dispatch(now)
    leases = [(name, message) for name, message in coordinator.outbox if isinstance(message, Lease)]
    coordinator.outbox.clear()
    return leases


def finish(
    coordinator: Coordinator, leases: list[tuple[str, Lease]], versions: tuple[int, ...] = (0,), num_correct: int = 1
) -> None:
    for name, lease in leases:
        coordinator.receive(name, group(lease.lease_id, list(versions), lease.num_samples, num_correct), 0.0)


def ids(groups: list[Any] | None) -> list[int]:
    assert groups is not None
    return [item.lease.lease_id for item in groups]


def test_a_batch_waits_for_its_earliest_lease() -> None:
    coordinator = make(make_config(max_staleness=3), "a")
    leases = granted(coordinator)
    finish(coordinator, leases[1:])
    assert coordinator.ledger.take_batch() is None
    finish(coordinator, leases[:1])
    assert ids(coordinator.ledger.take_batch()) == [0, 1]
    assert ids(coordinator.ledger.take_batch()) == [2, 3]


@pytest.mark.parametrize(("capacity", "fill"), [(2, 0.5), (100, 1.0)])
def test_the_window_is_as_full_as_its_places_beyond_the_batch_under_way_however_long_the_run(
    capacity: int, fill: float
) -> None:
    coordinator = make(make_config(prompts_per_step=2, max_staleness=2), "a", capacity=capacity)
    leases = granted(coordinator)
    for step in range(1, 30):
        finish(coordinator, leases[:2], versions=(step - 1,))
        assert coordinator.ledger.take_batch() is not None
        leases = leases[2:] + granted(coordinator)
        coordinator.set_version(step, step)
        assert coordinator.stats()["window_fill"] == fill
        coordinator.loaded("a", step)
        leases += granted(coordinator)


def test_no_window_is_full_where_nothing_may_be_sampled_ahead() -> None:
    coordinator = make(make_config(max_staleness=0), "a")
    finish(coordinator, granted(coordinator))
    assert coordinator.ledger.take_batch() is not None
    coordinator.set_version(1, 1)
    assert "window_fill" not in coordinator.stats()


def test_leases_are_spread_over_actors_with_room() -> None:
    coordinator = make(make_config(max_staleness=2), "a", "b", capacity=2)
    coordinator.join("big", 10, 0.0)
    coordinator.ready("big", 0, NO_PROBE)
    assert Counter(name for name, _ in granted(coordinator)) == {"big": 6}
    coordinator = make(make_config(max_staleness=1), "a", "b", capacity=3)
    assert Counter(name for name, _ in granted(coordinator)) == {"a": 2, "b": 2}


def test_a_late_joiner_gets_no_lease_before_it_holds_the_current_version() -> None:
    coordinator = make(make_config(), "old")
    coordinator.loaded("old", 1)
    coordinator.set_version(1, 1)
    coordinator.join("late", 100, 0.0)
    coordinator.ready("late", 0, NO_PROBE)
    assert coordinator.waiting_for_weights() == ("late",)
    assert {name for name, _ in granted(coordinator)} == {"old"}
    coordinator.remove("old", "test")
    assert granted(coordinator) == []
    coordinator.loaded("late", 1)
    assert coordinator.waiting_for_weights() == ()
    assert len(granted(coordinator)) == 6


def test_an_actor_that_claims_a_version_of_another_run_has_to_wait_for_weights() -> None:
    coordinator = make(make_config())
    coordinator.join("a", 1, 0.0)
    coordinator.ready("a", 5, NO_PROBE)
    assert coordinator.waiting_for_weights() == ("a",)


@pytest.mark.parametrize(("steps_done", "is_folder"), [(2, True), (3, False)])
def test_after_a_resume_in_the_middle_of_version_0_the_model_folder_is_no_longer_that_version(
    steps_done: int, is_folder: bool
) -> None:
    config = make_config(publish_every=3, warmup=2)
    before, after = make(config), make(config)
    before.set_version(0, steps_done)
    restore(after, take(before, 0.0))
    for coordinator, is_current in ((before, True), (after, is_folder)):
        coordinator.join("late", 1, 0.0)
        coordinator.ready("late", 0, NO_PROBE)
        assert coordinator.waiting_for_weights() == (() if is_current else ("late",))
        assert bool(granted(coordinator)) == is_current
    after.loaded("late", 0)
    assert after.waiting_for_weights() == ()


def test_prompts_of_a_lost_actor_are_leased_first_and_in_order() -> None:
    coordinator = make(make_config(max_staleness=3), "a", capacity=3)
    first = granted(coordinator)
    coordinator.lose("a", "test")
    coordinator.tick(4.9)
    assert not coordinator.drops, "it may come back"
    coordinator.tick(5.1)
    assert coordinator.drops[DropReason.ACTOR_LOST] == 3
    coordinator.join("b", 4, 0.0)
    coordinator.ready("b", 0, NO_PROBE)
    second = granted(coordinator)
    assert [lease.prompt_uid for _, lease in second[:3]] == [lease.prompt_uid for _, lease in first]
    assert [lease.lease_id for _, lease in second] == [3, 4, 5, 6]


def test_a_lost_connection_costs_nothing_when_the_actor_is_back_within_the_grace_period() -> None:
    coordinator = make(make_config(), "a", capacity=4)
    leases = granted(coordinator)
    coordinator.lose("a", "test")
    assert coordinator.members() == () and granted(coordinator) == []
    coordinator.tick(4.0)
    coordinator.join_again("a", held=[2, 3], finished=[0, 1], now=4.0)
    assert coordinator.members() == ("a",) and not coordinator.outbox
    finish(coordinator, leases)
    assert not coordinator.drops
    assert ids(coordinator.ledger.take_batch()) == [0, 1]


def test_an_actor_that_comes_back_later_is_told_to_forget_its_leases() -> None:
    coordinator = make(make_config(), "a", capacity=2)
    leases = granted(coordinator)
    coordinator.lose("a", "test")
    coordinator.tick(6.0)
    coordinator.join_again("a", held=[0], finished=[1], now=7.0)
    assert [message for _, message in coordinator.outbox] == [Cancel(lease_id=0), Cancel(lease_id=1)]
    assert coordinator.drops == {DropReason.ACTOR_LOST: 2, DropReason.UNKNOWN_LEASE: 1}, "a group was sampled in vain"
    finish(coordinator, leases[:1])
    assert coordinator.drops[DropReason.UNKNOWN_LEASE] == 2
    assert len(granted(coordinator)) == 2


def test_what_did_not_reach_an_actor_is_leased_again_when_it_is_back() -> None:
    coordinator = make(make_config(), "a", capacity=2)
    first = granted(coordinator)
    coordinator.lose("a", "test")
    coordinator.join_again("a", held=[1], finished=[], now=1.0)
    assert list(coordinator.outbox) == [("a", Cancel(lease_id=0))], "it may be on its way still"
    ((_, again),) = granted(coordinator)
    assert again.prompt_uid == first[0][1].prompt_uid


def test_a_group_that_is_sent_again_may_take_its_time() -> None:
    coordinator = make(make_config(), "a", capacity=2)
    leases = granted(coordinator)
    coordinator.lose("a", "test")
    coordinator.join_again("a", held=[1], finished=[0], now=8.0)
    coordinator.heartbeat("a", heartbeat({1: 0}), 8.1)
    assert not coordinator.is_lost("a")
    finish(coordinator, leases[:1])
    coordinator.heartbeat("a", heartbeat({1: 0}), 14.0)
    assert not coordinator.is_lost("a") and not coordinator.drops


def test_a_group_that_was_received_is_no_drop_when_its_ack_got_lost() -> None:
    coordinator = make(make_config(), "a", capacity=2)
    finish(coordinator, granted(coordinator)[:1])
    coordinator.outbox.clear()
    coordinator.lose("a", "test")
    coordinator.join_again("a", held=[1], finished=[0], now=1.0)
    assert list(coordinator.outbox) == [("a", Cancel(lease_id=0))]
    assert not coordinator.drops


def test_a_lease_that_is_not_wanted_any_more_is_cancelled_again_when_a_heartbeat_lists_it() -> None:
    coordinator = make(make_config(), "a", capacity=2)
    granted(coordinator)
    coordinator.heartbeat("a", heartbeat({0: 0, 1: 0, 77: 0}), 1.0)
    assert [m for _, m in coordinator.outbox if isinstance(m, Cancel)] == [Cancel(lease_id=77)]


def test_an_actor_that_was_another_learners_is_served_with_weights_whatever_it_claims_to_hold() -> None:
    for version in (0, 3):
        coordinator = make(make_config())
        coordinator.set_version(version, version)
        coordinator.join("a", 2, 0.0)
        coordinator.join_again("a", held=[5], finished=[], now=0.0)
        coordinator.ready("a", version, NO_PROBE)
        assert coordinator.waiting_for_weights() == ("a",)
        assert coordinator.folder_probe("a") is None


def test_the_work_that_an_actor_did_for_an_earlier_learner_is_not_counted_again() -> None:
    coordinator = make(make_config())
    coordinator.join("a", 1, 0.0)
    coordinator.join_again("a", held=[], finished=[], now=0.0)
    coordinator.heartbeat("a", heartbeat({}, generated_tokens=1000, uptime_s=50.0), 0.0)
    coordinator.heartbeat("a", heartbeat({}, generated_tokens=1007, uptime_s=51.0), 0.0)
    coordinator.remove("a", "test")
    assert (coordinator.stats()["generated_tokens"], coordinator.stats()["uptime_s"]) == (7.0, 1.0)


def test_an_actor_that_says_that_it_has_room_for_everything_leaves_some_for_others() -> None:
    coordinator = make(make_config(max_staleness=10_000), "greedy", capacity=2**40)
    assert len(granted(coordinator)) == MAX_CAPACITY < coordinator.ledger.pace.window


def test_an_actor_that_is_lost_for_long_is_forgotten() -> None:
    coordinator = make(make_config(), "a", "b")
    coordinator.lose("a", "test")
    coordinator.heard("b", 599.0)
    assert coordinator.forgettable(599.0) == []
    assert coordinator.forgettable(600.0) == ["a"]


def test_silence_is_noticed_after_a_nudge() -> None:
    coordinator = make(make_config(), "a")
    coordinator.tick(1.9)
    assert not coordinator.outbox
    coordinator.tick(2.1)
    coordinator.tick(2.2)
    assert list(coordinator.outbox) == [("a", Pulse(version=0))]
    coordinator.tick(10.1)
    assert coordinator.members() == ()
    coordinator.heard("a", 11.0)
    assert coordinator.members() == (), "it has to say what it holds"
    coordinator.join_again("a", held=[], finished=[], now=11.0)
    assert coordinator.members() == ("a",)


def test_an_actor_may_take_longer_to_start_than_to_answer() -> None:
    coordinator = make(make_config())
    coordinator.join("a", 1, 0.0)
    coordinator.tick(200.0)
    assert coordinator.is_joining("a")
    coordinator.heard("a", 250.0)
    coordinator.tick(299.0)
    assert coordinator.is_joining("a")
    coordinator.join_again("a", held=[], finished=[], now=299.0)
    coordinator.tick(301.0)
    assert not coordinator.is_joining("a"), "it has to be ready by then, whatever it says"
    coordinator.join_again("a", held=[], finished=[], now=302.0)
    coordinator.tick(303.0)
    assert coordinator.is_joining("a")


def test_a_second_copy_is_acknowledged_and_counted_but_not_trained() -> None:
    coordinator = make(make_config(), "a")
    leases = granted(coordinator)
    finish(coordinator, leases)
    finish(coordinator, leases[:1])
    assert coordinator.drops == {DropReason.DUPLICATE: 1}
    assert ("a", Ack(lease_id=0)) in coordinator.outbox
    assert ids(coordinator.ledger.take_batch()) == [0, 1]
    finish(coordinator, leases[:1])
    assert coordinator.drops == {DropReason.DUPLICATE: 2}


def test_a_group_of_another_actors_lease_is_not_taken() -> None:
    coordinator = make(make_config(), "a", "b", capacity=2)
    leases = granted(coordinator)
    name, lease = leases[0]
    other = "b" if name == "a" else "a"
    coordinator.receive(other, group(lease.lease_id, [0]), 0.0)
    assert coordinator.drops == {DropReason.UNKNOWN_LEASE: 1}
    finish(coordinator, leases)
    assert coordinator.stats()["buffered_groups"] == 4


@pytest.mark.parametrize(
    "spoil",
    [
        lambda g: replace(g, behavior_logprobs=np.full_like(g.behavior_logprobs, np.nan)),
        lambda g: replace(g, rewards=np.full_like(g.rewards, np.inf)),
        lambda g: replace(g, versions=np.full_like(g.versions, 1)),
        lambda g: replace(g, versions=np.full_like(g.versions, -1)),
        lambda g: replace(g, token_ids=np.full_like(g.token_ids, -1)),
        lambda g: group(g.lease_id, [0], num_samples=3),
        lambda g: group(g.lease_id, [0] * 9),
    ],
)
def test_a_group_that_is_not_what_was_leased_is_refused_and_sampled_again(spoil) -> None:
    coordinator = make(make_config(max_staleness=9), "a", capacity=2)
    ((_, lease), *others) = granted(coordinator)
    coordinator.receive("a", spoil(group(lease.lease_id, [0])), 0.0)
    assert coordinator.drops == {DropReason.MALFORMED: 1}
    assert any(isinstance(message, Refused) and not message.fatal for _, message in coordinator.outbox)
    finish(coordinator, others)
    finish(coordinator, granted(coordinator))
    assert lease.prompt_uid in [again.prompt_uid for _, again in granted(coordinator)]


def test_after_three_groups_that_were_refused_an_actor_has_to_leave() -> None:
    coordinator = make(make_config(max_staleness=9), "a")
    leases = granted(coordinator)
    for i, (_, lease) in enumerate(leases[:3]):
        assert not coordinator.condemned
        coordinator.receive("a", group(lease.lease_id, [-1]), 0.0)
        finish(coordinator, [leases[-1 - i]])
    assert coordinator.condemned == {"a": "3 of its groups were refused, the last one: token id -1"}


def test_a_prompt_that_keeps_failing_on_the_only_actor_is_given_up_and_replaced(
    caplog: pytest.LogCaptureFixture,
) -> None:
    coordinator = make(make_config(prompts_per_step=2, max_staleness=9), "a", capacity=1, prompts=MANY)
    order = []
    for i in range(9):
        ((_, lease),) = granted(coordinator, now=20.0 * i)
        order.append(lease.prompt_uid)
        if lease.prompt_uid == order[0]:
            coordinator.fail("a", LeaseFailed(lease_id=lease.lease_id, reason="too long"), now=20.0 * i)
        else:
            finish(coordinator, [("a", lease)])
    failed, is_failed = order[0], [uid == order[0] for uid in order]
    assert is_failed == [True, False, False, True, False, False, True, False, False], "others come in between"
    assert coordinator.drops == {DropReason.FAILED: 1}
    assert coordinator.stats()["lease_failures"] == MAX_FAILURES
    assert f"prompt {failed} is given up after 3 failures: too long" in caplog.text
    assert not coordinator.condemned, "one prompt that cannot be sampled is not the actor's fault"


def test_an_actor_that_fails_every_lease_costs_no_prompt_beside_good_ones_and_has_to_leave() -> None:
    coordinator = make(make_config(max_staleness=10_000), "bad", "good", capacity=3, prompts=MANY)
    now, num_taken, sampled = 0.0, 0, list[tuple[str, Lease]]()
    while not coordinator.condemned:
        assert now < 60.0, "it is still there"
        now += 0.1
        leases = granted(coordinator, now)
        finish(coordinator, sampled)
        sampled = [(name, lease) for name, lease in leases if name == "good"]
        for _, lease in [item for item in leases if item not in sampled]:
            coordinator.fail("bad", LeaseFailed(lease_id=lease.lease_id, reason="CUDA error"), now)
        while coordinator.ledger.take_batch() is not None:
            num_taken += 1
    assert coordinator.condemned == {"bad": "it failed on 8 prompts in a row, the last one: CUDA error"}
    assert not coordinator.drops and num_taken > 10
    assert coordinator.stats()["lease_failures"] < 20


def test_a_prompt_that_failed_is_trained_behind_those_that_it_let_pass() -> None:
    coordinator = make(make_config(prompts_per_step=1, max_staleness=3), "a", capacity=1, prompts=MANY)
    ((_, bad),) = granted(coordinator)
    coordinator.fail("a", LeaseFailed(lease_id=bad.lease_id, reason="no"), now=0.0)
    ((_, other),) = granted(coordinator, now=2.0)
    assert coordinator.ledger.slots.num_before(coordinator.ledger.pending[0].turn) == 1
    finish(coordinator, [("a", other)])
    ((_, again),) = granted(coordinator, now=2.0)
    assert again.prompt_uid == bad.prompt_uid
    finish(coordinator, [("a", again)])
    assert [ids(coordinator.ledger.take_batch()) for _ in range(2)] == [[other.lease_id], [again.lease_id]]


def test_a_held_out_prompt_that_failed_goes_behind_the_others() -> None:
    coordinator = make(make_config(), "a", capacity=1)
    coordinator.ledger.evaluate(Evaluation(HELDOUT, 2, 1.0, version=0))
    order = []
    for i in range(4):
        ((_, lease),) = granted(coordinator, now=20.0 * i)
        order.append(lease.prompt_uid)
        if i == 0:
            coordinator.fail("a", LeaseFailed(lease_id=lease.lease_id, reason="no"), now=0.0)
        else:
            finish(coordinator, [("a", lease)])
    assert order == ["h0", "h1", "h2", "h0"]


def tries_of_the_first_prompt(coordinator: Coordinator, bad: str | None = None, now: float = 0.0) -> Counter[str]:
    """How often each actor fails on it, or on `bad`, before it is given up; all others are sampled at once."""
    end_s, failed = now + 60.0, Counter[str]()
    while not coordinator.drops[DropReason.FAILED]:
        assert now < end_s, f"it is not given up after {failed}"
        for name, lease in granted(coordinator, now):
            bad = bad or lease.prompt_uid
            if lease.prompt_uid == bad:
                coordinator.fail(name, LeaseFailed(lease_id=lease.lease_id, reason="no"), now)
                failed[name] += 1
            else:
                finish(coordinator, [(name, lease)])
        now += 0.5
    return failed


def test_a_prompt_is_given_up_when_every_actor_there_is_has_failed_on_it() -> None:
    coordinator = make(make_config(max_staleness=10_000), "a", "b", capacity=1, prompts=MANY)
    failed = tries_of_the_first_prompt(coordinator)
    assert len(failed) == 2 and failed.total() == MAX_FAILURES


def test_one_actor_condemns_no_prompt_while_another_has_only_no_room_for_it() -> None:
    coordinator = make(make_config(max_staleness=10_000), "a", "b", capacity=1, prompts=MANY)
    bad, num_failures = None, 0
    for i in range(30):
        for name, lease in granted(coordinator, now=20.0 * i):
            bad = bad or (lease.prompt_uid if name == "a" else None)
            if lease.prompt_uid == bad:
                coordinator.fail(name, LeaseFailed(lease_id=lease.lease_id, reason="no"), now=20.0 * i)
                num_failures += 1
            elif name == "a":
                finish(coordinator, [(name, lease)])
        assert not coordinator.drops
        if num_failures == 2 * MAX_FAILURES:
            break
    assert num_failures == 2 * MAX_FAILURES and len(coordinator.member("b").held) == 1
    coordinator.drain("b")
    assert tries_of_the_first_prompt(coordinator, bad, now=1000.0) == {"a": 1}, "nobody else is left to try it"


@pytest.mark.parametrize(
    "other", [{"capacity": 0}, {"is_hung": True}, {"is_slow": True, "tried_s": 0.0, "group_s": 9.0}, {"rest": 1000.0}]
)
def test_a_prompt_does_not_wait_for_an_actor_that_gets_no_leases(other: dict[str, Any]) -> None:
    coordinator = make(make_config(max_staleness=10_000), "a", "b", capacity=1, prompts=MANY)
    if "rest" in other:
        coordinator.member("b").rest.begin(0.0, other["rest"])
    else:
        for attribute, value in other.items():
            setattr(coordinator.member("b"), attribute, value)
    coordinator._stand(coordinator.member("b"), 0.0)
    assert tries_of_the_first_prompt(coordinator) == {"a": MAX_FAILURES}


def test_a_group_that_got_too_old_is_dropped_and_its_prompt_sampled_again() -> None:
    coordinator = make(make_config(max_staleness=1), "a")
    leases = granted(coordinator)
    finish(coordinator, leases)
    coordinator.loaded("a", 2)
    coordinator.set_version(2, 0)  # two versions without a step: not what the trainer does, so the gate must act
    assert coordinator.ledger.take_batch() is None
    assert coordinator.drops == {DropReason.STALE: 4}
    again = granted(coordinator)
    assert [lease.prompt_uid for _, lease in again[:4]] == [lease.prompt_uid for _, lease in leases]
    finish(coordinator, again, versions=(1, 2))
    assert ids(coordinator.ledger.take_batch()) == [4, 5]


def test_over_age_mask_keeps_the_group_for_the_trainer_to_mask() -> None:
    coordinator = make(make_config(max_staleness=1, over_age=OverAge.mask), "a")
    finish(coordinator, granted(coordinator))
    coordinator.set_version(2, 0)
    batch = coordinator.ledger.take_batch()
    assert ids(batch) == [0, 1]
    assert batch is not None and batch[0].oldest_version == 0
    assert not coordinator.drops


def test_dynamic_sampling_replaces_groups_that_teach_nothing_without_favouring_the_fast() -> None:
    coordinator = make(make_config(prompts_per_step=2, max_staleness=0, dynamic=True), "a")
    slow, fast = granted(coordinator)
    finish(coordinator, [fast], num_correct=2)
    assert coordinator.drops == {DropReason.UNINFORMATIVE: 1}
    replacement = granted(coordinator)
    assert len(replacement) == 1
    finish(coordinator, replacement)
    assert coordinator.ledger.take_batch() is None, "the step waits for its slow lease"
    finish(coordinator, [slow])
    assert ids(coordinator.ledger.take_batch()) == [0, 2]


def test_dynamic_sampling_leaves_the_critics_warm_up_alone() -> None:
    coordinator = make(make_config(prompts_per_step=2, max_staleness=0, warmup=1, dynamic=True), "a")
    leases = granted(coordinator)
    finish(coordinator, leases[:3], num_correct=0)
    assert ids(coordinator.ledger.take_batch()) == [0, 1]
    coordinator.set_version(0, 1)
    finish(coordinator, leases[3:])
    assert coordinator.ledger.take_batch() is None
    assert coordinator.drops == {DropReason.UNINFORMATIVE: 1}


def test_groups_that_wait_in_the_buffer_when_the_warm_up_ends_are_no_row() -> None:
    """Every other one is kept, and dropping the rest of them at once ends no run."""
    config = make_config(prompts_per_step=4, max_staleness=2, warmup=1, dynamic=True)
    config = replace(config, algorithm=replace(config.algorithm, max_uninformative=3))
    coordinator = make(config, "a")
    leases = granted(coordinator)
    for i, lease in enumerate(leases):
        finish(coordinator, [lease], num_correct=0 if i % 2 else 1)
    assert ids(coordinator.ledger.take_batch()) == [0, 1, 2, 3]
    coordinator.set_version(0, 1)
    assert ids(coordinator.ledger.take_batch()) == [4, 6, 8, 10]
    assert coordinator.drops == {DropReason.UNINFORMATIVE: 4}
    assert coordinator.ledger.verdicts.problem is None


def test_a_group_on_which_the_verifier_failed_is_dropped_and_the_next_prompt_takes_its_place() -> None:
    coordinator = make(make_config(prompts_per_step=2, max_staleness=0), "a")
    first, second = granted(coordinator)
    spoilt = replace(group(first[1].lease_id, [0]), verdicts=(Verdict.CORRECT, Verdict.ERROR), verifier_error="raised")
    coordinator.receive("a", spoilt, 0.0)
    assert coordinator.drops == {DropReason.VERIFIER_ERROR: 1}
    finish(coordinator, [second, *granted(coordinator)])
    assert ids(coordinator.ledger.take_batch()) == [1, 2]
    assert coordinator.stats()["verdicts/error"] == 1


def test_a_survivor_that_waits_for_its_batch_does_not_hide_that_all_others_are_dropped() -> None:
    config = make_config(prompts_per_step=2, max_staleness=0, dynamic=True)
    config = replace(config, algorithm=replace(config.algorithm, max_uninformative=20))
    coordinator = make(config, "a")
    survivor, other = granted(coordinator)
    finish(coordinator, [survivor])
    leases = [other]
    for _ in range(20):
        assert coordinator.ledger.verdicts.problem is None
        finish(coordinator, leases, num_correct=0)
        assert coordinator.ledger.take_batch() is None
        leases = granted(coordinator)
    assert "dropped 20 groups (20 with all responses wrong" in str(coordinator.ledger.verdicts.problem)
    assert "dropped 20 groups" in coordinator.describe(0.0)


def test_a_distrusted_actor_takes_its_groups_of_the_last_version_with_it() -> None:
    coordinator = make(make_config(max_staleness=2), "a")
    leases = granted(coordinator)
    finish(coordinator, leases[:2])
    coordinator.loaded("a", 1)
    finish(coordinator, leases[2:4], versions=(0, 1))
    coordinator.distrust("a", 1)
    coordinator.remove("a", "wrong weights")
    assert coordinator.stats()["buffered_groups"] == 2
    assert coordinator.drops == {DropReason.ACTOR_LOST: 4}
    waiting = take(coordinator, 0.0).state["untrained"]
    assert [entry["uid"] for entry in waiting] == [lease.prompt_uid for _, lease in leases]


def test_before_the_first_step_evaluation_goes_first_and_is_not_admitted() -> None:
    coordinator = make(make_config(prompts_per_step=1, max_staleness=0), "a")
    coordinator.ledger.evaluate(Evaluation(HELDOUT, 4, 0.5, version=0))
    leases = granted(coordinator)
    assert [lease.purpose for _, lease in leases] == [Purpose.EVAL] * 3 + [Purpose.TRAIN]
    assert (leases[0][1].num_samples, leases[0][1].temperature) == (4, 0.5)
    assert coordinator.ledger.admitted == 1
    finish(coordinator, leases[:2], num_correct=3)
    assert coordinator.ledger.poll_evaluation() is None
    with pytest.raises(RuntimeError, match="still running"):
        coordinator.ledger.evaluate(Evaluation(HELDOUT, 4, 0.5, version=0))
    finish(coordinator, leases[2:3], versions=(0, 0), num_correct=0)
    result = coordinator.ledger.poll_evaluation()
    assert result is not None
    assert (result.accuracy, result.num_samples, result.num_failed) == (6 / 12, 12, 0)
    clustered = estimate([3, 3, 0], [4, 4, 4])
    assert (result.accuracy_low, result.accuracy_high) == (clustered.low, clustered.high)
    assert result.length_mean == pytest.approx((8 * 1 + 4 * 2) / 12)
    assert coordinator.ledger.poll_evaluation() is None


def test_held_out_prompts_that_ask_the_same_are_one_observation() -> None:
    """In whatever order their groups come, and where one of them could not be sampled."""
    coordinator = make(make_config(prompts_per_step=1, max_staleness=0), "a", capacity=8)
    twice = [*HELDOUT, *(replace(prompt, uid=f"again-{prompt.uid}") for prompt in HELDOUT)]
    coordinator.ledger.evaluate(Evaluation(twice, 4, 0.5, version=0))
    leases = {lease.prompt_uid: (name, lease) for name, lease in granted(coordinator) if lease.purpose is Purpose.EVAL}
    for uid, num_correct in (("again-h2", 4), ("h0", 3), ("again-h1", 0), ("h2", 4), ("again-h0", 1)):
        finish(coordinator, [leases[uid]], num_correct=num_correct)
    assert coordinator.ledger.evaluation is not None
    coordinator.ledger.evaluation.fail("h1")
    result = coordinator.ledger.poll_evaluation()
    assert result is not None
    found = (result.accuracy, result.accuracy_low, result.accuracy_high)
    assert found == astuple(estimate([4, 0, 8], [8, 8, 8]))


@settings(deadline=None)
@example(capacity=3, share=0.5, num_prompts=9, order=[])
@given(
    capacity=st.integers(1, 9),
    share=st.floats(0.01, 1.0),
    num_prompts=st.integers(1, 12),
    order=st.lists(st.integers(0, 99), max_size=30),
)
def test_training_and_evaluation_never_starve_each_other(
    capacity: int, share: float, num_prompts: int, order: list[int]
) -> None:
    """One actor, training groups waiting all the time; groups finish in the order that the numbers pick."""
    coordinator = make(make_config(max_staleness=10_000, share=share), "a", capacity=capacity)
    coordinator.set_version(0, 1)
    leases = granted(coordinator)
    heldout = [Prompt(uid=f"h{i}", text=f"{i}", reference="") for i in range(num_prompts)]
    coordinator.ledger.evaluate(Evaluation(heldout, 2, 1.0, version=0))
    # Grants from one evaluation lease to the next: its share of the leases, or of the room in whole groups.
    period = max(math.ceil(1 / share), math.ceil(capacity / max(1, int(share * capacity))))
    most_grants = len(order) + period * (num_prompts + 1) + 2 * capacity
    grants: list[bool] = []  # whether for evaluation, from here on
    while (result := coordinator.ledger.poll_evaluation()) is None:
        assert len(grants) <= most_grants, "the evaluation does not end"
        finish(coordinator, [leases.pop(order.pop() % len(leases) if order else 0)])
        new = granted(coordinator)
        assert len(new) == 1, "room is left empty"
        leases += new
        grants += [lease.purpose is Purpose.EVAL for _, lease in new]
        assert sum(grants) <= share * len(grants) + 1
        num_held = sum(lease.purpose is Purpose.EVAL for _, lease in leases)
        assert num_held <= max(1, share * capacity)
    assert result.num_samples == 2 * num_prompts


def test_an_actor_of_one_group_takes_turns_between_training_and_evaluation() -> None:
    coordinator = make(make_config(max_staleness=100, share=0.25), "a", capacity=1)
    coordinator.set_version(0, 1)
    coordinator.ledger.evaluate(Evaluation(HELDOUT[:2], 2, 1.0, version=0))
    purposes = []
    for _ in range(9):
        leases = granted(coordinator)
        purposes += [str(lease.purpose)[0] for _, lease in leases]
        finish(coordinator, leases)
    assert "".join(purposes) == "tttetttet"


def test_evaluation_has_all_the_room_when_no_training_lease_may_go_out() -> None:
    coordinator = make(make_config(prompts_per_step=1, max_staleness=0, share=0.1), "a", capacity=4)
    finish(coordinator, granted(coordinator))
    assert coordinator.ledger.take_batch() is not None
    coordinator.set_version(0, 1)
    coordinator.ledger.evaluate(Evaluation(HELDOUT, 2, 1.0, version=0))
    assert [lease.purpose for _, lease in granted(coordinator)] == [Purpose.TRAIN] + [Purpose.EVAL] * 3


def test_the_duration_of_an_evaluation_ends_with_its_last_group() -> None:
    coordinator = make(make_config(), "a")
    coordinator.ledger.evaluate(Evaluation(HELDOUT[:2], 2, 1.0, version=0, started_s=10.0))
    leases = [lease for _, lease in granted(coordinator) if lease.purpose is Purpose.EVAL]
    for now, lease in zip((11.5, 14.0), leases, strict=True):
        coordinator.receive("a", group(lease.lease_id, [0]), now)
    result = coordinator.ledger.poll_evaluation()
    assert result is not None and result.seconds == 4.0


def test_what_a_distrusted_actor_sampled_for_an_evaluation_is_sampled_again() -> None:
    """But not what it sampled with the version before, nor what others did."""
    coordinator = make(make_config(), "a", capacity=3)
    coordinator.ledger.evaluate(Evaluation(HELDOUT, 2, 1.0, version=0))
    first = granted(coordinator)
    assert [lease.prompt_uid for _, lease in first] == ["h0", "h1", "h2"]
    coordinator.loaded("a", 1)
    coordinator.set_version(1, 1)
    coordinator.receive("a", group(first[0][1].lease_id, [0], num_correct=1), 0.0)
    coordinator.receive("a", group(first[1][1].lease_id, [1], num_correct=1), 0.0)
    coordinator.distrust("a", 1)
    coordinator.remove("a", "wrong weights")
    coordinator.join("b", 3, 0.0)
    coordinator.ready("b", 0, NO_PROBE)
    coordinator.loaded("b", 1)
    again = []
    for _ in range(2):
        for _, lease in granted(coordinator):
            if lease.purpose is Purpose.EVAL:
                again.append(lease.prompt_uid)
                coordinator.receive("b", group(lease.lease_id, [1], num_correct=0), 0.0)
    assert again == ["h1", "h2"]
    assert coordinator.drops == {DropReason.ACTOR_LOST: 2}, "one that it held and one that had come"
    result = coordinator.ledger.poll_evaluation()
    assert result is not None and (result.accuracy, result.num_samples) == (1 / 6, 6)


def test_an_evaluation_survives_its_actor_and_uses_the_same_seeds_every_time() -> None:
    coordinator = make(make_config(), "a", capacity=3)
    coordinator.ledger.evaluate(Evaluation(HELDOUT, 2, 1.0, version=0))
    first = granted(coordinator)
    finish(coordinator, first[:1])
    coordinator.remove("a", "test")
    coordinator.join("b", 3, 0.0)
    coordinator.ready("b", 0, NO_PROBE)
    second = [item for item in granted(coordinator) if item[1].purpose is Purpose.EVAL]
    assert [lease.prompt_uid for _, lease in second] == ["h1", "h2"]
    assert [lease.seed for _, lease in second] == [lease.seed for _, lease in first[1:]]
    finish(coordinator, second)
    assert coordinator.ledger.poll_evaluation() is not None


def test_an_evaluation_whose_prompt_cannot_be_sampled_ends_all_the_same() -> None:
    coordinator = make(make_config(), "a")
    coordinator.ledger.evaluate(Evaluation(HELDOUT[:1], 2, 1.0, version=0))
    for i in range(MAX_FAILURES):
        leases = granted(coordinator, now=20.0 * i)
        finish(coordinator, [item for item in leases if item[1].purpose is Purpose.TRAIN])
        ((_, lease),) = [item for item in leases if item[1].purpose is Purpose.EVAL]
        coordinator.fail("a", LeaseFailed(lease_id=lease.lease_id, reason="no"), now=20.0 * i)
    result = coordinator.ledger.poll_evaluation()
    assert result is not None
    assert (result.num_failed, result.num_samples, result.accuracy) == (1, 0, 0.0)


def test_held_out_prompts_that_could_not_be_sampled_or_judged_count_as_wrong() -> None:
    coordinator = make(make_config(prompts_per_step=9), "a")
    coordinator.ledger.evaluate(Evaluation(HELDOUT, 2, 1.0, version=0))
    leases: dict[str, Lease] = {}
    failures, now = 0, 0.0
    while (result := coordinator.ledger.poll_evaluation()) is None:
        now += 20.0
        granted_now = granted(coordinator, now)
        finish(coordinator, [item for item in granted_now if item[1].purpose is Purpose.TRAIN])
        for _, lease in [item for item in granted_now if item[1].purpose is Purpose.EVAL]:
            leases[lease.prompt_uid] = lease
            if lease.prompt_uid == "h0":
                coordinator.fail("a", LeaseFailed(lease_id=lease.lease_id, reason="no"), now)
                failures += 1
            else:
                both = group(lease.lease_id, [0], num_correct=2)
                spoilt = replace(both, verdicts=(Verdict.CORRECT, Verdict.ERROR), verifier_error="raised")
                coordinator.receive("a", both if lease.prompt_uid == "h1" else spoilt, 0.0)
    assert failures == MAX_FAILURES and len(leases) == 3
    assert (result.num_prompts, result.num_failed, result.num_errors) == (3, 1, 1)
    assert result.accuracy == pytest.approx(3 / 6)


def test_the_window_is_sampled_when_it_is_full_and_everything_has_arrived() -> None:
    coordinator = make(make_config(), "a", capacity=3)
    leases = granted(coordinator)
    finish(coordinator, leases)
    assert not coordinator.ledger.is_window_sampled()
    leases = granted(coordinator)
    assert not coordinator.ledger.is_window_sampled()
    finish(coordinator, leases)
    assert coordinator.ledger.is_window_sampled()


def test_a_lease_that_got_lost_on_the_way_is_found_by_the_heartbeats() -> None:
    coordinator = make(make_config(prompts_per_step=1), "a")
    leases = granted(coordinator)
    coordinator.heartbeat("a", heartbeat({1: 0}), 4.0)
    assert not coordinator.is_lost("a"), "it may be on the way still"
    coordinator.heartbeat("a", heartbeat({1: 0}), 6.0)
    assert coordinator.is_lost("a"), "it has to say what it holds"
    coordinator.join_again("a", held=[1], finished=[], now=6.1)
    assert [m for _, m in coordinator.outbox if isinstance(m, Cancel)] == [Cancel(lease_id=0)]
    assert [lease.prompt_uid for _, lease in granted(coordinator)] == [leases[0][1].prompt_uid]


def test_work_of_actors_that_left_stays_counted() -> None:
    coordinator = make(make_config(), "a")
    for tokens in (5, 10):
        coordinator.heartbeat("a", heartbeat({}, tokens, busy_s=tokens / 10, uptime_s=1.0), 0.0)
    coordinator.join("a", 1, 0.0)
    coordinator.heartbeat("a", heartbeat({}, generated_tokens=3, busy_s=0.1, uptime_s=0.5), 0.0)
    stats = coordinator.stats()
    assert (stats["generated_tokens"], stats["uptime_s"]) == (13, 1.5)
    assert stats["busy_s"] == pytest.approx(1.1)


def test_seeds_of_neighbouring_leases_are_far_apart() -> None:
    seeds = sorted(lease.seed for _, lease in granted(make(make_config(prompts_per_step=50), "a")))
    assert min(np.diff(seeds)) > 100


def test_the_description_names_who_holds_what() -> None:
    coordinator = make(make_config())
    assert "no actor is connected" in coordinator.describe(0.0)
    coordinator = make(make_config(), "a")
    granted(coordinator)
    coordinator.join("b", 1, 0.0)
    text = coordinator.describe(2.5)
    assert "0 groups are buffered, 4 of 4 admitted" in text
    assert "a (sampling, version 0, heard 2.5 s ago) holds the leases [0, 1, 2, 3]" in text
    assert "b (joining, version None, heard 2.5 s ago) holds nothing" in text
    coordinator.member("a").rest.begin(0.0, 3.0)
    assert "a (resting, version 0, " in coordinator.describe(2.5)
    coordinator.member("a").is_slow = True
    assert "a (too slow, version 0, " in coordinator.describe(2.5)


# ---- the prompt stream


def test_the_stream_gives_every_prompt_once_per_epoch_in_another_order() -> None:
    stream = PromptStream(PROMPTS, seed=3)
    epochs = [[stream.next().uid for _ in PROMPTS] for _ in range(3)]
    assert all(sorted(epoch) == sorted(prompt.uid for prompt in PROMPTS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_stream_goes_on_where_its_state_was_taken() -> None:
    stream, other = PromptStream(PROMPTS, seed=3), PromptStream(PROMPTS, seed=3)
    for _ in range(10):
        stream.next()
    other.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert [stream.next() for _ in range(20)] == [other.next() for _ in range(20)]


def test_a_training_set_that_cannot_be_streamed_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="training set is empty"):
        PromptStream([], seed=0)
    with pytest.raises(ConfigError, match="different uids"):
        PromptStream([*PROMPTS, PROMPTS[0]], seed=0)


def test_the_sentence_of_a_time_out_has_no_end_of_actors() -> None:
    coordinator = make(make_config(), *(f"a{number}" for number in range(100)))
    text = coordinator.describe(0.0)
    assert text.endswith("; and 68 other actors") and text.count("(") == 32

"""Who samples what, and what may be trained: a pure state machine. No sockets, no clock, no threads.

A training prompt goes   pending -> leased(actor) -> buffered -> trained | dropped(reason)

- Lease ids count up and are never used twice. A prompt that comes back is leased again first, under a new id.
- Admission: groups leased + buffered + trained stay below the window, so that actors run ahead of the learner
  by at most `max_staleness` versions.
- Consumption is in the order of lease ids. A batch waits for its earlier leases: taking whichever finished
  first would favour short responses. In that order the admission window alone keeps every group young enough;
  the gate at consumption holds for whatever an actor sends.
- Evaluation leases go out before training leases and count nowhere in the above.

Everything to be sent is put into an outbox. learner/rollouts/service.py calls all this under its lock.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence

from common.config import Config, ConfigError, OverAge
from common.types import (
    JSON,
    Ack,
    Cancel,
    CompletedGroup,
    DropReason,
    Float32Array,
    Heartbeat,
    LearnerMessage,
    LeaseFailed,
    Prompt,
    Pulse,
    Purpose,
    Refused,
    TrajectoryGroup,
    Verdict,
)
from learner.rollouts.evaluation import EvalResult, Evaluation
from learner.rollouts.leases import Slot, eval_lease, problem_with, train_lease
from learner.rollouts.members import Member, Members, Presence
from learner.rollouts.prompts import PromptStream

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # of one prompt, before it is given up
REMEMBERED_LEASES = 10_000  # ids of received groups, kept to tell a duplicate from an unknown lease

_TOTALS = ("received_groups", "received_tokens", "generation_s", "verification_s", "lease_failures")


class Coordinator:
    """The state machine. `now` is a monotonic time in seconds.

    Invariants: every training prompt drawn from the stream is in exactly one place: pending, one slot, trained,
    or dropped for good. A lease is in `held` of the one member that its slot names until its group is buffered.
    """

    def __init__(self, config: Config, stream: PromptStream, tokenize: Callable[[Prompt], Sequence[int]]) -> None:
        self._config = config
        self._stream = stream
        self._tokenize = tokenize
        self._members = Members(config)
        self._pending: deque[Prompt] = deque()
        self._train: dict[int, Slot] = {}  # by lease id, ascending
        self._eval: dict[int, Slot] = {}
        self._evaluation: Evaluation | None = None
        self._next_lease_id = 0
        self._received: dict[int, None] = {}
        self._failures: Counter[str] = Counter()  # by prompt uid
        self._num_trained = 0  # groups
        self._totals = dict.fromkeys(_TOTALS, 0.0)
        self._warmup_steps = config.algorithm.critic_warmup_steps
        self._is_warmup_open = config.algorithm.critic_warmup_gate is not None  # may end before all its steps
        self.version = 0
        self.steps_done = 0
        self.drops: Counter[DropReason] = Counter()
        self.outbox: deque[tuple[str, LearnerMessage]] = deque()

    # ---- members

    def join(self, name: str, capacity: int, now: float) -> None:
        """A process of this name has greeted; it replaces an earlier one."""
        self.remove(name, "a new process has its name")
        self._members.add(name, capacity, now)

    def ready(self, name: str, version: int, probe_logprobs: Float32Array) -> None:
        """Its engine is up. Version 0 is the model folder that both sides have compared."""
        member = self._members[name]
        member.presence, member.was_ready = Presence.READY, True
        member.version = version if version == self.version else None
        member.probe_logprobs = probe_logprobs

    def heard(self, name: str, now: float) -> None:
        """Any message of a member. One that was lost takes part again, without the leases it had."""
        member = self._members[name]
        member.heard_s = now
        if member.presence is Presence.LOST:
            member.presence = Presence.READY if member.was_ready else Presence.JOINING
            logger.warning("actor %s is back; the leases %s are no longer its own", name, member.void)
            self._cancel_void(member)

    def heartbeat(self, name: str, heartbeat: Heartbeat, now: float) -> None:
        member = self._members[name]
        member.heartbeat = heartbeat
        self._send(name, Pulse(version=self.version))
        limit_s = self._config.transport.heartbeat_timeout_s
        overdue = [id_ for id_ in member.held if now - self._slot(id_).granted_s > limit_s]
        if heartbeat.held_groups < len(overdue):
            # a lease or a group went down with a broken connection; which of them cannot be known
            logger.warning("actor %s samples %d groups, not %s", name, heartbeat.held_groups, overdue)
            self._revoke(member)
            self._cancel_void(member)

    def loaded(self, name: str, version: int | None) -> None:
        """The actor holds `version` now, or (None) no whole one."""
        self._members[name].version = version

    def lose(self, name: str, reason: str) -> None:
        """Its leases go back to pending; it may come back."""
        member = self._members[name]
        if member.presence is not Presence.LOST:
            logger.warning("actor %s is lost (%s); it held the leases %s", name, reason, list(member.held))
            member.presence = Presence.LOST
            self._revoke(member)

    def remove(self, name: str, reason: str, *, distrust: bool = False) -> None:
        """It is gone for good. `distrust` drops its buffered groups with tokens of its newest version too."""
        member = self._members.pop(name)
        if member is None:
            return
        logger.info("actor %s leaves (%s); it held the leases %s", name, reason, list(member.held))
        self.outbox = deque((to, message) for to, message in self.outbox if to != name)
        self._revoke(member)
        if distrust and member.version is not None:
            self._drop_buffered_of(name, member.version)

    def tick(self, now: float) -> None:
        """Declare silent members lost, and nudge late ones."""
        for name, reason in self._members.silent(now):
            self.lose(name, reason)
        for name in self._members.late(now):
            self._send(name, Pulse(version=self.version))

    def members(self) -> tuple[str, ...]:
        """Ready actors, sorted."""
        return self._members.ready()

    def is_joining(self, name: str) -> bool:
        return self._members[name].presence is Presence.JOINING

    def waiting_for_weights(self) -> tuple[str, ...]:
        """Ready actors that do not hold the current version."""
        return tuple(name for name in self.members() if not self._members[name].is_current(self.version))

    def ready_probes(self) -> dict[str, Float32Array]:
        """The probe's log-probs that each ready actor reported when it became ready."""
        probes = {name: self._members[name].probe_logprobs for name in self.members()}
        return {name: probe for name, probe in probes.items() if probe is not None}

    def _revoke(self, member: Member) -> None:
        """Every lease that it holds is void: the prompts return to the front of their queues, in order."""
        held = [self._slot(lease_id) for lease_id in member.held]
        member.void.extend(member.held)
        member.held.clear()
        for slot in reversed(held):
            self._withdraw(slot, DropReason.ACTOR_LOST)

    def _cancel_void(self, member: Member) -> None:
        for lease_id in member.void:
            self._send(member.name, Cancel(lease_id=lease_id))
        member.void.clear()

    def _drop_buffered_of(self, name: str, version: int) -> None:
        for slot in reversed(list(self._train.values())):
            if slot.actor == name and slot.group is not None and slot.group.newest_version >= version:
                self._withdraw(slot, DropReason.ACTOR_LOST)

    # ---- leases out

    @property
    def window(self) -> int:
        """Groups that may be admitted at this version, counted from the start of the run.

        Step s consumes at version max(0, s - warm-up steps) // publish_every. While a gate may still end the
        warm-up, only the step under way is sure to belong to it.
        """
        warmup = min(self._warmup_steps, self.steps_done + 1) if self._is_warmup_open else self._warmup_steps
        versions = self.version + 1 + self._config.staleness.max_staleness
        policy_steps = min(versions * self._config.weights.publish_every, self._config.learner.steps)
        return self._config.rollout.prompts_per_step * (warmup + policy_steps)

    @property
    def admitted(self) -> int:
        """Groups leased, buffered or trained; those that were dropped have given their place back."""
        return self._num_trained + len(self._train)

    def is_window_sampled(self) -> bool:
        """The window is full and every group in it has arrived."""
        return self.admitted >= self.window and all(slot.group is not None for slot in self._train.values())

    def dispatch(self, now: float) -> None:
        """Grant leases while a current actor has room and there is something to sample."""
        members = [member for member in self._members if member.is_current(self.version)]
        while members:
            member = min(members, key=lambda m: (len(m.held) - m.capacity, m.name))  # the one with most room
            if len(member.held) >= member.capacity:
                return
            slot = self._next_slot(member.name, now)
            if slot is None:
                return
            member.held[slot.lease.lease_id] = None
            self._send(member.name, slot.lease)

    def _next_slot(self, actor: str, now: float) -> Slot | None:
        lease_id, evaluation = self._next_lease_id, self._evaluation
        if evaluation is not None and evaluation.pending:
            prompt = evaluation.pending.popleft()
            lease = eval_lease(self._config, lease_id, prompt, self._tokenize(prompt), evaluation)
            slots = self._eval
        elif self.admitted < self.window:
            prompt = self._pending.popleft() if self._pending else self._stream.next()
            lease = train_lease(self._config, lease_id, prompt, self._tokenize(prompt))
            slots = self._train
        else:
            return None
        self._next_lease_id += 1
        slots[lease_id] = Slot(lease, prompt, actor, granted_s=now)
        return slots[lease_id]

    # ---- groups in

    def receive(self, name: str, group: CompletedGroup, now: float) -> None:
        """Take a group in, or count why not; acknowledged in any case, since a second copy is of no use."""
        self._send(name, Ack(lease_id=group.lease_id))
        member = self._members[name]
        if group.lease_id not in member.held:
            is_copy = group.lease_id in self._received
            self._drop(DropReason.DUPLICATE if is_copy else DropReason.UNKNOWN_LEASE, group.lease_id, name)
            return
        slot = self._slot(group.lease_id)
        problem = problem_with(group, slot.lease, max(self.version, member.version or 0))
        if problem is not None:
            self._send(name, Refused(reason=f"group of lease {group.lease_id}: {problem}", fatal=False))
            self._try_again(slot, DropReason.MALFORMED, problem)
            return
        del member.held[group.lease_id]
        self._failures.pop(slot.prompt.uid, None)
        self._record(group)
        if slot.lease.purpose is Purpose.EVAL:
            assert self._evaluation is not None
            del self._eval[group.lease_id]
            self._evaluation.add(group)
            return
        slot.group = TrajectoryGroup(lease=slot.lease, actor=name, completed=group, arrived_s=now)
        if self._is_uninformative(slot.group):
            self._forget(slot, DropReason.UNINFORMATIVE)

    def fail(self, name: str, failed: LeaseFailed) -> None:
        """The actor could not sample this lease."""
        if failed.lease_id in self._members[name].held:
            self._try_again(self._slot(failed.lease_id), None, failed.reason)
        else:
            self._drop(DropReason.UNKNOWN_LEASE, failed.lease_id, name)

    def _try_again(self, slot: Slot, reason: DropReason | None, problem: str) -> None:
        """Lease the prompt again, unless it has failed MAX_FAILURES times."""
        uid = slot.prompt.uid
        self._failures[uid] += 1
        self._totals["lease_failures"] += 1
        del self._members[slot.actor].held[slot.lease.lease_id]
        logger.warning("prompt %s, failure %d on actor %s: %s", uid, self._failures[uid], slot.actor, problem)
        if self._failures[uid] < MAX_FAILURES:
            self._withdraw(slot, reason)
            return
        del self._failures[uid]
        logger.error("prompt %s is given up after %d failures: %s", uid, MAX_FAILURES, problem)
        self._forget(slot, DropReason.FAILED)

    def _slot(self, lease_id: int) -> Slot:
        return self._train[lease_id] if lease_id in self._train else self._eval[lease_id]

    def _withdraw(self, slot: Slot, reason: DropReason | None) -> None:
        """The prompt goes back to the front of the queue that it came from."""
        if reason is not None:
            self._drop(reason, slot.lease.lease_id, slot.actor)
        if slot.lease.purpose is Purpose.TRAIN:
            del self._train[slot.lease.lease_id]
            self._pending.appendleft(slot.prompt)
            return
        assert self._evaluation is not None
        del self._eval[slot.lease.lease_id]
        self._evaluation.pending.appendleft(slot.prompt)

    def _forget(self, slot: Slot, reason: DropReason) -> None:
        """The prompt is done with for this epoch; the stream's next takes its place."""
        self._drop(reason, slot.lease.lease_id, slot.actor)
        if slot.lease.purpose is Purpose.TRAIN:
            del self._train[slot.lease.lease_id]
            return
        assert self._evaluation is not None
        del self._eval[slot.lease.lease_id]
        self._evaluation.fail()

    def _drop(self, reason: DropReason, lease_id: int, name: str) -> None:
        self.drops[reason] += 1
        logger.info("lease %d of actor %s dropped: %s", lease_id, name, reason)

    def _record(self, group: CompletedGroup) -> None:
        self._received[group.lease_id] = None
        if len(self._received) > REMEMBERED_LEASES:
            del self._received[next(iter(self._received))]
        self._totals["received_groups"] += 1
        self._totals["received_tokens"] += len(group.token_ids)
        self._totals["generation_s"] += group.generation_s
        self._totals["verification_s"] += group.verification_s

    def _send(self, name: str, message: LearnerMessage) -> None:
        self.outbox.append((name, message))

    # ---- consumption

    def take_batch(self) -> list[TrajectoryGroup] | None:
        """The next step's groups, oldest lease first, or None while one of them is still being sampled."""
        num_groups = self._config.rollout.prompts_per_step
        batch: list[TrajectoryGroup] = []
        stale: list[Slot] = []
        for slot in list(self._train.values()):
            if slot.group is None or len(batch) == num_groups:
                break
            if self._is_over_age(slot.group):
                stale.append(slot)
            elif self._is_uninformative(slot.group):
                self._forget(slot, DropReason.UNINFORMATIVE)
            else:
                batch.append(slot.group)
        for slot in reversed(stale):
            self._withdraw(slot, DropReason.STALE)
        if len(batch) < num_groups:
            return None
        for group in batch:
            del self._train[group.lease.lease_id]
        self._num_trained += num_groups
        return batch

    def set_version(self, version: int, steps_done: int) -> None:
        self.version, self.steps_done = version, steps_done
        if steps_done >= self._warmup_steps:
            self._is_warmup_open = False

    def end_warmup(self, steps: int) -> None:
        """The gate ended the critic's warm-up after `steps` steps."""
        self._warmup_steps = steps
        self._is_warmup_open = False

    def _is_over_age(self, group: TrajectoryGroup) -> bool:
        staleness = self._config.staleness
        is_old = self.version - group.oldest_version > staleness.max_staleness
        return is_old and staleness.over_age is OverAge.drop

    def _is_uninformative(self, group: TrajectoryGroup) -> bool:
        """Dynamic sampling, in policy steps only: the critic's warm-up wants the policy's own distribution."""
        is_filtering = self._config.algorithm.dynamic_sampling and self.steps_done >= self._warmup_steps
        num_correct = group.completed.verdicts.count(Verdict.CORRECT)
        return is_filtering and num_correct in (0, len(group.completed.verdicts))

    # ---- evaluation

    def evaluate(self, evaluation: Evaluation) -> None:
        """Raises RuntimeError while another evaluation runs."""
        if self._evaluation is not None:
            raise RuntimeError(f"the evaluation of version {self._evaluation.version} is still running")
        self._evaluation = evaluation

    def poll_evaluation(self) -> EvalResult | None:
        """The finished evaluation's result, once; else None."""
        result = self._evaluation.result() if self._evaluation is not None else None
        if result is not None:
            self._evaluation = None
        return result

    @property
    def is_evaluating(self) -> bool:
        return self._evaluation is not None

    # ---- reports and checkpoints

    def stats(self) -> dict[str, float]:
        """Counters since the start of the run and gauges of now; the one place where they are kept."""
        num_buffered = sum(slot.group is not None for slot in self._train.values())
        return {
            "actors_connected": len(self.members()),
            "admitted_groups": self.admitted,
            "window_groups": self.window,
            "buffered_groups": num_buffered,
            "in_flight_groups": len(self._train) - num_buffered,
            "in_flight_eval_groups": len(self._eval),
            "pending_prompts": len(self._pending),
            "trained_groups": self._num_trained,
            **self._totals,
            **self._members.work(),
            **{f"dropped/{reason}": self.drops[reason] for reason in DropReason},
        }

    def describe(self, now: float) -> str:
        """Who holds what, for the message of a time-out."""
        num_buffered = sum(slot.group is not None for slot in self._train.values())
        parts = [f"{num_buffered} groups are buffered, {self.admitted} of {self.window} admitted"]
        parts += [self._members.describe(member, now) for member in self._members]
        return "; ".join(parts if len(self._members) else [*parts, "no actor is connected"])

    def state_dict(self) -> dict[str, JSON]:
        """For a checkpoint between two steps: the stream's position and all prompts drawn but not trained."""
        untrained = [slot.prompt.uid for slot in self._train.values()]
        return {
            "stream": self._stream.state_dict(),
            "untrained": untrained + [prompt.uid for prompt in self._pending],
            "version": self.version,
            "steps_done": self.steps_done,
            "warmup_steps": self._warmup_steps,
            "is_warmup_open": self._is_warmup_open,
            "next_lease_id": self._next_lease_id,
            "num_trained": self._num_trained,
            "failures": dict(self._failures),
            "drops": {str(reason): count for reason, count in self.drops.items()},
            "totals": dict(self._totals),
            "work": self._members.work(),
        }

    def load_state_dict(self, state: dict[str, JSON]) -> None:
        """Before any actor has joined. Raises ConfigError when the training set is another one."""
        if len(self._members):
            raise ConfigError("a checkpoint must be loaded before the first actor connects")
        self._stream.load_state_dict(state["stream"])
        self._pending = deque(self._stream.find(uid) for uid in state["untrained"])
        self.version, self.steps_done = state["version"], state["steps_done"]
        self._warmup_steps, self._is_warmup_open = state["warmup_steps"], state["is_warmup_open"]
        self._next_lease_id, self._num_trained = state["next_lease_id"], state["num_trained"]
        self._failures = Counter(state["failures"])
        self.drops = Counter({DropReason(reason): count for reason, count in state["drops"].items()})
        self._totals, self._members.departed = dict(state["totals"]), dict(state["work"])

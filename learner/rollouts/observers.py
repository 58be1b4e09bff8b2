"""Who watches a run, and what they are told.

An observer is no member: it holds no lease, gets no weights, and has no account. It asks (Watch) as often as it wants
to be told, and is answered (RunStatus) once in ANSWER_S at most. Whoever asks more often is counted and not answered,
more than MAX_OBSERVERS are refused, and one that has not asked for FORGET_S is forgotten. A status is made once in
ANSWER_S, for however many.

Used under the lock of learner/rollouts/service.py.
"""

import math
from collections import deque
from collections.abc import Iterable

import numpy as np

from common.config import Config
from common.types import MAX_SHOWN_MEMBERS, Heartbeat, MemberId, Refused, RunStatus
from learner.rollouts.coordinator import Coordinator
from learner.rollouts.history import Course
from learner.rollouts.members import Member, Presence, state_of

MAX_OBSERVERS = 16
ANSWER_S = 0.9  # who asks once a second is answered each time
FORGET_S = 30.0
RATE_S = 5.0  # over which an actor's tokens a second are counted
MAX_BEATS = 16  # heartbeats that this takes, one of each answer; more come of a clock that stands still
LEAST_S = 1e-3  # in which tokens are counted


class Observers:
    """Those that have asked of late, and the status that was made last."""

    def __init__(self, config: Config, coordinator: Coordinator, incarnation: int, now: float) -> None:
        self.course = Course()
        self.num_ignored = 0  # questions that came too early
        self._config = config
        self._coordinator = coordinator
        self._incarnation = incarnation
        self._began_s = now
        self._asked: dict[bytes, float] = {}  # when each was answered last
        self._made_s = -math.inf
        self._status: RunStatus | None = None
        self._rates: dict[MemberId, deque[Heartbeat]] = {}

    def answer(self, identity: bytes, members: Iterable[str], now: float) -> RunStatus | Refused | None:
        """To a Watch of this connection; None: it asks too often. `members` are all names, also of lost ones."""
        self._asked = {other: at for other, at in self._asked.items() if now - at < FORGET_S}
        if now - self._asked.get(identity, -math.inf) < ANSWER_S:
            self.num_ignored += 1
            return None
        if identity not in self._asked and len(self._asked) >= MAX_OBSERVERS:
            return Refused(reason=f"{MAX_OBSERVERS} observers watch this run already: end one of them", fatal=True)
        self._asked[identity] = now
        if self._status is None or now - self._made_s >= ANSWER_S:
            self._made_s = now
            self._status = self._make(members, now)
        return self._status

    def forget(self, identity: bytes) -> None:
        """Its connection is closed."""
        self._asked.pop(identity, None)

    @property
    def identities(self) -> tuple[bytes, ...]:
        """Connections that have been answered of late."""
        return tuple(self._asked)

    def _make(self, names: Iterable[str], now: float) -> RunStatus:
        ledger, course = self._coordinator.ledger, self.course
        num_steps = ledger.pace.warmup_steps + self._config.learner.steps
        everybody = sorted((self._coordinator.member(name) for name in names), key=lambda member: member.name)
        members = everybody[:MAX_SHOWN_MEMBERS]
        self._rates = {member.id: self._rates.get(member.id, deque(maxlen=MAX_BEATS)) for member in members}
        done_s = self._began_s if course.done_s is None else course.done_s
        return RunStatus(
            run=self._config.name.encode(errors="replace").decode(),
            incarnation=self._incarnation,
            step=ledger.pace.steps_done,
            warmup_steps=ledger.pace.warmup_steps,
            num_steps=num_steps,
            remaining_s=None if course.step_s is None else course.step_s * max(0, num_steps - ledger.pace.steps_done),
            uptime_s=now - self._began_s,
            step_age_s=now - done_s,
            version=ledger.version,
            max_staleness=self._config.staleness.max_staleness,
            group_target=self._config.rollout.prompts_per_step,
            metrics=course.metrics,
            counters={name: float(value) for name, value in self._coordinator.stats().items()},
            evaluated_steps=course.evaluated_steps,
            accuracies=course.accuracies,
            rewards=course.rewards,
            response_lengths=course.response_lengths,
            alarms=course.alarms,
            member_names=tuple(member.name for member in members),
            member_states=tuple(state_of(member, ledger.version, now) for member in members),
            member_versions=tuple(member.version for member in members),
            member_tokens_per_s=np.array([self._tokens_per_s(member) for member in members], np.float32),
            member_leases=np.array([len(member.held) for member in members], np.int32),
            member_silences_s=np.array([now - member.heard_s for member in members], np.float32),
            num_members=len(everybody),
        )

    def _tokens_per_s(self, member: Member) -> float:
        """Between two heartbeats about RATE_S apart; before there are two, since the actor has started."""
        heartbeat, beats = member.heartbeat, self._rates[member.id]
        if heartbeat is None or heartbeat.uptime_s < LEAST_S or member.presence is not Presence.READY:
            return 0.0
        if not beats or beats[-1] is not heartbeat:
            beats.append(heartbeat)
        while len(beats) > 2 and heartbeat.uptime_s - beats[1].uptime_s >= RATE_S:
            beats.popleft()
        first = beats[0]
        elapsed_s = heartbeat.uptime_s - first.uptime_s
        if elapsed_s < LEAST_S:
            return heartbeat.generated_tokens / heartbeat.uptime_s
        return (heartbeat.generated_tokens - first.generated_tokens) / elapsed_s

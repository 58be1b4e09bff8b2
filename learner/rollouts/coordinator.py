"""Who samples what, and what may be trained: a pure state machine. No sockets, no clock, no threads.

A training prompt goes   pending -> leased(actor) -> buffered -> trained | dropped(reason)

- Lease ids count up and are never used twice. A prompt that comes back is leased again first, under a new id, with what
  was sampled of its responses: the next actor goes on from there.
- An actor that is lost keeps its leases for transport.grace_s; when it greets again both sides say what they know.
- A member answers for its failures (learner/rollouts/accounts.py). A prompt is given up when several members, or the
  only one there is, have failed on it.
- Admission: groups leased + buffered + trained stay below the window (learner/rollouts/pace.py), so that actors run
  ahead of the learner by at most `max_staleness` versions.
- A lease is taken from an actor whose engine does not get on with it, or much slower than others (clock.py).
- Consumption is in the order of the prompt stream, also for a prompt that came back, and a batch waits for its earlier
  leases; or, by `staleness.batching`, in that of arrival, except that what would get too old goes first
  (learner/rollouts/batching.py). Either way the admission window keeps every group young enough; the gate at
  consumption holds for whatever an actor sends.
- Evaluation leases count nowhere in the above. They have all the room before the first step and whenever no training
  lease may go out, else at most `eval.share` of it.

Everything to be sent is put into an outbox. learner/rollouts/service.py calls all this under its lock.
"""

import logging
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence

from common.config import Batching, Config, OverAge
from common.types import (
    Ack,
    Cancel,
    CompletedGroup,
    DropReason,
    Float32Array,
    Heartbeat,
    Int32Array,
    LearnerMessage,
    LeaseFailed,
    MemberId,
    Progress,
    Prompt,
    Pulse,
    Purpose,
    Refused,
    TrajectoryGroup,
)
from learner.rollouts import overdue
from learner.rollouts.archive import renumbered
from learner.rollouts.batching import next_slots
from learner.rollouts.clock import LeaseTimes
from learner.rollouts.contents import problem_with, problem_with_tokens
from learner.rollouts.counts import Counts
from learner.rollouts.evaluation import Begun, EvalResult, Evaluation, asked
from learner.rollouts.leases import Slot, Slots, eval_lease, grown, is_over_age, train_lease
from learner.rollouts.members import Member, Members, Presence
from learner.rollouts.pace import Pace
from learner.rollouts.partial import Partial, Pending
from learner.rollouts.places import Outbox, Places
from learner.rollouts.prompts import PromptStream
from learner.rollouts.selection import Fate, Selection
from learner.rollouts.speed import Speed
from learner.rollouts.verdicts import Verdicts, is_informative

logger = logging.getLogger(__name__)

NOW = float("-inf")
MAX_FAILURES = 3  # of one prompt, and on as many actors if there are so many, before it is given up


class Coordinator:
    """The state machine. `now` is a monotonic time in seconds.

    Invariants: every training prompt drawn from the stream is in exactly one place: pending, one slot, trained,
    or dropped for good. A lease is in `held` of the one member that its slot names until its group is buffered.
    """

    def __init__(
        self,
        config: Config,
        stream: PromptStream,
        tokenize: Callable[[Prompt], Sequence[int] | Int32Array],
        *,
        incarnation: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        self._config = config
        self._stream = stream
        self._tokenize = tokenize
        self._members = Members(config)
        self.pace = Pace(config)
        self._pending: deque[Pending] = deque()
        self._vocab_size = vocab_size
        self._slots = Slots(incarnation)
        self._evaluation: Evaluation | None = None
        self._counts = Counts()
        self._selection = Selection()
        self.verdicts = Verdicts(config)
        self.version = 0
        self.outbox = Outbox()
        self.condemned: dict[str, str] = {}  # members that have to leave, and why; whoever dismisses them empties it
        self._places = Places()
        self._outdated: set[str] = set()  # ready members without the current version
        self._resting: dict[str, float] = {}  # members that get no leases for a while, and until when
        self._check_s = NOW  # when to look at every member next
        self._speed = Speed(config)
        self._times = LeaseTimes(config.transport)
        self._stragglers_s = NOW  # when they were looked for

    @property
    def drops(self) -> Counter[DropReason]:
        """Leases that were dropped, by reason."""
        return self._counts.drops

    # ---- members

    def join(self, name: str, capacity: int, now: float) -> None:
        """A process of this name has greeted; it replaces an earlier one."""
        self.remove(name, "a new process has its name")
        self._members.add(name, capacity, now)
        self._check_s = now

    def join_again(self, name: str, held: Iterable[int], finished: Iterable[int], now: float) -> None:
        """A member has greeted again, or one that was another learner's has joined. It samples the leases `held`, and
        keeps the groups of `finished`.

        What both sides know stays leased. What did not reach it is leased again, what is not wanted any more is
        cancelled.
        """
        member = self._members[name]
        member.heard_s = member.greeted_s = now
        member.presence = Presence.READY if member.was_ready else Presence.JOINING
        member.is_fresh &= member.was_ready
        known, theirs = set(member.held), {*held, *finished}
        self._revoke(member, [lease_id for lease_id in member.held if lease_id not in theirs])
        for lease_id in sorted(known ^ theirs):
            self._send(name, Cancel(lease_id=lease_id))
        for lease_id in set(finished) - known:
            if not self._counts.has_received(lease_id):
                self._counts.drop(DropReason.UNKNOWN_LEASE, lease_id, name)
        self._check_s = NOW
        self._stand(member, now)

    def ready(self, name: str, version: int, probe_logprobs: Float32Array) -> None:
        """Its engine is up. Version 0 is the model folder that both sides have compared, if no learner has published to
        it before."""
        member = self._members[name]
        if member.presence is Presence.JOINING:
            member.presence = Presence.READY
        member.was_ready = True
        is_folder = member.is_fresh and self.pace.is_folder_version_0
        member.version = version if version == self.version == 0 and is_folder else None
        member.probe_logprobs = probe_logprobs if member.is_fresh else None
        self._check_s = NOW
        self._stand(member, member.heard_s)

    def heard(self, name: str, now: float) -> None:
        """Any message of a member. One that was lost has to greet before it takes part again. What it did while nothing
        was heard is not known, so that this time does not count against its leases."""
        member = self._members[name]
        silent_s, member.heard_s = now - member.heard_s, now
        if silent_s > 2 * self._config.transport.heartbeat_s:
            for lease_id in member.held:
                self._slots[lease_id].granted_s += silent_s

    def heartbeat(self, name: str, heartbeat: Heartbeat, now: float) -> None:
        """Messages of one connection keep their order: what is neither listed nor here got lost with an earlier one."""
        member = self._members[name]
        member.beat(heartbeat)
        self._send(name, Pulse(version=self.version))
        if member.presence is Presence.LOST:
            return
        listed, grace_s = set(heartbeat.lease_ids.tolist()), self._config.transport.grace_s
        for lease_id in listed - member.held.keys():
            self._send(name, Cancel(lease_id=lease_id))
        missing = [
            lease_id
            for lease_id in member.held
            if lease_id not in listed and now - max(self._slots[lease_id].granted_s, member.greeted_s) > grace_s
        ]
        if missing:  # a lease, or a group that is sent again, may be on its way, but not for so long
            self.lose(name, f"it does not sample the leases {missing[:8]}")
            return
        if member.clock.beat(heartbeat) and member.is_hung:
            logger.warning("the engine of actor %s gets on again", name)
            member.is_hung = False
        self._revoke_overdue(member, now)
        self._stand(member, now)

    def drain(self, name: str) -> None:
        """It takes no new leases; what it holds may still come."""
        member = self._members[name]
        member.capacity = 0
        self._stand(member, member.heard_s)

    def loaded(self, name: str, version: int | None) -> None:
        """The actor holds `version` now, or (None) no whole one."""
        member = self._members[name]
        member.version = version
        self._stand(member, member.heard_s)

    def lose(self, name: str, reason: str) -> None:
        """It gets no more leases until it greets again; those that it has are kept for a while."""
        member = self._members[name]
        if member.presence is not Presence.LOST:
            logger.warning("actor %s is lost (%s); it holds the leases %s", name, reason, list(member.held))
            member.presence, member.lost_s = Presence.LOST, member.heard_s
            self._check_s = NOW
            self._stand(member, member.heard_s)

    def remove(self, name: str, reason: str, *, distrust: bool = False) -> None:
        """It is gone for good. `distrust` drops its buffered groups with tokens of its newest version too."""
        member = self._members.pop(name)
        if member is None:
            return
        logger.info("actor %s leaves (%s); it held the leases %s", name, reason, list(member.held))
        self.outbox.discard(name)
        self.condemned.pop(name, None)
        self._places.set(name, 0)
        self._outdated.discard(name)
        self._resting.pop(name, None)
        if distrust and member.version is not None:
            self._forget_partial(member, member.version)
        self._revoke(member, list(member.held))
        if distrust and member.version is not None:
            for slot in reversed(list(self._slots.train.values())):
                if slot.actor == name and slot.group is not None and slot.group.newest_version >= member.version:
                    self._withdraw(slot, DropReason.ACTOR_LOST)

    def tick(self, now: float) -> None:
        """Declare silent members lost, lease again what lost ones held for too long, nudge late ones, judge who is fast
        enough, and take leases from those that are too slow; nothing before it is due."""
        if now - self._stragglers_s >= self._config.transport.heartbeat_s:
            self._stragglers_s = now
            self._revoke_stragglers(now)
        if now < self._check_s:
            return
        for name, reason in self._members.silent(now):
            self.lose(name, reason)
        for member in self._members.bereft(now):
            logger.warning(
                "actor %s did not come back in time: its leases %s go to others", member.name, [*member.held]
            )
            self._revoke(member, list(member.held))
        for name in self._members.late(now):
            self._send(name, Pulse(version=self.version))
        self._speed.judge(self._members)
        for member in self._members:
            self._stand(member, now)
        self._check_s = self._members.next_check()

    def _stand(self, member: Member, now: float) -> None:
        """After any change of a member's presence, version, leases or speed: its room, and whether it needs weights."""
        self._places.set(member.name, member.free(self.version, now))
        if (until_s := max(member.account.waits_until_s, member.rest.until_s)) > now:
            self._resting[member.name] = until_s
        if member.presence is Presence.READY and not member.is_current(self.version):
            self._outdated.add(member.name)
        else:
            self._outdated.discard(member.name)

    def members(self) -> tuple[str, ...]:
        """Ready actors, sorted."""
        return self._members.ready()

    def member_ids(self) -> tuple[MemberId, ...]:
        """The same, each as the process that it is."""
        return tuple(self._members[name].id for name in self.members())

    def is_member(self, member: MemberId) -> bool:
        """Whether it has not left; it may be lost."""
        return any(present.id == member for present in self._members)

    def has_company(self, now: float) -> bool:
        """Whether somebody takes part, starts up, or was heard so recently that it may still come back."""
        recent_s = now - self._config.transport.heartbeat_timeout_s
        return any(member.presence is not Presence.LOST or member.heard_s > recent_s for member in self._members)

    def member(self, name: str) -> Member:
        """To be looked at."""
        return self._members[name]

    def is_joining(self, name: str) -> bool:
        return self._members[name].presence is Presence.JOINING

    def is_lost(self, name: str) -> bool:
        return self._members[name].presence is Presence.LOST

    def forgettable(self, now: float) -> list[str]:
        """Members that are lost for so long that nobody waits for them."""
        return self._members.forgettable(now)

    def count_dismissal(self) -> None:
        self._counts.totals["actors_dismissed"] += 1

    def count_forgotten(self) -> None:
        self._counts.totals["actors_forgotten"] += 1

    def condemn(self, name: str, reason: str) -> None:
        """This member has to leave."""
        self.condemned.setdefault(name, reason)

    def waiting_for_weights(self) -> tuple[str, ...]:
        """Ready actors that do not hold the current version."""
        return tuple(sorted(self._outdated))

    def folder_probe(self, name: str) -> Float32Array | None:
        """What a ready actor scored with the model folder's weights, if those are the current version; else None."""
        return self._members[name].probe_logprobs if self.version == 0 and self.pace.is_folder_version_0 else None

    def hung(self) -> list[tuple[str, str]]:
        """Members that have to leave because their engines have been hanging for too long, with the reason."""
        return self._members.hung()

    def _revoke(self, member: Member, lease_ids: Sequence[int], reason: DropReason = DropReason.ACTOR_LOST) -> None:
        """These leases of its are void: their prompts return to their queues, with what was sampled of them. An actor
        that still samples one is told so when it lists it."""
        for lease_id in lease_ids:
            slot = self._slots[lease_id]
            del member.held[lease_id]
            member.num_evaluating -= slot.lease.purpose is Purpose.EVAL
            self._withdraw(slot, reason, keeps_partial=True)

    def _revoke_overdue(self, member: Member, now: float) -> None:
        """An engine that stands still gets no lease until it moves. One that gets on with others only rests, so that
        the lease goes elsewhere."""
        transport = self._config.transport
        if hung := overdue.hung(member, self._slots, transport):
            logger.error("the engine of actor %s stands still; it held the leases %s", member.name, hung)
            member.is_hung = True
            self._revoke(member, hung, DropReason.HUNG)
        elif stuck := overdue.stuck(member, self._slots, transport):
            logger.warning("actor %s does not get on with the leases %s", member.name, stuck)
            member.rest.begin(now, transport.lease_timeout_s)
            self._revoke(member, stuck, DropReason.HUNG)
            for lease_id in stuck:
                self._send(member.name, Cancel(lease_id=lease_id))

    def _revoke_stragglers(self, now: float) -> None:
        room = {member.name: max(0, member.free(self.version, now)) for member in self._members}
        for slot in list(overdue.stragglers(self._slots, self._times, room, len(self._pending), now)):
            member = self._members[slot.actor]
            if now - member.heard_s > 2 * self._config.transport.heartbeat_s:
                continue  # it is silent: whether it is slow is not known
            logger.warning("actor %s is too slow with lease %d", slot.actor, slot.lease.lease_id)
            member.rest.begin(now, self._times.limit_s)
            self._revoke(member, [slot.lease.lease_id], DropReason.STRAGGLER)
            self._send(member.name, Cancel(lease_id=slot.lease.lease_id))
            self._stand(member, now)

    def _forget_partial(self, member: Member, version: int) -> None:
        """What it may have sampled with wrong weights, called `version`, is not handed on."""
        for slot in map(self._slots.__getitem__, member.held):
            if slot.partial is not None and slot.num_tokens and slot.partial.newest_version >= version:
                self._counts.dropped_tokens[DropReason.ACTOR_LOST] += slot.num_tokens
                slot.partial = None

    # ---- leases out

    @property
    def admitted(self) -> int:
        """Groups leased, buffered or trained; those that were dropped have given their place back."""
        return self.pace.taken + len(self._slots.train)

    def is_window_sampled(self) -> bool:
        """The window is full and every group in it has arrived."""
        return self.admitted >= self.pace.window and not self._slots.num_in_flight

    def dispatch(self, now: float) -> None:
        """Grant leases while a current actor has room and there is something to sample."""
        self._buffer_finished(now)
        self._end_rests(now)
        while (name := self._places.most()) is not None:
            member = self._members[name]
            slot = self._next_slot(member, now)
            if slot is None:
                return
            member.held[slot.lease.lease_id] = None
            member.num_evaluating += slot.lease.purpose is Purpose.EVAL
            member.tried_s = now
            self._stand(member, now)
            self._send(name, slot.lease)
            self._buffer_finished(now)

    def _end_rests(self, now: float) -> None:
        """Of those whose time is over; of all, when nobody else would get leases."""
        if not self._resting:
            return
        able = [member for member in self._members if member.is_current(self.version) and not member.is_hung]
        if all(member.rest.until_s > now for member in able):
            for member in able:
                member.rest.until_s = now
                self._resting[member.name] = member.account.waits_until_s
        for name in [name for name, until_s in self._resting.items() if now >= until_s]:
            del self._resting[name]
            self._stand(self._members[name], now)

    def _buffer_finished(self, now: float) -> None:
        """What a checkpoint held of finished groups takes its place in the order when all before it have theirs."""
        while self._pending and self.admitted < self.pace.window and (group := self._pending[0].group) is not None:
            group, pending = renumbered(group, self._slots.next_lease_id), self._pending.popleft()
            oldest = group.oldest_version
            slot = Slot(group.lease, pending.prompt, pending.turn, group.actor, granted_s=now, oldest_version=oldest)
            self._slots.buffer(self._slots.add(slot), group)
            self._selection.add(Fate.SAMPLED, group.completed)

    def _next_slot(self, member: Member, now: float) -> Slot | None:
        lease_id, evaluation = self._slots.next_lease_id, self._evaluation
        if evaluation is not None and evaluation.pending and self._may_evaluate(member):
            pending = evaluation.pending.popleft()
            prompt, partial = pending.prompt, pending.partial
            lease = eval_lease(self._config, lease_id, prompt, self._tokenize(prompt), partial, evaluation)
            member.leases_since_eval = 0
        elif self.admitted < self.pace.window:
            pending = self._next_pending()
            prompt, partial = pending.prompt, self._young_enough(pending)
            lease = train_lease(self._config, lease_id, prompt, self._tokenize(prompt), partial)
            member.leases_since_eval += 1
        else:
            return None
        self._counts.totals["prefix_tokens"] += len(lease.prefix_token_ids)
        oldest = partial.oldest_version if partial is not None and partial.num_tokens else self.version
        slot = Slot(lease, prompt, pending.turn, member.name, granted_s=now, oldest_version=oldest, partial=partial)
        return self._slots.add(slot)

    def _next_pending(self) -> Pending:
        if self._pending:
            return self._pending.popleft()
        return Pending(prompt=self._stream.next(), turn=self._slots.next_turn())

    def _young_enough(self, pending: Pending) -> Partial | None:
        """What is known of it, unless its oldest token could be too old when the group is trained. With
        `first_finished` its turn does not tell when that is: only tokens of this version are kept."""
        partial, staleness = pending.partial, self._config.staleness
        if partial is None or not partial.num_tokens or staleness.over_age is OverAge.mask:
            return partial
        version, bound = self.version, 0
        if staleness.batching is Batching.admission_order:
            version += self.pace.versions_until(self._slots.num_before(pending.turn))
            bound = staleness.max_staleness
        if version - partial.oldest_version <= bound:
            return partial
        self._counts.dropped_tokens[DropReason.STALE] += partial.num_tokens
        return None

    def _may_evaluate(self, member: Member) -> bool:
        """While training waits, evaluation gets `eval.share` of an actor's leases and of its room, but one at least, so
        that neither starves. Before the first step training does not count as waiting: version 0 is evaluated first."""
        if self.pace.steps_done == 0 or self.admitted >= self.pace.window:
            return True
        share = self._config.eval.share
        has_room = member.num_evaluating + 1 <= max(1.0, share * member.capacity)
        return has_room and (member.leases_since_eval + 1) * share >= 1.0

    # ---- groups in

    def receive(self, name: str, group: CompletedGroup, now: float) -> None:
        """Take a group in, or count why not; acknowledged in any case, since a second copy is of no use."""
        self._send(name, Ack(lease_id=group.lease_id))
        member = self._members[name]
        if group.lease_id not in member.held:
            is_copy = self._counts.has_received(group.lease_id)
            self._counts.drop(DropReason.DUPLICATE if is_copy else DropReason.UNKNOWN_LEASE, group.lease_id, name)
            return
        slot = self._slots[group.lease_id]
        newest = max(self.version, member.version or 0)
        problem = problem_with(group, slot.lease, newest, self._config, self._vocab_size)
        if problem is None and slot.partial is not None:
            problem = slot.partial.problem_with(group)
        if problem is not None:
            self._send(name, Refused(reason=f"group of lease {group.lease_id}: {problem}", fatal=False))
            member.account.refuse(slot.prompt.uid, now)
            self._try_again(slot, DropReason.MALFORMED, problem, now)
            return
        member.account.succeed()
        self._time(slot, group, member, now)
        self._release(member, slot, now)
        self._counts.failures.pop(slot.prompt.uid, None)
        self._counts.receive(group)
        self.verdicts.add(group, slot.lease.purpose)
        if slot.lease.purpose is Purpose.EVAL:
            assert self._evaluation is not None
            self._slots.remove(slot)
            self._evaluation.add(group, now)
            return
        self._selection.add(Fate.SAMPLED, group)
        self._speed.add(group)
        slot.partial = None
        self._slots.buffer(slot, TrajectoryGroup(lease=slot.lease, actor=name, completed=group, arrived_s=now))
        if (reason := self.verdicts.reason_to_drop(group, self._is_filtering())) is not None:
            self._forget(slot, reason)

    def progress(self, name: str, progress: Progress) -> None:
        """Tokens of a lease under way; of one that the actor does not hold any more they are not wanted."""
        member = self._members[name]
        if progress.lease_id not in member.held:
            return
        slot, problem = self._slots[progress.lease_id], None
        if len(progress.token_ids):
            newest = max(self.version, member.version or 0)
            drawn = (progress.token_ids, progress.behavior_logprobs, progress.versions)
            problem = problem_with_tokens(*drawn, newest, self._vocab_size)
        if problem is None:
            slot.partial = slot.partial or Partial(slot.lease.num_samples)
            problem = slot.partial.add(progress, slot.lease)
        if problem is not None:
            logger.warning("progress of lease %d of actor %s: %s", progress.lease_id, name, problem)
            self._counts.dropped_tokens[DropReason.MALFORMED] += len(progress.token_ids)
            self._send(name, Refused(reason=f"progress of lease {progress.lease_id}: {problem}", fatal=False))

    def _time(self, slot: Slot, group: CompletedGroup, member: Member, now: float) -> None:
        """Training leases set the pace for each other."""
        seconds, num_steps = now - slot.granted_s, grown(group.lengths, slot.lease)
        member.measure(group.generation_s, num_steps)
        if slot.lease.purpose is Purpose.TRAIN:
            if not self._times.is_straggler(seconds, num_steps):
                member.rest.end()
            self._times.add(seconds, num_steps)

    def fail(self, name: str, failed: LeaseFailed, now: float) -> None:
        """The actor could not sample this lease."""
        member = self._members[name]
        if failed.lease_id in member.held:
            slot = self._slots[failed.lease_id]
            member.account.fail(slot.prompt.uid, now)
            self._try_again(slot, None, failed.reason, now)
        else:
            self._counts.drop(DropReason.UNKNOWN_LEASE, failed.lease_id, name)

    def _release(self, member: Member, slot: Slot, now: float) -> None:
        del member.held[slot.lease.lease_id]
        member.num_evaluating -= slot.lease.purpose is Purpose.EVAL
        self._stand(member, now)

    def _try_again(self, slot: Slot, reason: DropReason | None, problem: str, now: float) -> None:
        """Lease the prompt again, unless it has failed too often; its actor has to answer for it."""
        uid, member = slot.prompt.uid, self._members[slot.actor]
        failures = self._counts.fail(uid, member.name)
        self._release(member, slot, now)
        self._check_s = NOW
        logger.warning("prompt %s, failure %d on actor %s: %s", uid, failures.total(), member.name, problem)
        if (verdict := member.account.verdict) is not None:
            self.condemn(member.name, f"{verdict}, the last one: {problem}")
        num_actors = min(MAX_FAILURES, max(1, len(self.members())))
        if failures.total() < MAX_FAILURES or len(failures) < num_actors:
            self._withdraw(slot, reason)
            return
        del self._counts.failures[uid]
        logger.error("prompt %s is given up after %d failures: %s", uid, failures.total(), problem)
        self._forget(slot, DropReason.FAILED)

    def _withdraw(self, slot: Slot, reason: DropReason | None, *, keeps_partial: bool = False) -> None:
        """The prompt goes back to its place in the queue that it came from."""
        self._remove(slot, reason, 0 if keeps_partial else slot.num_tokens)
        pending = Pending(prompt=slot.prompt, partial=slot.partial if keeps_partial else None, turn=slot.turn)
        insort(self._queue_of(slot), pending, key=lambda waiting: waiting.turn)

    def _queue_of(self, slot: Slot) -> deque[Pending]:
        if slot.lease.purpose is Purpose.TRAIN:
            return self._pending
        assert self._evaluation is not None
        return self._evaluation.pending

    def _forget(self, slot: Slot, reason: DropReason) -> None:
        """The prompt is done with for this epoch; the stream's next takes its place."""
        self._remove(slot, reason, slot.num_tokens)
        if slot.lease.purpose is Purpose.EVAL:
            assert self._evaluation is not None
            self._evaluation.fail()

    def _remove(self, slot: Slot, reason: DropReason | None, num_lost: int) -> None:
        """With it so many tokens are lost."""
        self._slots.remove(slot)
        if reason is not None:
            self._counts.drop(reason, slot.lease.lease_id, slot.actor, num_lost)
        else:
            self._counts.dropped_tokens[DropReason.FAILED] += num_lost
        if slot.group is not None:
            self._selection.add(Fate.DROPPED, slot.group.completed)

    def _send(self, name: str, message: LearnerMessage) -> None:
        self.outbox.append(name, message)

    # ---- consumption

    def take_batch(self) -> list[TrajectoryGroup] | None:
        """The next step's groups, or None while one of them is still being sampled."""
        slots = self._next_slots()
        if slots is not None and self._drop_what_may_not_be_trained(slots):
            slots = self._next_slots()
        if slots is None:
            return None
        batch = [slot.group for slot in slots if slot.group is not None]
        for slot in slots:
            self._slots.remove(slot)
        for group in batch:
            self._selection.add(Fate.TRAINED, group.completed)
        self._counts.totals["trained_groups"] += len(batch)
        self.pace.steps_taken += 1
        self.verdicts.batch_taken()
        return batch

    def _next_slots(self) -> list[Slot] | None:
        return next_slots(self._slots, self._config, self.pace, self.version)

    def _drop_what_may_not_be_trained(self, slots: list[Slot]) -> bool:
        """If that holds for one of `slots`, all that is buffered is looked through."""
        if not any(self._reason_to_drop(slot) for slot in slots):
            return False
        for slot in sorted(self._slots.buffered.values(), key=lambda slot: slot.lease.lease_id, reverse=True):
            if (reason := self._reason_to_drop(slot)) is DropReason.STALE:
                self._withdraw(slot, reason)
            elif reason is not None:  # it came during warm-up; not one in a row: its neighbours here may be kept
                self._forget(slot, reason)
        return True

    def _reason_to_drop(self, slot: Slot) -> DropReason | None:
        assert slot.group is not None
        if is_over_age(self._config.staleness, slot.group, self.version):
            return DropReason.STALE
        return DropReason.UNINFORMATIVE if self._is_filtering() and not is_informative(slot.group.completed) else None

    def set_version(self, version: int, steps_done: int) -> None:
        self.version, self.pace.steps_done = version, steps_done
        for member in self._members:
            self._stand(member, member.heard_s)

    def _is_filtering(self) -> bool:
        """Dynamic sampling, in policy steps only: the critic's warm-up wants the policy's own distribution."""
        return self._config.algorithm.dynamic_sampling and not self.pace.is_warmup

    # ---- evaluation

    def evaluate(self, evaluation: Evaluation, begun: Begun | None = None) -> None:
        """Starts it, or goes on from what a checkpoint held of it, unless something else is asked for now: then it
        starts again, of the present version. Raises RuntimeError while another evaluation runs."""
        if self._evaluation is not None:
            raise RuntimeError(f"the evaluation of version {self._evaluation.version} is still running")
        if begun is not None and begun.asked == asked(self._config, evaluation):
            evaluation.go_on(begun, now=evaluation.started_s)
        elif begun is not None:
            logger.warning("the evaluation of version %d starts again: its settings changed", evaluation.version)
            evaluation.version = self.version
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

    # ---- reports

    def stats(self) -> dict[str, float]:
        """Counters since the start of the run and gauges of now; the one place where they are kept."""
        slots = self._slots
        return {
            "actors_connected": len(self.members()),
            "actors_too_slow": sum(member.is_slow for member in self._members),
            "admitted_groups": self.admitted,
            "window_groups": self.pace.window,
            "buffered_groups": len(slots.train) - slots.num_in_flight,
            "in_flight_groups": slots.num_in_flight,
            "in_flight_eval_groups": len(slots.evaluation),
            "pending_prompts": len(self._pending),
            **self._counts.stats(),
            **self._selection.stats(),
            **self.verdicts.stats(),
            **self._members.work(),
        }

    def describe(self, now: float) -> str:
        """Who holds what, for the message of a time-out."""
        num_buffered = len(self._slots.train) - self._slots.num_in_flight
        parts = [f"{num_buffered} groups are buffered, {self.admitted} of {self.pace.window} admitted"]
        parts += [*self.verdicts.describe(), *(self._members.describe(member, now) for member in self._members)]
        return "; ".join(parts if len(self._members) else [*parts, "no actor is connected"])

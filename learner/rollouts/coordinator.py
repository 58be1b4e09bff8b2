"""Who samples what: members, and the leases that they hold. A pure state machine: no sockets, no clock, no threads.

- Where a prompt is, and what may be trained, is the ledger's part (learner/rollouts/ledger.py).
- An actor that is lost keeps its leases for transport.grace_s; when it greets again both sides say what they know.
- A member answers for its failures (learner/rollouts/accounts.py).
- A lease is taken from an actor whose engine does not get on with it, or much slower than others (clock.py).
- While training waits too, evaluation gets at most `eval.share` of an actor.

Everything to be sent is put into an outbox. learner/rollouts/service.py calls all this under its lock.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from itertools import islice

from common.config import Config, ConfigError
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
    SayHello,
)
from learner.rollouts import overdue
from learner.rollouts.clock import LeaseTimes
from learner.rollouts.contents import problem_with, problem_with_tokens
from learner.rollouts.leases import Slot, grown
from learner.rollouts.ledger import Ledger
from learner.rollouts.members import Member, Members, Presence
from learner.rollouts.partial import Partial
from learner.rollouts.places import Outbox, Places
from learner.rollouts.prompts import PromptStream
from learner.rollouts.speed import Speed

logger = logging.getLogger(__name__)

NOW = float("-inf")
DESCRIBED = 32  # actors in a sentence
CANCELS_PER_BEAT = 64  # answers to one heartbeat; what else it lists is in the next one too


class Coordinator:
    """The state machine. `now` is a monotonic time in seconds.

    Invariant: a lease is in `held` of the one member that its slot names until its group is buffered.
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
        self.ledger = Ledger(config, stream, tokenize, incarnation)
        self._members = Members(config)
        self._vocab_size = vocab_size
        self.outbox = Outbox()
        self.condemned: dict[str, str] = {}  # members that have to leave, and why; whoever dismisses them empties it
        self._places = Places()
        self._announced = 0  # newest version that was on its way to anybody
        self._outdated: set[str] = set()  # ready members without the current version
        self._resting: dict[str, float] = {}  # members that get no leases for a while, and until when
        self._check_s = NOW  # when to look at every member next
        self._speed = Speed(config)
        self._times = LeaseTimes(config.transport)
        self._stragglers_s = NOW  # when they were looked for

    @property
    def drops(self) -> Counter[DropReason]:
        """Leases that were dropped, by reason."""
        return self.ledger.counts.drops

    # ---- members

    def join(self, name: str, capacity: int, now: float) -> None:
        """A process of this name has greeted; it replaces an earlier one."""
        self.remove(name, "a new process has its name")
        self._members.add(name, capacity, now)
        self._check_s = now

    def join_again(
        self, name: str, held: Iterable[int], finished: Iterable[int], now: float, *, is_resent: bool = False
    ) -> None:
        """A member has greeted again, or one that was another learner's has joined. It samples the leases `held`, and
        keeps the groups of `finished`, which it sends again if `is_resent`.

        What both sides know stays leased. What did not reach it is leased again, what is not wanted any more is
        cancelled.
        """
        member = self._members[name]
        self.heard(name, now)
        member.greeted_s = now
        if member.presence is Presence.LOST:
            member.joining_s = now
        member.presence = Presence.READY if member.was_ready else Presence.JOINING
        member.is_fresh &= member.was_ready
        known, sampled, kept = set(member.held), set(held), set(finished)
        lost = [lease_id for lease_id in member.held if lease_id not in sampled | kept]
        self._revoke(member, lost)
        for lease_id in sorted({*lost, *(kept - known), *self._unwanted(member, sampled)}):
            self._send(name, Cancel(lease_id=lease_id))
        for lease_id in () if is_resent else kept - known:
            if not self.ledger.counts.has_received(lease_id):
                self.ledger.counts.drop(DropReason.UNKNOWN_LEASE, lease_id, name)
        self._check_s = NOW
        self._stand(member, now)

    def ready(self, name: str, version: int, probe_logprobs: Float32Array) -> None:
        """Its engine is up. Version 0 is the model folder that both sides have compared, if no learner has published to
        it before."""
        member = self._members[name]
        if member.presence is Presence.JOINING:
            member.presence = Presence.READY
        member.was_ready = True
        is_folder = member.is_fresh and self.ledger.pace.is_folder_version_0
        member.version = version if version == self.ledger.version == 0 and is_folder else None
        member.probe_logprobs = probe_logprobs if member.is_fresh else None
        self._check_s = NOW
        self._stand(member, member.heard_s)

    def heard(self, name: str, now: float) -> None:
        """Any message of a member. One that was lost has to greet before it takes part again. What it did while nothing
        was heard is not known, so that what is longer than two heartbeats does not count against its leases."""
        member = self._members[name]
        silent_s, member.heard_s = now - member.heard_s, now
        credit_s = silent_s - 2 * self._config.transport.heartbeat_s
        for lease_id in member.held if credit_s > 0 else ():
            slot = self.ledger.slots[lease_id]
            slot.granted_s += min(credit_s, now - slot.granted_s)

    def heartbeat(self, name: str, heartbeat: Heartbeat, now: float) -> None:
        """Messages of one connection keep their order: what is neither listed nor here got lost with an earlier one."""
        member = self._members[name]
        member.beat(heartbeat)
        self._send(name, Pulse(version=self.ledger.version))
        if member.presence is Presence.LOST:
            return
        if member.clock.beat(heartbeat, member.is_hung) and member.is_hung:
            logger.warning("the engine of actor %s gets on again", name)
            member.is_hung = False
        listed, grace_s = set(heartbeat.lease_ids.tolist()), self._config.transport.grace_s
        for lease_id in sorted(self._unwanted(member, listed))[:CANCELS_PER_BEAT]:
            self._send(name, Cancel(lease_id=lease_id))
        missing = [
            lease_id
            for lease_id in member.held
            if lease_id not in listed and now - max(self.ledger.slots[lease_id].granted_s, member.greeted_s) > grace_s
        ]
        if missing:  # a lease, or a group that is sent again, may be on its way, but not for so long
            self.lose(name, f"it does not sample the leases {missing[:8]}")
            return
        self._revoke_overdue(member, now)
        self._stand(member, now)

    def _unwanted(self, member: Member, sampled: Set[int]) -> Set[int]:
        """Leases that it samples and has to stop. An engine that hangs stays with what was taken from it: by that it
        tells how long it has been hanging, and whether it gets on again. One that drains has only to end."""
        is_watched = member.is_hung and member.capacity > 0
        return set() if is_watched else sampled - member.held.keys()

    def drain(self, name: str) -> None:
        """It takes no new leases; what it holds may still come."""
        member = self._members[name]
        member.capacity = 0
        self._stand(member, member.heard_s)

    def updating(self, name: str, version: int) -> None:
        """Its engine stops for `version`. Until it is known to go on it is in no state to sample, wherever it is lost;
        but it may go on, and draw tokens of `version`, before that is known."""
        self._announced = max(self._announced, version)
        self.loaded(name, None)

    def loaded(self, name: str, version: int | None) -> None:
        """The actor samples with `version` now, or (None) it is not known whether with any."""
        member = self._members[name]
        member.version = version
        self._announced = max(self._announced, version or 0)
        self._stand(member, member.heard_s)

    def lose(self, name: str, reason: str) -> None:
        """It gets no more leases until it greets again; those that it has are kept for a while."""
        member = self._members[name]
        if member.presence is not Presence.LOST:
            logger.warning("actor %s is lost (%s); it holds the leases %s", name, reason, list(member.held))
            member.presence, member.lost_s = Presence.LOST, member.heard_s
            self._check_s = NOW
            self._stand(member, member.heard_s)

    def remove(self, name: str, reason: str) -> None:
        """It is gone for good."""
        member = self._members.pop(name)
        if member is None:
            return
        logger.info("actor %s leaves (%s); it held the leases %s", name, reason, list(member.held))
        self.outbox.discard(name)
        self.condemned.pop(name, None)
        self._places.set(name, 0)
        self._outdated.discard(name)
        self._resting.pop(name, None)
        self._revoke(member, list(member.held))

    def distrust(self, name: str, version: int) -> None:
        """This actor, which may have left, had wrong weights that are called `version`: what it has drawn since it had
        them is of no use, also where another one has gone on from it."""
        for slot in self.ledger.slots.out():
            if slot.is_of(name, version):
                holder = self._members[slot.actor]
                self._revoke(holder, [slot.lease.lease_id])
                self._send(slot.actor, Cancel(lease_id=slot.lease.lease_id))
                self._stand(holder, holder.heard_s)
        self.ledger.distrust(name, version)

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
            self._send(name, Pulse(version=self.ledger.version))
        self._speed.judge(self._members)
        for member in self._members:
            self._stand(member, now)
        self._check_s = self._members.next_check()

    def _stand(self, member: Member, now: float) -> None:
        """After any change of a member's presence, version, leases or speed: its room, and whether it needs weights."""
        self._places.set(member.name, member.free(self.ledger.version, now))
        if (until_s := max(member.account.waits_until_s, member.rest.until_s)) > now:
            self._resting[member.name] = until_s
        if member.presence is Presence.READY and not member.is_current(self.ledger.version):
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
        self.ledger.counts.totals["actors_dismissed"] += 1

    def count_forgotten(self) -> None:
        self.ledger.counts.totals["actors_forgotten"] += 1

    def condemn(self, name: str, reason: str) -> None:
        """This member has to leave."""
        self.condemned.setdefault(name, reason)

    def waiting_for_weights(self) -> tuple[str, ...]:
        """Ready actors that do not hold the current version."""
        return tuple(sorted(self._outdated))

    def folder_probe(self, name: str) -> Float32Array | None:
        """What a ready actor scored with the model folder's weights, if those are the current version; else None."""
        is_folder = self.ledger.version == 0 and self.ledger.pace.is_folder_version_0
        return self._members[name].probe_logprobs if is_folder else None

    def hung(self) -> list[tuple[str, str]]:
        """Members that have to leave because their engines have been hanging for too long, with the reason."""
        return self._members.hung()

    def _revoke(self, member: Member, lease_ids: Sequence[int], reason: DropReason = DropReason.ACTOR_LOST) -> None:
        """These leases of its are void: their prompts return to their queues, with what was sampled of them. An actor
        that still samples one is told so when it lists it."""
        for lease_id in lease_ids:
            slot = self.ledger.slots[lease_id]
            member.release(slot.lease)
            self.ledger.withdraw(slot, reason, keeps_partial=True)

    def _revoke_overdue(self, member: Member, now: float) -> None:
        """An engine that stands still gets no lease until it moves. One that gets on with others only rests, so that
        the lease goes elsewhere."""
        transport = self._config.transport
        if hung := overdue.hung(member, self.ledger.slots, transport):
            logger.error("the engine of actor %s stands still; it held the leases %s", member.name, hung)
            member.is_hung = True
            self._revoke(member, hung, DropReason.HUNG)
        elif stuck := overdue.stuck(member, self.ledger.slots, transport):
            logger.warning("actor %s does not get on with the leases %s", member.name, stuck)
            member.rest.begin(now, transport.lease_timeout_s)
            self._revoke(member, stuck, DropReason.HUNG)
            for lease_id in stuck:
                self._send(member.name, Cancel(lease_id=lease_id))

    def _revoke_stragglers(self, now: float) -> None:
        room = {member.name: max(0, member.free(self.ledger.version, now)) for member in self._members}
        for slot in list(overdue.stragglers(self.ledger.slots, self._times, room, self.ledger.num_due, now)):
            member = self._members[slot.actor]
            if now - member.heard_s > 2 * self._config.transport.heartbeat_s:
                continue  # it is silent: whether it is slow is not known
            logger.warning("actor %s is too slow with lease %d", slot.actor, slot.lease.lease_id)
            member.rest.begin(now, self._times.limit_s)
            self._revoke(member, [slot.lease.lease_id], DropReason.STRAGGLER)
            self._send(member.name, Cancel(lease_id=slot.lease.lease_id))
            self._stand(member, now)

    @property
    def _newest_version(self) -> int:
        """That a token can have, whoever drew it: a prefix is another actor's, which may be further."""
        return max(self.ledger.version, self._announced)

    # ---- leases out

    def dispatch(self, now: float) -> None:
        """Grant leases while a current actor has room and there is something to sample."""
        self.ledger.buffer_finished(now)
        self._end_rests(now)
        while (name := self._places.most()) is not None:
            member = self._members[name]
            slot = self.ledger.lease(name, now, may_evaluate=self._may_evaluate(member))
            if slot is None:
                return
            member.take(slot.lease, now)
            self._stand(member, now)
            self._send(name, slot.lease)
            self.ledger.buffer_finished(now)

    def _end_rests(self, now: float) -> None:
        """Of those whose time is over; of all, when nobody else would get leases."""
        if not self._resting:
            return
        able = [member for member in self._members if member.is_able and member.is_current(self.ledger.version)]
        if all(member.rest.until_s > now for member in able):
            for member in able:
                member.rest.until_s = now
                self._resting[member.name] = member.account.waits_until_s
        for name in [name for name, until_s in self._resting.items() if now >= until_s]:
            del self._resting[name]
            self._stand(self._members[name], now)

    def _may_evaluate(self, member: Member) -> bool:
        """While training waits, evaluation gets `eval.share` of an actor's leases and of its room, but one at least, so
        that neither starves."""
        share = self._config.eval.share
        has_room = member.num_evaluating + 1 <= max(1.0, share * member.capacity)
        return has_room and (member.leases_since_eval + 1) * share >= 1.0

    # ---- groups in

    def receive(self, name: str, group: CompletedGroup, now: float) -> None:
        """Take a group in, or count why not; acknowledged in any case, since a second copy is of no use."""
        self._send(name, Ack(lease_id=group.lease_id))
        member = self._members[name]
        if group.lease_id not in member.held:
            is_copy = self.ledger.counts.has_received(group.lease_id)
            self.ledger.counts.drop(DropReason.DUPLICATE if is_copy else DropReason.UNKNOWN_LEASE, group.lease_id, name)
            return
        slot = self.ledger.slots[group.lease_id]
        problem = problem_with(group, slot.lease, self._newest_version, self._config, self._vocab_size)
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
        self.ledger.settle(slot, group, now)

    def progress(self, name: str, progress: Progress) -> None:
        """Tokens of a lease under way; of one that the actor does not hold any more they are not wanted."""
        member = self._members[name]
        if progress.lease_id not in member.held:
            return
        slot, problem = self.ledger.slots[progress.lease_id], None
        if len(progress.token_ids):
            drawn = (progress.token_ids, progress.behavior_logprobs, progress.versions)
            problem = problem_with_tokens(*drawn, self._newest_version, self._vocab_size)
        if problem is None:
            slot.partial = slot.partial or Partial(slot.lease.num_samples)
            if slot.partial.lacks(progress):
                self._send(name, SayHello(reason=f"earlier progress of lease {progress.lease_id} has not come"))
                return
            problem = slot.partial.add(progress, slot.lease, name)
        if problem is not None:
            logger.warning("progress of lease %d of actor %s: %s", progress.lease_id, name, problem)
            self.ledger.counts.dropped_tokens[DropReason.MALFORMED] += len(progress.token_ids)
            self._send(name, Refused(reason=f"progress of lease {progress.lease_id}: {problem}", fatal=False))

    def _time(self, slot: Slot, group: CompletedGroup, member: Member, now: float) -> None:
        """Training leases set the pace for each other."""
        seconds, num_steps = now - slot.granted_s, grown(group.lengths, slot.lease)
        member.measure(group.generation_s, num_steps)
        if slot.lease.purpose is Purpose.TRAIN:
            if not self._times.is_straggler(seconds, num_steps):
                member.rest.end()
            self._times.add(seconds, num_steps)
            self._speed.add(group)

    def fail(self, name: str, failed: LeaseFailed, now: float) -> None:
        """The actor could not sample this lease."""
        member = self._members[name]
        if failed.lease_id in member.held:
            slot = self.ledger.slots[failed.lease_id]
            member.account.fail(slot.prompt.uid, now)
            self._try_again(slot, None, failed.reason, now)
        else:
            self.ledger.counts.drop(DropReason.UNKNOWN_LEASE, failed.lease_id, name)

    def _release(self, member: Member, slot: Slot, now: float) -> None:
        member.release(slot.lease)
        self._stand(member, now)

    def _try_again(self, slot: Slot, reason: DropReason | None, problem: str, now: float) -> None:
        """The prompt has failed here; its actor has to answer for it."""
        member = self._members[slot.actor]
        self._release(member, slot, now)
        self._check_s = NOW
        if (verdict := member.account.verdict) is not None:
            self.condemn(member.name, f"{verdict}, the last one: {problem}")
        able = [other.name for other in self._members if other.is_able and now >= other.rest.until_s]
        self.ledger.fail(slot, reason, problem, able)

    def _send(self, name: str, message: LearnerMessage) -> None:
        self.outbox.append(name, message)

    def set_version(self, version: int, steps_done: int) -> None:
        self.ledger.end_step(version, steps_done)
        for member in self._members:
            self._stand(member, member.heard_s)

    # ---- reports

    def work(self) -> dict[str, float]:
        """What all actors that ever took part have done (members.py)."""
        return self._members.work()

    def inherit(self, work: Mapping[str, float]) -> None:
        """What they had done in an earlier life of the learner. Raises ConfigError when an actor has joined already."""
        if len(self._members):
            raise ConfigError("a checkpoint must be loaded before the first actor connects")
        self._members.departed = dict(work)

    def stats(self) -> dict[str, float]:
        """Counters since the start of the run and gauges of now; the one place where they are kept."""
        return {
            "actors_connected": len(self.members()),
            "actors_too_slow": sum(member.is_slow for member in self._members),
            **self.ledger.stats(),
            **self.work(),
        }

    def describe(self, now: float) -> str:
        """Who holds what, for the message of a time-out."""
        members = [
            self._members.describe(member, self.ledger.version, now) for member in islice(self._members, DESCRIBED)
        ]
        if (num_others := len(self._members) - len(members)) > 0:
            members.append(f"and {num_others} other actors")
        return "; ".join([*self.ledger.describe(), *(members or ["no actor is connected"])])

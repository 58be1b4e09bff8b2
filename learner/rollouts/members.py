"""The actors as the coordinator knows them: who is there, who holds which weights, what they have done."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from common.config import Config
from common.types import MAX_CAPACITY, Float32Array, Heartbeat, Lease, MemberId, Purpose
from learner.rollouts.accounts import Account
from learner.rollouts.clock import EngineClock, Rest

MEMORY = 0.2  # weight of the newest group in an actor's running mean
LEAST_TOKEN_S = 1e-9  # no engine draws a token in less: what is divided by it stays finite
RETRY = 50.0  # an actor that is too slow is tried with one lease again after this many times its last one


class Presence(StrEnum):
    """JOINING (greeted, engine not up yet) -> READY <-> LOST (silent or disconnected, or joining for too long).

    A lost member comes back with a Hello that says what it holds. Its leases are kept for transport.grace_s, and it is
    remembered for transport.reconnect_s.
    """

    JOINING = "joining"
    READY = "ready"
    LOST = "lost"


@dataclass
class Member:
    """One actor process. `version` is None until it is known to hold weights of this run."""

    name: str
    number: int  # see MemberId
    capacity: int  # groups
    heard_s: float
    joining_s: float  # since when it is joining, if it is
    is_fresh: bool = True  # until it is ready: its engine can have no other weights than the model folder's
    presence: Presence = Presence.JOINING
    greeted_s: float = float("-inf")  # the last time that it did so again
    lost_s: float = float("-inf")  # when it was heard for the last time before it was lost
    was_ready: bool = False
    version: int | None = None
    probe_logprobs: Float32Array | None = None  # [probe tokens - 1], as reported with Ready
    held: dict[int, None] = field(default_factory=dict)  # lease ids, oldest first
    num_evaluating: int = 0  # evaluation leases among them
    account: Account = field(default_factory=Account)
    leases_since_eval: int = 0  # training leases
    nudged_s: float = float("-inf")
    token_s: float | None = None  # time for a token of one response, a running mean
    group_s: float = 0.0  # time for its last group
    num_timed: int = 0  # groups
    is_slow: bool = False  # too slow to be of use (learner/rollouts/speed.py)
    tried_s: float = float("-inf")  # when it was last granted a lease
    heartbeat: Heartbeat | None = None
    clock: EngineClock = field(default_factory=EngineClock)
    is_hung: bool = False  # its engine draws no tokens; its leases were taken from it, and it gets none until it does
    rest: Rest = field(default_factory=Rest)
    baseline: Heartbeat | None = None  # what one that greets again had done before, which is counted already

    @property
    def id(self) -> MemberId:
        return MemberId(self.name, self.number)

    def is_current(self, version: int) -> bool:
        return self.presence is Presence.READY and self.version is not None and self.version >= version

    @property
    def is_able(self) -> bool:
        """Whether leases go to it as long as it holds the current version and neither waits nor rests."""
        return self.presence is Presence.READY and self.capacity > 0 and not self.is_hung and not self.is_slow

    def free(self, version: int, now: float) -> int:
        """Leases of `version` that it may be granted now."""
        if not self.is_current(version) or self.is_hung or now < self.rest.until_s:
            return 0
        if self.is_slow:
            return int(not self.held and now - self.tried_s > RETRY * self.group_s)
        return self.account.room(self.capacity, now) - len(self.held)

    def take(self, lease: Lease, now: float) -> None:
        """It was granted this lease."""
        self.held[lease.lease_id] = None
        self.tried_s = now
        is_evaluation = lease.purpose is Purpose.EVAL
        self.num_evaluating += is_evaluation
        self.leases_since_eval = 0 if is_evaluation else self.leases_since_eval + 1

    def release(self, lease: Lease) -> None:
        """It does not hold this lease any more."""
        del self.held[lease.lease_id]
        self.num_evaluating -= lease.purpose is Purpose.EVAL

    def measure(self, generation_s: float, num_tokens: int) -> None:
        """Its speed, from the response that grew most, because that is what a group takes its time for."""
        if generation_s > 0 and num_tokens > 0:
            token_s = max(generation_s / num_tokens, LEAST_TOKEN_S)
            self.token_s = token_s if self.token_s is None else self.token_s + MEMORY * (token_s - self.token_s)
            self.group_s = generation_s
            self.num_timed += 1

    def beat(self, heartbeat: Heartbeat) -> None:
        if self.heartbeat is None and not self.is_fresh:
            self.baseline = heartbeat
        self.heartbeat = heartbeat


class Members:
    """The table, and the generation counters of all actors that ever took part."""

    def __init__(self, config: Config) -> None:
        self._transport = config.transport
        self._start_timeout_s = config.actors.start_timeout_s
        self._members: dict[str, Member] = {}
        self._num_joined = 0
        self.departed = {"generated_tokens": 0.0, "busy_s": 0.0, "uptime_s": 0.0}

    def __getitem__(self, name: str) -> Member:
        return self._members[name]

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def __len__(self) -> int:
        return len(self._members)

    def add(self, name: str, capacity: int, now: float) -> None:
        self._num_joined += 1
        self._members[name] = Member(name, self._num_joined, min(capacity, MAX_CAPACITY), now, now)

    def pop(self, name: str) -> Member | None:
        member = self._members.pop(name, None)
        if member is not None:
            _add_work(self.departed, member)
        return member

    def ready(self) -> tuple[str, ...]:
        return tuple(sorted(member.name for member in self if member.presence is Presence.READY))

    def work(self) -> dict[str, float]:
        """Generated tokens, busy and up seconds, from everybody's last heartbeat."""
        work = dict(self.departed)
        for member in self:
            _add_work(work, member)
        return work

    def silent(self, now: float) -> list[tuple[str, str]]:
        """Members to be declared lost, with the reason."""
        found = []
        for member in self:
            silent_s = now - member.heard_s
            if member.presence is Presence.READY and silent_s > self._transport.heartbeat_timeout_s:
                found.append((member.name, f"silent for {silent_s:.1f} s"))
            joining_s = now - member.joining_s
            if member.presence is Presence.JOINING and joining_s > self._start_timeout_s:
                found.append((member.name, f"not ready {joining_s:.0f} s after its greeting"))
        return found

    def bereft(self, now: float) -> list[Member]:
        """Lost members whose leases are not kept any longer."""
        return [m for m in self if m.presence is Presence.LOST and m.held and now - m.lost_s >= self._transport.grace_s]

    def forgettable(self, now: float) -> list[str]:
        """Members that have been lost for so long that they have given up themselves."""
        limit_s = self._transport.reconnect_s
        return [m.name for m in self if m.presence is Presence.LOST and now - max(m.lost_s, m.heard_s) >= limit_s]

    def hung(self) -> list[tuple[str, str]]:
        """Members to be dismissed, with the reason."""
        limit_s = 2 * self._transport.lease_timeout_s
        return [
            (member.name, f"its engine has drawn no token in {member.clock.stalled_s:.0f} s of sampling")
            for member in self
            if member.is_hung and member.clock.stalled_s > limit_s
        ]

    def late(self, now: float) -> list[str]:
        """Ready members that missed two heartbeats, each at most once per heartbeat_s.

        Sending them something finds a closed connection long before the time-out does.
        """
        heartbeat_s = self._transport.heartbeat_s
        late = [
            member
            for member in self
            if member.presence is Presence.READY
            and now - member.heard_s > 2 * heartbeat_s
            and now - member.nudged_s > heartbeat_s
        ]
        for member in late:
            member.nudged_s = now
        return [member.name for member in late]

    def next_check(self) -> float:
        """When something becomes due for a member, if nothing is heard until then."""
        return min((due_s for member in self for due_s in self._dues(member)), default=float("inf"))

    def _dues(self, member: Member) -> Iterator[float]:
        silence_s, beat_s = self._transport.heartbeat_timeout_s, self._transport.heartbeat_s
        match member.presence:
            case Presence.JOINING:
                yield member.joining_s + self._start_timeout_s
            case Presence.READY:
                yield min(member.heard_s + silence_s, max(member.heard_s + 2 * beat_s, member.nudged_s + beat_s))
            case Presence.LOST if member.held:
                yield member.lost_s + self._transport.grace_s

    def describe(self, member: Member, version: int, now: float) -> str:
        held = list(member.held)
        leases = f"holds the leases {held[:8]}" + (f" and {len(held) - 8} more" if len(held) > 8 else "")
        return (
            f"{member.name} ({state_of(member, version, now)}, version {member.version}, heard "
            f"{now - member.heard_s:.1f} s ago) {leases if held else 'holds nothing'}"
        )


def state_of(member: Member, version: int, now: float) -> str:
    """One word, or two, for what a member does."""
    if member.presence is not Presence.READY:
        return str(member.presence)
    if member.is_hung:
        return "hung"
    if member.capacity == 0:
        return "leaving"
    if not member.is_current(version):
        return "updating"
    if member.is_slow:
        return "too slow"
    if now < max(member.rest.until_s, member.account.waits_until_s):
        return "resting"
    return "sampling" if member.held else "idle"


def _add_work(work: dict[str, float], member: Member) -> None:
    for heartbeat, sign in ((member.heartbeat, 1), (member.baseline, -1)):
        if heartbeat is not None:
            work["generated_tokens"] += sign * heartbeat.generated_tokens
            work["busy_s"] += sign * heartbeat.busy_s
            work["uptime_s"] += sign * heartbeat.uptime_s

"""What each message from an actor leads to: greetings and their checks, routing to the coordinator, dismissals.

An actor is known by its name; its ZeroMQ identity is that of one connection, and the secret in its greetings that of
its process. A member that greets again goes on over its new connection. Another process gets the name of a member that
is lost; the name of one that seems to be there is a claim: the member is asked, and keeps its name when it is heard,
loses it when its connection turns out to be closed or when it is silent for transport.grace_s.

Used under the lock of learner/rollouts/service.py.
"""

import hmac
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.agreement import shared_settings
from common.config import Config
from common.keys import NAME_RULE, is_actor_name
from common.types import (
    JSON,
    PROTOCOL_VERSION,
    Ack,
    ActorMessage,
    Bye,
    CompletedGroup,
    Draining,
    DropReason,
    Float32Array,
    Heartbeat,
    Hello,
    LearnerMessage,
    Lease,
    LeaseFailed,
    MemberId,
    Progress,
    Pulse,
    Ready,
    Refused,
    SayHello,
    Stop,
    Watch,
    WeightsCommand,
    WeightsPhase,
    WeightsReport,
    Welcome,
)
from common.wire import WireError
from learner.rollouts.commands import COMMANDS_PER_LIFE, Command
from learner.rollouts.coordinator import Coordinator
from learner.rollouts.observers import Observers

logger = logging.getLogger(__name__)

LOOK_S = 0.25  # between two looks at all members: there may be hundreds
MAX_MEMBERS = 2048  # actors, lost ones included, so that who has a key cannot fill the memory with names
OWN_DATA = (Welcome, Lease, WeightsCommand)  # messages in which nothing of an actor's goes through a header
REMEMBERED = 1000  # dismissed processes that have neither said bye nor disconnected; probes that nobody could judge yet


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A greeting under the name of a member that seems to be there."""

    identity: bytes
    hello: Hello
    since_s: float


class Reception:
    """Invariants: `_names` and `_identities` are inverse maps of the coordinator's members, lost ones included, and
    `_secrets` has the same names. A connection is a member's, or claims one name, or neither: what it greets with last
    counts, and so does what a process does."""

    def __init__(
        self,
        config: Config,
        coordinator: Coordinator,
        fingerprints: tuple[str, str],
        probe_token_ids: Sequence[int],
        run_id: str = "",
        incarnation: int = 0,
        now: float = 0.0,
    ) -> None:
        self.observers = Observers(config, coordinator, incarnation, now)
        self._config = config
        self._coordinator = coordinator
        self._fingerprints = fingerprints
        self._probe_token_ids = np.asarray(probe_token_ids, dtype=np.int32)
        self._identities: dict[str, bytes] = {}
        self._names: dict[bytes, str] = {}
        self._secrets: dict[str, str] = {}  # by name
        self._dismissed: dict[bytes, str] = {}  # why; answers what was under way
        self._claims: dict[str, Claim] = {}  # by name
        self._run_id, self._incarnation = run_id, incarnation
        self._settings = shared_settings(config)
        self._direct: list[tuple[bytes, LearnerMessage]] = []
        self._commands: dict[int, Command] = {}  # by id, under way
        self.num_refused = 0  # greetings
        self.lost: tuple[MemberId, ...] = ()  # before they could report on the last command
        self._num_commands = incarnation * COMMANDS_PER_LIFE  # an actor tells those of an earlier life by their ids
        self._stop: Stop | None = None
        self._judge: Callable[[Float32Array], str | None] | None = None
        self._unjudged: dict[MemberId, Float32Array] = {}  # what was scored before there was a judge
        self._looked_s = float("-inf")

    @property
    def names(self) -> tuple[str, ...]:
        """Actors that have greeted and not left."""
        return tuple(sorted(self._identities))

    # ---- messages

    def handle(self, identity: bytes, message: ActorMessage | WireError, now: float) -> None:
        name = self._names.get(identity)
        if isinstance(message, WireError):
            self._malformed(identity, name, message)
        elif isinstance(message, Hello):
            self._greet(identity, message, now)
        elif isinstance(message, Watch):
            self._watch(identity, now)
        elif name is None:
            self._stranger(identity, message)
        else:
            self._coordinator.heard(name, now)
            self._route(name, message, now)
            if name in self._identities and (reason := self._reason_to_greet(name, message)) is not None:
                self._direct.append((identity, SayHello(reason=reason)))
        self._dismiss_condemned()

    def _route(self, name: str, message: ActorMessage, now: float) -> None:
        match message:
            case Heartbeat():
                self._coordinator.heartbeat(name, message, now)
            case Progress():
                self._coordinator.progress(name, message)
            case CompletedGroup():
                self._coordinator.receive(name, message, now)
            case LeaseFailed():
                self._coordinator.fail(name, message, now)
            case WeightsReport():
                self._report(name, message)
            case Ready():
                self._ready(name, message)
            case Draining():
                logger.info("actor %s finishes what it holds, and leaves", name)
                self._coordinator.drain(name)
            case Bye(error=error):
                logger.info("actor %s says bye: %s", name, error or "as asked")
                self._part(name, f"bye: {error or 'as asked'}")

    def _reason_to_greet(self, name: str, message: ActorMessage) -> str | None:
        """Why a member has to greet again, after this message of its, or None."""
        if self._coordinator.is_lost(name):
            return "it was lost from sight"
        if isinstance(message, Heartbeat) and self._coordinator.is_joining(name):
            return "it takes part without having said that it is ready"
        return None

    def _greet(self, identity: bytes, hello: Hello, now: float) -> None:
        self._forget_claims(identity, hello.secret)
        if self._stop is not None:
            self._direct.append((identity, self._stop))
            return
        problem = self._dismissed.get(identity) or self._misfit(hello)
        if problem is not None:
            logger.warning("actor %r refused: %s", hello.name[:100], problem)
            self.num_refused += 1
            self._refuse(identity, problem, fatal=True)
            return
        if self._names.get(identity, hello.name) != hello.name:
            self._part(self._names[identity], "it greeted under another name")
        owner = self._identities.get(hello.name)
        if owner is not None and self._is_member(hello):
            self._greet_again(identity, hello, now)
        elif owner is None or owner == identity or self._coordinator.is_lost(hello.name):
            self._admit(identity, hello, now)
        else:
            self._claim(identity, owner, hello, now)

    def _is_member(self, hello: Hello) -> bool:
        """Whether it comes from the process that is the member of its name."""
        return hmac.compare_digest(hello.secret, self._secrets.get(hello.name, ""))

    def _greet_again(self, identity: bytes, hello: Hello, now: float) -> None:
        """A member, on any connection."""
        if hello.number is not None:
            self._welcome_back(identity, hello, now)
        elif not self._coordinator.member(hello.name).was_ready:
            self._admit(identity, hello, now)  # no Welcome has reached it
        else:
            logger.info("a greeting of actor %s from before it was ready comes late", hello.name)

    def _admit(self, identity: bytes, hello: Hello, now: float) -> None:
        """A new member, which may have been another learner's."""
        if self._identities.get(hello.name) == identity or self._is_member(hello):
            self._part(hello.name, "it greeted anew")
        elif hello.name in self._identities:
            self._send_away(hello.name, "another process has its name")
        self._identities[hello.name] = identity
        self._names[identity] = hello.name
        self._secrets[hello.name] = hello.secret
        self._coordinator.join(hello.name, hello.capacity, now)
        if hello.incarnation is not None:
            self._join_again(hello, now, is_resent=hello.incarnation == self._incarnation)
        self._welcome(identity, hello.name)
        logger.info("actor %s joins with room for %d groups", hello.name, hello.capacity)

    def _welcome_back(self, identity: bytes, hello: Hello, now: float) -> None:
        """What it was told on an earlier connection and has not answered is told again."""
        name = hello.name
        del self._names[self._identities[name]]
        self._identities[name] = identity
        self._names[identity] = name
        self._claims.pop(name, None)
        self._join_again(hello, now, is_resent=True)  # or has been counted when it joined
        self._welcome(identity, name)
        for command in self._commands.values():
            self._direct += [(identity, command.message(m)) for m in command.missing() if m.name == name]
        logger.info("actor %s is back, with %d leases and %d groups", name, len(hello.held), len(hello.finished))

    def _join_again(self, hello: Hello, now: float, *, is_resent: bool) -> None:
        """Only who knows this learner by the Welcome of today sends the groups again that it keeps."""
        held, finished = hello.held.tolist(), hello.finished.tolist()
        self._coordinator.join_again(hello.name, held, finished, now, is_resent=is_resent)

    def _welcome(self, identity: bytes, name: str) -> None:
        transport = self._config.transport
        welcome = Welcome(
            run_id=self._run_id,
            incarnation=self._incarnation,
            number=self._coordinator.member(name).number,
            settings=self._settings,
            heartbeat_s=transport.heartbeat_s,
            timeout_s=transport.heartbeat_timeout_s,
            probe_token_ids=self._probe_token_ids,
        )
        self._direct.append((identity, welcome))

    def _claim(self, identity: bytes, owner: bytes, hello: Hello, now: float) -> None:
        """`tick` and `undeliverable` decide."""
        earlier = self._claims.get(hello.name)
        if earlier is not None and earlier.identity != identity:
            self._refuse_claim(earlier)
        self._claims[hello.name] = Claim(identity=identity, hello=hello, since_s=now)
        self._ask(owner)

    def _ask(self, owner: bytes) -> None:
        """The message finds out whether its connection is closed."""
        self._direct.append((owner, Pulse(version=self._coordinator.ledger.version)))

    def _settle_claims(self, now: float) -> None:
        for name, claim in list(self._claims.items()):
            if name not in self._identities or self._coordinator.is_lost(name):
                del self._claims[name]
                self._admit(claim.identity, claim.hello, now)
                continue
            is_heard = self._coordinator.member(name).heard_s > claim.since_s
            if not is_heard and now - claim.since_s < self._config.transport.grace_s:
                continue
            del self._claims[name]
            if is_heard or self._coordinator.is_joining(name):  # an engine that starts keeps its actor from answering
                self._refuse_claim(claim)
            else:
                self._admit(claim.identity, claim.hello, now)

    def _refuse_claim(self, claim: Claim) -> None:
        problem = f"another actor named {claim.hello.name} takes part: give this one another --name, or stop that one"
        logger.warning("an actor is refused: %s", problem)
        self._refuse(claim.identity, problem, fatal=True)

    def _misfit(self, hello: Hello) -> str | None:
        """Why this actor cannot take part, or None."""
        model, tokenizer = self._fingerprints
        if hello.protocol_version != PROTOCOL_VERSION:
            return f"it speaks protocol version {hello.protocol_version}, the learner {PROTOCOL_VERSION}"
        if not is_actor_name(hello.name):
            return f"its name {NAME_RULE}"
        if hello.capacity < 1:
            return f"its capacity is {hello.capacity}; set actors.groups_in_flight to at least 1"
        if hello.model_fingerprint != model:
            return "its model has another architecture; give it the learner's model.path"
        if hello.tokenizer_fingerprint != tokenizer:
            return "its tokenizer is another one; give it the learner's model.path"
        if hello.name not in self._identities and len(self._identities) >= MAX_MEMBERS:
            return f"{MAX_MEMBERS} actors take part already, lost ones included, and that is the most there may be"
        return None

    def _ready(self, name: str, ready: Ready) -> None:
        if self._coordinator.member(name).was_ready:
            return  # it has greeted again
        logger.info("actor %s is ready with version %d", name, ready.version)
        self._coordinator.ready(name, ready.version, ready.probe_logprobs)
        if (probe := self._coordinator.folder_probe(name)) is not None:
            self._check_folder(self._coordinator.member(name).id, probe)

    def judge_ready(self, judge: Callable[[Float32Array], str | None]) -> None:
        """See LearnerService.judge_ready."""
        self._judge = judge
        unjudged, self._unjudged = self._unjudged, {}
        for member, probe in unjudged.items():
            self._check_folder(member, probe)

    def _check_folder(self, member: MemberId, probe: Float32Array) -> None:
        """Before it gets a lease, if the learner has loaded its own model by then; else as soon as it has, wherever the
        actor is by that time."""
        if self._judge is None:
            self._unjudged[member] = probe[: len(self._probe_token_ids)].copy()  # one too many is enough to be wrong
            if len(self._unjudged) > REMEMBERED:
                del self._unjudged[next(iter(self._unjudged))]
        elif (problem := self._judge(probe)) is not None:
            self.quarantine(member, problem, version=0)

    def _watch(self, identity: bytes, now: float) -> None:
        answer = self._stop or self.observers.answer(identity, self._identities, now)
        if answer is not None:
            self._direct.append((identity, answer))

    def _stranger(self, identity: bytes, message: ActorMessage) -> None:
        """From a process that is no member: it was dismissed, or the learner does not know it (yet)."""
        if isinstance(message, Bye):
            self._forget(identity)
            return
        if isinstance(message, CompletedGroup):
            self._coordinator.drops[DropReason.UNKNOWN_LEASE] += 1
            self._direct.append((identity, Ack(lease_id=message.lease_id)))
        if (reason := self._dismissed.get(identity)) is not None:
            self._refuse(identity, reason, fatal=True)
        else:
            self._direct.append((identity, SayHello(reason="the learner does not know it")))

    def _malformed(self, identity: bytes, name: str | None, error: WireError) -> None:
        self._coordinator.drops[DropReason.MALFORMED] += 1
        if name is not None:
            self.dismiss(name, f"it sent a malformed message: {error}")
            return
        logger.warning("a malformed message of a stranger: %s", error)
        self._refuse(identity, f"malformed message: {error}", fatal=True)

    def _refuse(self, identity: bytes, reason: str, *, fatal: bool) -> None:
        self._direct.append((identity, Refused(reason=reason, fatal=fatal)))

    # ---- leaving

    def dismiss(self, name: str, reason: str) -> None:
        """Tell an actor to leave, and go on without it."""
        if name not in self._identities:
            return
        logger.warning("actor %s is dismissed: %s", name, reason)
        self._send_away(name, reason)
        self._coordinator.count_dismissal()

    def _send_away(self, name: str, reason: str) -> None:
        identity = self._part(name, reason)
        self._dismissed[identity] = reason
        if len(self._dismissed) > REMEMBERED:
            del self._dismissed[next(iter(self._dismissed))]
        self._refuse(identity, reason, fatal=True)

    def _forget(self, identity: bytes) -> None:
        """Of one that is no member: why it is none, and whether it would like to be one."""
        self._dismissed.pop(identity, None)
        self.observers.forget(identity)
        self._forget_claims(identity)

    def _forget_claims(self, identity: bytes, secret: str = "") -> None:
        """Of this connection, and of this process."""
        self._claims = {
            name: claim
            for name, claim in self._claims.items()
            if claim.identity != identity and not hmac.compare_digest(claim.hello.secret, secret)
        }

    def _dismiss_condemned(self) -> None:
        for name, reason in list(self._coordinator.condemned.items()):
            self.dismiss(name, reason)

    def tick(self, now: float) -> None:
        """What time brings: the coordinator's part, names that are claimed, members that nobody waits for."""
        self._coordinator.tick(now)
        self._settle_claims(now)
        if now - self._looked_s >= LOOK_S:
            self._looked_s = now
            self._look_at_members(now)
        self._dismiss_condemned()

    def _look_at_members(self, now: float) -> None:
        """At each of them. A connection may be found closed only a while after it was."""
        for name in self._claims:
            self._ask(self._identities[name])
        for name, reason in self._coordinator.hung():
            self._coordinator.condemn(name, reason)
        for name in self._coordinator.forgettable(now):
            self._part(name, f"it is forgotten after {self._config.transport.reconnect_s:g} s")
            self._coordinator.count_forgotten()

    def undeliverable(self, identity: bytes) -> None:
        """Nobody of this identity is connected."""
        self._forget(identity)
        if (name := self._names.get(identity)) is None:
            return
        if self._stop is None:
            self._coordinator.lose(name, "its connection is closed")
        else:
            self._part(name, "its connection is closed")

    def begin_stop(self, reason: str) -> None:
        """Stop goes to everybody; those that are lost are not waited for."""
        self._stop = Stop(reason=reason)
        self._direct += [(identity, self._stop) for identity in self.observers.identities]
        present = set(self._coordinator.members())
        for name, identity in list(self._identities.items()):
            self._direct.append((identity, self._stop))
            if name not in present and not self._coordinator.is_joining(name):
                self._part(name, "lost at the end of the run")

    def _part(self, name: str, reason: str) -> bytes:
        identity = self._identities.pop(name)
        del self._names[identity], self._secrets[name]
        self._coordinator.remove(name, reason)
        return identity

    # ---- publication

    def begin(self, phase: WeightsPhase, version: int, payloads: Mapping[MemberId, dict[str, JSON]]) -> Command:
        """Send a phase to the ready actors among those named; the others count as gone."""
        self._num_commands += 1
        command = Command(self._num_commands, phase, version, dict(payloads))
        self._commands[command.id] = command
        self.note_losses()
        for member in sorted(command.missing()):
            self._direct.append((self._identities[member.name], command.message(member)))
            if phase not in (WeightsPhase.SLEEP, WeightsPhase.WAKE):
                self._coordinator.updating(member.name, version)
        return command

    def note_losses(self) -> None:
        """Nobody waits for the report of an actor that is lost, or that has left.

        What one that comes back has done of the command is not known: it may be asleep, and it is served again.
        """
        if not self._commands:
            return
        present = set(self._coordinator.member_ids())
        for command in self._commands.values():
            for member in command.missing() - present:
                command.gone.add(member)
                if self._coordinator.is_member(member):
                    self._coordinator.loaded(member.name, None)

    def end(self, command: Command) -> None:
        """Reports that come later are not wanted."""
        del self._commands[command.id]
        self.lost = tuple(sorted(command.gone))

    def dismiss_member(self, member: MemberId, reason: str) -> None:
        """As `dismiss`; nothing when it has left, also when another process has its name."""
        if self._coordinator.is_member(member):
            self.dismiss(member.name, reason)

    def quarantine(self, member: MemberId, reason: str, version: int) -> None:
        """It has to leave, and what it drew with the wrong weights `version` is given up: also when it has left, and
        what another process of its name has drawn since."""
        self._coordinator.distrust(member.name, version)
        if self._coordinator.is_member(member):
            self.dismiss(member.name, reason)
        else:
            logger.warning("actor %s, which has left, had wrong weights: %s", member.name, reason)

    def _report(self, name: str, report: WeightsReport) -> None:
        command = self._commands.get(report.command_id)
        member = next((m for m in command.missing() if m.name == name), None) if command is not None else None
        if command is None or member is None or not self._coordinator.is_member(member):
            logger.info("actor %s reports %s of version %d late", name, report.phase, report.version)
            return
        command.reports[member] = report
        if command.phase is WeightsPhase.RESUME and report.error is None:
            self._coordinator.loaded(name, command.version)

    # ---- out

    def outgoing(self) -> list[tuple[bytes, LearnerMessage]]:
        """Everything to be sent now, with the identity to send it to."""
        outbox = self._coordinator.outbox
        to_members = [(self._identities[name], message) for name, message in outbox]
        messages = [*self._direct, *to_members]
        self._direct.clear()
        outbox.clear()
        return messages

    def deliver(self, send: Callable[[bytes, LearnerMessage], bool]) -> None:
        """Sends all that. What cannot be sent costs the one peer that it is for; what is made of the run's own data
        alone could be sent to nobody. Raises WireError for that."""
        for identity, message in self.outgoing():
            try:
                is_sent = send(identity, message)
            except WireError as error:
                if isinstance(message, OWN_DATA):
                    raise
                kind, name = type(message).__name__, self._names.get(identity, "who is no actor")
                logger.error("%s gets no %s: %s", name, kind, error)
                is_sent = False
            if not is_sent:
                self.undeliverable(identity)

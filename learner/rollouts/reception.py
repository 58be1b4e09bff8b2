"""What each message from an actor leads to: greetings and their checks, routing to the coordinator, dismissals.

An actor is known by its name; its ZeroMQ identity is that of one process. The latest process to greet under a name
is the actor, an earlier one is told to leave. Used under the lock of learner/rollouts/service.py.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from common.config import Config
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
    LeaseFailed,
    MemberId,
    Ready,
    Refused,
    Stop,
    WeightsCommand,
    WeightsPhase,
    WeightsReport,
    Welcome,
)
from common.wire import WireError
from learner.rollouts.coordinator import Coordinator

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[\w.:-]{1,100}")


@dataclass(eq=False)
class Command:
    """One phase of a publication under way: who has to report, and what they said."""

    id: int
    phase: WeightsPhase
    version: int
    targets: frozenset[MemberId]
    reports: dict[MemberId, WeightsReport] = field(default_factory=dict)
    gone: set[MemberId] = field(default_factory=set)  # lost or replaced before they reported

    def missing(self) -> set[MemberId]:
        """Those who may still report."""
        return set(self.targets) - set(self.reports) - self.gone


class Reception:
    """Invariant: `_names` and `_identities` are inverse maps of the coordinator's members, lost ones included."""

    def __init__(
        self,
        config: Config,
        coordinator: Coordinator,
        fingerprints: tuple[str, str],
        probe_token_ids: Sequence[int],
    ) -> None:
        self._config = config
        self._coordinator = coordinator
        self._fingerprints = fingerprints
        self._probe_token_ids = np.asarray(probe_token_ids, dtype=np.int32)
        self._identities: dict[str, bytes] = {}
        self._names: dict[bytes, str] = {}
        self._dismissed: dict[bytes, str] = {}  # why; answers what was under way
        self._direct: list[tuple[bytes, LearnerMessage]] = []
        self._commands: dict[int, Command] = {}  # by id, under way
        self._num_commands = 0
        self._stop: Stop | None = None
        self._judge: Callable[[Float32Array], str | None] | None = None

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
        elif name is None:
            self._stranger(identity, message)
        else:
            self._coordinator.heard(name, now)
            self._route(identity, name, message, now)

    def _route(self, identity: bytes, name: str, message: ActorMessage, now: float) -> None:
        match message:
            case Heartbeat():
                self._coordinator.heartbeat(name, message, now)
            case CompletedGroup():
                self._coordinator.receive(name, message, now)
            case LeaseFailed():
                self._coordinator.fail(name, message)
            case WeightsReport():
                self._report(name, message)
            case Ready():
                self._ready(identity, name, message)
            case Draining():
                logger.info("actor %s finishes what it holds, and leaves", name)
                self._coordinator.drain(name)
            case Bye(error=error):
                logger.info("actor %s says bye: %s", name, error or "as asked")
                self._part(name, f"bye: {error or 'as asked'}")

    def _greet(self, identity: bytes, hello: Hello, now: float) -> None:
        if self._stop is not None:
            self._direct.append((identity, self._stop))
            return
        problem = self._dismissed.get(identity) or self._misfit(hello)
        if problem is not None:
            logger.warning("actor %r refused: %s", hello.name[:100], problem)
            self._refuse(identity, problem, fatal=True)
            return
        if identity in self._names:
            self._part(self._names[identity], "it greeted again")
        self.dismiss(hello.name, "a new process has its name")
        self._identities[hello.name] = identity
        self._names[identity] = hello.name
        self._coordinator.join(hello.name, hello.capacity, now)
        transport = self._config.transport
        welcome = Welcome(
            heartbeat_s=transport.heartbeat_s,
            timeout_s=transport.heartbeat_timeout_s,
            probe_token_ids=self._probe_token_ids,
        )
        self._direct.append((identity, welcome))
        logger.info("actor %s joins with room for %d groups", hello.name, hello.capacity)

    def _misfit(self, hello: Hello) -> str | None:
        """Why this actor cannot take part, or None."""
        model, tokenizer = self._fingerprints
        if hello.protocol_version != PROTOCOL_VERSION:
            return f"it speaks protocol version {hello.protocol_version}, the learner {PROTOCOL_VERSION}"
        if not _NAME.fullmatch(hello.name):
            return "its name must be 1 to 100 letters, digits, or any of _ . : -"
        if hello.capacity < 1:
            return f"its capacity is {hello.capacity}; set actors.groups_in_flight to at least 1"
        if hello.model_fingerprint != model:
            return "its model has another architecture; give it the learner's model.path"
        if hello.tokenizer_fingerprint != tokenizer:
            return "its tokenizer is another one; give it the learner's model.path"
        return None

    def _ready(self, identity: bytes, name: str, ready: Ready) -> None:
        if not self._coordinator.is_joining(name):
            self._refuse(identity, "it is ready already", fatal=False)
            return
        logger.info("actor %s is ready with version %d", name, ready.version)
        self._coordinator.ready(name, ready.version, ready.probe_logprobs)
        self._check_folder(name)

    def judge_ready(self, judge: Callable[[Float32Array], str | None]) -> None:
        """See LearnerService.judge_ready."""
        self._judge = judge
        for name in self._coordinator.members():
            self._check_folder(name)

    def _check_folder(self, name: str) -> None:
        """Before it gets a lease, if the learner has loaded its own model by then."""
        probe = self._coordinator.folder_probe(name)
        if self._judge is not None and probe is not None and (problem := self._judge(probe)) is not None:
            self.dismiss(name, problem, distrust=True)

    def _stranger(self, identity: bytes, message: ActorMessage) -> None:
        """From a process that is no member: it was dismissed, or the learner does not know it (yet)."""
        if isinstance(message, Bye):
            self._dismissed.pop(identity, None)
            return
        if isinstance(message, CompletedGroup):
            self._coordinator.drops[DropReason.UNKNOWN_LEASE] += 1
            self._direct.append((identity, Ack(lease_id=message.lease_id)))
        reason = self._dismissed.get(identity)
        self._refuse(identity, reason or "the learner does not know it; say hello", fatal=reason is not None)

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

    def dismiss(self, name: str, reason: str, *, distrust: bool = False) -> None:
        """Tell an actor to leave, and go on without it. `distrust`: see Coordinator.remove."""
        if name not in self._identities:
            return
        logger.warning("actor %s is dismissed: %s", name, reason)
        identity = self._part(name, reason, distrust=distrust)
        self._dismissed[identity] = reason
        self._refuse(identity, reason, fatal=True)

    def undeliverable(self, identity: bytes) -> None:
        """Nobody of this identity is connected."""
        self._dismissed.pop(identity, None)
        if (name := self._names.get(identity)) is None:
            return
        if self._stop is None:
            self._coordinator.lose(name, "its connection is closed")
        else:
            self._part(name, "its connection is closed")

    def begin_stop(self, reason: str) -> None:
        """Stop goes to everybody; those that are lost are not waited for."""
        self._stop = Stop(reason=reason)
        present = set(self._coordinator.members())
        for name, identity in list(self._identities.items()):
            self._direct.append((identity, self._stop))
            if name not in present and not self._coordinator.is_joining(name):
                self._part(name, "lost at the end of the run")

    def _part(self, name: str, reason: str, *, distrust: bool = False) -> bytes:
        identity = self._identities.pop(name)
        del self._names[identity]
        self._coordinator.remove(name, reason, distrust=distrust)
        return identity

    # ---- publication

    def begin(self, phase: WeightsPhase, version: int, payloads: Mapping[MemberId, dict[str, JSON]]) -> Command:
        """Send a phase to the ready actors among those named; the others count as gone."""
        present = set(self._coordinator.member_ids())
        self._num_commands += 1
        command = Command(self._num_commands, phase, version, frozenset(payloads), gone=set(payloads) - present)
        self._commands[command.id] = command
        for member in sorted(command.missing()):
            message = WeightsCommand(
                command_id=command.id, phase=phase, version=version, payload=dict(payloads[member])
            )
            self._direct.append((self._identities[member.name], message))
            if phase is WeightsPhase.START:
                self._coordinator.loaded(member.name, None)  # no version is whole until FINISH
        return command

    def note_losses(self) -> None:
        """Nobody waits for the report of an actor that is lost, or that has left."""
        if not self._commands:
            return
        present = set(self._coordinator.member_ids())
        for command in self._commands.values():
            command.gone |= command.missing() - present

    def end(self, command: Command) -> None:
        """Reports that come later are not wanted."""
        del self._commands[command.id]

    def dismiss_member(self, member: MemberId, reason: str, *, distrust: bool) -> None:
        """As `dismiss`; nothing when it has left, also when another process has its name."""
        if self._coordinator.is_member(member):
            self.dismiss(member.name, reason, distrust=distrust)

    def _report(self, name: str, report: WeightsReport) -> None:
        command = self._commands.get(report.command_id)
        member = next((m for m in command.missing() if m.name == name), None) if command is not None else None
        if command is None or member is None or not self._coordinator.is_member(member):
            logger.info("actor %s reports %s of version %d late", name, report.phase, report.version)
            return
        command.reports[member] = report
        if command.phase is WeightsPhase.FINISH and report.error is None:
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

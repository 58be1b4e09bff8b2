"""Publication's conversation with the actors: the phases of one attempt, their time limits, and who is to blame.

A phase in which all take part in a collective (joining a transfer group, a broadcast) fails for everybody when one
peer is lost, so an error of the collective is nobody's guilt. Dismissed is who did not answer while others did, who
failed by itself, and who does not answer the next command, which every attempt begins with. Whose connection was lost
before it could answer has done nothing wrong: it is left out, and served when it is back.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from common.broadcast import BrokenTransfer
from common.types import MemberId, WeightsPhase, WeightsReport

Payload = dict[str, Any]


class PublishError(RuntimeError):
    """An attempt failed, or publication as a whole; the message says why."""


class ActorControl(Protocol):
    """What publication needs of the service (learner/rollouts/service.py)."""

    def member_ids(self) -> tuple[MemberId, ...]:
        """The ready ones."""
        ...

    def waiting_ids(self) -> tuple[MemberId, ...]:
        """Those of them that do not hold the current version."""
        ...

    def command(
        self,
        phase: WeightsPhase,
        version: int,
        payloads: Mapping[MemberId, Payload],
        timeout_s: float,
        meanwhile: Callable[[], None] | None = None,
    ) -> dict[MemberId, WeightsReport]:
        """Sends the phase, runs `meanwhile` here, and waits for the reports, which lack whoever did not answer."""
        ...

    def lost_ids(self) -> tuple[MemberId, ...]:
        """Those of the last command that could not answer it, because they were lost or have been replaced."""
        ...

    def dismiss(self, member: MemberId, reason: str) -> None:
        """It leaves; what it has sampled stays."""
        ...

    def quarantine(self, member: MemberId, reason: str, version: int) -> None:
        """It leaves, if it has not yet, and what it sampled with this version goes too."""
        ...


@dataclass(frozen=True)
class Deadlines:
    """How long publication waits, from weights.timeout_s: a collective ends before the command that it is part of.

    A peer that waits in a collective may do so twice in a phase (to receive, and to pass on), and still answers.
    """

    answer_s: float  # for the actors' reports of one phase

    @property
    def collective_s(self) -> float:
        """For one operation of a transfer group."""
        return self.answer_s / 3

    @property
    def thread_s(self) -> float:
        """For the sending thread to bring one bucket to its end; not reached unless the limits above fail."""
        return 1.5 * self.answer_s


@dataclass
class Costs:
    """Seconds that one publication spent, over all attempts. Gathering and sending overlap."""

    gather_s: float = 0.0  # collecting shards into buckets
    send_s: float = 0.0  # inside the transfer's own operations
    wait_s: float = 0.0  # for the actors' answers, beyond that


@dataclass
class Channel:
    """One attempt's way to the members: each phase goes to all of them."""

    control: ActorControl
    members: tuple[MemberId, ...]
    version: int
    deadlines: Deadlines
    costs: Costs
    lost: set[MemberId] = field(default_factory=set)  # in this attempt
    dismissed: set[MemberId] = field(default_factory=set)  # likewise

    def pause(self) -> None:
        """The first phase. Those who do not answer it are dismissed; the rest are the members of this attempt.

        Raises PublishError when nobody is left.
        """
        asked = self.members
        reports = self._ask(WeightsPhase.PAUSE, {}, None)
        problems = self._dismiss_guilty(WeightsPhase.PAUSE, reports, is_collective=False)
        self.members = tuple(sorted(member for member, report in reports.items() if report.error is None))
        if not self.members:
            raise PublishError(f"no actor paused for version {self.version} (asked: {names(asked)}): {problems}")

    def run(
        self,
        phase: WeightsPhase,
        payloads: Mapping[MemberId, Payload] | None = None,
        collective: Callable[[], None] | None = None,
    ) -> None:
        """One phase with all members; `collective` is rank 0's part in it.

        Raises PublishError when somebody did not finish it, after dismissing whose fault that is.
        """
        broken: list[str] = []

        def take_part() -> None:
            assert collective is not None
            try:
                collective()
            except BrokenTransfer as error:
                broken.append(f"learner: {error}")

        reports = self._ask(phase, payloads or {}, take_part if collective is not None else None)
        problems = self._dismiss_guilty(phase, reports, is_collective=collective is not None)
        if broken or problems:
            raise PublishError(f"{phase} of version {self.version} failed ({'; '.join(broken + problems)})")

    def _ask(
        self, phase: WeightsPhase, payloads: Mapping[MemberId, Payload], collective: Callable[[], None] | None
    ) -> dict[MemberId, WeightsReport]:
        """The reports of one phase; books the time."""
        spent_s = 0.0

        def timed() -> None:
            nonlocal spent_s
            began = time.monotonic()
            try:
                if collective is not None:
                    collective()
            finally:
                spent_s = time.monotonic() - began

        started = time.monotonic()
        reports = self.control.command(
            phase,
            self.version,
            {member: payloads.get(member, {}) for member in self.members},
            self.deadlines.answer_s,
            timed,
        )
        self.lost.update(self.control.lost_ids())
        self.costs.send_s += spent_s
        self.costs.wait_s += time.monotonic() - started - spent_s
        return reports

    def _dismiss_guilty(
        self, phase: WeightsPhase, reports: Mapping[MemberId, WeightsReport], is_collective: bool
    ) -> list[str]:
        """What went wrong, one entry a member; dismisses whose own fault it was.

        When nobody answered a collective phase, it may be anybody's fault: the next attempt's first command decides.
        """
        where = f"phase {phase} of version {self.version}"
        problems = []
        for member in self.members:
            report = reports.get(member)
            if member in self.lost:
                problems.append(f"{member.name}: its connection was lost")
            elif report is None:
                problems.append(f"{member.name}: no answer")
                if reports or not is_collective:
                    self._dismiss(member, f"it did not answer within {self.deadlines.answer_s:g} s in {where}")
            elif report.error is not None:
                problems.append(f"{member.name}: {report.error}")
                if not report.is_shared:
                    self._dismiss(member, f"it failed in {where}: {report.error}")
        return problems

    def _dismiss(self, member: MemberId, reason: str) -> None:
        self.dismissed.add(member)
        self.control.dismiss(member, reason)


def names(members: tuple[MemberId, ...]) -> str:
    """For a sentence."""
    return ", ".join(member.name for member in members) or "nobody"

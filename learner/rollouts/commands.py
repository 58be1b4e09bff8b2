"""One phase of a publication on its way to the actors and back."""

from dataclasses import dataclass, field

from common.types import JSON, MemberId, WeightsCommand, WeightsPhase, WeightsReport

COMMANDS_PER_LIFE = 1 << 32  # ids; an actor tells the commands of one life of the learner from those of another


@dataclass(eq=False)
class Command:
    """One phase of a publication under way: who has to report, and what they said."""

    id: int
    phase: WeightsPhase
    version: int
    payloads: dict[MemberId, dict[str, JSON]]
    reports: dict[MemberId, WeightsReport] = field(default_factory=dict)
    gone: set[MemberId] = field(default_factory=set)  # lost or replaced before they reported

    def missing(self) -> set[MemberId]:
        """Those who may still report."""
        return set(self.payloads) - set(self.reports) - self.gone

    def message(self, member: MemberId) -> WeightsCommand:
        """What `member` is told."""
        return WeightsCommand(command_id=self.id, phase=self.phase, version=self.version, payload=self.payloads[member])

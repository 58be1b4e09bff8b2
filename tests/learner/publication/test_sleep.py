"""Actors that sleep while the learner trains: who wakes them, and what becomes of one that nobody could reach then."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from common.types import MemberId, Prompt, Ready, WeightsPhase, WeightsReport, Welcome
from learner.publication.sleep import actors_asleep
from learner.rollouts.coordinator import Coordinator
from learner.rollouts.prompts import PromptStream
from learner.rollouts.reception import Reception
from tests.learner.rollouts.test_coordinator import make_config
from tests.support.fake_actors import FINGERPRINTS, NO_PROBE, hello

CONFIG = make_config()
CONFIG = replace(CONFIG, actors=replace(CONFIG.actors, sleep_while_training=True))


class Control:
    """The service without sockets and threads. Everybody who hears a command does it at once."""

    def __init__(self, *names: str) -> None:
        prompts = PromptStream([Prompt(uid="p", text="", reference="")], seed=0)
        self.coordinator = Coordinator(CONFIG, prompts, lambda prompt: [1])
        self.reception = Reception(CONFIG, self.coordinator, FINGERPRINTS, [1])
        self.heard: list[tuple[str, WeightsPhase]] = []
        self.dismissed: list[str] = []
        self.welcomes: dict[bytes, Welcome] = {}
        for name in names:
            self.greet(name)

    def greet(self, name: str) -> None:
        """With what the last Welcome gave it, if there was one."""
        identity = name.encode()
        self.reception.handle(identity, hello(name, welcome=self.welcomes.get(identity)), 0.0)
        self.reception.handle(identity, Ready(version=0, probe_logprobs=NO_PROBE), 0.0)
        self.welcomes.update((to, m) for to, m in self.reception.outgoing() if isinstance(m, Welcome))

    def lose(self, name: str) -> None:
        self.reception.undeliverable(name.encode())

    def member_ids(self) -> tuple[MemberId, ...]:
        return self.coordinator.member_ids()

    def waiting_ids(self) -> tuple[MemberId, ...]:
        raise AssertionError("nobody serves joiners meanwhile")

    def command(
        self,
        phase: WeightsPhase,
        version: int,
        payloads: Mapping[MemberId, dict[str, Any]],
        timeout_s: float,
        meanwhile: Callable[[], None] | None = None,
    ) -> dict[MemberId, WeightsReport]:
        command = self.reception.begin(phase, version, payloads)
        for member in sorted(command.missing()):
            self.heard.append((member.name, phase))
            report = WeightsReport(
                command_id=command.id,
                phase=phase,
                version=version,
                error=None,
                is_shared=False,
                probe_logprobs=NO_PROBE,
            )
            self.reception.handle(member.name.encode(), report, 0.0)
        self.reception.end(command)
        return command.reports

    def lost_ids(self) -> tuple[MemberId, ...]:
        return self.reception.lost

    def dismiss(self, member: MemberId, reason: str) -> None:
        self.dismissed.append(member.name)

    def quarantine(self, member: MemberId, reason: str) -> None:
        raise AssertionError(reason)


SLEEP, WAKE = WeightsPhase.SLEEP, WeightsPhase.WAKE


def test_actors_sleep_while_the_learner_trains_and_hold_their_weights_afterwards() -> None:
    control = Control("a", "b")
    with actors_asleep(CONFIG, control, 0):
        assert control.heard == [("a", SLEEP), ("b", SLEEP)]
        control.greet("c")
    assert control.heard[2:] == [("a", WAKE), ("b", WAKE)], "who came meanwhile is awake"
    assert control.coordinator.waiting_for_weights() == ()


def test_who_is_lost_when_it_should_wake_up_is_served_when_it_is_back() -> None:
    """Which wakes it; it would sleep for ever, for all that its heartbeats say."""
    control = Control("a", "b")
    with actors_asleep(CONFIG, control, 0):
        control.lose("a")
    assert control.heard[2:] == [("b", WAKE)]
    control.greet("a")
    assert control.coordinator.waiting_for_weights() == ("a",)
    assert control.dismissed == [] and control.coordinator.members() == ("a", "b")


def test_who_is_lost_and_back_before_it_should_wake_up_does() -> None:
    control = Control("a", "b")
    with actors_asleep(CONFIG, control, 0):
        control.lose("a")
        control.greet("a")
    assert control.heard[2:] == [("a", WAKE), ("b", WAKE)]
    assert control.coordinator.waiting_for_weights() == ()

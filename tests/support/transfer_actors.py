"""Actors without an engine that take real weights over a real gloo group, and fail where a test wants them to.

Each obeys its commands in a thread of its own, as a process would; its weights are a policy's parameters.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from actors.receiver import Receiver
from common.broadcast import Background, join_gloo
from common.types import MemberId, WeightsPhase, WeightsReport
from learner.networks.model import Policy

NO_PROBE = np.empty(0, np.float32)

KILLED, SILENT, FAILS = "killed", "silent", "fails"  # its connections close; it hangs; it reports an error of its own
FORGETS = "forgets"  # it receives all weights and loads none
CUT = "cut"  # its connections close, and are there again at once
BREAKS = "breaks"  # its end of the transfer breaks, every time, and nobody is to blame


class Lost(Exception):
    """This actor answers no more."""


@dataclass
class TransferActor:
    """What one actor does with a command. `fault` strikes at the `at`-th command of `phase`, counted from 0."""

    policy: Policy
    probe: torch.Tensor
    fault: str | None = None
    phase: WeightsPhase = WeightsPhase.UPDATE
    at: int = 0
    receiver: Receiver = field(default_factory=Receiver)
    received: list[WeightsPhase] = field(default_factory=list)

    def obey(self, phase: WeightsPhase, payload: dict[str, Any]) -> tuple[str | None, bool, Any]:
        """(error, whether it is the collective's, log-probs). Raises Lost."""
        strikes = self.fault not in (None, FORGETS) and phase is self.phase and self.received.count(phase) == self.at
        self.received.append(phase)
        if strikes and self.fault != SILENT:
            self.receiver.close()
        if strikes and self.fault == BREAKS:
            self.at += 1
            return "connection closed by peer", True, NO_PROBE
        if strikes and self.fault == FAILS:
            return "no such tensor", False, NO_PROBE
        if strikes:
            raise Lost
        if phase is WeightsPhase.INIT:
            where = (payload["master_address"], payload["master_port"], payload["rank_offset"])
            self.receiver.join(lambda: join_gloo(*where, payload["world_size"], payload["timeout_s"]))
        elif phase is WeightsPhase.UPDATE:
            self._load(payload)
        elif phase is WeightsPhase.RESUME:
            return None, False, self._score()
        is_broken = phase in (WeightsPhase.INIT, WeightsPhase.UPDATE) and self.receiver.problem is not None
        return (self.receiver.problem, True, NO_PROBE) if is_broken else (None, False, NO_PROBE)

    def weights(self) -> dict[str, torch.Tensor]:
        return dict(self.policy.model.named_parameters())

    @torch.no_grad()
    def _load(self, payload: dict[str, Any]) -> None:
        dtype, weights = getattr(torch, payload["dtype_name"]), self.weights()
        for name, tensor in self.receiver.receive(payload["names"], dtype, payload["shapes"], torch.device("cpu")):
            if self.fault != FORGETS:
                weights[name].copy_(tensor)

    @torch.no_grad()
    def _score(self) -> Any:
        ends = torch.tensor([0, len(self.probe)])
        return self.policy(self.probe, ends, torch.tensor([1]), 1.0)[0].numpy()


@dataclass
class LocalActors:
    """The service, as far as publication knows it, with the actors in this process.

    A killed actor is noticed at once, as by a closed connection, and so is a cut one, which is there again for the next
    command; a silent one only by the time-out.
    """

    actors: dict[MemberId, TransferActor] = field(default_factory=dict)
    dismissed: dict[str, str] = field(default_factory=dict)
    quarantined: dict[str, int] = field(default_factory=dict)  # those of them for their weights, and of which version
    served: set[MemberId] = field(default_factory=set)  # who has finished an update and begun no other
    lost: tuple[MemberId, ...] = ()

    def add(self, name: str, number: int, actor: TransferActor) -> TransferActor:
        self.actors[MemberId(name, number)] = actor
        return actor

    def member_ids(self) -> tuple[MemberId, ...]:
        return tuple(sorted(self.actors))

    def waiting_ids(self) -> tuple[MemberId, ...]:
        return tuple(sorted(set(self.actors) - self.served))

    def dismiss(self, member: MemberId, reason: str) -> None:
        self.dismissed[member.name] = reason
        self.actors.pop(member, None)

    def quarantine(self, member: MemberId, reason: str, version: int) -> None:
        self.dismiss(member, reason)
        self.quarantined[member.name] = version

    def lost_ids(self) -> tuple[MemberId, ...]:
        return self.lost

    def command(
        self,
        phase: WeightsPhase,
        version: int,
        payloads: Mapping[MemberId, dict[str, Any]],
        timeout_s: float,
        meanwhile: Callable[[], None] | None = None,
    ) -> dict[MemberId, WeightsReport]:
        reports: dict[MemberId, WeightsReport] = {}
        lost = set(payloads) - set(self.actors)
        started = time.monotonic()
        if phase is WeightsPhase.START:
            self.served -= set(payloads)
        answers = {
            member: Background(lambda member=member: self.actors[member].obey(phase, payloads[member]))
            for member in payloads
            if member in self.actors
        }
        if meanwhile is not None:
            meanwhile()
        for member, answer in answers.items():
            try:
                error, is_shared, probe = answer.result(timeout_s)
            except Lost:
                if self.actors[member].fault == SILENT:
                    time.sleep(max(0.0, timeout_s - (time.monotonic() - started)))
                    continue
                lost.add(member)
                self.served.discard(member)
                if self.actors[member].fault != CUT:
                    del self.actors[member]
                continue
            reports[member] = WeightsReport(
                command_id=0, phase=phase, version=version, error=error, is_shared=is_shared, probe_logprobs=probe
            )
            if phase is WeightsPhase.FINISH and error is None:
                self.served.add(member)
        self.lost = tuple(sorted(lost))
        return reports

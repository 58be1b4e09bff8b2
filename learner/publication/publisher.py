"""Publication: how the learner's policy becomes the next version in every actor.

`Publisher.publish(version)` is a collective over the learner's ranks. Rank 0 leads the actors through the phases of
WeightsPhase; the other ranks take part in gathering the shards. No actor enters a transfer before all members have
acknowledged the phase before, and every wait ends after `weights.timeout_s` and names who is missing. An actor that
fails is dropped and the publication is repeated for the rest with a new transfer group.

The transfer itself is vLLM's trainer-side engine: `nccl` is vLLM's own, `gloo` for CPUs is
learner/publication/transfer.py.
"""

import logging
import socket
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from common.config import Config, TransferBackend
from common.types import WeightsPhase, WeightsReport
from learner.networks.model import Policy
from learner.publication.transfer import GlooTrainerInitInfo, PolicySource

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3


class PublishError(RuntimeError):
    """No actor could be brought to the new version; the message says why."""


class ActorControl(Protocol):
    """What publication needs of the service (learner/rollouts/service.py)."""

    def members(self) -> tuple[str, ...]: ...

    def command(
        self, phase: WeightsPhase, version: int, payloads: dict[str, dict[str, Any]], timeout_s: float
    ) -> dict[str, WeightsReport]: ...

    def quarantine(self, actor: str, reason: str) -> None: ...


@dataclass
class ControlClient:
    """vLLM's weight-sync client over our control messages, for the members of one transfer group.

    Structural implementation of VLLMWeightSyncClient. `ranks_per_actor` engine workers of each actor take consecutive
    ranks after the learner's. Raises PublishError as soon as one member fails: the group is then unusable.
    """

    control: ActorControl | None  # None on ranks other than 0, which never call it
    members: tuple[str, ...]
    ranks_per_actor: int
    timeout_s: float
    version: int = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        first = init_info["rank_offset"]
        self._all(
            WeightsPhase.INIT,
            {
                actor: init_info | {"rank_offset": first + index * self.ranks_per_actor}
                for index, actor in enumerate(self.members)
            },
        )

    def start_weight_update(self) -> None:
        self._all(WeightsPhase.START)

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        assert isinstance(update_info, dict)
        self._all(WeightsPhase.UPDATE, dict.fromkeys(self.members, update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all(WeightsPhase.FINISH)

    def _all(self, phase: WeightsPhase, payloads: dict[str, dict[str, Any]] | None = None) -> None:
        assert self.control is not None
        reports = self.control.command(
            phase, self.version, payloads or {actor: {} for actor in self.members}, self.timeout_s
        )
        problems = [f"{actor}: no answer" for actor in self.members if actor not in reports]
        problems += [f"{actor}: {report.error}" for actor, report in reports.items() if report.error]
        if problems:
            raise PublishError(f"{phase} of version {self.version} failed ({'; '.join(problems)})")


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What one publication cost and whom it reached."""

    version: int
    members: tuple[str, ...]
    seconds: float
    probe_difference: float  # largest |log-prob difference| over members and probe tokens


@dataclass
class Publisher:
    """Publishes versions to all members. `control` is None on ranks other than 0.

    A version names one set of weights: who joins late gets what the others got, also when the policy has moved on
    since. For that a copy is kept where it can happen, with weights.publish_every > 1 or staleness.exact: one set of
    weights in host memory, shared out over the ranks like the policy. It is the smallest mend: joiners that wait for
    the next publication would deadlock a run without other actors, and a version in between would break the count
    that the staleness bound rests on. After a resume, the version under way is the weights of the checkpoint.
    """

    config: Config
    policy: Policy
    control: ActorControl | None
    rank: int
    probe_token_ids: torch.Tensor  # int64 [probe tokens]
    _engine: TrainerWeightTransferEngine[Any] | None = field(default=None, init=False)
    _client: ControlClient | None = field(default=None, init=False)
    _source: PolicySource = field(init=False)
    # Members of the last publication whose probe agreed, and at which version
    _agreed: dict[str, int] = field(default_factory=dict, init=False)
    _version: int | None = field(default=None, init=False)  # the last one that was published
    _expected: np.ndarray[Any, Any] = field(init=False)  # its probe

    def __post_init__(self) -> None:
        moves_on = self.config.weights.publish_every > 1 or self.config.staleness.exact
        self._source = PolicySource(self.policy, getattr(torch, self.config.model.dtype.value), keeps=moves_on)

    def publish(self, version: int) -> Publication:
        """Brings every member to `version`: the policy's present weights, or, when it is the version that was
        published last, those of that time. Called by all ranks together.

        With no actor connected it reaches nobody: whoever comes later is served before it gets a lease. Raises
        PublishError on every rank when MAX_ATTEMPTS attempts failed.
        """
        started = time.monotonic()
        if version != self._version:
            self._source.hold()
            self._expected, self._version = self._own_probe(), version
        for attempt in range(1, MAX_ATTEMPTS + 1):
            if self._agree(None if self.control is None or self.control.members() else "no actor is connected"):
                logger.warning("version %d is published to nobody: no actor is connected", version)
                self.shutdown()
                return Publication(
                    version=version, members=(), seconds=time.monotonic() - started, probe_difference=0.0
                )
            problem = self._attempt(version)
            if problem is None:
                break
            if attempt == MAX_ATTEMPTS:
                raise PublishError(f"version {version} was not published in {attempt} attempts: {problem}")
        members, difference = self._finish(version, self._expected)
        return Publication(
            version=version,
            members=members,
            seconds=time.monotonic() - started,
            probe_difference=difference,
        )

    def shutdown(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None

    def _attempt(self, version: int) -> str | None:
        """One try on all ranks; None when it worked, else the problem (the same on all ranks)."""
        problem = None
        try:
            self._prepare(version)
        except PublishError as error:
            problem = str(error)
        problem = self._agree(problem)
        if problem is not None:
            return problem
        assert self._engine is not None
        self._source.begin_pass()
        try:
            self._engine.send_weights()
        except (PublishError, RuntimeError) as error:  # gloo and nccl report a lost peer as RuntimeError
            problem = str(error)
            logger.warning("publication of version %d: %s", version, problem)
            self.shutdown()
        self._source.finish_pass()
        return self._agree(problem)

    def _prepare(self, version: int) -> None:
        """Pauses all members and, when they are not the ones of the last time, builds a new transfer group."""
        if self.control is None:
            if self._engine is None:
                self._engine = self._trainer_engine(ControlClient(None, (), 1, 0.0), port=0)
            return
        members = self._paused_members(version)
        if self._engine is not None and self._client is not None and self._client.members == members:
            self._client.version = version
            return
        self.shutdown()
        weights = self.config.weights
        self._client = ControlClient(
            self.control, members, self.config.actors.tensor_parallel_size, weights.timeout_s, version
        )
        try:
            self._engine = self._trainer_engine(self._client, port=self._rendezvous_port())
        except RuntimeError as error:
            raise PublishError(f"no transfer group with {', '.join(members)}: {error}") from error

    def _paused_members(self, version: int) -> tuple[str, ...]:
        assert self.control is not None
        members = self.control.members()
        reports = self.control.command(
            WeightsPhase.PAUSE, version, {actor: {} for actor in members}, self.config.weights.timeout_s
        )
        paused = tuple(sorted(actor for actor, report in reports.items() if report.error is None))
        if not paused:
            raise PublishError(
                f"no actor paused for version {version} (asked: {', '.join(members) or 'none connected'})"
            )
        return paused

    def _trainer_engine(self, client: ControlClient, port: int) -> TrainerWeightTransferEngine[Any]:
        host, weights = self.config.transport.host, self.config.weights
        world_size = 1 + len(client.members) * client.ranks_per_actor
        info: TrainerInitInfo
        if weights.backend is TransferBackend.gloo:
            info = GlooTrainerInitInfo(host, port, world_size, weights.timeout_s, rank=self.rank)
        else:
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            info = NCCLTrainerInitInfo(host, port, world_size, rank=self.rank)
        return WeightTransferTrainerFactory.trainer_init(info, client=client, source=self._source)

    def _rendezvous_port(self) -> int:
        """0 lets the gloo store pick one; nccl wants a number before it listens."""
        if self.config.weights.backend is TransferBackend.gloo:
            return 0
        with socket.socket() as probe:
            probe.bind((self.config.transport.host, 0))
            return int(probe.getsockname()[1])

    def _finish(self, version: int, expected: np.ndarray[Any, Any]) -> tuple[tuple[str, ...], float]:
        """Resumes generation and compares every member's probe with the learner's own."""
        if self.control is None or self._client is None:
            return (), 0.0
        weights, members = self.config.weights, self._client.members
        reports = self.control.command(
            WeightsPhase.RESUME, version, {actor: {} for actor in members}, weights.timeout_s
        )
        differences: dict[str, float] = {}
        for actor, report in reports.items():
            if report.error is None and len(report.probe_logprobs) == len(expected):
                differences[actor] = float(np.abs(report.probe_logprobs - expected).max())
        good = tuple(actor for actor in members if differences.get(actor, np.inf) <= weights.probe_tolerance)
        for actor in members:
            if actor in differences and actor not in good:
                self.control.quarantine(actor, self._disagreement(actor, version, differences[actor]))
            elif actor not in good:
                report = reports.get(actor)
                problem = "it did not answer" if report is None else report.error or "it scored another sequence"
                self.control.quarantine(actor, f"no log-probs of the probe after version {version}: {problem}")
        self._agreed = dict.fromkeys(good, version)
        return good, max(differences.values(), default=0.0)

    def _disagreement(self, actor: str, version: int, difference: float) -> str:
        """What it means that a member's probe differs: it computes another function, or lost a tensor on the way."""
        tolerance = f"(weights.probe_tolerance is {self.config.weights.probe_tolerance:g})"
        if actor in self._agreed:
            return (
                f"its log-probs of the probe agreed with the learner's at version {self._agreed[actor]} and differ by "
                f"{difference:.3g} nats after version {version} {tolerance}: a tensor was not loaded"
            )
        cause = "its engine computes this model otherwise than the learner, or in another dtype"
        return (
            f"its log-probs of the probe never agreed with the learner's: they differ by {difference:.3g} nats at "
            f"version {version}, the first that it was sent {tolerance}: {cause}"
            + (", or a tensor was not loaded" if version > 0 else "")
        )

    def _own_probe(self) -> np.ndarray[Any, Any]:
        """The learner's log-probs of the probe sequence at temperature 1 (a collective): float32 [tokens - 1]."""
        tokens = self.probe_token_ids
        with torch.no_grad():
            logprobs, _ = self.policy(tokens, torch.tensor([0, len(tokens)]), torch.tensor([1]), temperature=1.0)
        return logprobs.float().cpu().numpy()

    def _agree(self, problem: str | None) -> str | None:
        """Rank 0's opinion on all ranks."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return problem
        flag = torch.tensor([problem is not None], dtype=torch.int64)
        dist.broadcast(flag, src=0)
        if not flag.item():
            return None
        return problem or "rank 0 could not reach the actors (see its log)"

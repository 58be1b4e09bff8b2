"""Ways for a bucket from rank 0 into every actor. The other end is actors/weights.py.

A transfer lives as long as its members stay the same, and is replaced after any failure; a Line sees to that. Only
rank 0 has any.
"""

import base64
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

import torch
from torch.distributed import TCPStore

from common.addresses import own_address
from common.broadcast import BrokenTransfer, GlooGroup, Group, NcclGroup, nccl_unique_id
from common.config import Config, TransferBackend
from common.types import MemberId, WeightsPhase
from learner.publication.buckets import Bucket
from learner.publication.control import Channel, Payload, PublishError
from learner.publication.ipc import IpcTransfer


class Transfer(Protocol):
    """What a backend has to do. Both calls raise PublishError, through Channel.run, when somebody did not get it."""

    def meet(self, channel: Channel) -> None:
        """Phase INIT with the channel's members; once, before anything is sent."""
        ...

    def send(self, channel: Channel, bucket: Bucket) -> None:
        """Phase UPDATE: returns when all members have loaded the bucket, whose memory is then free."""
        ...

    def close(self) -> None:
        """Ends what is under way. From any thread, any number of times; does not block."""
        ...


def transfer_for(config: Config) -> Transfer:
    """The transfer of weights.backend, not met yet."""
    match config.transfer_backend:
        case TransferBackend.gloo:
            return GlooTransfer(config)
        case TransferBackend.nccl:
            return NcclTransfer(config)
        case TransferBackend.ipc:
            return IpcTransfer(torch.device("cuda", torch.cuda.current_device()))
        case TransferBackend.auto:
            raise AssertionError("Config.transfer_backend is decided")


@dataclass
class Line:
    """The transfer to one group of members, made anew when they are not those of the last time."""

    new_transfer: Callable[[], Transfer]
    members: tuple[MemberId, ...] = field(default=(), init=False)  # who has met in it
    _transfer: Transfer | None = field(default=None, init=False)

    def meet(self, channel: Channel) -> None:
        """Phase INIT, if the channel's members have not met. Raises PublishError when they do not."""
        if self._transfer is not None and self.members == channel.members:
            return
        self.close()
        self._transfer, self.members = self.new_transfer(), channel.members
        self._transfer.meet(channel)

    def send(self, channel: Channel, bucket: Bucket) -> None:
        """Phase UPDATE, to those who have met. Raises PublishError when somebody did not get it."""
        transfer = self._transfer
        if transfer is None:
            raise PublishError("the transfer was closed")
        transfer.send(channel, bucket)

    def close(self) -> None:
        """Ends the transfer; whoever meets next gets a new one."""
        transfer, self._transfer, self.members = self._transfer, None, ()
        if transfer is not None:
            transfer.close()


class _BroadcastTransfer(ABC):
    """One group of rank 0 and all engine workers; those of each actor take consecutive ranks."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._group: Group | None = None

    def meet(self, channel: Channel) -> None:
        ranks, timeout_s = self._config.actors.tensor_parallel_size, channel.deadlines.collective_s
        size = 1 + len(channel.members) * ranks
        invitation, join = self._invite(size, timeout_s)
        invitation |= {"world_size": size, "timeout_s": timeout_s}
        payloads = {
            member: invitation | {"rank_offset": 1 + index * ranks} for index, member in enumerate(channel.members)
        }

        def meet() -> None:
            self._group = join()

        channel.run(WeightsPhase.INIT, payloads, meet)

    def send(self, channel: Channel, bucket: Bucket) -> None:
        def broadcast() -> None:
            assert self._group is not None
            try:
                self._group.broadcast(self._on_its_way(bucket.data))
            except BrokenTransfer:
                self.close()  # before the reports are waited for: it frees the peers
                raise

        channel.run(WeightsPhase.UPDATE, dict.fromkeys(channel.members, bucket.announcement), broadcast)

    def close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.close()

    @abstractmethod
    def _invite(self, size: int, timeout_s: float) -> tuple[Payload, Callable[[], Group]]:
        """What the workers need to know to come, and rank 0's own way in, which waits for them."""

    @abstractmethod
    def _on_its_way(self, data: torch.Tensor) -> torch.Tensor:
        """The data where the group can send it from."""


class GlooTransfer(_BroadcastTransfer):
    """Over CPUs. Rank 0 listens at the advertised address, at a port of its own for every group."""

    def _invite(self, size: int, timeout_s: float) -> tuple[Payload, Callable[[], Group]]:
        host = own_address(self._config.transport)
        # Listens before the actors are told where to go, so none of them can come too early.
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
        invitation = {"master_address": host, "master_port": store.port}
        return invitation, lambda: GlooGroup(store, 0, size, host, timeout_s)

    def _on_its_way(self, data: torch.Tensor) -> torch.Tensor:
        return data.cpu()


class NcclTransfer(_BroadcastTransfer):
    """Over GPUs. The actors get NCCL's id with the invitation, so there is no rendezvous besides NCCL's own."""

    def _invite(self, size: int, timeout_s: float) -> tuple[Payload, Callable[[], Group]]:
        unique_id, device = nccl_unique_id(), torch.device("cuda", torch.cuda.current_device())
        invitation = {"unique_id": base64.b64encode(unique_id).decode()}
        return invitation, lambda: NcclGroup(unique_id, 0, size, device, timeout_s)

    def _on_its_way(self, data: torch.Tensor) -> torch.Tensor:
        return data

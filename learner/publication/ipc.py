"""Weights for actors on the learner's own GPU, which NCCL refuses to serve: they read each bucket in place.

Of one learner rank, whose GPU all actors share. Nothing is sent but where a bucket is (common/ipc.py); an actor copies
it on the GPU before it answers. The other end is actors/ipc.py.
"""

import torch

from common import ipc
from common.types import WeightsPhase
from learner.publication.buckets import Bucket
from learner.publication.control import Channel


class IpcTransfer:
    """`device` is the learner's GPU. An actor on another one is dismissed when they meet."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def meet(self, channel: Channel) -> None:
        uuid = ipc.gpu_uuid(self._device)
        channel.run(WeightsPhase.INIT, {member: {"gpu_uuid": uuid} for member in channel.members})

    def send(self, channel: Channel, bucket: Bucket) -> None:
        with torch.cuda.device(self._device):  # it runs in a thread of its own, which starts with the first GPU
            channel.run(
                WeightsPhase.UPDATE,
                {member: bucket.announcement | {"buffer": ipc.export(bucket.data)} for member in channel.members},
            )
            torch.cuda.ipc_collect()  # what readers of earlier buckets let go of only after they had answered

    def close(self) -> None:
        """Nothing is under way between two calls, and a call ends with the actors' time limit."""

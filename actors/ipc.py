"""The actor's side of weight transfer on a GPU that it shares with the learner. The other end is
learner/publication/ipc.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo

from actors.weights import BucketInfo, ReloadingEngine
from common import ipc


@dataclass
class IpcInitInfo(WeightTransferInitInfo):
    gpu_uuid: str  # of the learner's GPU


@dataclass
class IpcBucketInfo(BucketInfo):
    buffer: dict[str, Any]  # where the bucket is: common/ipc.py


class IpcEngine(ReloadingEngine[IpcInitInfo, IpcBucketInfo]):
    """Copies each bucket out of the learner's memory. There is no group, so that no broken one can be kept."""

    init_info_cls = IpcInitInfo
    update_info_cls = IpcBucketInfo

    def init_transfer_engine(self, init_info: IpcInitInfo) -> None:
        """Raises ValueError on another GPU than the learner's."""
        own = ipc.gpu_uuid(self.device)
        if own != init_info.gpu_uuid:
            raise ValueError(
                f"this actor computes on GPU {own} and the learner on {init_info.gpu_uuid}, but with "
                "actors.placement=shared it must be the same: start it there (CUDA_VISIBLE_DEVICES), or set "
                "actors.placement=separate"
            )

    def receive_weights(self, update_info: IpcBucketInfo) -> None:
        """The reload keeps tensors until their layer is complete, and the learner's memory is free when this is over,
        so they are a copy's."""
        dtype = getattr(torch, update_info.dtype_name)
        outlines = [torch.empty(shape, dtype=dtype, device="meta") for shape in update_info.shapes]
        pieces = ipc.attach(update_info.buffer, self.device).clone().split([outline.nbytes for outline in outlines])
        tensors = [piece.view(dtype).view(like.shape) for piece, like in zip(pieces, outlines, strict=True)]
        self.model.load_weights(list(zip(update_info.names, tensors, strict=True)))

    def shutdown(self) -> None:
        """There is nothing to leave."""

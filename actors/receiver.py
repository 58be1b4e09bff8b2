"""An actor's end of a transfer group: joins it, takes buckets from it, and keeps what broke it.

A broken transfer raises nothing here: an exception of one of several engine workers would leave the answers of the
others unread. It is kept as `problem`, and the actor asks for it after each phase in which it can happen.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from common.broadcast import BrokenTransfer, Buffers, Group


class Receiver:
    """Of one worker. At most one group at a time; none after a problem, which only the next group ends."""

    def __init__(self) -> None:
        self.problem: str | None = None
        self._group: Group | None = None
        self._buffers = Buffers()

    def join(self, make_group: Callable[[], Group]) -> None:
        """Leaves the group before and joins a new one."""
        self.close()
        self.problem = None
        try:
            self._group = make_group()
        except BrokenTransfer as error:
            self.problem = str(error)

    def receive(
        self, names: list[str], dtype: torch.dtype, shapes: list[list[int]], device: torch.device
    ) -> list[tuple[str, Tensor]]:
        """One bucket, cut into tensors that share its memory, which is on `device`, where the group computes.

        Empty when the transfer broke. Raises RuntimeError when there is no group.
        """
        if self.problem is not None:
            return []
        if self._group is None:
            raise RuntimeError("weights were announced before this worker joined a transfer group")
        outlines = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
        buffer = self._buffers.take(sum(outline.nbytes for outline in outlines), device)
        try:
            self._group.broadcast(buffer)
        except BrokenTransfer as error:
            self.problem = str(error)
            self.close()  # so that the others do not wait for this worker
            return []
        pieces = buffer.split([outline.nbytes for outline in outlines])
        tensors = [piece.view(dtype).view(like.shape) for piece, like in zip(pieces, outlines, strict=True)]
        return list(zip(names, tensors, strict=True))

    def close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.close()

"""What travels at a publication: tensors in order, gathered into whole buckets before any of it is sent.

A gather is a collective of the learner's ranks, and sending is one of rank 0 and the actors. Interleaved, on side
streams and behind one another's kernels, they deadlock with more than two ranks. So a bucket is gathered on the
default stream of every rank, in lockstep, and rank 0 waits for it before it hands it on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from common.broadcast import Buffers
from learner.networks.model import Policy, TensorSpec

BUCKET_BYTES = 64 * 2**20


class Source(Protocol):
    """Where the tensors of a publication come from. Both calls agree in names, types, shapes and order."""

    def specs(self) -> list[TensorSpec]:
        """What a pass yields, known without a gather."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """One pass: full tensors where the policy computes. Each step may be a collective of all ranks."""
        ...


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Consecutive tensors of one type, laid end to end: a copy, which no parameter shares."""

    specs: tuple[TensorSpec, ...]
    data: Tensor  # uint8 [bytes], where the policy computes; complete, also on the device

    @property
    def announcement(self) -> dict[str, Any]:
        """What an actor needs to cut it apart; BucketInfo of actors/weights.py."""
        return {
            "names": [spec.name for spec in self.specs],
            "dtype_name": str(self.specs[0].dtype).removeprefix("torch."),
            "shapes": [list(spec.shape) for spec in self.specs],
        }


def gather(source: Source, bucket_bytes: int, buffers: Buffers | None) -> Iterator[Bucket | None]:
    """One pass over the source in buckets; a collective, step by step. None on ranks that do not send.

    `buffers` is where the sender's buckets get their memory from; the others have none.

    Every rank may stop after any bucket, if all do.
    """
    tensors = source.tensors()
    for specs in plan(source.specs(), bucket_bytes):
        data, filled = None, 0
        for spec in specs:
            name, tensor = next(tensors)
            found = (name, tensor.dtype, tuple(tensor.shape))
            assert found == (spec.name, spec.dtype, spec.shape), f"announced {spec}, gathered {found}"
            if buffers is not None:
                piece = tensor.detach().contiguous().view(-1).view(torch.uint8)
                data = buffers.take(sum(map(_num_bytes, specs)), piece.device) if data is None else data
                data[filled : filled + len(piece)].copy_(piece)  # at once, so that no tensor is kept beside the bucket
                filled += len(piece)
        bucket = Bucket(specs=tuple(specs), data=data) if data is not None else None
        if tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()
        yield bucket


def plan(specs: Sequence[TensorSpec], bucket_bytes: int) -> list[list[TensorSpec]]:
    """Runs of consecutive tensors: one type each, at most `bucket_bytes` unless a single tensor is larger."""
    buckets: list[list[TensorSpec]] = []
    for _, run in groupby(specs, key=lambda spec: spec.dtype):
        filled = bucket_bytes + 1
        for spec in run:
            if filled + _num_bytes(spec) > bucket_bytes:
                buckets.append([])
                filled = 0
            buckets[-1].append(spec)
            filled += _num_bytes(spec)
    return buckets


def _num_bytes(spec: TensorSpec) -> int:
    return spec.dtype.itemsize * prod(spec.shape)


class PolicySource:
    """The policy's parameters under their checkpoint names, in the type in which the engine holds them."""

    def __init__(self, policy: Policy, dtype: torch.dtype, keeps: bool) -> None:
        """`keeps`: passes give the weights as of the last `hold`, of which a copy is kept; else as they are."""
        self._policy = policy
        self._dtype = dtype
        self._keeps = keeps
        self._held: HeldWeights | None = None

    def specs(self) -> list[TensorSpec]:
        return self._policy.hf_specs(self._dtype)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._policy.named_hf_parameters(self._dtype) if self._held is None else self._held)

    def hold(self) -> None:
        """From here on, passes give what the policy is now."""
        if self._keeps:
            self._held = None  # never two copies at once
            self._held = HeldWeights(self._policy, self._dtype)


class HeldWeights:
    """A copy in host memory of what the policy trains: each rank's own shards, in the type in which they travel.

    Of adapters in their own type, because it is their product that is rounded.
    """

    @torch.no_grad()
    def __init__(self, policy: Policy, dtype: torch.dtype) -> None:
        self._policy, self._dtype = policy, dtype
        self._held: dict[str, Tensor] = {}
        for name, parameter in policy.named_parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            kept_as = dtype if policy.adapter is None else parameter.dtype
            self._held[name] = local.detach().to("cpu", kept_as, copy=True)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """As Policy.named_hf_parameters: the full tensors, where the policy computes; a collective when sharded."""
        return self._policy.named_hf_parameters(self._dtype, self._held)

"""What travels at a publication, and our transfer engine for CPUs: the learner's side of actors/weights.py.

vLLM's trainer-side API wants a `WeightSource` (the policy's parameters) and a `TrainerWeightTransferEngine`. For GPUs
vLLM has one, `nccl`; `gloo` for CPUs is ours, registered under vLLM's own factory by importing this module.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from typing import ClassVar

import numpy as np
import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore
from torch.distributed.tensor import DTensor
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from learner.networks.model import Policy

BUCKET_BYTES = 64 * 2**20


class PolicySource(WeightSource):
    """The policy's parameters under their checkpoint names, gathered one at a time (a collective).

    Every rank has to walk through all of them. When a transfer fails on rank 0 half-way, `finish_pass` gathers the
    rest there, or the other ranks would wait for it for ever.
    """

    def __init__(self, policy: Policy, dtype: torch.dtype, keeps: bool) -> None:
        """`keeps`: passes send the weights as of the last `hold`, of which a copy is kept; else as they are."""
        self._policy = policy
        self._dtype = dtype  # of the tensors on their way: the engine's own
        self._keeps = keeps
        self._held: HeldWeights | None = None
        self._pass: Iterator[tuple[str, torch.Tensor]] = iter(())

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(spec.name, spec.dtype, spec.shape) for spec in self._policy.hf_specs(self._dtype)]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return (item for item in self._pass)  # a transfer that gives up closes this, not the pass

    def hold(self) -> None:
        """From here on, passes send what the policy is now."""
        if self._keeps:
            self._held = None  # never two copies at once
            self._held = HeldWeights(self._policy, self._dtype)

    def begin_pass(self) -> None:
        self._pass = iter(self._policy.named_hf_parameters(self._dtype) if self._held is None else self._held)

    def finish_pass(self) -> None:
        for _ in self._pass:
            pass


class HeldWeights:
    """A copy of the policy's weights in host memory: each rank's own shards, in the type in which they travel."""

    @torch.no_grad()
    def __init__(self, policy: Policy, dtype: torch.dtype) -> None:
        self._policy = policy
        self._shards: list[tuple[str, torch.Tensor, torch.Tensor]] = []  # name, parameter, copy of this rank's shard
        for name, parameter in policy.model.named_parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            self._shards.append((name, parameter, local.detach().to("cpu", dtype, copy=True)))

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As Policy.named_hf_parameters: the full tensors, where the policy computes; a collective when sharded."""
        yield from self._policy.as_stored(self._gathered())

    def _gathered(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter, local in self._shards:
            if isinstance(parameter, DTensor):
                whole = DTensor.from_local(
                    local,
                    parameter.device_mesh,
                    parameter.placements,
                    run_check=False,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
                yield name, whole.full_tensor()
            else:
                yield name, local.to(parameter.device)


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """Where rank 0 listens, and how many processes will come (itself included)."""

    backend: ClassVar[str] = "gloo"

    master_address: str
    master_port: int
    world_size: int
    timeout_s: float


class GlooTrainerEngine(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """Rank 0 broadcasts byte buckets over gloo; the counterpart of actors/weights.py."""

    init_info_cls = GlooTrainerInitInfo
    source: WeightSource

    def __init__(self, *, client: VLLMWeightSyncClient, source: WeightSource, is_sender: bool) -> None:
        super().__init__(client=client, source=source, is_sender=is_sender)
        self._store: TCPStore | None = None
        self._group: ProcessGroupGloo | None = None

    @classmethod
    def trainer_init(
        cls,
        init_info: GlooTrainerInitInfo,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource | None = None,
    ) -> "GlooTrainerEngine":
        assert source is not None
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        if engine.is_sender:
            engine._meet(init_info)
        return engine

    def send_weights(self) -> None:
        metadata = self.source.metadata()
        if not self.is_sender:
            for _ in self.source:
                pass
            return
        sizes = _bucket_sizes(metadata)
        announcement = {
            "names": [meta.name for meta in metadata],
            "dtype_names": [str(meta.dtype).removeprefix("torch.") for meta in metadata],
            "shapes": [list(meta.shape) for meta in metadata],
            "bucket_sizes": sizes,
        }
        self.client.start_weight_update()
        with ThreadPoolExecutor(max_workers=1) as executor:
            loading = executor.submit(self.client.update_weights, announcement)
            try:
                self._broadcast(sizes)
            finally:
                loading.result()  # the client's own error says more than a broken connection
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        self._group = self._store = None

    def _meet(self, info: GlooTrainerInitInfo) -> None:
        timeout = timedelta(seconds=info.timeout_s)
        # Listening starts before the actors are told where to go, so none of them can come too early.
        self._store = TCPStore(
            info.master_address,
            info.master_port,
            info.world_size,
            is_master=True,
            wait_for_workers=False,
            timeout=timeout,
        )
        worker_info = {
            "master_address": info.master_address,
            "master_port": self._store.port,
            "rank_offset": 1,
            "world_size": info.world_size,
            "timeout_s": info.timeout_s,
        }
        with ThreadPoolExecutor(max_workers=1) as executor:
            joining = executor.submit(self.client.init_weight_transfer_engine, worker_info)
            try:
                self._group = ProcessGroupGloo(PrefixStore("weights", self._store), 0, info.world_size, timeout)
            finally:
                joining.result()

    def _broadcast(self, sizes: list[int]) -> None:
        assert self._group is not None
        parameters = iter(self.source)
        for size in sizes:
            flat = [next(parameters)[1].detach().cpu().contiguous().view(-1).view(torch.uint8) for _ in range(size)]
            self._group.broadcast(torch.cat(flat), 0).wait()


def _bucket_sizes(metadata: list[ParamMeta]) -> list[int]:
    """Number of consecutive parameters in each bucket: one dtype each, at most BUCKET_BYTES unless one is larger."""
    sizes: list[int] = []
    for _, run in groupby(metadata, key=lambda meta: meta.dtype):
        filled = BUCKET_BYTES + 1
        for meta in run:
            num_bytes = meta.dtype.itemsize * int(np.prod(meta.shape, dtype=np.int64))
            if filled + num_bytes > BUCKET_BYTES:
                sizes.append(0)
                filled = 0
            sizes[-1] += 1
            filled += num_bytes
    return sizes


if "gloo" not in WeightTransferTrainerFactory._registry:
    WeightTransferTrainerFactory.register_engine("gloo", GlooTrainerEngine)

"""The actor's side of weight transfer over gloo, for CPUs; on GPUs vLLM's own nccl engine takes its place.

vLLM calls `register_gloo` through its plugin entry point in every process that it spawns, and the worker process then
builds the engine when the actor was started with `weights.backend: gloo`. The learner's side is
learner/publication/transfer.py; the two agree on the fields of GlooInitInfo and GlooUpdateInfo, which travel as plain
dictionaries.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where to meet: the learner listens at master_address:master_port and is rank 0 of world_size."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """What comes: parameters in order, sent as one byte buffer per bucket of consecutive parameters."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    bucket_sizes: list[int]  # number of parameters in each bucket


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Receives weights from rank 0 of a gloo group and loads them through vLLM's layer-wise reload."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    _group: ProcessGroupGloo | None = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        self.shutdown()
        rank = init_info.rank_offset + self.parallel_config.rank
        timeout = timedelta(seconds=init_info.timeout_s)
        store = TCPStore(
            init_info.master_address,
            init_info.master_port,
            init_info.world_size,
            is_master=False,
            timeout=timeout,
        )
        self._group = ProcessGroupGloo(PrefixStore("weights", store), rank, init_info.world_size, timeout)

    def start_weight_update(self) -> None:
        _forget_packed_experts(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        if self._group is None:
            raise RuntimeError("weights were announced before this worker joined a transfer group")
        position = 0
        for size in update_info.bucket_sizes:
            span = slice(position, position + size)
            parameters = list(
                zip(
                    update_info.names[span],
                    update_info.dtype_names[span],
                    update_info.shapes[span],
                    strict=True,
                )
            )
            self.model.load_weights(self._receive_bucket(parameters))
            position += size

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        _refresh_tied_heads(self.model)

    def shutdown(self) -> None:
        self._group = None

    def _receive_bucket(self, parameters: list[tuple[str, str, list[int]]]) -> list[tuple[str, torch.Tensor]]:
        """One broadcast from rank 0, cut into tensors that share its memory."""
        empty = [torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for _, dtype, shape in parameters]
        num_bytes = [tensor.numel() * tensor.element_size() for tensor in empty]
        buffer = torch.empty(sum(num_bytes), dtype=torch.uint8)
        assert self._group is not None
        self._group.broadcast(buffer, 0).wait()
        pieces = buffer.split(num_bytes)
        return [
            (name, piece.view(like.dtype).view(like.shape).to(self.device))
            for (name, _, _), like, piece in zip(parameters, empty, pieces, strict=True)
        ]


def _forget_packed_experts(model: torch.nn.Module) -> None:
    """Lets a mixture's experts be packed again when they are reloaded.

    The CPU's kernel multiplies a packed copy of the experts, but vLLM packs only where there is no kernel yet: an
    update would put plain weights in the packed ones' place.
    """
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            module.quant_method.moe_kernel = None


def _refresh_tied_heads(model: torch.nn.Module) -> None:
    """Prepares output layers that share the reloaded embedding's weight again, whatever the model calls them.

    On CPUs the output layer keeps a prepacked copy of its weight. A reload writes the new embedding into the shared
    weight but skips the tied layer, because the checkpoint has no tensor for it, and generation would silently go on
    with the old copy.
    """
    tables = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    embeddings = {table.weight.data_ptr() for table in tables if not isinstance(table, ParallelLMHead)}
    for head in tables:
        if isinstance(head, ParallelLMHead) and head.weight.data_ptr() in embeddings:
            head.quant_method.process_weights_after_loading(head)


def register_gloo() -> None:
    """Makes `weights.backend: gloo` known to vLLM in this process; called by vLLM's plugin loader."""
    if "gloo" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("gloo", "actors.weights", "GlooWeightTransferEngine")

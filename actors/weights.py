"""The actor's side of weight transfer: what vLLM's workers do in the phases of a publication.

vLLM imports this module in the processes that hold the model, for TransferWorker, before they build the engine of
weights.backend, which vLLM then knows by name. The learner's side is learner/publication/transfer.py; the two agree on
the fields of the Info classes, which travel as plain dictionaries.
"""

import base64
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from actors import draws
from actors.engine import TRANSFER_ENGINE
from actors.receiver import Receiver
from common.broadcast import Group, NcclGroup, join_gloo
from common.config import TransferBackend

InitInfo = TypeVar("InitInfo", bound=WeightTransferInitInfo)
UpdateInfo = TypeVar("UpdateInfo", bound=WeightTransferUpdateInfo)


@dataclass
class BucketInfo(WeightTransferUpdateInfo):
    """One bucket: consecutive tensors of one type, laid end to end."""

    names: list[str]
    dtype_name: str
    shapes: list[list[int]]


@dataclass
class BroadcastInitInfo(WeightTransferInitInfo):
    """A transfer group: the learner is rank 0 of world_size, this actor's workers follow from rank_offset on."""

    rank_offset: int
    world_size: int
    timeout_s: float  # of one operation


@dataclass
class GlooInitInfo(BroadcastInitInfo):
    master_address: str  # where the learner listens
    master_port: int


@dataclass
class NcclInitInfo(BroadcastInitInfo):
    unique_id: str  # base64


class ReloadingEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads what comes through vLLM's layer-wise reload, whatever way it comes.

    What a CPU's kernels hold besides the parameters has to be made anew. A GPU's hold nothing besides, and vLLM keeps
    the addresses that its graphs have captured, so there nothing may be touched.
    """

    @property
    def problem(self) -> str | None:
        """What broke the transfer group, which is nobody's fault here."""
        return None

    def start_weight_update(self) -> None:
        if current_platform.is_cpu():
            _forget_packed_experts(self.model)
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        """Also of an update that was broken off: what had come is loaded, the next update starts from there."""
        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            _refresh_tied_heads(self.model)


class BroadcastEngine(ReloadingEngine[InitInfo, BucketInfo]):
    """Takes buckets from rank 0 of a transfer group."""

    update_info_cls = BucketInfo

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._receiver = Receiver()

    @property
    def problem(self) -> str | None:
        return self._receiver.problem

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self._receiver.join(lambda: self._make_group(init_info))

    def receive_weights(self, update_info: BucketInfo) -> None:
        try:
            dtype = getattr(torch, update_info.dtype_name)
            if tensors := self._receiver.receive(update_info.names, dtype, update_info.shapes, self.device):
                self.model.load_weights(tensors)
        except BaseException:
            self._receiver.close()  # so that the others do not wait for this worker
            raise

    def shutdown(self) -> None:
        self._receiver.close()

    @abstractmethod
    def _make_group(self, info: InitInfo) -> Group:
        """Meets the others. Raises BrokenTransfer when they do not come, another error when this worker cannot."""


class GlooEngine(BroadcastEngine[GlooInitInfo]):
    """For CPUs."""

    init_info_cls = GlooInitInfo

    def _make_group(self, info: GlooInitInfo) -> Group:
        rank = info.rank_offset + self.parallel_config.rank
        return join_gloo(info.master_address, info.master_port, rank, info.world_size, info.timeout_s)


class NcclEngine(BroadcastEngine[NcclInitInfo]):
    """For GPUs. vLLM's own nccl engine waits for a lost learner or actor without end; this one does not."""

    init_info_cls = NcclInitInfo

    def _make_group(self, info: NcclInitInfo) -> Group:
        rank = info.rank_offset + self.parallel_config.rank
        return NcclGroup(base64.b64decode(info.unique_id), rank, info.world_size, self.device, info.timeout_s)


class TransferWorker:
    """What vLLM's worker class gets from us (worker_extension_cls)."""

    weight_transfer_engine: ReloadingEngine[Any, Any]

    def transfer_problem(self) -> str | None:
        """What broke the last collective of a transfer, if it broke."""
        return self.weight_transfer_engine.problem


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


def _register() -> None:
    """Makes our engines, and our sampler for CPUs, known to vLLM in this process."""
    if current_platform.is_cpu():
        draws.install()
    for backend, engine in ((TransferBackend.gloo, GlooEngine), (TransferBackend.nccl, NcclEngine)):
        WeightTransferEngineFactory.register_engine(TRANSFER_ENGINE.format(backend), engine)
    # by its place: it imports this module
    WeightTransferEngineFactory.register_engine(TRANSFER_ENGINE.format(TransferBackend.ipc), "actors.ipc", "IpcEngine")


_register()

"""Networks on their devices: sharded by FSDP2 over the learner's ranks, each with its shard of rank 0's weights."""

import os
import shutil
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from common.config import Config, ConfigError, Device, DType, Offload
from learner.networks.attention import hide_from_compiler


def compute_type(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.model.dtype is DType.bfloat16 else torch.float32


def place(
    root: nn.Module,
    hf_model: PreTrainedModel,
    heads: Sequence[nn.Module],
    config: Config,
    device: torch.device,
    mesh: DeviceMesh | None,
) -> None:
    """Shards `root` over `mesh`, or moves it to `device`; `hf_model` in it has the layers, `heads` compute in float32.

    Raises ConfigError for a model that names no layers.
    """
    if config.learner.compile:
        _compile_layers(hf_model, device)
    if mesh is None:
        root.to(device)
        return
    full = {name: p.detach() for name, p in root.named_parameters()} if dist.get_rank() == 0 else {}
    _shard(root, hf_model, heads, config, mesh)
    _scatter_from_rank_0(root, full, device, mesh)


def _compile_layers(hf_model: PreTrainedModel, device: torch.device) -> None:
    """Each by itself, when it runs for the first time, so that FSDP and checkpointing are outside of what is compiled.
    The number of tokens changes with every micro-batch: compiled once for all of them."""
    compiler = os.environ.get("CXX", "g++")  # as torch looks for it
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(
            f"learner.compile=true needs a C++ compiler on CPUs, but {compiler} was not found: install it, set CXX to "
            "another one, or leave learner.compile out"
        )
    hide_from_compiler()
    # one for each adapter, with gradients and without, of the first layer, whose input has none, and of the others
    torch._dynamo.config.recompile_limit = 16
    for layer in _decoder_layers(hf_model):
        layer.forward = torch.compile(layer.forward, dynamic=True)  # type: ignore[method-assign]


def _shard(
    root: nn.Module, hf_model: PreTrainedModel, heads: Sequence[nn.Module], config: Config, mesh: DeviceMesh
) -> None:
    precision = MixedPrecisionPolicy(param_dtype=compute_type(config), reduce_dtype=torch.float32)
    is_offloaded = config.learner.offload is Offload.all  # pinned for the copies to a GPU
    offload = CPUOffloadPolicy(pin_memory=config.device is Device.cuda) if is_offloaded else OffloadPolicy()
    for module in (*_decoder_layers(hf_model), *_tables(hf_model)):
        fully_shard(module, mesh=mesh, mp_policy=precision, offload_policy=offload)
        if hasattr(module, "token_logprobs"):
            register_fsdp_forward_method(module, "token_logprobs")
    whole = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    for head in heads:
        fully_shard(head, mesh=mesh, mp_policy=whole, offload_policy=offload)
    # By default the root stays gathered after a forward without backward: publication and checkpoints would
    # then find compute copies in the place of the master weights.
    fully_shard(root, mesh=mesh, mp_policy=precision, offload_policy=offload, reshard_after_forward=True)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum


def _tables(hf_model: PreTrainedModel) -> list[nn.Module]:
    """Embedding and output layer, gathered only while they compute; none when they are one, which the root then has
    gathered from the first layer to the last."""
    embedding, head = hf_model.get_input_embeddings(), hf_model.get_output_embeddings()
    if head is None:
        return [embedding]
    return [] if head.weight is embedding.weight else [embedding, head]


def _decoder_layers(hf_model: PreTrainedModel) -> list[nn.Module]:
    """The blocks that are sharded, and gathered, one at a time."""
    names = set(hf_model._no_split_modules or ())
    layers = [module for module in hf_model.modules() if type(module).__name__ in names]
    if not layers:
        raise ConfigError(f"{type(hf_model).__name__} names no decoder layers to shard, choose another model")
    return layers


@torch.no_grad()
def _scatter_from_rank_0(root: nn.Module, full: dict[str, Tensor], device: torch.device, mesh: DeviceMesh) -> None:
    """Every rank's shard of every parameter and buffer from rank 0, one tensor in flight at a time."""
    for name, parameter in root.named_parameters():
        assert isinstance(parameter, DTensor)
        tensor = full[name].to(device) if full else torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        dist.broadcast(tensor, 0)
        shard = distribute_tensor(tensor, mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(shard.to_local())
    for buffer in root.buffers():
        dist.broadcast(buffer, 0)

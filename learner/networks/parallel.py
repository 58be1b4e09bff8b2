"""The learner's processes: process group, device mesh and seeds.

Ranks are started by torchrun, which sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Without
them the process is alone and there is no process group.
"""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from common.addresses import prefer_way_to_rank_0
from common.config import Config, ConfigError, Device, DType

REFUSAL_BYTES = 2048  # of a rank's refusal; what is longer is cut off


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among the learner's."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def process_group(device: Device, timeout_s: float = 1800.0) -> Iterator[World]:
    """Joins the process group that torchrun's environment describes, and leaves it at the end.

    The group always has a gloo backend for CPU tensors (batches, checkpoints), beside NCCL on CUDA. A
    collective that waits longer than `timeout_s` fails.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    here = torch.device("cpu")
    if device is Device.cuda:
        here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(here)
    if "RANK" not in os.environ:
        yield World(rank=0, size=1, device=here)
        return
    if os.environ.get("LOCAL_WORLD_SIZE", str(size)) != str(size):
        prefer_way_to_rank_0(os.environ["MASTER_ADDR"])
    backend = "cpu:gloo,cuda:nccl" if device is Device.cuda else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield World(rank=rank, size=size, device=here)
    finally:
        dist.destroy_process_group()


def make_mesh(config: Config) -> DeviceMesh | None:
    """The mesh to shard over, or None for plain modules.

    None exactly for one process on a CPU that needs no master weights beside those that it computes with, because it
    computes in float32 (the demo) or trains adapters, which are float32 in any case: sharding would only cost time. On
    CUDA FSDP2 offloads too. With replicas > 1 the mesh is
    (replicate, shard). Raises ConfigError when replicas do not divide the ranks or a needed process group
    is missing.
    """
    size = dist.get_world_size() if dist.is_initialized() else 1
    needs_masters = config.model.dtype is not DType.float32 and config.lora.rank == 0
    if size == 1 and config.device is Device.cpu and not needs_masters:
        return None
    if not dist.is_initialized():
        raise ConfigError(
            f"device={config.device} with model.dtype={config.model.dtype} needs a process group, "
            "start the learner with torchrun"
        )
    replicas = config.learner.replicas
    if size % replicas:
        raise ConfigError(f"learner.replicas={replicas} must divide the {size} learner ranks")
    if replicas == 1:
        return init_device_mesh(config.device.value, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(config.device.value, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch, the same on every rank: training draws nothing per rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def like(parameter: DTensor, local: Tensor) -> DTensor:
    """A tensor that is sharded as `parameter` is and of which this rank has `local`."""
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def full_tensor(parameter: Tensor, shard: Tensor) -> Tensor:
    """The whole of a parameter from `shard`, every rank's own part of it in any type and place, or all of it when
    `parameter` is not sharded; where the network computes. A collective when sharded.
    """
    if not isinstance(parameter, DTensor):
        return shard.to(parameter.device)
    # an offloaded shard is in host memory, and NCCL sends none of that
    return like(parameter, shard.to(parameter.device_mesh.device_type)).full_tensor()


@contextmanager
def refusals_of_any_rank(is_alone: bool) -> Iterator[None]:
    """What one rank refuses inside (a ConfigError), every rank refuses in the same words; a collective unless alone.

    Otherwise the others would wait for it in their next collective, and whose end the user sees would be chance. Of
    several refusals the lowest rank's counts.
    """
    refusal: ConfigError | None = None
    try:
        yield
    except ConfigError as error:
        if is_alone:
            raise
        refusal = error
    if is_alone:
        return
    mine = torch.zeros(REFUSAL_BYTES, dtype=torch.uint8)
    if refusal is not None:
        words = torch.tensor(list(str(refusal).encode()[:REFUSAL_BYTES]), dtype=torch.uint8)
        mine[: len(words)] = words
    sentences = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(sentences, mine)
    texts = [bytes(sentence.tolist()).rstrip(b"\0").decode(errors="replace") for sentence in sentences]
    if any(texts):
        text = next(filter(None, texts))
        raise refusal if refusal is not None and str(refusal) == text else ConfigError(text)

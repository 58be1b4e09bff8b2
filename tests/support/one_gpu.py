"""A stand-in for CUDA IPC on a machine without a GPU: memory that other processes can open, under handles of bytes.

What torch does with a CUDA tensor is done with shared memory: the tensor stays where its owner goes on writing, and
who rebuilds it from the description sees the same bytes.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import reductions

from common import ipc

REAL_REBUILD = reductions.rebuild_cuda_tensor


def reduce_tensor(tensor: Tensor) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """torch.multiprocessing.reductions.reduce_tensor, of a tensor that is said to be on a GPU."""
    storage = tensor.untyped_storage()
    manager, handle, size = storage._share_filename_cpu_()
    where = (manager + b"\n" + handle, size, 0)
    counter = (b"/torch_counter", 3)
    kinds = (type(tensor), tensor.size(), tensor.stride(), tensor.storage_offset(), type(tensor._typed_storage()))
    return reductions.rebuild_cuda_tensor, (*kinds, tensor.dtype, 0, *where, False, *counter, b"event", True)


@functools.wraps(REAL_REBUILD)
def rebuild_cuda_tensor(
    tensor_cls: type,
    tensor_size: torch.Size,
    tensor_stride: tuple[int, ...],
    tensor_offset: int,
    storage_cls: type,
    dtype: torch.dtype,
    storage_device: int | None,
    storage_handle: bytes,
    storage_size_bytes: int,
    storage_offset_bytes: int,
    requires_grad: bool,
    ref_counter_handle: bytes,
    ref_counter_offset: int,
    event_handle: bytes,
    event_sync_required: bool,
) -> Tensor:
    assert (tensor_cls, storage_cls, requires_grad) == (torch.Tensor, torch.storage.TypedStorage, False)
    assert (ref_counter_handle, ref_counter_offset) == (b"/torch_counter", 3)
    assert (event_handle, event_sync_required, storage_offset_bytes) == (b"event", True, 0)
    manager, handle = storage_handle.split(b"\n")
    storage = torch.UntypedStorage._new_shared_filename_cpu(manager, handle, storage_size_bytes)
    return torch.empty(0, dtype=dtype).set_(storage, tensor_offset, tensor_size, tensor_stride)


@pytest.fixture
def shared_memory_for_gpu_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports and attaches CPU tensors as if they were on a GPU, whose identity is the number of their device."""
    monkeypatch.setattr(reductions, "reduce_tensor", reduce_tensor)
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", rebuild_cuda_tensor)
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(ipc, "gpu_uuid", lambda device: f"GPU-{device.index}")

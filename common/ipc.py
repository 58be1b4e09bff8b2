"""A buffer in GPU memory that another process on the same GPU reads in place: CUDA IPC, as plain fields.

Learner and actors share this file, so that the two ends cannot drift apart. torch describes such a buffer by the
arguments of a function that rebuilds it in the other process (torch.multiprocessing.reductions), and would pickle
them. Here they travel by name, as text and numbers, and nothing that came from elsewhere is unpickled: the other end
adds the types and its own device.

torch counts who holds the buffer in shared memory, so each export is for one reader, who attaches once. The exporting
process must not use `expandable_segments`: their memory is shared through a file descriptor that is fetched from the
other process, which needs the right to trace it (ptrace), and most systems deny that between siblings.

torch is imported where it is used: importing `common` loads none of it.
"""

import base64
import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NUMBERS = ("tensor_offset", "storage_size_bytes", "storage_offset_bytes", "ref_counter_offset")
BYTES = ("storage_handle", "ref_counter_handle", "event_handle")

Fields = dict[str, Any]  # str, int and bool


def gpu_uuid(device: "torch.device") -> str:
    """The same for all processes that see this GPU, and for no other GPU in the world."""
    import torch

    return str(torch.cuda.get_device_properties(device).uuid)


def export(buffer: "Tensor") -> Fields:
    """What one other process needs to read `buffer` (uint8 [bytes], contiguous), which must stay until it has."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

    rebuild, arguments = reduce_tensor(buffer)  # type: ignore[no-untyped-call]
    named = dict(zip(inspect.signature(rebuild_cuda_tensor).parameters, arguments, strict=True))
    assert rebuild is rebuild_cuda_tensor, f"a buffer on {buffer.device} cannot be exported"
    return (
        {"num_bytes": buffer.numel(), "event_sync_required": bool(named["event_sync_required"])}
        | {name: int(named[name]) for name in NUMBERS}
        | {name: base64.b64encode(named[name]).decode() for name in BYTES}
    )


def attach(fields: Fields, device: "torch.device") -> "Tensor":
    """The exported buffer, in place: uint8 [bytes] on `device`, the same GPU. The exporter waits until it is let go."""
    import torch
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    tensor: Tensor = rebuild_cuda_tensor(  # type: ignore[no-untyped-call]
        tensor_cls=torch.Tensor,
        tensor_size=torch.Size([fields["num_bytes"]]),
        tensor_stride=(1,),
        storage_cls=torch.storage.TypedStorage,
        dtype=torch.uint8,
        storage_device=device.index,
        requires_grad=False,
        event_sync_required=fields["event_sync_required"],
        **{name: fields[name] for name in NUMBERS},
        **{name: base64.b64decode(fields[name]) for name in BYTES},
    )
    return tensor

"""The data plane of a publication: a group in which rank 0 broadcasts buffers, and whose every wait ends.

Learner and actors share this file, so that the two ends of a transfer cannot drift apart. A collective fails for
everybody when one peer is lost; it then raises BrokenTransfer, which says of nobody that it is to blame. A group that
broke is closed and never used again.

torch and vLLM are imported where they are used: importing `common` loads neither.
"""

import logging
import os
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, TypeAlias, TypeVar
from weakref import ReferenceType, ref

from common.addresses import address_towards

if TYPE_CHECKING:
    import torch
    from numpy import uint8
    from numpy.typing import NDArray
    from torch import Tensor
    from torch._C._distributed_c10d import Store
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

    Memory: TypeAlias = NDArray[uint8]
    Kept: TypeAlias = tuple[Memory, ReferenceType[Memory]]  # and the part of it that the last tensor cut from it holds

T = TypeVar("T")

_BACKGROUND = "transfer"  # the name of a thread


class BrokenTransfer(RuntimeError):
    """A collective did not come to its end: a peer was lost, or did not come in time."""


class Group(Protocol):
    """A transfer group as one of its members sees it."""

    def broadcast(self, buffer: "Tensor") -> None:
        """Fills `buffer` (uint8, contiguous, where the group computes) with rank 0's. Raises BrokenTransfer."""
        ...

    def close(self) -> None:
        """Ends what is under way, here and for the peers. From any thread, any number of times; does not block."""
        ...


class Buffers:
    """Memory for the buckets that one end of a transfer has in its hands, one after another.

    On a CPU what nobody holds any more is handed out again, the largest two at most: to touch new memory for the first
    time takes as long as the transfer. It is numpy's, which asks the system for huge pages and torch does not. On a
    GPU torch does all that.
    """

    KEPT = 2  # one is sent or loaded while the next is filled

    def __init__(self) -> None:
        self._kept: list[Kept] = []

    def take(self, num_bytes: int, device: "torch.device") -> "Tensor":
        """uint8 [num_bytes] on `device`, not set; the caller's own as long as it, or a tensor cut from it, lives."""
        import torch

        if device.type != "cpu":
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)
        memory = self._free_memory(num_bytes)
        held = memory[:num_bytes]
        self._kept = [(kept, holder) for kept, holder in self._kept if kept is not memory] + [(memory, ref(held))]
        self._kept = sorted(self._kept, key=lambda kept: len(kept[0]))[-self.KEPT :]
        return torch.from_numpy(held)

    def _free_memory(self, num_bytes: int) -> "Memory":
        """The smallest that is large enough and that nobody holds, or new."""
        import numpy as np

        free = [memory for memory, holder in self._kept if holder() is None and len(memory) >= num_bytes]
        return min(free, key=len) if free else np.empty(num_bytes, dtype=np.uint8)


class Background(Generic[T]):
    """A call in a daemon thread: one that never returns does not hinder its caller, nor `leave`."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._thread = threading.Thread(target=self._run, name=_BACKGROUND, daemon=True)
        self._thread.start()

    def result(self, timeout_s: float) -> T:
        """What the call returned or raised. Raises TimeoutError when it is not back in time."""
        self._thread.join(max(0.0, timeout_s))
        if self._thread.is_alive():
            raise TimeoutError(f"still under way after {timeout_s:g} s")
        if self._error is not None:
            raise self._error
        return self._value

    def _run(self) -> None:
        self._error: BaseException | None = None
        try:
            self._value = self._call()
        except BaseException as error:  # raised again by `result`
            self._error = error


def leave(code: int) -> NoReturn:
    """Ends the process as sys.exit does, but at once where a call in the background was left behind in a library: one
    that comes back while Python ends would abort the process instead."""
    if any(thread.name == _BACKGROUND for thread in threading.enumerate()):
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    sys.exit(code)


class GlooGroup:
    """Over CPUs. Binds the address that it is given: the one with which the others reach this process."""

    def __init__(self, store: "Store", rank: int, size: int, host: str, timeout_s: float) -> None:
        """Meets the others at `store`. Raises BrokenTransfer when they do not all come within `timeout_s`.

        gloo waits five times as long for each peer that has said where it is and does not connect, so it meets in a
        thread that is left behind.
        """
        from torch._C._distributed_c10d import PrefixStore
        from torch.distributed import ProcessGroupGloo

        gloo: Any = ProcessGroupGloo
        options = gloo._Options()
        options._timeout = timedelta(seconds=timeout_s)
        options._devices = [gloo.create_device(hostname=host)]
        self._store: Store | None = store
        try:
            meeting = Background(lambda: gloo(PrefixStore("weights", store), rank, size, options))
            self._group: Any = meeting.result(timeout_s)
        except TimeoutError:
            raise BrokenTransfer(f"the others did not all connect within {timeout_s:g} s") from None
        except RuntimeError as error:
            raise BrokenTransfer(error) from error

    def broadcast(self, buffer: "Tensor") -> None:
        group = self._group
        if group is None:
            raise BrokenTransfer("the group is closed")
        try:
            group.broadcast(buffer, 0).wait()
        except RuntimeError as error:
            raise BrokenTransfer(error) from error

    def close(self) -> None:
        """The sockets close when the last operation is over, which the group's time-out sees to."""
        self._group = self._store = None


def join_gloo(master_address: str, master_port: int, rank: int, size: int, timeout_s: float) -> GlooGroup:
    """The group whose rank 0 listens there, bound to the address with which this process reaches that.

    Raises RuntimeError when nobody listens, BrokenTransfer when the others do not come.
    """
    from torch._C._distributed_c10d import TCPStore

    def connect() -> tuple[TCPStore, str]:
        store = TCPStore(master_address, master_port, is_master=False, timeout=timedelta(seconds=timeout_s))
        return store, address_towards(master_address, master_port)

    try:
        # torch's own limit does not hold where something accepts and never answers
        store, own = Background(connect).result(1.5 * timeout_s)
    except (RuntimeError, OSError) as error:
        raise RuntimeError(f"the learner cannot be reached at {master_address}:{master_port}: {error}") from error
    return GlooGroup(store, rank, size, own, timeout_s)


class NcclGroup:
    """Over GPUs, through vLLM's communicator, which unlike torch's has no watchdog that ends the process.

    NCCL waits for lost peers without end, on the host and on the device, until its communicator is aborted. So every
    call runs in a thread of its own, and when that is not back in time, `close` aborts the communicator, which ends
    the thread too.
    """

    def __init__(self, unique_id: bytes, rank: int, size: int, device: "torch.device", timeout_s: float) -> None:
        """Meets the others under rank 0's id. Raises BrokenTransfer when they do not all come within `timeout_s`."""
        self._device, self._timeout_s = device, timeout_s
        self._communicator: PyNcclCommunicator | None = None
        self._is_closed = False
        self._within("the others did not all come", lambda: self._connect(unique_id, rank, size))

    def broadcast(self, buffer: "Tensor") -> None:
        import torch

        torch.cuda.current_stream(self._device).synchronize()  # what used the buffer's memory before is over
        self._within("no broadcast", lambda: self._broadcast(buffer))

    def close(self) -> None:
        self._is_closed = True
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            Background(communicator.destroy)  # aborts; waits for that, so not here

    def _within(self, what: str, call: Callable[[], None]) -> None:
        try:
            Background(call).result(self._timeout_s)
        except (TimeoutError, RuntimeError) as error:
            self.close()
            raise BrokenTransfer(f"{what}: {error}") from error

    def _connect(self, unique_id: bytes, rank: int, size: int) -> None:
        from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group

        self._communicator = uid_init_process_group(unique_id, rank, size, self._device)
        if self._is_closed:  # too late: nobody waits for it any more
            self.close()

    def _broadcast(self, buffer: "Tensor") -> None:
        import torch

        if (communicator := self._communicator) is None:
            raise BrokenTransfer("the group is closed")
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            communicator.broadcast(buffer, 0, stream)
            stream.synchronize()


def nccl_unique_id() -> bytes:
    """A new id for one group, made by its rank 0, which NCCL then listens for."""
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    return bytes(NCCLLibrary().ncclGetUniqueId().internal)

"""A second device on a machine that has none: tensors at "meta" keep their values, and nothing may mix them with the
CPU's that CUDA would refuse.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

OTHER = torch.device("meta")  # autograd runs its backward passes on the thread of the CPU

aten = torch.ops.aten
MOVES = (aten.copy_.default, aten._to_copy.default)
TAKES_INDICES_FROM_THE_CPU = (aten.index.Tensor, aten.index_put_.default)


class There(Tensor):
    """A tensor of the other device; `here` has its values."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "There":
        tensor = Tensor._make_wrapper_subclass(cls, here.shape, strides=here.stride(), dtype=here.dtype, device=OTHER)
        tensor.here = here
        return tensor

    def tolist(self) -> Any:
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of other_device()")


class _OtherDevice(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors: list[Tensor] = []
        tree_map(lambda x: tensors.append(x) if isinstance(x, Tensor) else None, (args, kwargs))
        is_there = any(isinstance(x, There) for x in tensors)
        if is_there and func not in (*MOVES, *TAKES_INDICES_FROM_THE_CPU):
            strangers = [tuple(x.shape) for x in tensors if not isinstance(x, There) and x.dim() > 0]
            assert not strangers, f"{func} mixes devices: of shapes {strangers} on the CPU"
        asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        stays = asked == OTHER if asked is not None else is_there
        if func is aten.copy_.default:
            stays = isinstance(args[0], There)
        if asked is not None:
            kwargs = kwargs | {"device": torch.device("cpu")}
        known = {id(x.here): x for x in tensors if isinstance(x, There)}
        result = func(*tree_map(_here, args), **tree_map(_here, kwargs))
        if not stays or func is aten._local_scalar_dense.default:
            return result
        return tree_map(lambda x: known.get(id(x), There(x)) if isinstance(x, Tensor) else x, result)


def _here(x: Any) -> Any:
    return x.here if isinstance(x, There) else x


@contextmanager
def other_device() -> Iterator[torch.device]:
    """The device, inside of which `tensor.to(device)` and factories with `device=` make tensors of it."""
    with _OtherDevice():
        yield OTHER

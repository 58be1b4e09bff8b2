"""Which GPUs each process gets, and how much of them: `actors.placement` for the GPUs that are visible here.

    separate    learner ranks have the first GPUs, one each; actors have the following ones, tensor_parallel_size each
    shared      one GPU has everybody: a single learner rank and any number of actors
    auto        separate where enough GPUs are visible, else shared

NCCL refuses two processes on one GPU, so that weights cannot be broadcast there: they are read in place (`ipc`), and
only one rank exports them.
"""

import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace

from common.config import Config, ConfigError, Device, Placement
from common.memory import MemoryPlan, Shapes, plan_memory, read_shapes, refuse_shortage
from common.validation import validate

MIB = 2**20
NVIDIA_SMI_S = 60.0  # it takes seconds where no driver is loaded yet
_HINT = ": use more, or share one (actors.placement=shared)"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One visible GPU. `name` is what CUDA_VISIBLE_DEVICES accepts; `memory` is None where nobody tells."""

    name: str
    memory: int | None  # bytes


@dataclass(frozen=True, kw_only=True)
class Devices:
    """CUDA_VISIBLE_DEVICES of each child; empty where there are none."""

    learner: str  # of every rank, which takes the one of its number
    actors: tuple[str, ...]


def settle(config: Config, gpus: Sequence[Gpu]) -> Config:
    """The configuration with placement and memory decided, for `train`, which starts everything on `gpus`.

    Raises ConfigError when roles do not find a place or do not fit, before anything is loaded.
    """
    return settle_memory(place(config, gpus), gpus)


def place(config: Config, gpus: Sequence[Gpu]) -> Config:
    """The configuration with the placement decided. Raises ConfigError when roles do not find a place."""
    if config.device is Device.cpu:
        return config
    if config.actors.placement is Placement.auto:
        config = _decided(config, len(gpus))
    assign(config, [gpu.name for gpu in gpus])
    return config


def _decided(config: Config, num_gpus: int) -> Config:
    """With `auto` replaced by what goes with so many GPUs."""
    is_enough = num_gpus >= _separate_need(config)
    placement = Placement.separate if is_enough else Placement.shared
    decided = replace(config, actors=replace(config.actors, placement=placement))
    try:
        validate(decided)
    except ConfigError as error:
        if is_enough:
            raise
        raise ConfigError(f"{_shortfall(config, num_gpus)}, and one for both is not possible: {error}") from None
    return decided


def settle_memory(config: Config, gpus: Sequence[Gpu]) -> Config:
    """The configuration with actors.gpu_memory_utilization decided, where engines share a GPU with the learner.

    Raises ConfigError when something does not fit. Where nothing can be planned nothing is refused, but a shared GPU
    needs the setting then.
    """
    if config.device is Device.cpu:
        return config
    decides = config.is_shared and config.actors.gpu_memory_utilization is None
    try:
        shapes, memory = known(config, gpus)
    except ConfigError as error:
        if not decides:
            return config
        raise ConfigError(f"{error}: set actors.gpu_memory_utilization to the engine's fraction of the GPU") from None
    plan = refuse_shortage(config, shapes, memory)
    if not decides:
        return config
    utilization = math.floor(plan.gpu_memory_utilization * 1e6) / 1e6
    return replace(config, actors=replace(config.actors, gpu_memory_utilization=utilization))


def plan_here(config: Config) -> MemoryPlan | None:
    """The memory plan of a process that shares its GPU; None when it has it for itself, or nothing can be planned."""
    if not config.is_shared:
        return None
    try:
        shapes, memory = known(config, visible_gpus())
    except ConfigError:  # `settle_memory` has said what follows from that
        return None
    return plan_memory(config, shapes, memory)


def known(config: Config, gpus: Sequence[Gpu]) -> tuple[Shapes, int]:
    """Sizes of the networks, and bytes of the smallest GPU in use. Raises ConfigError when one is not known."""
    used = gpus[:1] if config.is_shared else gpus
    memory = [gpu.memory for gpu in used if gpu.memory is not None]
    if not memory:
        raise ConfigError(
            f"the memory of GPU {', '.join(gpu.name for gpu in used) or '(none is visible)'} is not known (nvidia-smi "
            "does not tell), so that nothing can be planned"
        )
    return read_shapes(config), min(memory)


def assign(config: Config, names: Sequence[str]) -> Devices:
    """Who gets which of the GPUs called `names`. Raises ConfigError when there are too few."""
    ranks, count, width = config.learner.ranks, config.actors.count, config.actors.tensor_parallel_size
    if config.device is Device.cpu:
        return Devices(learner="", actors=("",) * count)
    if len(names) < (ranks if config.is_shared else _separate_need(config)):
        raise ConfigError(_shortfall(config, len(names)) + ("" if config.is_shared else _HINT))
    firsts = [0 if config.is_shared else ranks + i * width for i in range(count)]
    return Devices(
        learner=",".join(names[:ranks]), actors=tuple(",".join(names[first : first + width]) for first in firsts)
    )


def visible_gpus() -> list[Gpu]:
    """The GPUs that this process may use, in CUDA's order. Raises ConfigError where there is no driver."""
    chosen, listed = os.environ.get("CUDA_VISIBLE_DEVICES"), _listed_gpus()
    if chosen is None:
        if listed is None:
            raise ConfigError("device=cuda needs an NVIDIA driver, but nvidia-smi was not found: use device=cpu")
        return [Gpu(name=index, memory=memory) for index, _, memory in listed]
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    return [
        Gpu(name=name, memory=next((m for i, uuid, m in listed or () if name == i or uuid.startswith(name)), None))
        for name in names
    ]


def _separate_need(config: Config) -> int:
    return config.learner.ranks + config.actors.count * config.actors.tensor_parallel_size


def _shortfall(config: Config, num_gpus: int) -> str:
    ranks, actors = config.learner.ranks, config.actors
    roles = f"learner.ranks={ranks}"
    if not config.is_shared:
        roles += f" and actors.count={actors.count} with actors.tensor_parallel_size={actors.tensor_parallel_size}"
    need = ranks if config.is_shared else _separate_need(config)
    return f"{roles} need {need} GPUs, but {num_gpus} are visible"


def _listed_gpus() -> list[tuple[str, str, int | None]] | None:
    """(index, UUID, bytes of memory) of each GPU of this machine; None without a driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, check=False, timeout=NVIDIA_SMI_S)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"device=cuda: nvidia-smi did not answer within {NVIDIA_SMI_S:g} s") from None
    if listing.returncode != 0:
        raise ConfigError(f"device=cuda: nvidia-smi fails ({listing.stdout.strip() or listing.stderr.strip()})")
    rows = [[field.strip() for field in line.split(",")] for line in listing.stdout.splitlines() if line.strip()]
    return [(index, uuid, int(mib) * MIB if mib.isdigit() else None) for index, uuid, mib in rows]

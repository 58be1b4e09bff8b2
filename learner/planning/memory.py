"""What each GPU of a run holds (common/memory.py), as a table, before anything is started."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from common.config import Config, ConfigError, Device
from common.memory import GIB, MemoryPlan, Parts, plan_memory, read_shapes, refuse_shortage
from common.placement import Gpu, known, place, visible_gpus

CACHE = "key-value cache"


@dataclass(frozen=True, kw_only=True)
class Role:
    """What one process holds of one GPU, or of the host's memory; `parts` in bytes."""

    role: str
    processes: int
    parts: Parts

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """`problem` is the sentence with which `train` would refuse the run; None: it fits, or nothing is refused."""

    about: str  # of what memory
    roles: tuple[Role, ...]
    problem: str | None
    max_sequences_tokens: int | None  # tokens that the key-value cache of one engine holds; None: not limited here


def gpus_to_plan(count: int | None, gib: float | None) -> list[Gpu]:
    """Those that are described, else those that are visible. Raises ConfigError when only one of both is given, or
    when there are none."""
    if count is None and gib is None:
        try:
            return visible_gpus()
        except ConfigError as error:
            raise ConfigError(f"{error}, or describe GPUs that are not here with --gpus and --gpu-gib") from None
    if count is None or gib is None:
        raise ConfigError("--gpus and --gpu-gib describe GPUs that are not here together: give both or none")
    return [Gpu(name=str(number), memory=int(gib * GIB)) for number in range(count)]


def report(config: Config, gpus: Sequence[Gpu]) -> MemoryReport:
    """The table of a run on `gpus`, which count for device=cuda alone.

    Raises ConfigError when roles find no place, or nothing can be planned.
    """
    if config.device is Device.cpu:
        return _on_host(config)
    config = place(config, gpus)
    shapes, gpu = known(config, gpus)
    plan = plan_memory(config, shapes, gpu)
    problem = None
    try:
        refuse_shortage(config, shapes, gpu)
    except ConfigError as error:
        problem = str(error)
    kind = "one GPU for all" if plan.is_shared else "each GPU"
    return MemoryReport(
        about=f"{kind} has {gpu / GIB:.1f} GiB, of which {plan.usable / GIB:.1f} GiB are planned with",
        roles=_roles(config, plan),
        problem=problem,
        max_sequences_tokens=max(0, plan.kv_cache) // plan.kv_per_token,
    )


def _roles(config: Config, plan: MemoryPlan) -> tuple[Role, ...]:
    """An engine without room for any cache is shown with the least that it needs."""
    engine = plan.engine | {CACHE: plan.kv_cache if plan.kv_cache > 0 else plan.kv_least}
    roles = [Role(role="learner rank", processes=config.learner.ranks, parts=plan.learner)]
    if plan.sleeps:
        roles.append(Role(role="  while actors generate", processes=config.learner.ranks, parts=plan.resting))
    width = config.actors.tensor_parallel_size
    name = "engine" if width == 1 else f"engine, each of {width} GPUs"
    return (*roles, Role(role=name, processes=max(config.actors.count, 1), parts=engine))


def _on_host(config: Config) -> MemoryReport:
    """Tensors that last, which are the same on a CPU; what is on top of them there is not planned."""
    plan = plan_memory(config, read_shapes(config), gpu=1)
    lasting = ("frozen parameters", "parameters", "optimizer", "reference", "gradients")
    learner = {name: plan.learner[name] for name in lasting if name in plan.learner}
    engine = {"weights": plan.engine["weights"], CACHE: config.actors.cpu_kv_cache_gib * GIB}
    roles = (
        Role(role="learner rank", processes=config.learner.ranks, parts=learner),
        Role(role="engine", processes=max(config.actors.count, 1), parts=engine),
    )
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    need = sum(role.processes * role.total for role in roles)
    return MemoryReport(
        about=f"the host has {_amount(ram)}; weights, gradients, optimizer and caches take {_amount(need)}, "
        "and activations and libraries, which are not planned on CPUs, come on top",
        roles=roles,
        problem=None,
        max_sequences_tokens=None,
    )


def table(memory: MemoryReport) -> list[str]:
    """One line per role: its name, how many there are, what each holds, and what for, largest first."""
    lines = [memory.about]
    for role in memory.roles:
        parts = sorted(role.parts.items(), key=lambda part: -part[1])
        listed = ", ".join(f"{name} {_amount(size)}" for name, size in parts)
        lines.append(f"{role.role:<24} {role.processes:>3} x {_amount(role.total):>9}   {listed}")
    return lines


def _amount(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"

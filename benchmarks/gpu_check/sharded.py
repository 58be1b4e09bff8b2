"""Part c: a process group of one (NCCL on a GPU), FSDP2 on it, a step, and a checkpoint that goes on bit by bit.

Two trainers, one after the other: the first takes a step, is saved, and takes another one; the second is loaded and
takes that one too. What was loaded must be what was saved, and in float32 the weights and the optimizers' state after
the second step must be equal to the last bit. In bfloat16 flash attention adds up gradients in any order, so there
the difference is only written down.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_check.models import DEMO, walks
from benchmarks.gpu_check.report import Report
from benchmarks.learner import make_config
from common.config import AlgorithmConfig, Config, Device, DType
from common.launcher import rank_environment, reserve_port
from learner.algorithm.packing import Batch
from learner.algorithm.trainer import Trainer
from learner.checkpoint import Checkpointer
from learner.networks.model import load_critic, load_policy
from learner.networks.parallel import World, make_mesh, process_group

TIMEOUT_S = 60.0  # of a collective


def run(report: Report, device: torch.device, folder: Path) -> None:
    with alone(Device(device.type)) as world:
        collectives(report, world.device)
        for dtype in DType:
            with reproducible() if dtype is DType.float32 else ExitStack():
                resume(report, configuration(DEMO, world, dtype), world, folder / f"checkpoints-{dtype}")


@contextmanager
def alone(device: Device) -> Iterator[World]:
    """A process group with this process only, as `run.py train` makes it with learner.ranks=1."""
    with (
        reserve_port() as port,
        patch.dict("os.environ", rank_environment(0, 1, port)),
        process_group(device, TIMEOUT_S) as world,
    ):
        yield world


@contextmanager
def reproducible() -> Iterator[None]:
    """Kernels that add up in one order, where torch has such; attention by plain products."""
    torch.set_deterministic_debug_mode("warn")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.set_deterministic_debug_mode("default")


def configuration(path: Path, world: World, dtype: DType, algorithm: AlgorithmConfig | None = None) -> Config:
    config = make_config(path, algorithm or AlgorithmConfig())
    return replace(config, device=Device(world.device.type), model=replace(config.model, dtype=dtype))


def collectives(report: Report, device: torch.device) -> None:
    """The three that FSDP2 and publication need; with one rank each returns what it was given."""
    sent = torch.arange(1 << 20, device=device, dtype=torch.float32)
    broadcast, gathered, reduced = sent.clone(), torch.zeros_like(sent), torch.zeros_like(sent)
    dist.broadcast(broadcast, 0)
    dist.all_gather([gathered], sent)
    dist.reduce_scatter(reduced, [sent])
    for name, found in (("broadcast", broadcast), ("all-gather", gathered), ("reduce-scatter", reduced)):
        if not torch.equal(found, sent):
            report.fail(f"{name} over {dist.get_backend_config()} returned other numbers than it was given")
    report.number("process group", str(dist.get_backend_config()))


def resume(report: Report, config: Config, world: World, folder: Path) -> None:
    """One checkpoint, gone on from by the trainer that made it and by another one."""
    dtype, mesh = config.model.dtype, make_mesh(config)
    batch = walks(32)
    first = trainer(config, world, mesh)
    is_sharded = any(isinstance(module, FSDPModule) for module in first.policy.network.modules())
    report.number(f"{dtype}: networks", "FSDP2" if is_sharded else "plain")
    fresh = state(first)
    norm = first.step(batch, 0, is_warmup=False)["policy/grad_norm"]
    report.number(f"{dtype}: policy gradient norm of a step", norm)
    saved = state(first)
    if equal(fresh, saved):
        report.fail(f"{dtype}: a training step changed nothing")
    with Checkpointer(folder, keep=1, in_background=True) as checkpointer:
        checkpointer.save(1, 0, first)
        checkpointer.wait()
        second = trainer(config, world, mesh)
        checkpointer.load(1, second)
    if not equal(saved, state(second)):
        report.fail(f"{dtype}: what was loaded differs from what was saved")
    compare_next_step(report, batch, first, second, is_exact=dtype is DType.float32 or world.device.type == "cpu")


def compare_next_step(report: Report, batch: Batch, first: Trainer, second: Trainer, is_exact: bool) -> None:
    """The step after the checkpoint, taken by both."""
    dtype = first.config.model.dtype
    after = []
    for one in (first, second):
        one.step(batch, 0, is_warmup=False)
        after.append(state(one))
    name = f"{dtype}: largest difference of the step after a resume"
    difference = max(
        float((a.double() - b.double()).abs().max()) for a, b in zip(*map(dict.values, after), strict=True)
    )
    if is_exact:
        report.at_most(name, difference, 0.0)
    else:
        report.number(name, difference)


def trainer(config: Config, world: World, mesh: DeviceMesh | None) -> Trainer:
    policy, critic = load_policy(config, world.device, mesh), load_critic(config, world.device, mesh)
    return Trainer(config, policy, critic, world.rank, world.size)


def state(one: Trainer) -> dict[str, Tensor]:
    """Every tensor of its state dict, whole, on the CPU, as a copy."""
    return dict(_tensors(one.state_dict(), ""))


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _tensors(values: Mapping[str, object], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{name}/")
        elif isinstance(value, Tensor):
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            yield prefix + name, whole.detach().clone().cpu()

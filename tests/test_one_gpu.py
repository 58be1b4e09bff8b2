"""Weights and sleep on one GPU, on a machine without: from the publisher over the wire and vLLM's own encoding into the
worker's engine. Only CUDA's two calls are stand-ins (tests/support/one_gpu.py)."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from actors import engine
from actors.engine import TRANSFER_ENGINE
from actors.ipc import IpcEngine
from common import ipc, placement, wire
from common.config import ActorsConfig, Config, TransferBackend
from common.loading import load_config
from common.memory import GIB, plan_memory, read_shapes
from common.placement import Gpu, settle
from common.types import MemberId, WeightsCommand, WeightsPhase, WeightsReport
from learner.main import _leave_room
from learner.networks.model import Policy, load_policy
from learner.networks.parallel import World
from learner.publication.ipc import IpcTransfer
from learner.publication.publisher import Publisher
from learner.publication.sleep import actors_asleep
from tests.support.one_gpu import shared_memory_for_gpu_memory
from tests.support.tiny_models import VOCAB, tiny_run, write_tiny_model

CPU = torch.device("cpu")
PROBE = torch.arange(9) % VOCAB
__all__ = ["shared_memory_for_gpu_memory"]


@dataclass
class Worker:
    """vLLM's worker, as far as an update goes: it keeps the tensors that come until the update is finished."""

    policy: Policy
    gpu: int = 1
    engine: IpcEngine = field(init=False)
    loaded: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.engine = IpcEngine.__new__(IpcEngine)
        self.engine.device, self.engine.model = torch.device("cpu", self.gpu), self  # type: ignore[assignment]

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.loaded |= dict(weights)

    @torch.no_grad()
    def do(self, phase: WeightsPhase, payload: dict[str, Any]) -> None:
        match phase:
            case WeightsPhase.INIT:
                self.engine.init_transfer_engine(self.engine.parse_init_info(payload))
            case WeightsPhase.UPDATE:
                self.engine.receive_weights(self.engine.parse_update_info(payload))
            case WeightsPhase.FINISH:
                for name, parameter in self.policy.model.named_parameters():
                    parameter.copy_(self.loaded.pop(name))


@dataclass
class Service:
    """The learner's service: each command goes to the workers through both encodings that it takes in a run."""

    workers: dict[MemberId, Worker]
    dismissed: dict[str, str] = field(default_factory=dict)
    commands: list[WeightsPhase] = field(default_factory=list)
    told: list[MemberId] = field(default_factory=list)  # one a command

    def member_ids(self) -> tuple[MemberId, ...]:
        return tuple(sorted(self.workers))

    def lost_ids(self) -> tuple[MemberId, ...]:
        return ()

    def waiting_ids(self) -> tuple[MemberId, ...]:
        return tuple(member for member in self.member_ids() if member.name == "late")

    def command(
        self,
        phase: WeightsPhase,
        version: int,
        payloads: Mapping[MemberId, dict[str, Any]],
        timeout_s: float,
        meanwhile: Callable[[], None] | None = None,
    ) -> dict[MemberId, WeightsReport]:
        if meanwhile is not None:
            meanwhile()
        self.commands.append(phase)
        self.told += payloads
        command = WeightsCommand(command_id=1, phase=phase, version=version, payload={})
        return {member: self.answer(member, replace(command, payload=payload)) for member, payload in payloads.items()}

    def answer(self, member: MemberId, command: WeightsCommand) -> WeightsReport:
        arrived = wire.decode([bytes(frame) for frame in wire.encode(command)], max_bytes=1 << 20)
        assert isinstance(arrived, WeightsCommand)
        payload = MsgpackDecoder().decode(MsgpackEncoder().encode(arrived.payload))
        worker, error = self.workers[member], None
        try:
            worker.do(command.phase, payload)
        except ValueError as problem:
            error = str(problem)
        probe = np.empty(0, np.float32)
        if command.phase is WeightsPhase.RESUME:
            with torch.no_grad():
                probe = worker.policy(PROBE, torch.tensor([0, 9]), torch.tensor([1]), 1.0)[0].numpy()
        return WeightsReport(
            command_id=1,
            phase=command.phase,
            version=command.version,
            error=error,
            is_shared=False,
            probe_logprobs=probe,
        )

    def dismiss(self, member: MemberId, reason: str) -> None:
        self.dismissed[member.name] = reason
        del self.workers[member]

    def quarantine(self, member: MemberId, reason: str, version: int) -> None:
        self.dismiss(member, reason)


class Scribbling(IpcTransfer):
    """Its memory is used for something else as soon as a bucket has been sent."""

    def send(self, channel: Any, bucket: Any) -> None:
        super().send(channel, bucket)
        bucket.data.fill_(255)


@torch.no_grad()
def train(policy: Policy) -> None:
    for parameter in policy.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)


def publisher(path: str, service: Service, config: Config | None = None) -> Publisher:
    run = config or tiny_run(path)
    policy = load_policy(run, CPU, None)
    return Publisher(
        run, policy, service, 0, PROBE, new_transfer=lambda _: Scribbling(torch.device("cpu", 1)), bucket_bytes=4096
    )


@pytest.mark.usefixtures("shared_memory_for_gpu_memory")
def test_actors_hold_the_learners_weights_and_nothing_of_its_memory(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path)
    workers = {MemberId(name, 1): Worker(load_policy(tiny_run(path), CPU, None)) for name in ("a", "b")}
    service = Service(dict(workers))
    publication = publisher(path, service)
    for version in (0, 1):
        train(publication.policy)
        assert len(publication.publish(version).members) == 2
        for worker in workers.values():
            for name, parameter in publication.policy.model.named_parameters():
                assert torch.equal(dict(worker.policy.model.named_parameters())[name], parameter), name
    assert service.dismissed == {}
    assert service.commands.count(WeightsPhase.UPDATE) > 4 and service.commands.count(WeightsPhase.INIT) == 1


@pytest.mark.usefixtures("shared_memory_for_gpu_memory")
def test_joiners_get_the_weights_and_the_others_hear_nothing_of_it(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path)
    service = Service({MemberId("first", 1): Worker(load_policy(tiny_run(path), CPU, None))})
    publication = publisher(path, service)
    train(publication.policy)
    publication.publish(1)
    late, elsewhere = MemberId("late", 2), MemberId("late", 3)
    service.workers[late] = Worker(load_policy(tiny_run(path), CPU, None))
    service.workers[elsewhere] = Worker(load_policy(tiny_run(path), CPU, None), gpu=2)
    service.told.clear()
    assert publication.serve(1).members == (late,)
    assert set(service.told) == {late, elsewhere} and "GPU-2" in service.dismissed["late"]
    for name, parameter in publication.policy.model.named_parameters():
        assert torch.equal(dict(service.workers[late].policy.model.named_parameters())[name], parameter), name
    assert publication.publish(2).members == (MemberId("first", 1), late)


@pytest.mark.usefixtures("shared_memory_for_gpu_memory")
def test_an_actor_on_another_gpu_is_dismissed_and_the_others_are_served(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path)
    workers = {
        MemberId("here", 1): Worker(load_policy(tiny_run(path), CPU, None)),
        MemberId("there", 2): Worker(load_policy(tiny_run(path), CPU, None), gpu=2),
    }
    service = Service(workers)
    assert publisher(path, service).publish(0).members == (MemberId("here", 1),)
    assert list(service.dismissed) == ["there"]
    assert "this actor computes on GPU GPU-2 and the learner on GPU-1" in service.dismissed["there"]


@pytest.mark.usefixtures("shared_memory_for_gpu_memory")
def test_what_travels_is_text_and_numbers_and_a_view_comes_back() -> None:
    buffer = torch.arange(1000, dtype=torch.int32).view(torch.uint8)
    fields = json.loads(json.dumps(ipc.export(buffer)))
    assert {type(value) for value in fields.values()} <= {str, int, bool}
    there = ipc.attach(fields, CPU)
    assert torch.equal(there, buffer)
    buffer.fill_(7)
    assert bool((there == 7).all())  # the same memory


def test_a_buffer_that_is_on_no_gpu_is_not_exported() -> None:
    with pytest.raises((AssertionError, ValueError)):
        ipc.export(torch.zeros(4, dtype=torch.uint8))


def test_vllm_finds_the_engine_by_its_name() -> None:
    made = WeightTransferEngineFactory._registry[TRANSFER_ENGINE.format(TransferBackend.ipc)]
    assert made() is IpcEngine


def sleepy(path: str) -> Config:
    return replace(tiny_run(path), actors=ActorsConfig(sleep_while_training=True))


def test_actors_sleep_for_the_time_of_a_training_step(tmp_path: Path) -> None:
    config = sleepy(write_tiny_model(tmp_path))
    policy = load_policy(config, CPU, None)
    first, joiner = MemberId("a", 1), MemberId("b", 2)
    service = Service({first: Worker(policy)})
    with actors_asleep(config, service, version=3):
        assert service.commands == [WeightsPhase.SLEEP]
        service.workers[joiner] = Worker(policy)  # awake, so nobody wakes it
    assert service.commands == [WeightsPhase.SLEEP, WeightsPhase.WAKE]
    with actors_asleep(replace(config, actors=ActorsConfig()), service, version=3):
        pass
    with actors_asleep(config, None, version=3):
        pass
    assert len(service.commands) == 2


def test_who_does_not_go_to_sleep_is_dismissed_and_training_goes_on(tmp_path: Path) -> None:
    config = sleepy(write_tiny_model(tmp_path))
    policy = load_policy(config, CPU, None)

    class Sleepless(Worker):
        def do(self, phase: WeightsPhase, payload: dict[str, Any]) -> None:
            raise ValueError("no memory to copy the weights to")

    service = Service({MemberId("a", 1): Sleepless(policy), MemberId("b", 2): Worker(policy)})
    with actors_asleep(config, service, version=0):
        assert list(service.dismissed) == ["a"] and "no memory to copy" in service.dismissed["a"]
    assert service.member_ids() == (MemberId("b", 2),)


def engine_arguments(config: Config, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What vLLM is started with."""
    seen: dict[str, Any] = {}

    class Arguments:
        def __init__(self, **arguments: Any) -> None:
            seen.update(arguments)

    monkeypatch.setattr("vllm.AsyncEngineArgs", Arguments)
    monkeypatch.setattr("vllm.v1.engine.async_llm.AsyncLLM.from_engine_args", lambda arguments: None)
    engine._build(config)
    return seen


def test_on_a_shared_gpu_the_engine_is_told_its_cache_and_may_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = [Gpu(name="0", memory=24 * GIB)]
    monkeypatch.setattr(placement, "visible_gpus", lambda: gpu)
    shared = ["device=cuda", "model.dtype=bfloat16", "staleness.max_staleness=0"]
    run = settle(load_config(["demo"], [*shared, "actors.sleep_while_training=true"]), gpu)
    arguments = engine_arguments(run, monkeypatch)
    plan = plan_memory(run, read_shapes(run), 24 * GIB)
    assert arguments["kv_cache_memory_bytes"] == plan.kv_cache >= plan.kv_least
    assert arguments["gpu_memory_utilization"] == run.actors.gpu_memory_utilization
    assert arguments["enable_sleep_mode"] is True

    kept: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: kept.append(share))
    world = World(rank=0, size=1, device=torch.device("cuda", 0))
    _leave_room(run, world)
    _leave_room(load_config(["demo"], []), world)
    assert kept == [plan.learner_fraction] and 0.5 < kept[0] < 1


def test_elsewhere_vllm_measures_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = engine_arguments(load_config(["demo"], []), monkeypatch)
    assert (arguments["kv_cache_memory_bytes"], arguments["gpu_memory_utilization"]) == (None, 0.3)
    assert arguments["enable_sleep_mode"] is False

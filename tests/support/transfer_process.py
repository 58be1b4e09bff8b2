"""The two sides of a publication in processes of their own, if need be on a host (network namespace) of their own.

The protocol, the service, the publisher and the gloo group are the real ones; actors have no engine.
"""

import asyncio
import ctypes
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from common.config import ActorsConfig, RolloutConfig, TransportConfig, WeightsConfig
from common.transport import ActorConnection
from common.types import Bye, MemberId, Prompt, Ready, Stop, WeightsCommand, WeightsPhase, WeightsReport, Welcome
from learner.networks.model import load_policy
from learner.publication.publisher import Publisher
from learner.rollouts.service import LearnerService
from tests.support.fake_actors import FINGERPRINTS, NO_PROBE, heartbeat, hello
from tests.support.ranks import fork_server, set_environment
from tests.support.tiny_models import VOCAB, tiny_run
from tests.support.transfer_actors import Lost, TransferActor

PROBE = torch.arange(9) % VOCAB
CLONE_NEWNET = 0x40000000


def start(function: Callable[..., None], *arguments: Any, host: str | None = None) -> ForkServerProcess:
    """Calls `function(*arguments)` in a process, in the namespace `host` if one is named."""
    environment = {name: value for name, value in os.environ.items() if "SOCKET_IFNAME" not in name}
    process = fork_server().Process(target=_run, args=(environment, host, function, arguments))
    process.start()
    return process


def _run(
    environment: dict[str, str], host: str | None, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    set_environment(environment)
    if host is not None:
        with open(f"/var/run/netns/{host}") as namespace:
            assert ctypes.CDLL(None).setns(namespace.fileno(), CLONE_NEWNET) == 0
    torch.set_num_threads(1)
    function(*arguments)


class NotedService(LearnerService):
    """Notes who is told what."""

    def command(
        self,
        phase: WeightsPhase,
        version: int,
        payloads: Mapping[MemberId, dict[str, Any]],
        *arguments: Any,
    ) -> dict[MemberId, WeightsReport]:
        self.told |= {member.name for member in payloads}
        return super().command(phase, version, payloads, *arguments)


def publish_twice(folder: str, host: str, num_actors: int, run_dir: Path, num_joiners: int = 0) -> None:
    """The learner, one rank: writes `run_dir`/endpoint, publishes two versions, and writes whom they reached. Between
    the two it waits for joiners, if there are to be any, serves them, and writes who heard of it."""
    config = replace(
        tiny_run(folder),
        rollout=RolloutConfig(prompts_per_step=1, group_size=2, max_tokens=8),
        actors=ActorsConfig(start_timeout_s=120.0),
        weights=WeightsConfig(timeout_s=60.0),
        transport=TransportConfig(host=host, heartbeat_s=0.2, heartbeat_timeout_s=20.0, curve=False),
    )
    policy = load_policy(config, torch.device("cpu"), None)
    prompts = [Prompt(uid="p", text="", reference="")]
    reached = []
    with NotedService(config, prompts, lambda prompt: [1], FINGERPRINTS, PROBE.tolist()) as service:
        (run_dir / "endpoint.tmp").write_text(service.endpoint)
        (run_dir / "endpoint.tmp").rename(run_dir / "endpoint")
        service.told = set[str]()
        service.wait_for_members(num_actors, 240.0)
        publisher = Publisher(config, policy, service, 0, PROBE, bucket_bytes=12_000)
        for version in (1, 2):
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.mul_(1.0 + 0.1 * version)
            publication = publisher.publish(version)
            service.set_version(version, version)
            reached.append(" ".join(member.name for member in publication.members))
            if num_joiners and version == 1:
                (run_dir / "published").touch()
                service.wait_for_members(num_actors + num_joiners, 240.0)
                service.told = set()
                served = publisher.serve(version)
                reached.append(" ".join(member.name for member in served.members))
                reached.append("told " + " ".join(sorted(service.told)))
        publisher.shutdown()
    (run_dir / "reached").write_text("\n".join(reached))


def act(endpoint: str, name: str, folder: str, *fault: Any) -> None:
    """An actor. `fault` is what TransferActor takes; where it strikes, the process kills itself."""
    asyncio.run(
        _act(endpoint, name, TransferActor(load_policy(tiny_run(folder), torch.device("cpu"), None), PROBE, *fault))
    )


async def _act(endpoint: str, name: str, actor: TransferActor) -> None:
    async with ActorConnection(endpoint, name, 16) as connection:
        await connection.send(hello(name, process=f"{name} {os.getpid()}"))
        assert isinstance(await connection.receive(60.0), Welcome)
        await connection.send(Ready(version=0, probe_logprobs=NO_PROBE))
        beat = asyncio.create_task(_beat(connection))
        while not isinstance(message := await connection.receive(60.0), Stop):
            if isinstance(message, WeightsCommand):
                await connection.send(await asyncio.to_thread(_report, actor, message))
        beat.cancel()
        await connection.send(Bye(error=None))


def _report(actor: TransferActor, command: WeightsCommand) -> WeightsReport:
    try:
        error, is_shared, probe = actor.obey(command.phase, command.payload)
    except Lost:
        os.kill(os.getpid(), signal.SIGKILL)
        raise
    return WeightsReport(
        command_id=command.command_id,
        phase=command.phase,
        version=command.version,
        error=error,
        is_shared=is_shared,
        probe_logprobs=probe,
    )


async def _beat(connection: ActorConnection) -> None:
    while True:
        await connection.send(heartbeat({}))
        await asyncio.sleep(0.2)

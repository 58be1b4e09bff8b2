"""One actor without an engine in a process of its own: the real protocol, and weights over a real gloo group.

    python -m tests.support.transfer_process ENDPOINT NAME MODEL_FOLDER [FAULT PHASE AT]

Leaves with exit code 0 when the learner says stop, and kills itself where its fault says so.
"""

import asyncio
import os
import signal
import sys

import torch

from common.transport import ActorConnection
from common.types import Bye, Heartbeat, Ready, Stop, WeightsCommand, WeightsPhase, WeightsReport, Welcome
from learner.networks.model import load_policy
from tests.support.fake_actors import NO_PROBE, hello
from tests.support.tiny_models import VOCAB, tiny_run
from tests.support.transfer_actors import Lost, TransferActor

PROBE = torch.arange(9) % VOCAB


async def main(endpoint: str, name: str, folder: str, fault: str | None, phase: str, at: str) -> None:
    torch.set_num_threads(1)
    actor = TransferActor(load_policy(tiny_run(folder), torch.device("cpu"), None), PROBE)
    actor.fault, actor.phase, actor.at = fault, WeightsPhase(phase), int(at)
    async with ActorConnection(endpoint, name, 16) as connection:
        await connection.send(hello(name))
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
        await connection.send(Heartbeat(held_groups=0, generated_tokens=0, busy_s=0.0, uptime_s=0.0))
        await asyncio.sleep(0.2)


if __name__ == "__main__":
    endpoint, name, folder, *fault = sys.argv[1:]
    asyncio.run(main(endpoint, name, folder, *(fault or (None, WeightsPhase.UPDATE, "0"))))

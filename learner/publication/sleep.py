"""Actors on the learner's GPU give their memory back while it trains (actors.sleep_while_training).

vLLM's sleep mode, level 1: weights go to host memory, the key-value cache is dropped, and a request that is still
running is computed again afterwards. Level 2 would save the copy, but drops weights that nothing brings back when a
step ends without a publication, as in the critic's warm-up.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from common.config import Config
from common.types import WeightsPhase
from learner.publication.control import ActorControl, Channel, Costs, Deadlines, PublishError

logger = logging.getLogger(__name__)


@contextmanager
def actors_asleep(config: Config, control: ActorControl | None, version: int) -> Iterator[None]:
    """For the time of a training step; nothing without the setting, or on ranks other than 0 (control is None).

    Who does not go to sleep, or does not wake up, is dismissed. Who is lost when it should wake up does so when it is
    served with weights, as whoever has missed a command is.
    """
    if not config.actors.sleep_while_training or control is None:
        yield
        return
    channel = Channel(control, control.member_ids(), version, Deadlines(config.weights.timeout_s), Costs())
    _run(channel, WeightsPhase.SLEEP)
    yield
    channel.members = tuple(member for member in channel.members if member not in channel.dismissed)
    torch.cuda.empty_cache()  # what training has freed goes back to the GPU, for the actors to take
    _run(channel, WeightsPhase.WAKE)


def _run(channel: Channel, phase: WeightsPhase) -> None:
    try:
        if channel.members:
            channel.run(phase)
    except PublishError as error:
        logger.warning("%s", error)

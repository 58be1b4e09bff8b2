"""One learner rank as `run.py learner` starts it, except that a publication moves no weights: the actors are fakes."""

import logging
import math
import os
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

from common.config import DType
from common.loading import read_config
from common.types import WeightsPhase
from learner import main as learner
from learner.publication import sentinel
from learner.publication.control import Costs
from learner.publication.publisher import Publication, Publisher
from tests.support.ranks import fork_server, set_environment


def start(config_path: Path, environment: dict[str, str], log: Path) -> ForkServerProcess:
    """A process that trains as `config_path` says, with `environment` on top of this process's, and appends to `log`.

    Its exit code is that of `run.py learner`.
    """
    process = fork_server().Process(target=_train, args=(config_path, {**os.environ, **environment}, log))
    process.start()
    return process


class Announcement(Publisher):
    """Tells the members which version is theirs now, and leaves it at that."""

    def hold(self, version: int) -> None:
        """The fakes score no probe, and none is expected of them."""
        self.probe.at_ready = lambda: lambda logprobs: None  # type: ignore[method-assign]

    def publish(self, version: int) -> Publication:
        members = self.control.member_ids() if self.control is not None else ()
        if self.control is not None and members:
            for phase in (WeightsPhase.FINISH, WeightsPhase.RESUME):  # it is loaded, and it is sampled from
                self.control.command(phase, version, {actor: {} for actor in members}, 30.0)
        return Publication(version=version, members=members, seconds=0.0, costs=Costs(), probe_difference=0.0)

    def serve(self, version: int) -> Publication:
        """Those who lack it are told with the others: it costs a fake nothing."""
        return self.publish(version)

    def shutdown(self) -> None:
        """There is no transfer group."""


def _train(config_path: Path, environment: dict[str, str], log: Path) -> None:
    set_environment(environment)
    with log.open("ab") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    torch.set_num_threads(1)
    learner.Publisher = Announcement  # type: ignore[misc]
    sentinel.LARGEST_FLOOR = dict.fromkeys(DType, math.inf)  # the fakes' log-probs are made up
    sys.exit(learner.main(read_config(config_path)))

"""One learner rank as `run.py learner` starts it, except that a publication moves no weights: the actors are fakes.

python tests/learner_without_transfer.py RUN/config.yaml      (with torch.distributed's variables set)
"""

import logging
import math
import sys

import torch

from common.config import DType
from common.loading import read_config
from common.types import WeightsPhase
from learner import main as learner
from learner.publication import sentinel
from learner.publication.publisher import Publication, Publisher


class Announcement(Publisher):
    """Tells the members which version is theirs now, and leaves it at that."""

    def publish(self, version: int) -> Publication:
        members = self.control.members() if self.control is not None else ()
        if self.control is not None and members:
            self.control.command(WeightsPhase.FINISH, version, {actor: {} for actor in members}, 30.0)
        return Publication(version=version, members=members, seconds=0.0, probe_difference=0.0)

    def shutdown(self) -> None:
        """There is no transfer group."""


def main() -> int:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    torch.set_num_threads(1)
    learner.Publisher = Announcement  # type: ignore[misc]
    sentinel.LARGEST_FLOOR = dict.fromkeys(DType, math.inf)  # the fakes' log-probs are made up
    return learner.main(read_config(sys.argv[1]))


if __name__ == "__main__":
    sys.exit(main())

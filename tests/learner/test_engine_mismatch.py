"""The learner's loop with fakes for everything around the trainer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common.config import Config, WeightsConfig
from common.types import TrajectoryGroup
from learner.algorithm.packing import Batch
from learner.checkpoint import Checkpointer
from learner.loop import Learner
from learner.networks.parallel import World
from learner.publication.control import Costs
from learner.publication.publisher import Publication
from tests.learner.algorithm.test_trainer import LENGTHS, TablePolicy, config, make_batch, make_trainer, on_policy


class CopyingPublisher:
    """Publishes to one engine, which computes exactly like the learner."""

    control = None  # no actor sleeps

    def __init__(self, policy: torch.nn.Module) -> None:
        self.policy, self.engine = policy, TablePolicy()

    def hold(self, version: int) -> None:
        """Keeps nothing: what it publishes are the present weights."""

    def publish(self, version: int) -> Publication:
        self.engine.load_state_dict(self.policy.state_dict())
        return Publication(version=version, members=(), seconds=0.0, costs=Costs(), probe_difference=0.0)


class OneRank(Learner):
    """Its batches are what the published policy samples, all of the current version."""

    def _next_batch(self) -> tuple[tuple[TrajectoryGroup, ...], Batch, float]:
        batch = make_batch(LENGTHS, seed=self.step, version=self.version)
        return (), on_policy(batch, self.publisher.engine), 0.0  # type: ignore[attr-defined]


def make_learner(cfg: Config, tmp_path: Path) -> tuple[Learner, list[dict[str, Any]]]:
    """(the learner, to which the metrics of each step that its trainer takes are appended)."""
    trainer = make_trainer(cfg)
    world = World(rank=0, size=1, device=torch.device("cpu"))
    publisher: Any = CopyingPublisher(trainer.policy.network)
    learner = OneRank(cfg, world, trainer, publisher, Checkpointer(tmp_path, keep=1), None)
    metrics: list[dict[str, Any]] = []
    step = trainer.step

    def recorded(*args: Any, **kwargs: Any) -> Any:
        metrics.append(step(*args, **kwargs))
        return metrics[-1]

    trainer.step = recorded  # type: ignore[method-assign]
    return learner, metrics


def test_with_several_steps_a_version_engines_are_compared_in_the_first_of_them_only(tmp_path: Path) -> None:
    """An exact engine under a policy that moves fast: the floor is rounding, and no step sounds the alarm."""
    cfg = replace(config(learning_rate=0.05, critic_warmup_steps=2), weights=WeightsConfig(publish_every=4))
    learner, metrics = make_learner(cfg, tmp_path)
    learner._begin()
    for _ in range(2 + 9):
        learner._take_step()
    assert learner.version == 2
    measured = [step for step, row in enumerate(metrics) if "offpolicy/mismatch_abs_mean" in row]
    assert measured == [0, 2, 6, 10]  # the first of warm-up, then once a version
    assert all(metrics[step]["offpolicy/mismatch_abs_mean"] < 1e-6 for step in measured)
    assert learner.sentinel.floor is not None and learner.sentinel.floor < 1e-6
    assert [step for step, row in enumerate(metrics) if "offpolicy/gap_0/ess" in row] == measured
    assert max(row["offpolicy/ratio_max"] for row in metrics[2:]) > 1.05  # the drift is there, and not counted

"""Publication of a policy that trains an adapter: actors hold whole models, and who does not load them is found."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.config import Config, LoraConfig
from learner.networks.model import Policy, load_policy
from learner.publication.publisher import Publisher
from tests.learner.publication.test_publisher import BUCKET_BYTES, CPU, PROBE, actor, make_run
from tests.support.tiny_models import write_tiny_model
from tests.support.transfer_actors import FORGETS, LocalActors


def lora_run(path: str, publish_every: int = 1) -> Config:
    return replace(make_run(path, weights={"publish_every": publish_every}), lora=LoraConfig(rank=4))


@torch.no_grad()
def train(policy: Policy) -> None:
    for parameter in policy.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)


def test_an_actor_that_samples_from_the_initial_policy_is_found_at_the_first_update(tmp_path: Path) -> None:
    """As where engines take updates and go on sampling from what they began with."""
    path, actors = write_tiny_model(tmp_path), LocalActors()
    actors.add("right", 1, actor(path))
    actors.add("stuck", 2, actor(path, FORGETS))
    policy = load_policy(lora_run(path), CPU, None)
    publisher = Publisher(lora_run(path), policy, actors, 0, PROBE)
    assert [member.name for member in publisher.publish(0).members] == ["right", "stuck"]  # nothing to tell: B = 0
    train(policy)
    assert [member.name for member in publisher.publish(1).members] == ["right"]
    reason = actors.dismissed["stuck"]
    assert "agreed with the learner's at version 0" in reason and "after version 1" in reason
    publisher.shutdown()


@pytest.mark.parametrize("publish_every", [1, 2])  # without and with a copy of what was published
def test_what_an_actor_loads_has_the_log_probs_of_the_policy_with_its_adapter(
    tmp_path: Path, publish_every: int
) -> None:
    path, actors = write_tiny_model(tmp_path, is_tied=True), LocalActors()
    actors.add("a", 1, actor(path))
    config = lora_run(path, publish_every)
    policy = load_policy(config, CPU, None)
    publisher = Publisher(config, policy, actors, 0, PROBE, bucket_bytes=BUCKET_BYTES)
    for version in (0, 1, 2):
        assert publisher.publish(version).probe_difference < 1e-5
        train(policy)
    publisher.shutdown()

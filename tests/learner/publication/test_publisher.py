"""Publication to actors that are stand-ins: real policies, but tensors are handed over within the process."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from common.config import Config, Device, StalenessConfig, WeightsConfig
from common.launcher import rank_environment, reserve_port
from common.types import WeightsPhase, WeightsReport
from learner.networks.model import Policy, load_policy
from learner.networks.parallel import make_mesh, process_group
from learner.publication.publisher import Publisher
from learner.publication.transfer import HeldWeights, PolicySource
from tests.support.ranks import run_two_ranks
from tests.support.tiny_models import VOCAB, tiny_run, write_tiny_mixture, write_tiny_model

CPU = torch.device("cpu")
PROBE = torch.arange(9) % VOCAB


@dataclass
class Actors:
    """The service, as far as publication knows it, and the engines behind it."""

    policies: dict[str, Policy]
    dismissed: list[str] = field(default_factory=list)

    def members(self) -> tuple[str, ...]:
        return tuple(sorted(self.policies))

    def command(
        self, phase: WeightsPhase, version: int, payloads: dict[str, Any], timeout_s: float
    ) -> dict[str, WeightsReport]:
        return {
            name: WeightsReport(phase=phase, version=version, error=None, probe_logprobs=self.score(name))
            for name in payloads
        }

    def quarantine(self, actor: str, reason: str) -> None:
        self.dismissed.append(reason)

    def score(self, name: str) -> Any:
        with torch.no_grad():
            return self.policies[name](PROBE, torch.tensor([0, 9]), torch.tensor([1]), 1.0)[0].numpy()

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return dict(self.policies[name].model.named_parameters())


@dataclass
class Transfer:
    """vLLM's trainer-side engine: whatever the source yields is what the members load."""

    actors: Actors
    members: tuple[str, ...]
    source: PolicySource

    @torch.no_grad()
    def send_weights(self) -> None:
        for name, tensor in self.source:
            for member in self.members:
                self.actors.weights(member)[name].copy_(tensor)

    def shutdown(self) -> None:
        """There is nothing to close."""


def publisher(path: str, actors: Actors, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Publisher:
    config = replace(tiny_run(path), **settings)
    made = Publisher(config, load_policy(config, CPU, None), actors, 0, PROBE)
    monkeypatch.setattr(made, "_trainer_engine", lambda client, port: Transfer(actors, client.members, made._source))
    return made


@torch.no_grad()
def train(policy: Policy) -> None:
    for parameter in policy.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)


SETTINGS = [
    {"weights": WeightsConfig(publish_every=3)},
    {"staleness": StalenessConfig(exact=True)},  # the next version waits although the policy is trained
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["publish_every", "exact"])
def test_a_late_joiner_gets_the_weights_that_were_published_not_todays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    path = write_tiny_model(tmp_path)
    actors = Actors({"first": load_policy(tiny_run(path), CPU, None)})
    publication = publisher(path, actors, monkeypatch, **settings)
    publication.publish(0)
    train(publication.policy)
    publication.publish(1)
    published = {name: tensor.clone() for name, tensor in actors.weights("first").items()}

    train(publication.policy)  # the version under way is not over
    actors.policies["late"] = load_policy(tiny_run(path), CPU, None)
    again = publication.publish(1)
    assert again.members == ("first", "late") and again.probe_difference < 1e-5
    assert actors.dismissed == []
    for member in again.members:
        assert all(torch.equal(tensor, published[name]) for name, tensor in actors.weights(member).items())

    publication.publish(2)
    for member in again.members:
        for name, tensor in publication.policy.model.named_parameters():
            assert torch.equal(actors.weights(member)[name], tensor)


def test_no_copy_is_kept_where_the_policy_cannot_move_on_within_a_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_model(tmp_path)
    publication = publisher(path, Actors({"a": load_policy(tiny_run(path), CPU, None)}), monkeypatch)
    publication.publish(0)
    assert publication._source._held is None


def test_a_transfer_that_gives_up_leaves_the_rest_of_its_pass_to_be_gathered(tmp_path: Path) -> None:
    """Or the other ranks would wait in their gathers for ever."""
    walked = []

    class Walked:
        def named_hf_parameters(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
            for index in range(5):
                walked.append(index)
                yield str(index), torch.zeros(1)

    source = PolicySource(cast(Policy, Walked()), torch.float32, keeps=False)
    source.begin_pass()
    tensors = iter(source)
    next(tensors)
    cast(Any, tensors).close()
    source.finish_pass()
    assert walked == [0, 1, 2, 3, 4]


def test_held_weights_have_the_names_and_shapes_that_were_announced(tmp_path: Path) -> None:
    """Those of the checkpoint, also where transformers fuses the experts of a layer."""
    policy = load_policy(tiny_run(write_tiny_mixture(tmp_path)), CPU, None)
    source = PolicySource(policy, torch.bfloat16, keeps=True)
    before = dict(policy.named_hf_parameters(torch.bfloat16))
    source.hold()
    train(policy)
    source.begin_pass()
    for meta, (name, tensor) in zip(source.metadata(), source, strict=True):
        assert (meta.name, meta.dtype, meta.shape) == (name, tensor.dtype, tuple(tensor.shape))
        assert torch.equal(tensor, before[name])


def _hold_and_gather(rank: int, config: Config, port: int) -> None:
    import os

    torch.set_num_threads(1)
    os.environ |= rank_environment(rank, 2, port)
    with process_group(Device.cpu, timeout_s=60):
        policy = load_policy(config, CPU, make_mesh(config))
        expected = {name: tensor.clone() for name, tensor in policy.named_hf_parameters(torch.bfloat16)}
        held = HeldWeights(policy, torch.bfloat16)
        train(policy)
        found = dict(held)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert any(not torch.equal(found[name], now) for name, now in policy.named_hf_parameters(torch.bfloat16))


@pytest.mark.slow
def test_two_ranks_hold_their_shards_and_gather_them_as_they_were(tmp_path: Path) -> None:
    config = tiny_run(write_tiny_model(tmp_path), ranks=2)
    with reserve_port() as port:
        run_two_ranks(_hold_and_gather, config, port)

"""The loop of one rank: when it saves, evaluates and publishes. Networks, actors and files are stand-ins."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from common.config import AlgorithmConfig, CheckpointConfig, Config, EvalConfig, LearnerConfig, ModelConfig
from learner import main as learner_main
from learner.main import Learner
from learner.networks.parallel import World
from learner.publication.control import Costs
from learner.publication.probe import Probe
from learner.publication.publisher import Publication


@dataclass
class Stage:
    """Everything around the loop, as one object; `calls` is what the loop asked for, in order."""

    explained_variance: list[float] = field(default_factory=list)
    calls: list[tuple[str, int]] = field(default_factory=list)
    policy: Any = None
    network: Any = None
    control: None = None  # of the publisher
    probe: Any = None

    # the trainer
    def step(self, batch: None, version: int, is_warmup: bool, *, is_published: bool) -> dict[str, float]:
        self.calls.append(("warm-up" if is_warmup else "policy", version))
        return {"critic/explained_variance": self.explained_variance.pop(0)} if self.explained_variance else {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """There is nothing to restore."""

    # the publisher
    def hold(self, version: int) -> None:
        self.calls.append(("hold", version))

    def publish(self, version: int) -> Publication:
        self.calls.append(("publish", version))
        return Publication(version=version, members=(), seconds=0.0, costs=Costs(), probe_difference=0.0)

    # the checkpointer
    def save(self, step: int, version: int, state: object, data: bytes) -> None:
        self.calls.append(("save", step))

    def of(self, name: str) -> list[int]:
        return [number for called, number in self.calls if called == name]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage()
    stage.policy = stage
    monkeypatch.setattr(learner_main, "broadcast_batch", lambda batch: batch)
    monkeypatch.setattr(learner_main, "export_policy", lambda *_: stage.calls.append(("export", 0)))
    return stage


def run(stage: Stage, *, steps: int, warmup: int, gate: float | None = None, every: int = 0) -> None:
    config = Config(
        model=ModelConfig(path="nowhere"),
        algorithm=AlgorithmConfig(critic_warmup_steps=warmup, critic_warmup_gate=gate),
        learner=LearnerConfig(steps=steps),
        checkpoint=CheckpointConfig(every=every),
        eval=EvalConfig(every=0),
    )
    make_learner(stage, config).run()


def make_learner(stage: Stage, config: Config, leader: Any = None) -> Learner:
    everything, world = cast(Any, stage), World(rank=0, size=1, device=torch.device("cpu"))
    return Learner(config, world, everything, everything, everything, leader)


def test_a_checkpoint_is_due_every_so_many_steps_of_warm_up_and_policy_and_once_at_the_end(stage: Stage) -> None:
    run(stage, steps=5, warmup=4, every=2)
    assert stage.of("save") == [2, 4, 6, 8, 9]


def test_the_pretrained_critic_is_saved_whatever_the_interval(stage: Stage) -> None:
    run(stage, steps=3, warmup=4, every=0)
    assert stage.of("save") == [4, 7]


def test_the_pretrained_critic_is_saved_when_the_gate_ends_the_warm_up_early(stage: Stage) -> None:
    stage.explained_variance = [0.0, 0.2, 0.6]
    run(stage, steps=2, warmup=9, gate=0.5)
    assert stage.of("save") == [3, 5]
    assert stage.of("warm-up") == [0, 0, 0]


def test_a_run_without_policy_steps_trains_the_critic_saves_once_and_ends(stage: Stage) -> None:
    run(stage, steps=0, warmup=3)
    assert [name for name, _ in stage.calls] == ["hold", "publish", "warm-up", "warm-up", "warm-up", "save", "export"]
    assert stage.of("save") == [3]


def test_a_run_without_warm_up_does_not_save_before_its_first_policy_step(stage: Stage) -> None:
    run(stage, steps=2, warmup=0)
    assert stage.of("save") == [2]


def test_a_checkpoint_holds_what_the_probe_saw_at_version_0(stage: Stage) -> None:
    stage.probe = Probe(Config(), torch.arange(4))
    stage.probe.floor = 0.03
    state = make_learner(stage, Config()).state_dict()
    stage.probe = Probe(Config(), torch.arange(4))
    make_learner(stage, Config()).load_state_dict(state)
    assert stage.probe.floor == 0.03


def test_actors_can_be_judged_by_the_initial_policy_before_the_first_one_is_ready(stage: Stage) -> None:
    stage.probe = SimpleNamespace(at_ready=lambda: "by the probe")
    judged: list[str] = []
    service = SimpleNamespace(judge_ready=judged.append, set_version=lambda *_: None)
    begin = lambda: stage.calls.append(("begin", len(judged)))  # noqa: E731
    make_learner(stage, Config(), SimpleNamespace(service=service, begin=begin, evaluate=lambda version: None))._begin()
    assert stage.calls == [("hold", 0), ("begin", 1), ("publish", 0)] and judged == ["by the probe"]


def test_what_the_probe_did_not_measure_is_no_metric() -> None:
    costs = Costs()
    publication = Publication(version=1, members=(), seconds=0.0, costs=costs, probe_difference=None, probe_floor=2e-6)
    assert {name for name in publication.metrics() if "probe" in name} == {"weights/probe_floor"}

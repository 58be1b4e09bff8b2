"""The loop of one rank: when it saves, evaluates and publishes. Networks, actors and files are stand-ins."""

import signal
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from common import lastsettings
from common.config import (
    AlarmConfig,
    AlgorithmConfig,
    CheckpointConfig,
    Config,
    ConfigError,
    EvalConfig,
    LearnerConfig,
    ModelConfig,
    WeightsConfig,
)
from common.stopping import Interrupted, RunEnds
from learner import loop
from learner.loop import Learner
from learner.networks.parallel import World
from learner.publication.control import Costs
from learner.publication.probe import Probe
from learner.publication.publisher import Publication
from learner.rollouts.service import MembersWaiting, StillWaiting


@dataclass
class Stage:
    """Everything around the loop, as one object; `calls` is what the loop asked for, in order."""

    explained_variance: list[float] = field(default_factory=list)
    calls: list[tuple[str, int]] = field(default_factory=list)
    policy: Any = None
    network: Any = None
    control: None = None  # of the publisher
    probe: Any = None
    published: list[bool] = field(default_factory=list)  # of each step, whether its policy was what actors have
    failure: ConfigError | None = None  # of the save under way

    # the trainer
    def step(
        self, batch: None, version: int, is_warmup: bool, *, is_published: bool, observe: None
    ) -> dict[str, float]:
        self.calls.append(("warm-up" if is_warmup else "policy", version))
        self.published.append(is_published)
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

    def serve(self, version: int) -> Publication:
        self.calls.append(("serve", version))
        return Publication(version=version, members=(), seconds=0.0, costs=Costs(), probe_difference=0.0)

    # the checkpointer
    def save(self, step: int, version: int, state: object, write_extra: object) -> None:
        self.calls.append(("save", step))

    def wait(self) -> None:
        self.calls.append(("saved", 0))
        if self.failure is not None:
            raise self.failure

    def has_failed(self) -> bool:
        return self.failure is not None

    def of(self, name: str) -> list[int]:
        return [number for called, number in self.calls if called == name]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage()
    stage.policy = stage
    monkeypatch.setattr(loop, "broadcast_batch", lambda batch: batch)
    monkeypatch.setattr(loop, "export_policy", lambda *_: stage.calls.append(("export", 0)))
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
    end = ["save", "export", "saved"]
    assert [name for name, _ in stage.calls] == ["hold", "publish", "warm-up", "warm-up", "warm-up", *end]
    assert stage.of("save") == [3]


def test_a_run_without_warm_up_does_not_save_before_its_first_policy_step(stage: Stage) -> None:
    run(stage, steps=2, warmup=0)
    assert stage.of("save") == [2]


def test_an_evaluation_that_is_due_with_a_checkpoint_is_in_it_and_the_last_one_comes_after_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a resume from there would never start it; and actors are not sent home before all is on the disk."""
    order: list[str] = []
    monkeypatch.setattr(stage, "save", lambda step, *_: order.append(f"save {step}"))
    monkeypatch.setattr(stage, "wait", lambda: order.append("saved"))
    stage.probe = SimpleNamespace(at_ready=lambda: None)
    leader = SimpleNamespace(
        service=SimpleNamespace(
            set_version=lambda *_: None, judge_ready=lambda _: None, stop=lambda _: order.append("home")
        ),
        begin=lambda: None,
        next_groups=lambda *_: [],
        before_publication=lambda: None,
        record=lambda *_: None,
        state=lambda: None,
        evaluate=lambda version: order.append(f"evaluate {version}"),
        finish_evaluation=lambda **_: None,
    )
    monkeypatch.setattr(loop, "version_gaps", lambda *_: {})
    monkeypatch.setattr(loop.Batch, "from_groups", lambda groups: None)
    config = Config(
        model=ModelConfig(path="nowhere"),
        algorithm=AlgorithmConfig(critic_warmup_steps=0),
        learner=LearnerConfig(steps=4),
        checkpoint=CheckpointConfig(every=2),
        eval=EvalConfig(every=2),
    )
    make_learner(stage, config, leader).run()
    assert order == ["evaluate 0", "evaluate 2", "save 2", "save 4", "saved", "evaluate 4", "home"]


# ---- a run that ends before its last step


def leader_of(stage: Stage, *answers: Any) -> Any:
    """A leader that gives these answers for a batch, or raises them."""
    waiting = list(answers)

    def next_groups(step: int) -> list[Any]:
        answer = waiting.pop(0)
        if isinstance(answer, Exception):
            raise answer
        stage.calls.append(("batch", 0))
        return []

    service = SimpleNamespace(
        judge_ready=lambda judge: None, set_version=lambda *_: None, set_warmup=lambda *_: None, stop=lambda *_: None
    )
    nothing = {name: lambda *_, **__: None for name in ("begin", "evaluate", "record", "before_publication")}
    return SimpleNamespace(service=service, next_groups=next_groups, state=lambda: None, **nothing)


def run_led(stage: Stage, monkeypatch: pytest.MonkeyPatch, *answers: Any, numbers: list[int | None]) -> RunEnds:
    """Four steps with these answers for batches; `numbers` are the signals that have come, whenever one looks."""
    stage.probe = SimpleNamespace(at_ready=lambda: None)
    monkeypatch.setattr(loop.Batch, "from_groups", lambda groups: None)
    monkeypatch.setattr(loop, "version_gaps", lambda *_: {})
    config = Config(
        model=ModelConfig(path="nowhere"),
        algorithm=AlgorithmConfig(critic_warmup_steps=0),
        learner=LearnerConfig(steps=4),
        eval=EvalConfig(every=0),
    )
    learner = make_learner(stage, config, leader_of(stage, *answers))
    learner.asked_to_stop = lambda: numbers.pop(0) if numbers else None
    with pytest.raises(RunEnds) as caught:
        learner.run()
    return caught.value


def test_an_interrupt_ends_the_run_after_the_step_and_saves_it(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    # looked: after begin; step 1: batch, publication, end; step 2: batch, publication, end
    end = run_led(stage, monkeypatch, None, None, numbers=[None, None, None, None, None, None, signal.SIGTERM])
    assert isinstance(end.reason, Interrupted) and end.reason.number == signal.SIGTERM
    assert stage.of("policy") == [0, 1]
    assert stage.of("save") == [2] and stage.calls[-1] == ("saved", 0)


def test_a_batch_that_was_taken_is_trained_when_an_interrupt_comes_with_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_led(stage, monkeypatch, None, numbers=[None, signal.SIGTERM, signal.SIGTERM, signal.SIGTERM])
    assert stage.of("policy") == [0] and stage.of("publish") == [0, 1] and stage.of("save") == [1]


def test_an_interrupt_ends_the_wait_for_a_batch(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = (None, StillWaiting("a batch"), StillWaiting("a batch"))
    end = run_led(stage, monkeypatch, *answers, numbers=[None, None, None, None, None, signal.SIGINT])
    assert str(end) == "interrupted by SIGINT"
    assert stage.of("policy") == [0] and stage.of("save") == [1]


def test_a_late_joiner_is_served_and_nothing_is_published_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    run_led(stage, monkeypatch, None, MembersWaiting(("late",)), None, ConfigError("enough"), numbers=[])
    calls = [call for call in stage.calls if call[0] in ("publish", "serve", "batch")]
    assert calls == [("publish", 0), ("batch", 0), ("publish", 1), ("serve", 1), ("batch", 0), ("publish", 2)]


def test_what_ends_a_run_early_saves_what_is_new_first(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = ConfigError("the verifier fails on everything")
    assert run_led(stage, monkeypatch, None, None, verdict, numbers=[]).reason is verdict
    assert stage.of("save") == [2]


def test_a_run_that_ends_before_its_first_step_has_nothing_to_save(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_led(stage, monkeypatch, TimeoutError("nobody came"), numbers=[])
    assert stage.of("save") == []


@pytest.mark.parametrize("on_this_rank", [True, False], ids=["here", "on another rank"])
def test_a_save_that_has_failed_in_the_background_ends_all_ranks_after_the_step(
    stage: Stage, on_this_rank: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever has noticed it first: that is agreed with the interrupts, in a collective that there is anyway."""
    config = Config(model=ModelConfig(path="nowhere"), algorithm=AlgorithmConfig(critic_warmup_steps=0))
    learner = make_learner(stage, config)
    learner.world = World(rank=0, size=2, device=torch.device("cpu"))
    monkeypatch.setattr(loop.dist, "broadcast", lambda tensor, src: None)
    step, full = stage.step, ConfigError("the checkpoint of step 5 cannot be written")

    def step_while_the_disk_fills(*arguments: Any, **more: Any) -> dict[str, float]:
        stage.failure = full
        return step(*arguments, **more)

    def as_the_other_rank_says(codes: torch.Tensor, operation: object) -> None:
        if stage.failure is not None and len(stage.of("publish")) == 2:  # the step is over
            codes[0] = max(int(codes[0]), 0 if on_this_rank else loop._Said.FAILED)

    stage.step = step_while_the_disk_fills  # type: ignore[method-assign]
    stage.has_failed = lambda: on_this_rank and stage.failure is not None  # type: ignore[method-assign]
    monkeypatch.setattr(loop.dist, "all_reduce", as_the_other_rank_says)
    with pytest.raises(ConfigError) as ended:
        learner.run()
    assert ended.value is full
    assert stage.of("policy") == [0] and stage.of("save") == []


@pytest.mark.parametrize(
    "step", [2, 3, 4], ids=["before the first policy step", "a step into version 0", "two steps into it"]
)
def test_a_step_knows_also_after_a_resume_whether_actors_sample_from_its_policy(stage: Stage, step: int) -> None:
    """Before the resume a version takes three policy steps, after it one."""

    def configured(publish_every: int) -> Config:
        return Config(
            model=ModelConfig(path="nowhere"),
            algorithm=AlgorithmConfig(critic_warmup_steps=2),
            weights=WeightsConfig(publish_every=publish_every),
            learner=LearnerConfig(steps=6),
        )

    stage.probe = Probe(Config(), torch.arange(4))
    learner = make_learner(stage, configured(3))
    learner._begin()
    for _ in range(step):
        learner._take_step()
    assert stage.published == [True, True, True, False][:step]
    resumed = make_learner(stage, configured(1))
    resumed.load_state_dict(learner.state_dict())
    resumed.step, resumed.version = learner.step, learner.version
    stage.published.clear()
    resumed._begin()
    for _ in range(2):
        resumed._take_step()
    assert stage.published == [step == 2, True]


def test_a_checkpoint_holds_what_the_probe_saw_at_version_0(stage: Stage) -> None:
    stage.probe = Probe(Config(), torch.arange(4))
    stage.probe.floor = 0.03
    state = make_learner(stage, Config()).state_dict()
    stage.probe = Probe(Config(), torch.arange(4))
    make_learner(stage, Config()).load_state_dict(state)
    assert stage.probe.floor == 0.03


def test_an_alarm_is_told_once_also_across_a_checkpoint_and_not_in_warm_up(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The critic is worse than a constant all the time; two policy steps in a row make an alarm."""
    config = Config(
        model=ModelConfig(path="nowhere"),
        algorithm=AlgorithmConfig(critic_warmup_steps=2),
        alarm=AlarmConfig(window=2),
    )
    monkeypatch.setattr(loop.Batch, "from_groups", lambda groups: None)
    monkeypatch.setattr(loop, "version_gaps", lambda *_: {})
    stage.probe = Probe(config, torch.arange(4))
    stage.explained_variance = [-1.0] * 6
    told: list[tuple[int, str]] = []
    rows: list[dict[str, Any]] = []
    leader = leader_of(stage, *[None] * 6)
    leader.log = SimpleNamespace(event=lambda step, kind, name, **_: told.append((step, f"{kind} {name}")))
    leader.record = lambda step, version, warmup, groups, values: rows.append(values)
    learner = make_learner(stage, config, leader)
    for _ in range(4):
        learner._take_step()
    resumed = make_learner(stage, config, leader)
    resumed.load_state_dict(learner.state_dict())
    resumed.step = 4
    for _ in range(2):
        resumed._take_step()
    assert told == [(4, "alarm critic/explained_variance")]
    assert [row.get("alarm/active") for row in rows] == [None, None, 0.0, 1.0, 1.0, 1.0]


def test_actors_can_be_judged_by_the_initial_policy_before_the_first_one_is_ready(stage: Stage) -> None:
    stage.probe = SimpleNamespace(at_ready=lambda: "by the probe")
    judged: list[str] = []
    service = SimpleNamespace(judge_ready=judged.append, set_version=lambda *_: None)
    begin = lambda: stage.calls.append(("begin", len(judged)))  # noqa: E731
    make_learner(stage, Config(), SimpleNamespace(service=service, begin=begin, evaluate=lambda version: None))._begin()
    assert stage.calls == [("hold", 0), ("begin", 1), ("publish", 0)] and judged == ["by the probe"]


def test_the_settings_of_a_resume_are_kept_when_it_has_published(stage: Stage, tmp_path: Path) -> None:
    """And not before: an actor, or the transfer, may refuse them."""
    config = Config(name="run", runs_dir=str(tmp_path))
    config.run_dir.mkdir()
    aside = config.run_dir / lastsettings.BEFORE
    aside.touch()
    stage.probe = SimpleNamespace(at_ready=lambda: None)
    service = SimpleNamespace(
        judge_ready=lambda _: None, set_version=lambda *_: stage.calls.append(("aside", aside.exists()))
    )
    begin = lambda: None  # noqa: E731
    make_learner(stage, config, SimpleNamespace(service=service, begin=begin, evaluate=lambda version: None))._begin()
    assert stage.of("aside") == [True] and not aside.exists()


def test_what_the_probe_did_not_measure_is_no_metric() -> None:
    costs = Costs()
    publication = Publication(version=1, members=(), seconds=0.0, costs=costs, probe_difference=None, probe_floor=2e-6)
    assert {name for name in publication.metrics() if "probe" in name} == {"weights/probe_floor"}

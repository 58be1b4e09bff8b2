"""One run in this process: from a job to what came of it.

The age of batches is exact: the batch of version v was drawn by the weights of version max(0, v - age).
"""

import fcntl
import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.miniature.sampler import Sampler
from common.config import AdvantageEstimator, Config
from common.loading import load_config
from common.tasks import load_task
from common.types import TrajectoryGroup
from learner.alarm import Alarm
from learner.algorithm.packing import Batch
from learner.algorithm.trainer import Trainer
from learner.networks.model import load_networks
from learner.rollouts.prompts import PromptStream

CRITIC_SEED = 1_000  # of value pretraining that is shared by runs, if nothing else is said
EVALUATION_SEED = 7
KEPT = (  # metrics of a step that stay beside its evaluation
    "offpolicy/ess",
    "offpolicy/sequence_ess",
    "offpolicy/m2",
    "policy/grad_norm",
    "policy/entropy",
    "critic/explained_variance",
    "rollout/response_length_mean",
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run. What is equal here is the same run, and is not repeated."""

    table: str
    row: str
    seed: int
    recipes: tuple[str, ...]
    settings: tuple[str, ...]
    age: int = 0  # versions
    steps: int  # of the policy
    evaluate_every: int
    prompts: int  # held-out ones of an evaluation
    samples: int  # responses to each of them
    reuses_critic: bool = False  # whose value pretraining was made once, for all runs with the same critic
    critic_seed: int = CRITIC_SEED  # of it
    critic_recipes: tuple[str, ...] = ()  # it was made with these recipes and settings; none: with those of the run
    critic_settings: tuple[str, ...] = ()

    def config(self) -> Config:
        """Raises ConfigError."""
        own = (f"seed={self.seed}", f"staleness.max_staleness={self.age}", f"learner.steps={self.steps}")
        return load_config(self.recipes, (*own, *self.settings))

    def critic_config(self) -> Config:
        """Of the value pretraining that is shared. Raises ConfigError."""
        config = load_config(self.critic_recipes, self.critic_settings) if self.critic_recipes else self.config()
        return replace(config, seed=self.critic_seed)


@dataclass(frozen=True, kw_only=True)
class Point:
    """What was measured after so many policy steps; tokens and seconds without evaluations."""

    step: int
    accuracy: float
    tokens: int  # sampled by then, value pretraining not in it
    cpu_s: float
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    points: list[Point]
    alarms: list[tuple[int, str]]  # (policy step, metric)
    pretraining_tokens: int
    pretraining_cpu_s: float
    failure: str | None  # what ended the run early


class Miniature:
    """A trainer, the sampler that stands in for the actors, and the weights that old batches are drawn with."""

    def __init__(self, config: Config, age: int) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        networks = load_networks(config, torch.device("cpu"), None)
        self.policy = networks.policy
        self.trainer = Trainer(config, networks.policy, networks.critic, 0, 1, reference=networks.reference)
        self.sampler = Sampler(config)
        self.task = load_task(config.task)
        self.stream = PromptStream(self.task.train, config.seed)
        self.version = self.tokens = 0
        self._draws = 0
        self._weights: deque[tuple[int, dict[str, Tensor]]] = deque(maxlen=age + 1)
        self.keep_weights()

    def keep_weights(self) -> None:
        """Those of now become the newest that batches can be drawn with."""
        named = {name: tensor.clone() for name, tensor in self.policy.named_hf_parameters()}
        self._weights.append((self.version, named))

    def batch(self) -> Batch:
        """As many groups as a step trains on, drawn by the oldest weights that are kept."""
        version, weights = self._weights[0]
        self.sampler.load(weights)
        groups: list[TrajectoryGroup] = []
        while len(groups) < self.config.rollout.prompts_per_step:
            groups += self._informative(self._groups(version))
        return Batch.from_groups(groups[: self.config.rollout.prompts_per_step])

    def pretrain(self) -> None:
        """Value pretraining, as configured."""
        for _ in range(self.config.algorithm.critic_warmup_steps):
            self.trainer.step(self.batch(), 0, is_warmup=True)

    def policy_step(self) -> dict[str, Any]:
        """Trains on a batch and makes the next version; the step's metrics."""
        metrics: dict[str, Any] = dict(self.trainer.step(self.batch(), self.version, is_warmup=False))
        self.version += 1
        self.keep_weights()
        return metrics

    def accuracy(self, prompts: int, samples: int) -> float:
        """Held-out accuracy of the newest weights, at temperature 1, always with the same random numbers."""
        self.sampler.load(self._weights[-1][1])
        return self.sampler.accuracy(self.task.heldout[:prompts], samples, EVALUATION_SEED)

    def _groups(self, version: int) -> list[TrajectoryGroup]:
        rollout = self.config.rollout
        prompts = [self.stream.next() for _ in range(rollout.prompts_per_step)]
        self._draws += 1
        seed = (self.config.seed + 1) * 1_000_003 + self._draws
        groups = self.sampler.groups(prompts, rollout.group_size, version, seed)
        self.tokens += sum(len(group.completed.token_ids) for group in groups)
        return groups

    def _informative(self, groups: list[TrajectoryGroup]) -> list[TrajectoryGroup]:
        """With dynamic sampling, the groups whose rewards differ."""
        if not self.config.algorithm.dynamic_sampling:
            return groups
        return [group for group in groups if group.completed.rewards.min() < group.completed.rewards.max()]


def train(job: Job, critics: Path, make: Callable[[Config, int], Miniature] = Miniature) -> Outcome:
    """The whole run. Pretrained critics that several runs share are kept in the folder `critics`."""
    config = job.config()
    run, alarm = make(config, job.age), Alarm(config.alarm)
    pretraining_tokens, pretraining_s = _pretrain(run, job, critics)
    run.tokens, clock = 0, _Clock()
    points: list[Point] = []
    alarms: list[tuple[int, str]] = []
    failure, metrics = None, {}
    for step in range(job.steps + 1):
        if step:
            try:
                metrics = run.policy_step()
            except FloatingPointError as error:
                failure = str(error)
                break
            alarms += [(step, crossing.name) for crossing in alarm.observe(step, metrics)[1]]
        if step % job.evaluate_every == 0 or step == job.steps:
            with clock.stopped():
                accuracy = run.accuracy(job.prompts, job.samples)
            kept = {name: float(f"{metrics[name]:.4g}") for name in KEPT if name in metrics}
            points.append(Point(step=step, accuracy=accuracy, tokens=run.tokens, cpu_s=clock.now(), metrics=kept))
    return Outcome(
        points=points,
        alarms=alarms,
        pretraining_tokens=pretraining_tokens,
        pretraining_cpu_s=round(pretraining_s, 2),
        failure=failure,
    )


class _Clock:
    """CPU seconds of this process since it was made."""

    def __init__(self) -> None:
        self._began = time.process_time()

    def now(self) -> float:
        return round(time.process_time() - self._began, 2)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens inside does not count."""
        before = time.process_time()
        yield
        self._began += time.process_time() - before


def _pretrain(run: Miniature, job: Job, critics: Path) -> tuple[int, float]:
    """(tokens, CPU seconds) that value pretraining took, in this run or when the shared critic was made."""
    config = run.config
    if config.algorithm.advantage is not AdvantageEstimator.gae or config.algorithm.critic_warmup_steps == 0:
        return 0, 0.0
    if not job.reuses_critic:
        started = time.process_time()
        run.pretrain()
        return run.tokens, time.process_time() - started
    shared = job.critic_config()
    with _critic(shared, critics) as path:
        if not path.exists():
            _make_critic(shared, path)
    kept = torch.load(path)
    assert run.trainer.critic is not None
    run.trainer.critic.load_state_dict(kept["critic"])
    return kept["tokens"], kept["cpu_s"]


@contextmanager
def _critic(config: Config, critics: Path) -> Iterator[Path]:
    """Where the critic of such a configuration is kept; whoever comes first makes it, the others wait."""
    relevant = (
        config.seed,
        asdict(config.model),
        asdict(config.task),
        asdict(config.lora),
        asdict(config.learner.critic),
        {name: value for name, value in asdict(config.algorithm).items() if name.startswith("critic_warmup")},
        asdict(config.rollout),
        config.learner.mini_batches,
    )
    path = critics / f"{hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]}.pt"
    critics.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path


def _make_critic(config: Config, path: Path) -> None:
    maker, started = Miniature(config, 0), time.process_time()
    maker.pretrain()
    assert maker.trainer.critic is not None
    kept = {
        "critic": maker.trainer.critic.state_dict(),
        "tokens": maker.tokens,
        "cpu_s": time.process_time() - started,
    }
    temporary = path.with_suffix(".tmp")
    torch.save(kept, temporary)
    temporary.replace(path)

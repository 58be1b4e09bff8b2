"""A run on a virtual clock: the learner's own coordinator, with simulated engines and a learner that only takes time.

Who samples what, how far ahead, in which order and what is dropped is decided by learner/rollouts and nowhere else.
Here are the clock (simpy), the engines (engine.py) and the learner's loop

    batch -> train -> publish

of policy steps. The critic's warm-up is left out, and every actor has been there from the start and stays.
"""

from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import simpy

from common.config import Config, OverAge, VerifierConfig
from common.memory import num_sequences
from common.types import CompletedGroup, Lease, Prompt, Purpose, TrajectoryGroup, Verdict
from learner.planning.engine import Engine
from learner.planning.limits import Patience, check_size
from learner.planning.speeds import Speeds, token_s
from learner.rollouts.coordinator import Coordinator
from learner.rollouts.evaluation import Evaluation
from learner.rollouts.prompts import PromptStream

FINEST_TOKENS = 256  # of a mean response; longer ones are counted in larger units, which stand for several tokens
NUM_PROMPTS = 4096
NEVER = 1e9  # for limits that no simulated actor reaches


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a simulated run did, in its steady state. Ages in versions, shares of tokens or of time."""

    actors: int
    steps: int  # that are counted
    step_s: float
    steps_per_s: float
    trained_tokens_per_s: float
    generated_tokens_per_s: float
    learner_idle: float  # without a batch, or waiting for the window before a publication (staleness.exact)
    actors_idle: float  # paused, or without a sequence
    running: float  # sequences of one actor, mean over its busy time
    token_s: float  # of one sequence, as learner/planning/runs.py measures it
    staleness_mean: float
    staleness_max: int
    staleness_hist: dict[int, float]  # version gap -> share of the trained tokens
    masked: float  # share of them older than max_staleness (staleness.over_age=mask)
    dropped: dict[str, int]  # reason -> groups


@dataclass(frozen=True)
class _Mark:
    """Totals at one time."""

    now: float
    waited_s: float
    generated: float
    busy_s: float
    sequence_s: float


def simulate(
    config: Config,
    speeds: Speeds,
    *,
    actors: int,
    steps: int,
    filling: int | None = None,
    slowness: Sequence[float] = (),
    patience: Patience | None = None,
) -> Outcome:
    """The outcome of `steps` policy steps, after those in which the pipeline fills.

    Args:
        filling: the number of those; None: as many as it takes to be in the steady state.
        slowness: of each actor, how many times slower it is than `speeds` say; empty: all alike.

    Raises ConfigError when the run is too large to simulate, or `patience` is over.
    """
    if filling is None:
        filling = max(2 + _ahead(config), steps // 4)
        check_size(config, _ahead(config), filling + steps)
    return Simulation(config, speeds, list(slowness) or [1.0] * actors, filling, steps, patience or Patience()).run()


def _ahead(config: Config) -> int:
    """Steps by which sampling runs ahead of training at most."""
    return (1 + config.staleness.max_staleness) * config.weights.publish_every


class Simulation:
    """One run; `run` once. What is random is drawn by lease, so that variants see the same responses."""

    def __init__(
        self, config: Config, speeds: Speeds, slowness: Sequence[float], filling: int, steps: int, patience: Patience
    ) -> None:
        self._patience = patience
        self._num_filling, self._num_steps = filling, filling + steps
        self._unit = max(1, round(speeds.mean_length / FINEST_TOKENS))  # tokens
        self._config = _without_limits(config, self._num_steps + 2 * _ahead(config))
        self._speeds = speeds
        self._environment = simpy.Environment()
        self._changed = self._environment.event()
        self._beat_s = 0.0
        self._num_steps_done = 0
        self._num_leases = Counter[Purpose]()
        self._waited_s = 0.0
        self._marks: list[_Mark] = []
        self._ages: list[npt.NDArray[np.int32]] = []  # of the tokens of each step that is counted
        self._sampled: list[tuple[float, int, int]] = []  # of its groups: generation_s, versions, longest response
        self._coordinator = Coordinator(self._config, _prompts(config.seed), lambda prompt: [1])
        self._ledger = self._coordinator.ledger
        self._engines = {f"actor-{i}": self._engine(f"actor-{i}", times) for i, times in enumerate(slowness)}
        for name in self._engines:
            self._coordinator.join(name, config.actors.groups_in_flight, 0.0)
            self._coordinator.ready(name, 0, np.empty(0, np.float32))

    def run(self) -> Outcome:
        self._turn()
        self._environment.run(until=self._environment.process(self._learn()))
        return self._outcome(*self._marks)

    def _engine(self, name: str, slowness: float) -> Engine:
        speed = self._speeds.engine.slowed(slowness * self._unit)
        places = num_sequences(self._config)
        places = min(places, self._speeds.max_sequences or places)
        return Engine(self._environment, speed, places, lambda group: self._receive(name, group))

    # ---- the learner

    def _learn(self) -> Generator[simpy.Event, None, None]:
        """Notes the totals when the first step that counts took its batch, and when the one after the last did."""
        for step in range(self._num_steps + 1):
            self._num_steps_done = step
            started = self._environment.now
            while (batch := self._ledger.take_batch()) is None:
                yield self._changed
            self._waited_s += self._environment.now - started
            self._turn()
            if step in (self._num_filling, self._num_steps):
                self._marks.append(self._mark())
            if step == self._num_steps:
                break
            if step >= self._num_filling:
                self._ages.append(self._ledger.version - _versions(batch))
                self._sampled.extend(map(_sampled, batch))
            yield from self._train(step, sum(len(group.completed.token_ids) for group in batch))
            yield from self._publish_when_due(step + 1)
            self._evaluate_when_due(step + 1)

    def _train(self, step: int, num_units: int) -> Generator[simpy.Event, None, None]:
        sleeps = self._config.actors.sleep_while_training
        if sleeps:
            self._pause()
        yield self._environment.timeout(self._speeds.train_s(step, num_units * self._unit))
        if sleeps:
            self._resume()

    def _publish_when_due(self, steps_done: int) -> Generator[simpy.Event, None, None]:
        version = self._ledger.version
        if steps_done % self._config.weights.publish_every == 0:
            started = self._environment.now
            while self._config.staleness.exact and not self._ledger.is_window_sampled():
                yield self._changed
            self._waited_s += self._environment.now - started
            publish_s = self._speeds.publication_s(version)
            pause_s = self._speeds.pause_share * publish_s
            version += 1
            self._pause()
            yield self._environment.timeout(pause_s)
            for name, engine in self._engines.items():
                engine.load()
                self._coordinator.loaded(name, version)
            self._resume()
            yield self._environment.timeout(publish_s - pause_s)
        self._coordinator.set_version(version, steps_done)
        self._turn()

    def _evaluate_when_due(self, steps_done: int) -> None:
        settings = self._config.eval
        if self._ledger.evaluation is not None and self._ledger.poll_evaluation() is None:
            return
        if settings.every and steps_done % settings.every == 0:
            prompts = [Prompt(uid=f"heldout-{i}", text="", reference="") for i in range(settings.num_prompts)]
            num_samples = settings.samples_per_prompt if settings.temperature > 0 else 1
            self._ledger.evaluate(Evaluation(prompts, num_samples, settings.temperature, self._ledger.version))
            self._turn()

    def _pause(self) -> None:
        for engine in self._engines.values():
            engine.pause()

    def _resume(self) -> None:
        for engine in self._engines.values():
            engine.resume()

    # ---- the service

    def _receive(self, name: str, group: CompletedGroup) -> None:
        self._coordinator.receive(name, group, self._environment.now)
        self._turn()

    def _turn(self) -> None:
        """What the service's thread does after every message; whoever waits looks again."""
        now = self._environment.now
        self._patience.check(len(self._engines), self._num_steps_done, self._num_steps)
        if now >= self._beat_s:
            self._beat_s = now + self._config.transport.heartbeat_s
            for name in self._engines:
                self._coordinator.heard(name, now)
            self._coordinator.tick(now)
        self._coordinator.dispatch(now)
        while self._coordinator.outbox:
            name, message = self._coordinator.outbox.popleft()
            if isinstance(message, Lease):
                self._engines[name].sample(message, *self._responses(message))
        changed, self._changed = self._changed, self._environment.event()
        changed.succeed()

    def _responses(self, lease: Lease) -> tuple[npt.NDArray[np.int32], tuple[Verdict, ...]]:
        """Their lengths, in units, and verdicts, which all agree where a group teaches nothing."""
        random = np.random.default_rng(lease.seed)
        lengths = self._speeds.lengths(self._num_leases[lease.purpose], random, lease.num_samples, lease.max_tokens)
        self._num_leases[lease.purpose] += 1
        verdicts = [Verdict.CORRECT] * lease.num_samples
        if random.random() >= self._speeds.uninformative:
            verdicts[0] = Verdict.WRONG
        return -(-lengths // self._unit), tuple(verdicts)

    # ---- the end

    def _mark(self) -> _Mark:
        for engine in self._engines.values():
            engine.catch_up()
        engines = self._engines.values()
        return _Mark(
            self._environment.now,
            self._waited_s,
            self._unit * sum(engine.tokens for engine in engines),
            sum(engine.busy_s for engine in engines),
            sum(engine.sequence_s for engine in engines),
        )

    def _outcome(self, begin: _Mark, end: _Mark) -> Outcome:
        seconds, busy_s = end.now - begin.now, end.busy_s - begin.busy_s
        counts = Counter(np.concatenate(self._ages).tolist())
        total = counts.total()
        bound = self._config.staleness.max_staleness
        return Outcome(
            actors=len(self._engines),
            steps=len(self._ages),
            step_s=seconds / len(self._ages),
            steps_per_s=len(self._ages) / seconds,
            trained_tokens_per_s=self._unit * total / seconds,
            generated_tokens_per_s=(end.generated - begin.generated) / seconds,
            learner_idle=(end.waited_s - begin.waited_s) / seconds,
            actors_idle=1 - busy_s / (seconds * len(self._engines)),
            running=(end.sequence_s - begin.sequence_s) / busy_s if busy_s else 0.0,
            token_s=token_s(self._sampled, self._speeds.pause_s) / self._unit,
            staleness_mean=sum(age * count for age, count in counts.items()) / total,
            staleness_max=max(counts),
            staleness_hist={age: count / total for age, count in sorted(counts.items())},
            masked=sum(count for age, count in counts.items() if age > bound) / total
            if self._config.staleness.over_age is OverAge.mask
            else 0.0,
            dropped={str(reason): count for reason, count in self._coordinator.drops.items()},
        )


def _without_limits(config: Config, steps: int) -> Config:
    """The run that is simulated: policy steps only, nobody is silent, and rewards are free."""
    return replace(
        config,
        algorithm=replace(
            config.algorithm, critic_warmup_steps=0, critic_warmup_gate=None, max_uninformative=int(NEVER)
        ),
        learner=replace(config.learner, steps=steps),
        transport=replace(config.transport, heartbeat_timeout_s=NEVER, straggler_factor=NEVER),
        verifier=VerifierConfig(function="simulated:verdicts"),
    )


def _prompts(seed: int) -> PromptStream:
    return PromptStream([Prompt(uid=f"train-{i}", text="", reference="") for i in range(NUM_PROMPTS)], seed)


def _sampled(group: TrajectoryGroup) -> tuple[float, int, int]:
    completed = group.completed
    return completed.generation_s, group.newest_version - group.oldest_version, int(completed.lengths.max())


def _versions(batch: Sequence[TrajectoryGroup]) -> npt.NDArray[np.int32]:
    return np.concatenate([group.completed.versions for group in batch])

"""Measures how a run grows with its actors: the learner's own coordinator on a virtual clock, with simulated actors.

    python benchmarks/scaling.py [--steps N] [--json OUT.json]

No engine, no model, no sockets. An actor holds `places` groups at once and draws every response of a group at one token
per TOKEN_S; lengths are log-normal with sigma 1, and each token is stamped with the version that the actor has at that
time. A learner's step takes as long as four such actors need on average for its groups, so that four are ideally enough
and both sides always busy. The first fifth of the steps is not counted.

Idle: the learner's share of time without a batch. Ideal: the smaller of what the actors can draw when all their
places are full and what the learner can train. The second table is the CPU time of the coordinator itself.
"""

import argparse
import heapq
import itertools
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.config import (
    AlgorithmConfig,
    Batching,
    Config,
    LearnerConfig,
    OverAge,
    RolloutConfig,
    StalenessConfig,
    TransportConfig,
)
from common.types import CompletedGroup, FinishReason, Heartbeat, Lease, Prompt, Verdict
from learner.rollouts.coordinator import Coordinator
from learner.rollouts.prompts import PromptStream

GROUPS, SAMPLES = 16, 8  # of a step; responses of a group
BOUND = 2  # max_staleness
TOKEN_S = 0.02
MEAN_TOKENS, SIGMA, MAX_TOKENS = 200.0, 1.0, 2000
NO_PROBE = np.empty(0, np.float32)
ORDERS = (
    (Batching.admission_order, OverAge.drop),
    (Batching.first_finished, OverAge.drop),
    (Batching.first_finished, OverAge.mask),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    batching: str
    over_age: str
    places: int  # of each actor
    actors: str
    tokens_per_s: float
    ideal_tokens_per_s: float
    idle: float  # of the learner
    oldest: int  # versions, of all tokens
    masked: float  # share of tokens older than the bound
    dropped: int  # groups


@dataclass
class Actor:
    name: str
    places: int
    token_s: float
    loaded_s: list[float] = field(default_factory=lambda: [0.0])  # when each version came

    def versions(self, began_s: float, lengths: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Of all tokens of a group, whose responses are drawn side by side."""
        drawn_s = began_s + self.token_s * np.concatenate([np.arange(1, length + 1) for length in lengths])
        return (np.searchsorted(np.array(self.loaded_s), drawn_s, side="right") - 1).astype(np.int32)


def draw_lengths(seed: int, num_groups: int) -> npt.NDArray[np.int32]:
    """(num_groups, SAMPLES), the same for the same seed."""
    location = math.log(MEAN_TOKENS) - SIGMA**2 / 2
    drawn = np.random.default_rng(seed).lognormal(location, SIGMA, (num_groups, SAMPLES))
    return np.clip(drawn, 1, MAX_TOKENS).astype(np.int32)


class Simulation:
    """Events in the order of their times; after each of them, a turn of the service and a try for a batch."""

    def __init__(self, config: Config, actors: Sequence[Actor], step_s: float) -> None:
        self._config, self._step_s = config, step_s
        prompts = [Prompt(uid=f"p{i}", text="", reference="") for i in range(50_000)]
        self._coordinator = Coordinator(config, PromptStream(prompts, seed=0), lambda prompt: [1])
        self._actors = {actor.name: actor for actor in actors}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._now = 0.0
        self._idle_since: float | None = 0.0
        self.taken_s: list[float] = []  # when each step began
        self.waited_s: list[float] = []
        self.ages_T: list[npt.NDArray[np.int32]] = []  # of each step
        for actor in actors:
            self._coordinator.join(actor.name, actor.places, 0.0)
            self._coordinator.ready(actor.name, 0, NO_PROBE)

    @property
    def num_dropped(self) -> int:
        return self._coordinator.drops.total()

    def run(self) -> None:
        self._turn()
        while len(self.taken_s) < self._config.learner.steps:
            self._now, _, happen = heapq.heappop(self._events)
            happen()
            self._turn()

    def _at(self, seconds: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (seconds, next(self._order), happen))

    def _turn(self) -> None:
        for name in self._actors:
            self._coordinator.heard(name, self._now)
        self._coordinator.tick(self._now)
        if self._idle_since is not None and (batch := self._coordinator.ledger.take_batch()) is not None:
            self.waited_s.append(self._now - self._idle_since)
            self.taken_s.append(self._now)
            versions_T = np.concatenate([group.completed.versions for group in batch])
            self.ages_T.append(self._coordinator.ledger.version - versions_T)
            self._idle_since = None
            self._at(self._now + self._step_s, self._publish)
        self._coordinator.dispatch(self._now)
        while self._coordinator.outbox:
            name, message = self._coordinator.outbox.popleft()
            if isinstance(message, Lease):
                self._sample(self._actors[name], message, self._now)

    def _sample(self, actor: Actor, lease: Lease, began_s: float) -> None:
        lengths = draw_lengths(lease.seed, 1)[0]

        def arrive() -> None:
            group = completed(lease.lease_id, lengths, actor.versions(began_s, lengths), self._now - began_s)
            self._coordinator.receive(actor.name, group, self._now)

        self._at(began_s + actor.token_s * int(lengths.max()), arrive)

    def _publish(self) -> None:
        version = self._coordinator.ledger.version + 1
        for actor in self._actors.values():
            actor.loaded_s.append(self._now)
            self._coordinator.loaded(actor.name, version)
        self._coordinator.set_version(version, version)
        self._idle_since = self._now


def completed(
    lease_id: int, lengths: npt.NDArray[np.int32], versions: npt.NDArray[np.int32], generation_s: float
) -> CompletedGroup:
    return CompletedGroup(
        lease_id=lease_id,
        lengths=lengths,
        token_ids=np.zeros(len(versions), np.int32),
        behavior_logprobs=np.zeros(len(versions), np.float32),
        versions=versions,
        rewards=np.ones(len(lengths), np.float32),
        verdicts=(Verdict.CORRECT,) * len(lengths),
        verifier_error=None,
        finish_reasons=(FinishReason.STOP,) * len(lengths),
        generation_s=generation_s,
        verification_s=0.0,
    )


def measure(order: tuple[Batching, OverAge], places: int, slowness: Sequence[float], steps: int) -> Row:
    """`slowness`: time for a token, of each actor, in TOKEN_S."""
    config = Config(
        rollout=RolloutConfig(prompts_per_step=GROUPS, group_size=SAMPLES, max_tokens=MAX_TOKENS),
        staleness=StalenessConfig(max_staleness=BOUND, batching=order[0], over_age=order[1]),
        algorithm=AlgorithmConfig(critic_warmup_steps=0),
        learner=LearnerConfig(steps=steps),
        transport=TransportConfig(heartbeat_timeout_s=1e6, straggler_factor=1e9),  # what order alone does
    )
    typical = draw_lengths(0, 20_000)
    group_s, group_tokens = float(typical.max(axis=1).mean()) * TOKEN_S, float(typical.sum(axis=1).mean())
    step_s = GROUPS * group_s / (4 * places)
    actors = [Actor(f"actor-{i}", places, TOKEN_S * times) for i, times in enumerate(slowness)]
    simulation = Simulation(config, actors, step_s)
    simulation.run()
    first = steps // 5
    span_s = simulation.taken_s[-1] - simulation.taken_s[first]
    rate = sum(places / (group_s * times) for times in slowness)
    ages_T = np.concatenate(simulation.ages_T)
    return Row(
        batching=order[0],
        over_age=order[1],
        places=places,
        actors=" + ".join(f"{len(list(same))} x {times:g}" for times, same in itertools.groupby(slowness)),
        tokens_per_s=sum(len(ages) for ages in simulation.ages_T[first:-1]) / span_s,
        ideal_tokens_per_s=group_tokens * min(rate, GROUPS / step_s),
        idle=sum(simulation.waited_s[first + 1 :]) / span_s,
        oldest=int(ages_T.max()),
        masked=float((ages_T > BOUND).mean()),
        dropped=simulation.num_dropped,
    )


def measure_turns(num_actors: int = 500, places: int = 16) -> dict[str, float]:
    """CPU time of the first dispatch to everybody, and of turns in which one group and one heartbeat arrive."""
    config = Config(
        rollout=RolloutConfig(prompts_per_step=num_actors * places // 2, group_size=2, max_tokens=8),
        staleness=StalenessConfig(max_staleness=1),
        algorithm=AlgorithmConfig(critic_warmup_steps=0),
    )
    prompts = [Prompt(uid=f"p{i}", text="", reference="") for i in range(3 * num_actors * places)]
    coordinator = Coordinator(config, PromptStream(prompts, seed=0), lambda prompt: [1])
    for i in range(num_actors):
        coordinator.join(f"actor-{i}", places, 0.0)
        coordinator.ready(f"actor-{i}", 0, NO_PROBE)
    started = time.process_time()
    coordinator.dispatch(0.0)
    dispatch_s = time.process_time() - started
    leases = [(name, message) for name, message in coordinator.outbox if isinstance(message, Lease)]
    coordinator.outbox.clear()
    lengths, versions = np.full(2, 4, np.int32), np.zeros(8, np.int32)
    held: dict[str, list[int]] = {}
    for name, lease in leases:
        held.setdefault(name, []).append(lease.lease_id)
    beats = {name: heartbeat(ids) for name, ids in held.items()}
    groups = [(name, completed(lease.lease_id, lengths, versions, 1.0)) for name, lease in leases[:2000]]
    turns: list[float] = []
    for i, (name, group) in enumerate(groups):
        now = i * 1e-3
        started = time.process_time()
        coordinator.heard(name, now)
        coordinator.heartbeat(name, beats[name], now)
        coordinator.receive(name, group, now)
        coordinator.tick(now)
        coordinator.waiting_for_weights()
        coordinator.ledger.take_batch()
        coordinator.dispatch(now)
        coordinator.outbox.clear()
        turns.append(time.process_time() - started)
    return {
        "actors": num_actors,
        "leases": len(leases),
        "first_dispatch_s": dispatch_s,
        "turn_mean_ms": 1e3 * statistics.mean(turns),
        "turn_max_ms": 1e3 * max(turns),
    }


def heartbeat(lease_ids: Sequence[int]) -> Heartbeat:
    ids = np.array(lease_ids, np.int32)
    return Heartbeat(lease_ids=ids, lease_tokens=np.zeros_like(ids), generated_tokens=0, busy_s=0.0, uptime_s=0.0)


def render(rows: Sequence[Row]) -> str:
    lines = [
        "| places | actors | order | tokens/s | of ideal | learner idle | oldest | masked |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        order = row.batching + (", mask" if row.over_age == OverAge.mask else "")
        share = row.tokens_per_s / row.ideal_tokens_per_s
        lines.append(
            f"| {row.places} | {row.actors} | {order} | {row.tokens_per_s:,.0f} | {share:.0%} | {row.idle:.0%} | "
            f"{row.oldest} | {row.masked:.1%} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="learner steps of each run")
    parser.add_argument("--places", type=int, nargs="+", default=[2, 8], help="groups that an actor samples at once")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    fleets = [[1.0], [1.0] * 2, [1.0] * 4, [1.0] * 8, [1.0] * 3, [1.0] * 3 + [3.0], [1.0] * 3 + [10.0]]
    rows = [
        measure(order, places, fleet, options.steps)
        for places in options.places
        for fleet in fleets
        for order in ORDERS
    ]
    turns = measure_turns()
    print(render(rows), "", json.dumps(turns), sep="\n")
    if options.json is not None:
        options.json.write_text(json.dumps({"rows": [asdict(row) for row in rows], "turns": turns}, indent=1) + "\n")


if __name__ == "__main__":
    main()

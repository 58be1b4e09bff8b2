"""Measures how a run grows with its actors: the simulation of `run.py plan`, the coordinator's own time, and processes.

    python benchmarks/scaling.py [--steps N] [--json OUT.json]
    python benchmarks/scaling.py --processes [--actors 1 2 4 8] [--json OUT.json] [--svg OUT.svg]

With `--processes` real learners and actors run beside their simulation (benchmarks/fleet.py).

Without it: no engine, no model, no sockets. An actor holds `places` groups at once and draws every response of a group
at one token per TOKEN_S, however many run; lengths are log-normal with sigma 1. A learner's step takes as long as four
such actors need on average for its groups, so that four are ideally enough and both sides always busy. Steps in which
the pipeline fills are not counted.

Idle: the learner's share of time without a batch. Ideal: the smaller of what the actors can draw when all their
places are full and what the learner can train. The second table is the CPU time of the coordinator itself.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cost import Meter
from common.config import (
    ActorsConfig,
    AlgorithmConfig,
    Batching,
    Config,
    EvalConfig,
    OverAge,
    RolloutConfig,
    StalenessConfig,
)
from common.quiet import quieter
from common.types import CompletedGroup, FinishReason, Heartbeat, Lease, Prompt, Verdict
from learner.planning.engine import EngineSpeed
from learner.planning.simulation import simulate
from learner.planning.speeds import Speeds
from learner.rollouts.coordinator import Coordinator
from learner.rollouts.prompts import PromptStream

GROUPS, SAMPLES = 16, 8  # of a step; responses of a group
BOUND = 2  # max_staleness
TOKEN_S = 0.02
MEAN_TOKENS, SIGMA, MAX_TOKENS = 200.0, 1.0, 2000
STEPS = {1: 14, 2: 20, 4: 28, 8: 28}  # learner steps of a run of so many processes
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
        actors=ActorsConfig(groups_in_flight=places),
        eval=EvalConfig(every=0),
    )
    lengths = {"length_mean": MEAN_TOKENS, "length_sigma": SIGMA}
    engine, nothing = EngineSpeed(base_s=TOKEN_S), (0.0,)
    random, typical = (
        np.random.default_rng(0),
        Speeds(train_token_s=nothing, publish_s=nothing, engine=engine, **lengths),
    )
    drawn = np.stack([typical.lengths(0, random, SAMPLES, MAX_TOKENS) for _ in range(20_000)])
    group_s, group_tokens = float(drawn.max(axis=1).mean()) * TOKEN_S, float(drawn.sum(axis=1).mean())
    step_s = GROUPS * group_s / (4 * places)
    speeds = replace(typical, train_token_s=(step_s / (GROUPS * group_tokens),))
    outcome = simulate(config, speeds, actors=len(slowness), steps=steps, slowness=slowness)
    rate = sum(places / (group_s * times) for times in slowness)
    return Row(
        batching=order[0],
        over_age=order[1],
        places=places,
        actors=" + ".join(f"{len(list(same))} x {times:g}" for times, same in itertools.groupby(slowness)),
        tokens_per_s=outcome.trained_tokens_per_s,
        ideal_tokens_per_s=group_tokens * min(rate, GROUPS / step_s),
        idle=outcome.learner_idle,
        oldest=outcome.staleness_max,
        masked=outcome.masked,
        dropped=sum(outcome.dropped.values()),
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


def measure_processes(options: argparse.Namespace) -> None:
    from benchmarks import fleet  # with torch and all that a learner needs

    meter, rows = Meter(), []
    print(fleet.HEADER, "|---" * fleet.HEADER.count(" |") + "|", sep="\n", flush=True)
    with quieter("learner"):
        for row in fleet.measure({actors: STEPS[actors] for actors in options.actors}):
            rows.append(row)
            print(fleet.render(row), flush=True)
    cost = meter.cost()
    print(f"\n{cost}")
    if options.json is not None:
        plain = [asdict(row) | {"share": row.share, "ratio": row.ratio} for row in rows]
        options.json.write_text(json.dumps({"rows": plain, "cost": asdict(cost)}, indent=1) + "\n")
    if options.svg is not None:
        options.svg.write_text(fleet.drawing(rows))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="learner steps of each run")
    parser.add_argument("--places", type=int, nargs="+", default=[2, 8], help="groups that an actor samples at once")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("--processes", action="store_true", help="real processes beside their simulation")
    parser.add_argument("--actors", type=int, nargs="+", choices=list(STEPS), default=list(STEPS), help="of processes")
    parser.add_argument("--svg", type=Path, help="draw what processes did here")
    options = parser.parse_args(arguments)
    if options.processes:
        measure_processes(options)
        return
    fleets = [[1.0], [1.0] * 2, [1.0] * 4, [1.0] * 8, [1.0] * 3, [1.0] * 3 + [3.0], [1.0] * 3 + [10.0]]
    with quieter("learner"):
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

"""A run that nobody trained: 60 policy steps after 12 of warm-up, with every metric that a report reads.

The numbers are smooth and healthy; a test changes what it is about. `write_run` writes the files that a learner would,
without its event files.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import Config, EvalConfig, LearnerConfig, ModelConfig, StalenessConfig
from common.loading import save_config

Row = dict[str, Any]
WARMUP, STEPS = 12, 60
GROUPS, TOKENS = 16, 6400  # a step
STEP_S = 6.0
EVALUATED = (0, 10, 20, 30, 40, 50, 60)
START = 1.7e9
REASONS = ("stale", "actor_lost", "hung", "straggler", "duplicate", "failed", "verifier_error")


@dataclass(frozen=True, kw_only=True)
class MadeUp:
    """`change` holds other values of metrics, or functions of the policy step, than the healthy ones; None: absent."""

    config: Config = field(default_factory=lambda: config())
    change: Mapping[str, float | Callable[[int], float | None] | None] = field(default_factory=dict)
    steps: int = STEPS
    warmup: int = WARMUP
    accuracies: Sequence[float] = (0.21, 0.45, 0.66, 0.78, 0.84, 0.88, 0.9)
    half_interval: float | None = 0.04
    events: Sequence[Row] = ()
    actors: Sequence[str] = ("actor-0", "actor-1")


def config(**changes: Any) -> Config:
    """Bound 2, 60 steps, two actors."""
    settings: dict[str, Any] = {
        "name": "made-up",
        "model": ModelConfig(path="configs/models/contrary_walk"),
        "staleness": StalenessConfig(max_staleness=2),
        "learner": LearnerConfig(steps=STEPS),
        "eval": EvalConfig(num_prompts=96, samples_per_prompt=8),
    }
    return Config(**settings | changes)


def write_run(folder: Path, made: MadeUp | None = None) -> Path:
    made = made or MadeUp()
    folder.mkdir(parents=True, exist_ok=True)
    save_config(made.config, folder / "config.yaml")
    rows = [_warmup_row(step) for step in range(1, made.warmup + 1)]
    rows[:1] = [row | {"offpolicy/ess": 1.0, "offpolicy/mismatch_abs_mean": 4.6e-7} for row in rows[:1]]
    rows += [_row(step, made) for step in range(1, made.steps + 1)]
    _write(folder / "metrics.jsonl", rows)
    _write(folder / "ledger.jsonl", [_group(row["step"], index, made) for row in rows for index in range(GROUPS)])
    if made.events:
        _write(folder / "events.jsonl", made.events)
    return folder


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _warmup_row(step: int) -> Row:
    return {
        "step": step,
        "time": START + STEP_S * step,
        "version": 0,
        "critic/explained_variance": 0.3 * (1 - math.exp(-step / 4)),
        "critic/explained_variance_first": 0.1,
        "critic/explained_variance_p50": 0.25 * (1 - math.exp(-step / 4)),
        "critic/explained_variance_last": 0.6 * (1 - math.exp(-step / 4)),
    } | _flow(step, step)


def _row(step: int, made: MadeUp) -> Row:
    """Of a policy step, counted from 1."""
    number = made.warmup + step
    row = {"step": number, "time": START + STEP_S * number, "version": step}
    row |= _flow(step, number) | _ages(step) | _offpolicy(step, made.config.staleness.max_staleness) | _critic(step)
    index = EVALUATED.index(step) if step in EVALUATED else 0 if step == 1 else None
    if index is not None and index < len(made.accuracies):
        row |= _evaluation(EVALUATED[index], made.accuracies[index], made.half_interval)
    for name, change in made.change.items():
        value = change(step) if callable(change) else change
        row.pop(name, None)
        row |= {} if value is None else {name: value}
    return row


def _evaluation(version: int, accuracy: float, half: float | None) -> Row:
    row = {
        "accuracy/heldout": accuracy,
        "accuracy/version": version,
        "accuracy/version_newest": version + (2 if 0 < version < STEPS else 0),
        "eval/num_prompts": 96,
        "eval/num_failed": 0,
        "eval/num_errors": 0,
        "time/evaluation_s": 30.0,
    }
    if half is None:
        return row
    return row | {"accuracy/heldout_low": accuracy - half, "accuracy/heldout_high": accuracy + half}


def _flow(step: int, number: int) -> Row:
    """What comes from the actors, `number` counted with the warm-up."""
    generated = number * TOKENS * 1.05
    drops = {f"drops/{reason}": 0 for reason in REASONS}
    drops |= {"drops/stale": number // 10, "drops/actor_lost": number // 30}
    tokens = {f"dropped_tokens/{name.removeprefix('drops/')}": count * 400 for name, count in drops.items()}
    return (
        {
            "time/step_s": STEP_S,
            "time/publish_s": 0.3 + 0.1 * math.sin(step),
            "tokens/generated": generated,
            "tokens/trained": number * TOKENS,
            "learner/idle_fraction": 0.06 + 0.02 * math.sin(step / 2),
            "actors/idle_fraction": 0.05 + 0.02 * math.cos(step / 3),
            "actors/connected": 2,
            "actors/dismissed": 0,
            "actors/too_slow": 0,
            "queue/window_fill": 0.8 + 0.1 * math.sin(step / 5),
            "verdicts/correct": 70 * number,
            "verdicts/wrong": 50 * number,
            "verdicts/unanswered": 8 * number,
            "verdicts/timed_out": 0,
            "verdicts/error": 0,
            "verifier/num_errors": 0,
            "length/truncated_fraction": 0.01,
            "selection/length_sampled": 50.0 + 2 * math.sin(step),
            "selection/length_trained": 49.5 + 2 * math.sin(step + 1),
            "selection/length_trained_over_sampled": 0.99,
            "selection/length_dropped": 60.0,
            "selection/pass_rate_dropped": 0.4,
            "selection/pass_rate_sampled": 0.55 + 0.05 * math.sin(step / 2),
            "selection/pass_rate_trained": 0.55 + 0.05 * math.sin(step / 2 + 1),
        }
        | drops
        | tokens
    )


def _ages(step: int) -> Row:
    shares = (0.5, 0.35 + 0.1 * math.sin(step / 4), 0.15 - 0.1 * math.sin(step / 4))
    gaps = {str(gap): round(TOKENS * share) for gap, share in enumerate(shares) if step > gap}
    total = sum(gaps.values())
    mean = sum(int(gap) * count for gap, count in gaps.items()) / total
    oldest = max(map(int, gaps))
    rate = 3e-4 * (1 - step / (STEPS + 1))
    return {
        "staleness/hist": gaps,
        "staleness/token_mean": mean,
        "staleness/token_max": oldest,
        "staleness/flight_mean": 0.3 * mean,
        "staleness/queue_mean": 0.7 * mean,
        "staleness/updates_mean": 1.5,
        "staleness/nats_mean": 0.0011 * mean,
        "staleness/nats_max": 0.0012 * oldest,
        "policy/kl_version": 0.001 * (1 + 0.4 * math.sin(step / 3)),
        "policy/learning_rate": rate,
        "staleness/lr_gauge": oldest * rate,
    }


def _offpolicy(step: int, bound: int) -> Row:
    row: Row = {
        "offpolicy/ess": 0.98,
        "offpolicy/sequence_ess": 0.8,
        "offpolicy/m2": 0.004,
        "offpolicy/tv": 0.012,
        "offpolicy/mismatch_abs_mean": 5e-7 * (1 + 0.2 * math.sin(step)),
        "offpolicy/mismatch_floor": 4.6e-7,
        "offpolicy/mismatch_alarm": 0,
    }
    for gap in range(min(bound, step - 1) + 1):
        name, noise = f"offpolicy/gap_{gap}", 1 + 0.1 * math.sin(step + gap)
        row |= {
            f"{name}/tokens": 2000,
            f"{name}/sequences": 40,
            f"{name}/ess": 1 - 0.008 * gap * noise,
            f"{name}/sequence_ess": 1 - (0.03 + 0.08 * gap) * noise,
            f"{name}/ratio_p01": 1 - (0.002 + 0.09 * gap) * noise,
            f"{name}/ratio_p50": 1.0,
            f"{name}/ratio_p99": 1 + (0.002 + 0.1 * gap) * noise,
            f"{name}/m2": (1e-6 + 0.003 * gap) * noise,
            f"{name}/tv": (2e-4 + 0.009 * gap) * noise,
        }
        for sign, most in (("positive", 0.03), ("negative", 0.05)):
            losses = {"clipped": most * (1 + gap) / 2, "truncated": 0.004 * gap, "masked": 0.0}
            row |= {f"{name}/lost_{loss}_{sign}": share for loss, share in losses.items()}
    return row


def _critic(step: int) -> Row:
    grown = 0.3 + 0.3 * (1 - math.exp(-step / 20))
    row = {
        "critic/explained_variance": grown,
        "critic/explained_variance_first": 0.15,
        "critic/explained_variance_p50": grown,
        "critic/explained_variance_last": min(grown + 0.3, 1.0),
    }
    for gap in range(3):
        row[f"critic/gap_{gap}/explained_variance"] = grown - 0.05 * gap
        row[f"critic/gap_{gap}/bias"] = 0.02 * gap - 0.01
    return row


def _group(step: int, index: int, made: MadeUp) -> Row:
    version = max(0, step - made.warmup - 1)
    return {
        "step": step,
        "prompt_uid": f"train/{step * GROUPS + index}",
        "lease_id": step * GROUPS + index,
        "actor": made.actors[index % len(made.actors)],
        "versions": [max(0, version - 1), version],
        "rewards": [1.0, -1.0] * 4,
        "lengths": [50] * 8,
    }

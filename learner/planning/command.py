"""`run.py plan`: whether a run fits into memory, how fast it would be, and how many actors its learner needs."""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path

from common.config import Config, ConfigError, Device
from common.lines import for_terminal
from common.memory import num_sequences
from common.quiet import quieter
from common.types import JSON
from learner.planning.fleet import Fleet, alternatives, plan_fleet
from learner.planning.limits import MOST_S, RANGES, Patience, check_option
from learner.planning.memory import MemoryReport, gpus_to_plan, report, table
from learner.planning.runs import MeasuredRun, measured
from learner.planning.simulation import Outcome
from learner.planning.speeds import OVERHEAD, Speeds, assumed

USER_ERROR = 2
RESPONSES = 50_000  # of a simulation whose number of steps is not given
FEWEST_STEPS, MOST_STEPS = 8, 60
BAR_WIDTH = 40
LABEL = 10  # columns
# Settings on which the speed of a learner or an actor depends, in a way that a run with others does not tell.
SPEED_SETTINGS = (
    "device",
    "model.path",
    "model.dtype",
    "model.critic_frozen",
    "model.num_critics",
    "lora.rank",
    "rollout.max_tokens",
    "algorithm.advantage",
    "algorithm.critic_updates_per_step",
    "algorithm.kl_weight",
    "learner.ranks",
    "learner.mini_batches",
    "learner.activation_checkpointing",
    "learner.compile",
    "learner.offload",
    "actors.tensor_parallel_size",
    "actors.enforce_eager",
)
# What is assumed of a run of which nothing is known: option, value.
ASSUMED = {
    "actor_tokens_per_s": 2000.0,
    "learner_tokens_per_s": 4000.0,
    "publish_s": 1.0,
    "length_sigma": 0.7,
    "uninformative": 0.3,
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that `plan` says. `fleet` is None where the run does not fit into memory."""

    config: Config
    memory: MemoryReport
    speeds: Speeds
    source: str  # of the speeds
    notes: tuple[str, ...]
    idle: float  # of the learner, that counts as busy
    fleet: Fleet | None
    others: tuple[tuple[str, Outcome], ...]  # setting, what it would change


def plan(config: Config, options: argparse.Namespace) -> int:
    """Prints the plan. Exit code 2 when the run does not fit into memory."""
    with quieter("learner.rollouts"):  # it warns of actors that are only simulated
        made = make_plan(config, options)
    if options.json:
        print(json.dumps(as_json(made), indent=1))
    else:
        print(for_terminal("\n".join(as_text(made)), LABEL))
    if made.memory.problem is not None:
        print(f"error: {made.memory.problem}", file=sys.stderr)
        return USER_ERROR
    return 0


def make_plan(config: Config, options: argparse.Namespace) -> Plan:
    """Raises ConfigError for options that make no sense, and where nothing can be planned."""
    if not 0 <= options.idle < 1:
        raise ConfigError(f"--idle {options.idle:g} is no share of the time: it must be from 0 to below 1")
    for name in RANGES:
        if (value := getattr(options, name)) is not None:
            check_option(name, value)
    gpus = gpus_to_plan(options.gpus, options.gpu_gib) if config.device is Device.cuda else []
    memory = report(config, gpus)
    speeds, source, notes = _speeds(config, options)
    if memory.max_sequences_tokens is not None:
        speeds = replace(speeds, max_sequences=max(1, int(memory.max_sequences_tokens / speeds.mean_length)))
    fleet, others = None, list[tuple[str, Outcome]]()
    if memory.problem is None:
        steps, patience = options.steps or _usual_steps(config), Patience(MOST_S)
        fleet = plan_fleet(config, speeds, idle=options.idle, steps=steps, patience=patience)
        others = list(alternatives(config, speeds, actors=fleet.planned.actors, steps=steps, patience=patience))
    return Plan(
        config=config,
        memory=memory,
        speeds=speeds,
        source=source,
        notes=notes,
        idle=options.idle,
        fleet=fleet,
        others=tuple(others),
    )


def _usual_steps(config: Config) -> int:
    """As many as keep a simulation to some seconds."""
    responses = config.rollout.prompts_per_step * config.rollout.group_size
    return min(MOST_STEPS, max(FEWEST_STEPS, RESPONSES // responses))


def _speeds(config: Config, options: argparse.Namespace) -> tuple[Speeds, str, tuple[str, ...]]:
    """(speeds, where they come from, what to know about them)"""
    given = {name: value for name in (*ASSUMED, "length_mean") if (value := getattr(options, name)) is not None}
    longest = config.rollout.max_tokens
    if given.get("length_mean", 0) > longest:
        raise ConfigError(f"--length-mean {given['length_mean']:g} is more than rollout.max_tokens={longest}")
    if options.runs:
        if given:
            names = ", ".join(_option(name) for name in given)
            raise ConfigError(f"{names} with --from: the run tells it; leave one of both out")
        runs = [MeasuredRun(Path(run)) for run in options.runs]
        return measured(runs), f"of {', '.join(options.runs)}", tuple(_differences(config, runs[0]))
    values = ASSUMED | {"length_mean": config.rollout.max_tokens / 4} | given
    if not config.algorithm.dynamic_sampling:
        values["uninformative"] = 0.0
    guessed = [_option(name) for name in values if name not in given and values[name]]
    notes = (f"{', '.join(guessed)} are not given: what follows is no better than these guesses",) if guessed else ()
    return assumed(**values, sequences=num_sequences(config), overhead=OVERHEAD[config.device]), "assumed", notes


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _differences(config: Config, run: MeasuredRun) -> list[str]:
    pairs = ((name, attrgetter(name)(run.config), attrgetter(name)(config)) for name in SPEED_SETTINGS)
    return [
        f"{run.folder} had {name}={theirs}, not {ours}: its speeds may not hold"
        for name, theirs, ours in pairs
        if theirs != ours
    ]


# ---- text and JSON


def as_text(made: Plan) -> list[str]:
    parts = [("memory", table(made.memory)), ("speeds", _speeds_text(made))]
    if made.fleet is not None:
        parts.append(("planned", _outcome_text(made.config, made.fleet.planned)))
        parts.append(("actors", _fleet_text(made.fleet, made.idle, made.config.staleness.exact)))
        parts.append(("instead", _others_text(made.fleet.planned, made.others)))
    return [
        f"{label if i == 0 else '':<{LABEL}}{line}".rstrip() for label, lines in parts for i, line in enumerate(lines)
    ]


def _speeds_text(made: Plan) -> list[str]:
    speeds, config = made.speeds, made.config
    places = num_sequences(config)
    places = min(places, speeds.max_sequences or places)
    train_s = sum(speeds.train_token_s) / len(speeds.train_token_s)
    return [
        f"{made.source}: an actor {speeds.engine.tokens_per_s(1):,.0f} tokens/s with 1 sequence, "
        f"{speeds.engine.tokens_per_s(places):,.0f} with {places}; the learner {1 / train_s:,.0f}; "
        f"a publication {sum(speeds.publish_s) / len(speeds.publish_s):.2f} s; "
        f"responses of {speeds.mean_length:,.0f} tokens",
        *made.notes,
    ]


def _outcome_text(config: Config, outcome: Outcome) -> list[str]:
    staleness, rollout = config.staleness, config.rollout
    dropped = ", ".join(f"{reason} {count}" for reason, count in outcome.dropped.items()) or "no group"
    return [
        f"{outcome.actors} actor(s), {rollout.prompts_per_step} x {rollout.group_size} responses a step, "
        f"{staleness.batching}, max_staleness {staleness.max_staleness} ({outcome.steps} steps simulated)",
        f"a step {outcome.step_s:.2f} s; trained {outcome.trained_tokens_per_s:,.0f} tokens/s, "
        f"generated {outcome.generated_tokens_per_s:,.0f}",
        f"idle: learner {outcome.learner_idle:.0%}, actors {outcome.actors_idle:.0%} (paused included); "
        f"{outcome.running:.0f} sequences run on an actor",
        f"staleness mean {outcome.staleness_mean:.2f}, max {outcome.staleness_max}"
        + (f"; {outcome.masked:.1%} of the tokens masked" if outcome.masked else ""),
        *(
            f"{age:>3} old {share:>6.1%} {'#' * round(BAR_WIDTH * share)}".rstrip()
            for age, share in outcome.staleness_hist.items()
        ),
        f"dropped: {dropped}",
    ]


def _fleet_text(fleet: Fleet, idle: float, is_exact: bool) -> list[str]:
    if fleet.smallest is not None:
        best, few = fleet.best, fleet.smallest
        more = best.trained_tokens_per_s / few.trained_tokens_per_s - 1
        text = f"{few.actors} keep the learner busy (idle {few.learner_idle:.0%}, at most {idle:.0%} asked for); "
        text += f"more would bring {more:.0%}" if more >= 0.005 else "more would bring nothing"
    else:
        best = fleet.best
        text = f"no number keeps the learner busy: with {best.actors} it idles {best.learner_idle:.0%}, and more bring "
        text += "nothing, because "
        text += (
            "staleness.exact makes each publication wait for the longest responses of the window"
            if is_exact
            else "the responses of a batch take longer than the bound leaves them (see instead)"
        )
    head = f"{'':>6} {'trained/s':>10} {'learner idle':>13} {'actors idle':>12} {'staleness':>10}"
    rows = [
        f"{outcome.actors:>6} {outcome.trained_tokens_per_s:>10,.0f} {outcome.learner_idle:>13.0%} "
        f"{outcome.actors_idle:>12.0%} {outcome.staleness_mean:>10.2f}"
        for outcome in fleet.outcomes
    ]
    return [text, head, *rows]


def _others_text(planned: Outcome, others: tuple[tuple[str, Outcome], ...]) -> list[str]:
    return [
        f"{setting}: trained {other.trained_tokens_per_s / planned.trained_tokens_per_s - 1:+z.0%}, learner idle "
        f"{other.learner_idle:.0%}, staleness {other.staleness_mean:.2f}, max {other.staleness_max}"
        + (f", {other.masked:.1%} masked" if other.masked else "")
        for setting, other in others
    ]


def as_json(made: Plan) -> JSON:
    memory, fleet, speeds = made.memory, made.fleet, asdict(made.speeds)
    speeds["groups"] = len(speeds["groups"])  # how many lengths are drawn from
    return {
        "memory": asdict(memory) | {"fits": memory.problem is None},
        "speeds": speeds | {"source": made.source, "length_mean": made.speeds.mean_length, "notes": list(made.notes)},
        "planned": None if fleet is None else asdict(fleet.planned),
        "actors": None
        if fleet is None
        else {
            "idle": made.idle,
            "smallest": None if fleet.smallest is None else fleet.smallest.actors,
            "outcomes": [asdict(outcome) for outcome in fleet.outcomes],
        },
        "instead": {setting: asdict(outcome) for setting, outcome in made.others},
    }

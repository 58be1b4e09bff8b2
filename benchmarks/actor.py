"""Tokens per second through an actor, against plain `vllm.LLM.generate` on the same prompts.

    python benchmarks/actor.py [--models demo 3m] [--repeats N] [--json FILE] [--svg FILE]

One side is vLLM alone: `LLM.generate` of a list. The other is a real actor, `run.py actor` under a learner's service in
this process: leases, keys, verification, version stamps, log-probs, partial progress, heartbeats. A round is so many
groups of the same prompts on either side, from the moment at which they may begin to the last answer; so many sequences
run at once at most. Weights stay those of version 0. Sides take turns, each round of one beside a round of every
other, and ratios are within a round.

The rows `actor, leases ahead` are of an actor that holds half as many leases again as it samples at once
(actors.max_num_seqs), so that a place is taken as soon as a response ends.

All processes of a side, engine and verifier included, are pinned to one core, and this process to another. In the rows
`+ core` the front end, which is the process that talks to the engine, may use the other core too. CPU time
is in milliseconds for 1,000 tokens, by kind of process.

    demo   the demo as it is: configs/models/contrary_walk, whose responses end by themselves
    3m     random weights without an end-of-sequence token: every response has as many tokens as it may

The plain rows differ in what they ask for: nothing but temperature and length; a seed for each request, as an actor
gives it; the log-prob of each token; both.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # or a module here would hide a package

from benchmarks.cost import Meter
from benchmarks.engines import PARTS, Asked, Leased, Plain, Round
from benchmarks.picture import picture
from common.config import Config
from common.loading import load_config
from common.quiet import quieter
from common.report.marks import Limit, Range, Ranges
from common.report.scales import categories, linear
from common.report.svg import Plot, draw, kind
from common.tasks.dataset import load_dataset
from learner.planning.fleet import with_leases_ahead

GROUPS = 48  # of a round
SETTLE_S = 1.5  # before a round: a worker process of vLLM's keeps its core busy for a second after its last message
TARGET = 0.95  # of plain
PLAIN = "plain"
AHEAD = "actor, leases ahead"
MODELS = {"demo": "contrary_walk, 0.15M parameters", "3m": "random weights, 3.0M parameters"}
FIXED = ("eval.every=0", "algorithm.critic_warmup_steps=0", "staleness.max_staleness=0", "learner.steps=1000000")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One side with one model. Rates and ratios over the rounds: median, and the smallest and largest."""

    model: str
    side: str
    rounds: int
    tokens: int  # of a round, median
    tokens_per_s: float
    tokens_per_s_range: tuple[float, float]
    of_plain: float  # of the same round
    of_plain_range: tuple[float, float]
    cpu_ms: dict[str, float]  # of each kind of process, for 1,000 tokens


def make_config(model: str, folder: Path, groups: int) -> Config:
    """Of a learner that samples `groups` groups when it is told to, and never trains."""
    overrides = [*FIXED, f"rollout.prompts_per_step={groups}", f"runs_dir={folder}", "name=benchmark"]
    if model == "3m":
        from benchmarks.learner import save_model

        save_model("3m", folder / model)
        _without_end(folder / model)
        overrides += [f"model.path={folder / model}"]
    return load_config(["demo"], overrides)


def _without_end(folder: Path) -> None:
    """A tokenizer that names no token the end of a sequence, so that vLLM stops at none."""
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["eos_token"] = None
    file.write_text(json.dumps(settings))


def measure(model: str, groups: int, repeats: int, cores: tuple[int, int]) -> tuple[list[Row], float]:
    """A row for each side, and the CPU seconds of all."""
    with TemporaryDirectory() as name:
        config = make_config(model, Path(name), groups)
        data = load_dataset(config, None)
        prompts = data.task.train[:groups]
        token_ids = [data.token_ids(prompt).tolist() for prompt in prompts]
        ahead_config = replace(with_leases_ahead(config), runs_dir=f"{name}/ahead")
        with (
            Plain(config, token_ids, cores) as plain,
            Leased(config, prompts, data.token_ids, cores) as leased,
            Leased(ahead_config, prompts, data.token_ids, cores) as ahead,
        ):
            sides: dict[str, Callable[[], Round]] = {
                PLAIN: lambda: plain.round(Asked()),
                "actor": lambda: leased.round(),
                AHEAD: lambda: ahead.round(),
                "plain, seeds": lambda: plain.round(Asked(seeds=True)),
                "plain, log-probs": lambda: plain.round(Asked(logprobs=True)),
                "plain, seeds and log-probs": lambda: plain.round(Asked(seeds=True, logprobs=True)),
                "plain + core": lambda: plain.round(Asked(), is_free=True),
                "actor + core": lambda: leased.round(is_free=True),
                f"{AHEAD} + core": lambda: ahead.round(is_free=True),
            }
            rounds = take_turns(sides, repeats)
    rows = [summarised(model, side, done, rounds[PLAIN]) for side, done in rounds.items()]
    return rows, plain.spent_s + leased.spent_s + ahead.spent_s


def take_turns(sides: Mapping[str, Callable[[], Round]], repeats: int) -> dict[str, list[Round]]:
    """Every side in every round, the first of which does not count; every second one is in reverse."""
    rounds: dict[str, list[Round]] = {side: [] for side in sides}
    for number in range(repeats + 1):
        for side in list(sides)[:: 1 if number % 2 else -1]:
            time.sleep(SETTLE_S)
            done = sides[side]()
            if number:
                rounds[side].append(done)
    return rounds


def summarised(model: str, side: str, done: Sequence[Round], plain: Sequence[Round]) -> Row:
    rates = [each.tokens_per_s for each in done]
    ratios = [each.tokens_per_s / other.tokens_per_s for each, other in zip(done, plain, strict=True)]
    tokens = sum(each.tokens for each in done)
    return Row(
        model=model,
        side=side,
        rounds=len(done),
        tokens=round(statistics.median(each.tokens for each in done)),
        tokens_per_s=statistics.median(rates),
        tokens_per_s_range=(min(rates), max(rates)),
        of_plain=statistics.median(ratios),
        of_plain_range=(min(ratios), max(ratios)),
        cpu_ms={part: 1e6 * sum(each.cpu_s[part] for each in done) / tokens for part in done[0].cpu_s},
    )


HEADER = f"| model | side | tokens/s | range | of plain | range | {' | '.join(PARTS)} |"


def render(row: Row) -> str:
    low, high = row.tokens_per_s_range
    least, most = row.of_plain_range
    cpu = " | ".join(f"{row.cpu_ms.get(part, 0.0):.1f}" for part in PARTS)
    return (
        f"| {row.model} | {row.side} | {row.tokens_per_s:,.0f} | {low:,.0f} to {high:,.0f} | {row.of_plain:.3f} | "
        f"{least:.3f} to {most:.3f} | {cpu} |"
    )


def drawing(rows: Sequence[Row]) -> str:
    """Every side's share of plain, by model."""
    sides = list(dict.fromkeys(row.side for row in rows if row.side != PLAIN))
    models = list(dict.fromkeys(row.model for row in rows))
    marks = [
        Ranges(
            ranges=[
                Range(
                    x=models.index(row.model) + (number + 1) / (len(sides) + 1) - 0.5,
                    low=row.of_plain_range[0],
                    middle=row.of_plain,
                    high=row.of_plain_range[1],
                )
                for row in rows
                if row.side == side
            ],
            style=kind(number),
            name=side,
        )
        for number, side in enumerate(sides)
    ]
    shown = [0.8, 1.05, *(end for row in rows for end in row.of_plain_range)]
    plot = Plot(
        x=categories("model", models),
        y=linear("tokens/s, of plain LLM.generate", shown),
        marks=[Limit(name=f"target {TARGET}", y=TARGET), *marks],
    )
    return picture(draw(plot, "tokens per second of an actor against plain generation"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--groups", type=int, default=GROUPS, help="of a round, 8 responses each")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--svg", type=Path, help="draw the ratios here")
    options = parser.parse_args(arguments)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    meter, cores = Meter(), sorted(os.sched_getaffinity(0))
    rows: list[Row] = []
    spent_s = 0.0
    print(HEADER, "|---" * HEADER.count(" |") + "|", sep="\n", flush=True)
    with quieter("learner"):
        for model in options.models:
            measured, model_s = measure(model, options.groups, options.repeats, (cores[0], cores[-1]))
            rows, spent_s = rows + measured, spent_s + model_s
            print("\n".join(map(render, measured)), flush=True)
    cost = meter.cost(spent_s)
    print(f"\n{cost}")
    if options.json is not None:
        options.json.write_text(
            json.dumps({"rows": [asdict(row) for row in rows], "cost": asdict(cost)}, indent=1) + "\n"
        )
    if options.svg is not None:
        options.svg.write_text(drawing(rows))
    missed = [row for row in rows if row.side in ("actor", AHEAD) and row.of_plain < TARGET]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

"""How much of one batch's gradient is signal: VAPO, GRPO, DAPO and PPO on a frozen small model, without training it.

    python benchmarks/gradient_signal.py [--batches N] [--seed N] [--json FILE] [--svg FILE]

The model is configs/models/contrary_walk under configs/number_walk.yaml: a policy that mostly walks the wrong way, with
batches of 16 x 8 responses and, for PPO, of 128 x 1. Responses are sampled in this process (benchmarks/miniature); the
critic is pretrained as the recipe says, that of PPO in passes as many as its steps would make. What is printed is
explained in docs/signal.md; the same for a run of yours is `python run.py signal RUN`.
"""

import argparse
import copy
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from benchmarks.cost import Meter
from benchmarks.miniature.run import Miniature
from benchmarks.picture import picture
from common.config import Config
from common.loading import load_config
from common.report.marks import Range, Ranges
from common.report.scales import Axis, linear
from common.report.svg import Plot, draw, kind
from learner.algorithm.packing import Batch
from learner.signal.estimators import CRITIC, GRID, Estimator, configured, critic_free, fixed, trace, unbiased
from learner.signal.gradients import gram
from learner.signal.table import Row, Table, as_json, render, sentence, table

MODEL = "model.path=configs/models/contrary_walk"
SHORT_ALPHA = 0.15  # without a trained critic only rewards near the end of a response would count
PPO_STEPS = (8, 32)  # of the critic


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=36, help="of each shape (default: 36)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the tables here")
    parser.add_argument("--svg", type=Path, help="also draw the aims here")
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    meter = Meter()
    tables = {
        "16 x 8": grouped(arguments.seed, arguments.batches),
        "128 x 1": single(arguments.seed, arguments.batches),
    }
    for shape, found in tables.items():
        print(f"the gradient of one batch of {shape} responses, {found.num_batches} batches\n\n{render(found)}\n")
    print(sentence(tables["16 x 8"]))
    print(cost := meter.cost())
    if arguments.json is not None:
        rows = {shape: as_json(found) for shape, found in tables.items()}
        arguments.json.write_text(json.dumps({"tables": rows, "cost": vars(cost)}, indent=1) + "\n")
    if arguments.svg is not None:
        arguments.svg.write_text(drawing(tables))


def grouped(seed: int, num_batches: int) -> Table:
    """VAPO and what has no critic, on the same batches."""
    config = load_config(["number_walk"], [MODEL, f"seed={seed}"])
    algorithm, run = config.algorithm, Miniature(config, age=0)
    run.pretrain()
    short = replace(algorithm, length_adaptive_alpha=SHORT_ALPHA)
    estimators = [
        unbiased(algorithm, CRITIC, has_groups=True),
        replace(configured(algorithm, CRITIC), name=f"VAPO, {trace(algorithm)}"),
        *(fixed(algorithm, CRITIC, gae_lambda) for gae_lambda in GRID),
        *(replace(configured(one, None), name=f"V = 0, {trace(one)}") for one in (algorithm, short)),
        *critic_free(algorithm),
    ]
    assert run.trainer.critic is not None
    return measured(config, run, {CRITIC: run.trainer.critic.network}, num_batches, estimators)


def single(seed: int, num_batches: int) -> Table:
    """PPO with one response to each prompt, and a critic that has made so many steps of one pass."""
    config = load_config(["number_walk", "ppo"], [MODEL, f"seed={seed}", "algorithm.critic_warmup_epochs=1"])
    algorithm, run = config.algorithm, Miniature(config, age=0)
    assert run.trainer.critic is not None
    critics: dict[str, nn.Module] = {}
    for step in range(1, max(PPO_STEPS) + 1):
        run.trainer.step(run.batch(), 0, is_warmup=True)
        if step in PPO_STEPS:
            critics[f"{step} critic steps"] = copy.deepcopy(run.trainer.critic.network)
    estimators = [
        unbiased(algorithm, f"{max(PPO_STEPS)} critic steps", has_groups=False),
        replace(configured(algorithm, None), name="PPO, V = 0"),
        *(replace(configured(algorithm, name), name=f"PPO after {name}") for name in critics),
    ]
    return measured(config, run, critics, num_batches, estimators)


def measured(
    config: Config,
    run: Miniature,
    critics: Mapping[str, nn.Module],
    num_batches: int,
    estimators: Sequence[Estimator],
) -> Table:
    def batches() -> Iterator[Batch]:
        for _ in range(num_batches):
            yield run.batch()

    def told(done: int) -> None:
        end = "\n" if done == num_batches else ""
        print(f"\r{done} of {num_batches} batches", end=end, file=sys.stderr, flush=True)

    return table(estimators, gram(config, run.policy, critics, batches(), num_batches, estimators, told))


def drawing(tables: Mapping[str, Table]) -> str:
    """The aim of every estimator with its error, the best first, as an SVG file; numbered as in its legend."""
    rows = [row for found in tables.values() for row in found.rows if row.aim.value is not None]
    rows.sort(key=lambda row: -(row.aim.value or 0.0))
    marks = [
        Ranges(ranges=[span(place, row)], style=kind(place), name=f"{place + 1} {row.name}")
        for place, row in enumerate(rows)
    ]
    shown = [0.0, *(row.aim.value + (row.aim.error or 0.0) for row in rows)]  # type: ignore[operator]
    ticks = tuple((float(place), str(place + 1)) for place in range(len(rows)))
    x = Axis(label="estimator", low=-0.5, high=len(rows) - 0.5, ticks=ticks)
    y = linear("aim of one batch: cosine with the true gradient", shown)
    return picture(draw(Plot(x=x, y=y, marks=marks), "aim of gradient estimators"))


def span(place: int, row: Row) -> Range:
    value, error = row.aim.value, row.aim.error or 0.0
    assert value is not None
    return Range(x=float(place), low=value - error, middle=value, high=value + error)


if __name__ == "__main__":
    main()

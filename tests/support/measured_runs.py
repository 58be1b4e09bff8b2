"""The files of a run whose speeds are known by hand."""

import json
from collections.abc import Iterator
from pathlib import Path

from common.loading import load_config, save_config
from common.types import JSON


def write_run(folder: Path, rows: Iterator[dict[str, JSON]], groups: Iterator[dict[str, JSON]]) -> Path:
    folder.mkdir()
    small = ["rollout.prompts_per_step=2", "rollout.group_size=2", "actors.groups_in_flight=2", "eval.every=0"]
    save_config(load_config(["demo"], small), folder / "config.yaml")
    for name, lines in (("metrics.jsonl", rows), ("ledger.jsonl", groups)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def rows(num_steps: int) -> Iterator[dict[str, JSON]]:
    """One step of warm-up, then policy steps of 4 s: 1 of waiting, 0.5 of publishing; the engine is busy for 2 s."""
    for step in range(1, num_steps + 1):
        row: dict[str, JSON] = {
            "step": step,
            "version": max(0, step - 1),
            "time/step_s": 4.0,
            "time/wait_for_batch_s": 1.0,
            "time/publish_s": 0.5,
            "tokens/generated": 100 * step,
            "actors/connected": 1,
            "actors/idle_fraction": 0.5,
            "drops/uninformative": step,
        }
        yield row | ({"staleness/hist": {"0": 30.0, "2": 10.0}} if step > 1 else {})


def groups(num_steps: int) -> Iterator[dict[str, JSON]]:
    """Two of 20 tokens in each step, the longest response of 15, during which two versions came."""
    for step in range(1, num_steps + 1):
        for number in range(2):
            yield {
                "step": step,
                "lease_id": 2 * step + number,
                "versions": [0, 2],
                "lengths": [15, 5],
                "generation_s": 1.75,
                "verification_s": 0.2,
            }

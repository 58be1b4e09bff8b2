"""Accuracy over seeds, from finished runs: a table and JSON.

    for seed in 0 1 2; do python run.py train -c demo seed=$seed name=demo-$seed; done
    python benchmarks/accuracy.py runs/demo-0 runs/demo-1 runs/demo-2 [--json FILE] [--svg FILE]

Runs that differ only in name, seed and cores are one row: mean and standard deviation of the final held-out accuracy.
The SVG shows every run's held-out accuracy against the version, one colour a row.
"""

import argparse
import html
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common.report.summary import Summary, summary

COLOURS = ("#1b6ca8", "#c0392b", "#2e8b57", "#8e44ad", "#d68910")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One setting over its seeds; each list is in the order of `seeds`."""

    label: str
    seeds: list[int]
    before: list[float]
    after: list[float]
    versions: list[int]
    staleness_mean: list[float | None]
    staleness_max: list[float | None]
    wall_s: list[float]
    curves: list[list[tuple[int, float]]]  # (version, held-out accuracy)


def collect(run_dirs: Sequence[Path]) -> list[Row]:
    """One row for each set of runs that differ in name, seed and cores only. Raises ConfigError for what is no run."""
    alike: dict[str, list[Summary]] = defaultdict(list)
    for run in map(summary, run_dirs):
        if len(run.evaluations) < 2:
            raise ValueError(f"{run.run_dir} has no accuracy before and after: let it finish first")
        alike[repr(replace(run.config, name="", runs_dir="", seed=0, cores=None))].append(run)
    return [_row(sorted(runs, key=lambda run: run.config.seed)) for runs in alike.values()]


def _row(runs: list[Summary]) -> Row:
    return Row(
        label=runs[0].config.name.rsplit("-", 1)[0],
        seeds=[run.config.seed for run in runs],
        before=[run.evaluations[0].accuracy for run in runs],
        after=[run.evaluations[-1].accuracy for run in runs],
        versions=[run.num_versions for run in runs],
        staleness_mean=[run.staleness_mean for run in runs],
        staleness_max=[run.staleness_max for run in runs],
        wall_s=[run.wall_s for run in runs],
        curves=[[(one.version, one.accuracy) for one in run.evaluations] for run in runs],
    )


def render(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = [
        "| runs | before | after, by seed | after, mean ± sd | versions | staleness mean (max) | training time |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = statistics.stdev(row.after) if len(row.after) > 1 else 0.0
        ages = [f"{mean:.2f} ({top:.0f})" for mean, top in zip(row.staleness_mean, row.staleness_max, strict=True)
                if mean is not None and top is not None]  # fmt: skip
        cells = [
            row.label,
            f"{statistics.mean(row.before):.3f}",
            ", ".join(f"{accuracy:.3f}" for accuracy in row.after),
            f"{statistics.mean(row.after):.3f} ± {spread:.3f}",
            ", ".join(map(str, row.versions)),
            ", ".join(ages),
            ", ".join(f"{seconds:.0f} s" for seconds in row.wall_s),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: Sequence[Row]) -> str:
    """An SVG of all curves."""
    last = max(version for row in rows for curve in row.curves for version, _ in curve) or 1

    def place(version: float, accuracy: float) -> str:
        return f"{60 + 520 * version / last:.1f},{260 - 240 * accuracy:.1f}"

    text = 'font-family="sans-serif" font-size="12"'
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 300" width="760" height="300">']
    parts.append('<rect width="760" height="300" fill="white"/>')
    for step in range(5):
        share, y, x = step / 4, 260 - 60 * step, 60 + 130 * step
        parts.append(f'<line x1="60" x2="580" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="52" y="{y + 4}" text-anchor="end" {text}>{share:g}</text>')
        parts.append(f'<text x="{x}" y="278" text-anchor="middle" {text}>{share * last:.0f}</text>')
    parts.append(f'<text x="320" y="295" text-anchor="middle" {text}>version (held-out accuracy upwards)</text>')
    for k, row in enumerate(rows):
        colour = COLOURS[k % len(COLOURS)]
        for curve in row.curves:
            points = " ".join(place(*point) for point in curve)
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="595" y="{40 + 20 * k}" fill="{colour}" {text}>{html.escape(row.label)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--svg", type=Path, help="also draw the curves here")
    arguments = parser.parse_args()
    rows = collect(arguments.runs)
    print(render(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if arguments.svg is not None:
        arguments.svg.write_text(draw(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

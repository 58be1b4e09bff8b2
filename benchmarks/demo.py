"""Does the demo always end well? Runs it over seeds, alone or beside busy processes, and judges every run.

    python benchmarks/demo.py --seeds 0 1 2 3 4 --busy-seeds 5 6 7 --runs-dir runs/demo-check [--json FILE]

A busy run shares the machine with one endless loop per core, at the same priority. Runs that are complete are not
repeated, so that an interrupted benchmark goes on where it stopped. Exit code 1 when a run misses a bar (BARS).
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from common.metrics import read_jsonl
from common.report.summary import Summary, summary

RUN_PY = Path(__file__).resolve().parent.parent / "run.py"
TIMEOUT_S = 1800.0  # of one run, start included
BARS = "ends at 0.85 or more; in its last third never more than 0.05 below its best evaluation so far; mean explained "
BARS += "variance of the policy phase above 0.1; age above 0 and within the bound; at most 240 s of training alone"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One run. Accuracies are held out, avg@k; times in seconds."""

    seed: int
    is_busy: bool
    before: float
    best: float
    after: float
    largest_fall: float  # below the best evaluation so far, over the evaluations of the last third
    explained_variance: float  # mean over the policy steps
    staleness_mean: float
    staleness_max: float
    staleness_bound: int
    wall_s: float  # of all steps
    misses: tuple[str, ...]  # bars that the run does not clear


@contextmanager
def busy_cores() -> Iterator[None]:
    """One endless loop pinned to each core that this process may use."""
    with ExitStack() as stack:
        for core in sorted(os.sched_getaffinity(0)):
            code = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
            loop = stack.enter_context(subprocess.Popen([sys.executable, "-c", code]))
            stack.callback(loop.kill)
        yield


def run(seed: int, is_busy: bool, runs_dir: Path, overrides: Sequence[str]) -> Path:
    """The run directory of a complete run of the demo."""
    name = f"demo-{'busy' if is_busy else 'quiet'}-{seed}"
    done = runs_dir / name / "done"
    if done.is_file():
        return done.parent
    command = [sys.executable, str(RUN_PY), "train", "-c", "demo", "--overwrite"]
    command += [f"runs_dir={runs_dir}", f"name={name}", f"seed={seed}", *overrides]
    with ExitStack() as stack:
        if is_busy:
            stack.enter_context(busy_cores())
        train(command)
    done.touch()
    return done.parent


def train(command: Sequence[str], timeout_s: float = TIMEOUT_S) -> None:
    """Runs it to its end, start included; when this process is stopped, so is the run, in order."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            code = process.wait(timeout_s)
        except BaseException:
            process.terminate()
            process.wait(60.0)
            raise
    if code != 0:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {code}")


def judge(run_dir: Path, is_busy: bool) -> Judged:
    """Reads one complete run and holds it against BARS."""
    done = summary(run_dir)
    points = [(point.version, point.accuracy) for point in done.evaluations]
    accuracies = [accuracy for _, accuracy in points]
    fall = largest_fall(points)
    explained = _explained_variance(run_dir, done)
    mean, largest = done.staleness_mean or 0.0, done.staleness_max or 0.0
    bound = done.config.staleness.max_staleness
    bars = {
        "end": accuracies[-1] >= 0.85,
        "fall": fall <= 0.05,
        "explained variance": explained > 0.1,
        "age": mean > 0.0 and largest <= bound,
        "time": is_busy or done.wall_s <= 240.0,
    }
    return Judged(
        seed=done.config.seed,
        is_busy=is_busy,
        before=accuracies[0],
        best=max(accuracies),
        after=accuracies[-1],
        largest_fall=fall,
        explained_variance=explained,
        staleness_mean=mean,
        staleness_max=largest,
        staleness_bound=bound,
        wall_s=done.wall_s,
        misses=tuple(name for name, is_cleared in bars.items() if not is_cleared),
    )


def largest_fall(points: Sequence[tuple[int, float]]) -> float:
    """Of accuracy below its best so far, over the (version, accuracy) points of the last third of the versions."""
    last = points[-1][0]
    falls = [max(a for _, a in points[: i + 1]) - accuracy for i, (_, accuracy) in enumerate(points)]
    return max(fall for fall, (version, _) in zip(falls, points, strict=True) if version >= last * 2 / 3)


def _explained_variance(run_dir: Path, done: Summary) -> float:
    warmup = done.config.algorithm.critic_warmup_steps
    values = [
        row["critic/explained_variance"]
        for row in read_jsonl(run_dir / "metrics.jsonl")
        if row["step"] > warmup and row.get("critic/explained_variance") is not None
    ]
    return statistics.mean(values)


def render(judged: Sequence[Judged]) -> str:
    """A Markdown table."""
    lines = [
        "| seed | machine | before | best | end | largest fall in the last third | explained variance | age mean (max, "
        "bound) | training | misses |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in judged:
        cells = [
            str(one.seed),
            "busy" if one.is_busy else "quiet",
            f"{one.before:.3f}",
            f"{one.best:.3f}",
            f"**{one.after:.3f}**",
            f"{one.largest_fall:.3f}",
            f"{one.explained_variance:.2f}",
            f"{one.staleness_mean:.2f} ({one.staleness_max:.0f}, {one.staleness_bound})",
            f"{one.wall_s:.0f} s",
            ", ".join(one.misses) or "none",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4], help="runs on a quiet machine")
    parser.add_argument("--busy-seeds", type=int, nargs="*", default=[5, 6, 7], help="runs beside busy loops")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/demo-check"))
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top of the demo's")
    arguments = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    judged = []
    for is_busy, seeds in ((False, arguments.seeds), (True, arguments.busy_seeds)):
        for seed in seeds:
            judged.append(judge(run(seed, is_busy, arguments.runs_dir, arguments.overrides), is_busy))
            print(render(judged[-1:]).splitlines()[-1], flush=True)
    print(f"\n{render(judged)}\n\nBars: {BARS}.")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(one) for one in judged], indent=1) + "\n")
    return int(any(one.misses for one in judged))


if __name__ == "__main__":
    sys.exit(main())

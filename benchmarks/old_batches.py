"""What old batches need: corrections compared on batches that are exactly 8 versions old, as a table and a drawing.

    python benchmarks/old_batches.py [--cores 0 1] [--runs-dir runs/old_batches] [--svg FILE] [key=value ...]

Each run is number_walk with one correction and one seed, alone on one core; as many go at once as there are --cores.
The command can be stopped and given again: a finished run is not repeated, and one that was interrupted goes on from
its newest checkpoint. Another --runs-dir begins anew. Settings at the end hold for every run.
"""

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import accuracy
from common.config import ConfigError, Correction
from common.report.summary import summary

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ("staleness.max_staleness=8", "staleness.exact=true", "checkpoint.every=25")
ARMS = (Correction.none, Correction.behavior, Correction.decoupled)
POLL_S = 1.0
STOP_S = 60.0  # for a run to end in order


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run. `settings` are on top of the recipe."""

    runs_dir: Path
    correction: Correction
    seed: int
    settings: tuple[str, ...]

    @property
    def run_dir(self) -> Path:
        return self.runs_dir / f"{self.correction}-{self.seed}"

    def is_finished(self) -> bool:
        """Whether the last version was evaluated."""
        try:
            found = summary(self.run_dir)
        except ConfigError:
            return False
        return bool(found.evaluations) and found.evaluations[-1].version == found.config.learner.steps

    def command(self, core: int) -> list[str]:
        """Begins the run, or goes on with what is there of it."""
        train = [sys.executable, str(ROOT / "run.py"), "train", f"cores=[{core}]"]
        if (self.run_dir / "config.yaml").is_file():
            return [*train, "--resume", str(self.run_dir)]
        own = (
            f"runs_dir={self.runs_dir}",
            f"name={self.run_dir.name}",
            f"seed={self.seed}",
            f"algorithm.correction={self.correction}",
        )
        return [*train, *SETTINGS, *own, *self.settings, "-c", "number_walk"]


def run_all(jobs: Sequence[Job], cores: Sequence[int]) -> list[Job]:
    """Runs what is not finished, one job a core at a time; returns those that failed. All have ended on return."""
    waiting = [job for job in jobs if not job.is_finished()]
    running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
    failed: list[Job] = []
    try:
        while waiting or running:
            for core in set(cores) - running.keys():
                if waiting:
                    job = waiting.pop(0)
                    print(f"{job.run_dir} begins on core {core}, {len(waiting)} wait", flush=True)
                    running[core] = (job, subprocess.Popen(job.command(core), stdout=subprocess.DEVNULL))
            time.sleep(POLL_S)
            for core, (job, process) in list(running.items()):
                if process.poll() is not None:
                    del running[core]
                    failed += [job] if process.returncode else []
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for every run")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/old_batches"))
    parser.add_argument("--corrections", nargs="+", type=Correction, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cores", nargs="+", type=int, default=[0, 1], help="cores that each run one job at a time")
    parser.add_argument("--svg", type=Path, help="draw the curves here")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # then run_all ends the runs
    jobs = [
        Job(runs_dir=arguments.runs_dir, correction=correction, seed=seed, settings=tuple(arguments.settings))
        for seed in arguments.seeds
        for correction in arguments.corrections
    ]
    failed = run_all(jobs, arguments.cores)
    for job in failed:
        print(f"error: {job.run_dir} failed, see {job.run_dir / 'logs'}", file=sys.stderr)
    rows = accuracy.collect([job.run_dir for job in jobs if job.is_finished()])
    print(accuracy.render(rows))
    if arguments.svg is not None and rows:
        arguments.svg.write_text(accuracy.draw(rows), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

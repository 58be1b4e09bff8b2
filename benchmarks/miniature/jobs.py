"""Many runs on a few cores. A run that is done is a line of a file, and is not repeated."""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.cost import commit
from benchmarks.miniature.run import Job, Outcome, Point


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    cores: Sequence[int],
    critics: Path,
    work: Callable[[Job, Path], Outcome] | None = None,
) -> dict[Job, Outcome]:
    """The outcome of each job: read from `out`, or run now, one on each of `cores` at a time, and appended there.

    `work` makes a run, in a process of its own; by default benchmarks.miniature.run.train.
    """
    done, at = read(out), commit()
    missing = [job for job in jobs if job not in done]
    print(f"{len(jobs)} runs, {len(missing)} of them to be made", file=sys.stderr, flush=True)
    if missing:
        context = multiprocessing.get_context("spawn")
        free = context.Queue()
        for core in cores:
            free.put(core)
        with ProcessPoolExecutor(len(cores), context, initializer=_settle, initargs=(free,)) as pool:
            futures = {pool.submit(_timed, work or _train, job, critics): job for job in missing}
            try:
                for number, future in enumerate(as_completed(futures), start=1):
                    job = futures[future]
                    outcome, cpu_s = future.result()
                    done[job] = outcome
                    append(out, job, outcome, at, cpu_s)
                    last = outcome.points[-1]
                    text = f"[{number}/{len(missing)}] {job.table}, {job.row}, seed {job.seed}: {last.accuracy:.3f}"
                    print(text, file=sys.stderr, flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in (pool._processes or {}).values():
                    process.terminate()
                raise
    return {job: done[job] for job in jobs}


def read(out: Path) -> dict[Job, Outcome]:
    """What is kept in the file; a line that was cut short counts as not there."""
    found: dict[Job, Outcome] = {}
    for line in out.read_text().splitlines() if out.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[_job(row["job"])] = _outcome(row["outcome"])
    return found


def append(out: Path, job: Job, outcome: Outcome, at: str, cpu_s: float) -> None:
    """`at`: the commit; `cpu_s`: all that the run took, with its evaluations and what it pretrained itself."""
    out.parent.mkdir(parents=True, exist_ok=True)
    line = {"job": asdict(job), "outcome": asdict(outcome), "commit": at, "cpu_s": round(cpu_s, 2)}
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")


def spent(out: Path) -> dict[str, Any]:
    """What all runs of the file took: how many they are, CPU seconds where they are known, commits."""
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    return {
        "runs": len(lines),
        "cpu_s": round(sum(line.get("cpu_s", 0.0) for line in lines), 1),
        "commits": sorted({line["commit"] for line in lines}),
    }


def _job(fields: dict[str, Any]) -> Job:
    return Job(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def _outcome(fields: dict[str, Any]) -> Outcome:
    points = [Point(**point) for point in fields["points"]]
    return Outcome(**(fields | {"points": points, "alarms": [(step, name) for step, name in fields["alarms"]]}))


def _settle(free: Any) -> None:
    """Of a process that runs jobs: one core, one thread."""
    core = free.get()
    os.sched_setaffinity(0, {core})
    import torch

    torch.set_num_threads(1)


def _timed(work: Callable[[Job, Path], Outcome], job: Job, critics: Path) -> tuple[Outcome, float]:
    started = time.process_time()
    outcome = work(job, critics)
    return outcome, time.process_time() - started


def _train(job: Job, critics: Path) -> Outcome:
    from benchmarks.miniature.run import train

    return train(job, critics)


def grouped(outcomes: Iterable[tuple[Job, Outcome]]) -> dict[str, list[tuple[Job, Outcome]]]:
    """By row, each in the order of seeds."""
    rows: dict[str, list[tuple[Job, Outcome]]] = {}
    for job, outcome in sorted(outcomes, key=lambda pair: pair[0].seed):
        rows.setdefault(job.row, []).append((job, outcome))
    return rows

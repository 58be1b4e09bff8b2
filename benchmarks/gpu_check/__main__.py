"""Does everything that needs a GPU work on this one? `make gpu-check`, six minutes at most.

    python -m benchmarks.gpu_check [--parts a c] [--folder runs/gpu-check] [--device cpu]

    a   losses and gradients of policy and critic against the CPU in float32
    b   attention over packed sequences against one sequence at a time
    c   a process group over NCCL, FSDP2 on it, a training step, checkpoint and resume
    d   tokens/s, share of the card's peak and memory of the learner's step, 0.5B and 1.5B parameters
    e   the demo with learner and actor on this device, overlapping and synchronous; needs CUDA's vLLM
    f   weights from one process to another, in place and over NCCL, and a peer that dies; NCCL needs CUDA's vLLM

Needs no network and no root, makes its models itself, leaves the settings of the card alone, and uses the first visible
GPU only. Every part is a process of its own with a limit of its own. Prints what each found and writes it to
FOLDER/results.json; FOLDER/PART.log has what a part printed, FOLDER/runs the runs of part e. Exit code 1 when a part
failed, 2 without a GPU. `--device cpu` exercises this program itself, on tiny sizes: its numbers say nothing.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.gpu_check.parts import PARTS
from benchmarks.gpu_check.report import Found, read
from common.processtree import family, kill

ROOT = Path(__file__).resolve().parents[2]
TOTAL_S = 360.0
SLOWER = {"cuda": 1.0, "cpu": 4.0}  # factor of every limit
SHORTEST_S = 20.0  # less is not enough to begin a part with: torch takes that long to load from a cold disk
GRACE_S = 20.0  # to end what it started, after SIGTERM, and to be gone after SIGKILL
LOOK_S = 120.0  # for loading torch and asking the driver


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one part."""

    title: str
    found: Found
    seconds: float

    @property
    def result(self) -> str:
        if self.found.failures:
            return "FAILED"
        return "passed" if self.found.numbers else "not run"


def look(device: str, environment: Mapping[str, str]) -> dict[str, Any] | str:
    """The machine's facts, or the sentence that says why nothing can be checked on it."""
    command = [sys.executable, "-m", "benchmarks.gpu_check.machine", device]
    try:
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=LOOK_S
        )
    except subprocess.TimeoutExpired:
        return f"looking for a GPU took longer than {LOOK_S:.0f} s: does nvidia-smi answer?"
    if done.returncode != 0:
        return last_line(done.stderr) or f"looking for a GPU ended with exit code {done.returncode}"
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def run_part(name: str, device: str, folder: Path, environment: Mapping[str, str], left_s: float) -> Outcome:
    """One part to its end or its limit, whatever it does."""
    part, started = PARTS[name], time.monotonic()
    limit_s = min(part.limit_s * SLOWER[device], left_s)
    if limit_s < min(SHORTEST_S, part.limit_s):
        found = Found(not_run=[f"the time of the whole check was over, {limit_s:.0f} s were left"])
        return Outcome(title=part.title, found=found, seconds=0.0)
    report, log = folder / f"{name}.json", folder / f"{name}.log"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_check.parts", name, "--device", device]
    command += ["--report", str(report), "--folder", str(folder / "work")]
    with log.open("w") as output, ExitStack() as stack:
        process = subprocess.Popen(
            command,
            env={**environment, **part.environment},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C reaches this process only, which ends the part in order
        )
        stack.callback(end, process)
        try:
            problem = how_it_ended(process.wait(limit_s), log)
        except subprocess.TimeoutExpired:
            problem = f"took longer than its {limit_s:.0f} s and was ended"
    found = read(report)
    if problem is not None or not found.is_complete:
        found.failures.append(problem or "ended without completing its report")
    return Outcome(title=part.title, found=found, seconds=time.monotonic() - started)


def how_it_ended(code: int, log: Path) -> str | None:
    return None if code == 0 else f"ended with exit code {code}: {last_line(log.read_text(errors='replace'))}"


def end(process: subprocess.Popen[bytes]) -> None:
    """The part and all that it started; nothing to do when it is over by itself."""
    if process.poll() is not None:
        return
    members = [psutil.Process(pid) for pid in family([process.pid]) if psutil.pid_exists(pid)]
    process.terminate()
    _, alive = psutil.wait_procs(members, timeout=GRACE_S)
    kill(alive)
    psutil.wait_procs(alive, timeout=GRACE_S)  # one that hangs in the driver stays, and the other parts go on


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def render(name: str, outcome: Outcome) -> str:
    """The part's lines of the table."""
    found = outcome.found
    lines = [f"{name}  {outcome.title:<52} {outcome.result:<8} {outcome.seconds:>5.0f} s"]
    lines += [f"     {label:<72} {shown(value)}" for label, value in found.numbers.items()]
    lines += [f"     FAILED: {sentence}" for sentence in found.failures]
    lines += [f"     not run: {sentence}" for sentence in found.not_run]
    return "\n".join(lines)


def shown(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def one_gpu(device: str) -> dict[str, str]:
    """The children's environment: one visible GPU, every core for the references, no questions to a network."""
    environment = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}
    if device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        environment.pop("OMP_NUM_THREADS", None)
    return environment


def check(parts: list[str], device: str, folder: Path, machine: dict[str, Any]) -> int:
    """Runs the parts, prints and writes what they found; the exit code."""
    started, outcomes, environment = time.monotonic(), {}, one_gpu(device)
    for name in parts:
        left_s = TOTAL_S * SLOWER[device] - (time.monotonic() - started)
        outcomes[name] = run_part(name, device, folder, environment, left_s)
        print(render(name, outcomes[name]), flush=True)
    rows = {name: {"result": one.result, **asdict(one)} for name, one in outcomes.items()}
    content = {"machine": machine, "seconds": time.monotonic() - started, "parts": rows}
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    failed = [name for name, one in outcomes.items() if one.result == "FAILED"]
    verdict = f"failed: {', '.join(failed)}" if failed else "no part failed"
    print(f"{verdict}; {folder / 'results.json'}")
    return int(bool(failed))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu-check"), help="where results and logs go")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes, to test the check")
    arguments = parser.parse_args()
    machine = look(arguments.device, one_gpu(arguments.device))
    if isinstance(machine, str):
        print(f"error: {machine}", file=sys.stderr)
        return 2
    folder, work = arguments.folder.resolve(), arguments.folder.resolve() / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    print(", ".join(f"{name} {value}" for name, value in machine.items() if value is not None), flush=True)
    try:
        return check(arguments.parts, arguments.device, folder, machine)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    sys.exit(main())

"""What asynchronous training gains: the same steps in turns and overlapped, vLLM on one core, the learner on another.

    python benchmarks/overlap.py --runs-dir runs/overlap [--json FILE] [--svg FILE]       50 minutes at most
    python benchmarks/overlap.py --runs-dir runs/overlap --only 1:1 [--cores 0 1]         one point, about 8

A point (POINTS) is a piece of work whose ratio of generation to training is about what its name says. It is trained
with max_staleness 0, which is in turns, then with 1 and with 2, and all of it --repeats times; the three runs follow
each other, so that a machine that becomes slower is slower for all of them. Everything else is the same in them: seed,
settings, number of steps. There is no critic warm-up, so that every pipeline begins empty, and no evaluation but one
before the first step and one after the last. A finished run is not repeated; no run begins that would not end within
--minutes, and what is there is printed, also after an interrupt.

**What is timed.** Of STEPS policy steps the first FILLING and the last EMPTYING are left out, in all runs: the pipeline
of max_staleness 2 fills in 3 steps, and nothing is sampled ahead of the last 3. A step is `time/step_s`. In the
synchronous run

    Tg = `time/wait_for_batch_s`           from the new version in the engine to the whole batch in the learner
    Tt = `time/step_s` - Tg                training, publication, writing the step down

and nobody works while the other does. Overlapped, a step takes no less than the longer of the two, so that the speed-up
is bounded by (Tg + Tt) / max(Tg, Tt). Numbers are means over the repeats. The standard error is from the scatter of the
timed steps within runs or from that of the repeats, whichever is larger.

`at work` is the share of an overlapped step in which the side that takes longer does what it takes longer for: the
learner does not wait, or the engine has requests and is not paused. Both times are of one run, so that a machine that
is slower in one run than in the other, which changes the speed-up, does not change it.

Two things make the quotient of speed-up and bound no exact measure. A publication needs both sides: the engine pauses
for a part of it, which the bound does not count where Tg is the longer. And Tg is that of the synchronous run, in which
a batch ends with the few longest responses, while an overlapped engine has the next ones to go on with: it can need
less than Tg for a batch, and the quotient can exceed 1.

**Where the rest went.** What an overlapped step takes beyond max(Tg, Tt), seen from both sides, as differences from the
synchronous run, in seconds a step. The learner: waits for its batch, trains longer, publishes longer. The actor:
samples longer (its engine has work and is not paused), is paused (all its idle time up to the length of a publication),
is without work (the rest of it). The side that is the longer one has to explain the loss; the other one has time.

**Accuracy** is held out, avg@8 of 96 prompts at temperature 1, of the last version; its standard error is over
prompts. `others` is the CPU time of others on this machine, as a share of all its cores, while the runs lasted: timings
with more than a few percent there are no measurement. It makes the gain look smaller: while learner and actor take
turns, others find an idle core. A virtual machine can be slow without telling: `yardstick` is the time of the same work
on both cores at once just before each run.
"""

import argparse
import itertools
import json
import math
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cost import Meter
from benchmarks.picture import picture
from benchmarks.tables import markdown
from benchmarks.timed_run import RunCost, timed
from common.config import ConfigError
from common.report.marks import Line
from common.report.scales import linear, logarithmic
from common.report.summary import summary
from common.report.svg import Plot, draw, kind
from learner.planning.runs import MeasuredRun

RUN_PY = Path(__file__).resolve().parents[1] / "run.py"
BOUNDS = (0, 1, 2)  # max_staleness; the first is in turns
STEPS, FILLING, EMPTYING = 18, 4, 3  # policy steps of a run; of them not timed
TIMEOUT_S = 240.0  # of one run, start included
TYPICAL_S = 100.0  # the same, as expected before one has been measured
TARGET = 0.95  # of the bound
DONE = "overlap.json"  # in the folder of a finished run: what it cost
COMMON = (
    "algorithm.critic_warmup_steps=0",
    f"learner.steps={STEPS}",
    "eval.every=0",
    "eval.num_prompts=96",
    "eval.samples_per_prompt=8",
    "logging.console=plain",
)
CHAIN_SUM = ("model.path=configs/models/chain_sum", "model.max_model_len=256", "task.name=chain_sum",
             "rollout.max_tokens=128", "algorithm.length_adaptive_alpha=0.25")  # fmt: skip
# By about Tg:Tt. The demo's task and recipe unless it says otherwise
POINTS: dict[str, tuple[str, ...]] = {
    "1:4": ("rollout.prompts_per_step=12", "algorithm.critic_updates_per_step=14"),
    "1:2": ("rollout.prompts_per_step=16", "algorithm.critic_updates_per_step=6"),
    "1:1": ("rollout.prompts_per_step=24", "algorithm.critic_updates_per_step=2"),
    "1:1-sums": (*CHAIN_SUM, "rollout.prompts_per_step=16", "actors.groups_in_flight=10"),
    "2:1": ("-c", "grpo", "rollout.prompts_per_step=20", "actors.groups_in_flight=8"),
    "4:1": ("-c", "grpo", "rollout.prompts_per_step=20", "actors.groups_in_flight=4"),
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One run, or the means of its repeats: seconds a step, means over the timed steps."""

    max_staleness: int
    steps: int  # that are timed, in each run
    step_s: float
    step_error_s: float  # standard error of that mean
    wait_s: float  # of the learner for its batch
    train_s: float
    publish_s: float
    busy_s: float  # of the engine
    idle_s: float  # of the engine, pauses included
    tokens: float  # trained ones
    age_mean: float  # versions, per trained token
    accuracy: float
    accuracy_error: float
    costs: tuple[RunCost, ...]  # of each repeat, like the next two
    steps_s: tuple[float, ...]
    accuracies: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Gain:
    """One overlapped run against the synchronous one."""

    point: str
    generate_s: float  # Tg
    train_s: float  # Tt, publication included
    sync: Arm
    arm: Arm

    @property
    def bound(self) -> float:
        return (self.generate_s + self.train_s) / max(self.generate_s, self.train_s)

    @property
    def speed_up(self) -> float:
        return self.sync.step_s / self.arm.step_s

    @property
    def error(self) -> float:
        """Standard error of the speed-up."""
        parts = (arm.step_error_s / arm.step_s for arm in (self.sync, self.arm))
        return self.speed_up * math.hypot(*parts)

    @property
    def of_bound(self) -> float:
        return self.speed_up / self.bound

    @property
    def at_work(self) -> float:
        """Share of an overlapped step in which the side that takes longer in turns works. Both are of one run."""
        does_training_take_longer = self.train_s >= self.generate_s
        return (
            1.0 - self.arm.wait_s / self.arm.step_s if does_training_take_longer else self.arm.busy_s / self.arm.step_s
        )

    @property
    def losses(self) -> dict[str, float]:
        """Where the rest went, seconds a step. `longer than the bound` is what is to be explained."""
        paused_s = min(self.arm.idle_s, self.arm.publish_s)
        return {
            "longer than the bound": self.arm.step_s - max(self.generate_s, self.train_s),
            "learner waits": self.arm.wait_s,
            "trains longer": self.arm.train_s - self.sync.train_s,
            "publishes longer": self.arm.publish_s - self.sync.publish_s,
            "actor samples longer": self.arm.busy_s - self.sync.busy_s,
            "is paused": paused_s,
            "is without work": self.arm.idle_s - paused_s,
        }


def name_of(point: str, max_staleness: int, repeat: int = 0) -> str:
    return f"{point.replace(':', '-')}-age{max_staleness}-{repeat}"


def command(point: str, max_staleness: int, runs_dir: Path, cores: Sequence[int], repeat: int = 0) -> list[str]:
    name = name_of(point, max_staleness, repeat)
    own = (f"staleness.max_staleness={max_staleness}", f"runs_dir={runs_dir}", f"cores=[{','.join(map(str, cores))}]")
    start = (sys.executable, str(RUN_PY), "train", "-c", "demo", "--overwrite", f"name={name}")
    return [*start, *own, *COMMON, *POINTS[point]]


def run_all(points: Sequence[str], runs_dir: Path, cores: Sequence[int], minutes: float, repeats: int = 1) -> list[str]:
    """Trains what is not finished, and returns what failed or did not find the time."""
    ends_s, longest_s, missing = time.monotonic() + 60 * minutes, TYPICAL_S, []
    for point, repeat, bound in itertools.product(points, range(repeats), BOUNDS):
        name = name_of(point, bound, repeat)
        if (runs_dir / name / DONE).is_file():
            continue
        left_s = ends_s - time.monotonic()
        if left_s < longest_s:
            missing.append(f"{name}: {left_s:.0f} s were left, and a run takes up to {longest_s:.0f}")
            continue
        print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
        try:
            cost = timed(command(point, bound, runs_dir, cores, repeat), min(TIMEOUT_S, left_s), cores)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            missing.append(f"{name}: {error}")
            continue
        longest_s = max(longest_s, cost.wall_s)
        (runs_dir / name / DONE).write_text(json.dumps(asdict(cost)) + "\n")
    return missing


def read_arm(folder: Path) -> Arm:
    """Of a finished run. Raises ConfigError when its files do not tell."""
    run, end = MeasuredRun(folder, timed_steps()), summary(folder)
    if not end.evaluations or (last := end.evaluations[-1]).version != end.config.learner.steps:
        raise ConfigError(f"{folder} was not evaluated at its end")
    times = [float(row["time/step_s"]) for row in run.rows]
    count, actor_s = len(times), run.actor_s
    sums = {
        name: sum(float(row[f"time/{name}_s"]) for row in run.rows) for name in ("wait_for_batch", "train", "publish")
    }
    return Arm(
        max_staleness=run.config.staleness.max_staleness,
        steps=count,
        step_s=run.seconds / count,
        step_error_s=statistics.stdev(times) / math.sqrt(count),
        wait_s=sums["wait_for_batch"] / count,
        train_s=sums["train"] / count,
        publish_s=sums["publish"] / count,
        busy_s=run.busy_s / count,
        idle_s=(actor_s - run.busy_s) / count,
        tokens=sum(run.tokens) / count,
        age_mean=run.staleness_mean,
        accuracy=last.accuracy,
        accuracy_error=((last.high or 0.0) - (last.low or 0.0)) / (2 * 1.96),
        costs=(RunCost(**json.loads((folder / DONE).read_text())),),
        steps_s=(run.seconds / count,),
        accuracies=(last.accuracy,),
    )


def pooled(arms: Sequence[Arm]) -> Arm:
    """The means of one or more repeats."""
    first = arms[0]
    names = [name for name, value in asdict(first).items() if isinstance(value, float)]
    means = {name: statistics.mean(getattr(arm, name) for arm in arms) for name in names}
    within_s = math.hypot(*(arm.step_error_s for arm in arms)) / len(arms)
    between_s = statistics.stdev(arm.step_s for arm in arms) / math.sqrt(len(arms)) if len(arms) > 1 else 0.0
    each = {name: sum((getattr(arm, name) for arm in arms), ()) for name in ("costs", "steps_s", "accuracies")}
    return replace(first, **means | {"step_error_s": max(within_s, between_s)}, **each)


def timed_steps() -> range:
    """Their numbers, counted from 1."""
    return range(FILLING + 1, STEPS - EMPTYING + 1)


def read_gains(points: Sequence[str], runs_dir: Path) -> Iterator[Gain]:
    """Of the points whose synchronous run is there, with each overlapped run that is."""
    for point in points:
        repeats = [sorted(runs_dir.glob(f"{name_of(point, bound).removesuffix('0')}*")) for bound in BOUNDS]
        arms = [pooled(found) for folders in repeats if (found := list(_finished(folders)))]
        if arms and arms[0].max_staleness == 0:
            sync = arms[0]
            for arm in arms[1:]:
                yield Gain(point=point, generate_s=sync.wait_s, train_s=sync.step_s - sync.wait_s, sync=sync, arm=arm)


def _finished(folders: Sequence[Path]) -> Iterator[Arm]:
    for folder in folders:
        if (folder / DONE).is_file():
            try:
                yield read_arm(folder)
            except ConfigError as error:  # the others are shown all the same
                print(f"left out: {error}", file=sys.stderr)


def render(gains: Sequence[Gain]) -> str:
    """Two Markdown tables: what was gained, and where the rest went."""
    head = ("point", "max_staleness", "Tg, s", "Tt, s", "Tg:Tt", "step, s", "speed-up", "bound", "of it", "at work",
            "mean age", "tokens a step", "accuracy", "of each run", "others", "yardstick, ms")  # fmt: skip
    rows: list[list[str]] = []
    for gain in gains:
        if not rows or rows[-1][0] != gain.point:
            rows.append(_row(gain.point, gain.sync, _times(gain), ["1", "", "", ""]))
        speed_up = [f"{gain.speed_up:.2f} ± {gain.error:.2f}", f"{gain.bound:.2f}", f"**{gain.of_bound:.2f}**"]
        speed_up.append(f"{gain.at_work:.0%}")
        rows.append(_row(gain.point, gain.arm, ["", "", ""], speed_up))
    losses = [
        [gain.point, str(gain.arm.max_staleness), *(f"{seconds:+.3f}" for seconds in gain.losses.values())]
        for gain in gains
    ]
    names = tuple(gains[0].losses) if gains else ()
    return f"{markdown(head, rows)}\n\n{markdown(('point', 'max_staleness', *names), losses)}"


def _times(gain: Gain) -> list[str]:
    ratio = gain.generate_s / gain.train_s
    return [f"{gain.generate_s:.2f}", f"{gain.train_s:.2f}", f"{ratio:.2f}:1" if ratio >= 1 else f"1:{1 / ratio:.2f}"]


def _row(point: str, arm: Arm, times: Sequence[str], speed_up: Sequence[str]) -> list[str]:
    return [
        point,
        str(arm.max_staleness),
        *times,
        f"{arm.step_s:.3f}",
        *speed_up,
        f"{arm.age_mean:.2f}",
        f"{arm.tokens:,.0f}",
        f"{arm.accuracy:.3f} ± {arm.accuracy_error:.3f}",
        " ".join(f"{accuracy:.2f}" for accuracy in arm.accuracies),
        f"{statistics.mean(cost.others for cost in arm.costs):.1%}",
        " ".join(f"{1000 * cost.yardstick_s:.0f}" for cost in arm.costs),
    ]


def drawn(gains: Sequence[Gain]) -> str:
    """An SVG: speed-up against Tg:Tt, with the bound."""
    ratios = [gain.generate_s / gain.train_s for gain in gains]
    low, high = min(*ratios, 0.2), max(*ratios, 5.0)
    curve = [low * (high / low) ** (index / 60) for index in range(61)]
    marks = [Line(points=[(r, (1 + r) / max(1, r)) for r in curve], style="ink", name="bound", is_dashed=True)]
    for number, bound in enumerate(BOUNDS[1:]):
        points = sorted(
            (ratio, gain.speed_up) for ratio, gain in zip(ratios, gains, strict=True) if gain.arm.max_staleness == bound
        )
        marks.append(Line(points=points, style=kind(number), name=f"max_staleness={bound}"))
    y = linear("speed-up over max_staleness=0", [1.0, 2.0, *(gain.speed_up for gain in gains)])
    x = logarithmic("time to generate a batch / time to train it", [low, high])
    return picture(draw(Plot(x=x, y=y, marks=marks), "speed-up of overlapping"))


def written(gains: Sequence[Gain]) -> str:
    """JSON."""
    rows = [
        asdict(gain)
        | {"bound": gain.bound, "speed_up": gain.speed_up, "speed_up_error": gain.error, "of_bound": gain.of_bound}
        | {"at_work": gain.at_work, "losses_s": gain.losses}
        for gain in gains
    ]
    return json.dumps(rows, indent=1) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/overlap"), help="where the runs are, or are put")
    parser.add_argument("--only", nargs="+", choices=list(POINTS), default=list(POINTS), help="these points")
    parser.add_argument("--cores", nargs=2, type=int, default=[0, 1], help="of the learner, and of the actor")
    parser.add_argument("--repeats", type=int, default=2, help="of every run (default: 2)")
    parser.add_argument("--minutes", type=float, default=50.0, help="no run begins that would end later (default: 50)")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("--svg", type=Path, help="draw the speed-up against the ratio here")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    meter, missing = Meter(), ["interrupted"]
    try:
        missing = run_all(options.only, options.runs_dir, options.cores, options.minutes, options.repeats)
    except KeyboardInterrupt:
        pass  # what is there is printed
    finally:
        gains = list(read_gains(options.only, options.runs_dir))
        _report(gains, options.json, options.svg)
        print(f"\n{meter.cost()}")
    for problem in missing:
        print(f"missing: {problem}", file=sys.stderr)
    return int(bool(missing) or any(gain.of_bound < TARGET for gain in gains))


def _report(gains: Sequence[Gain], json_file: Path | None, svg_file: Path | None) -> None:
    if not gains:
        print("no point has its synchronous run and an overlapped one")
        return
    print(f"\n{render(gains)}\n")
    costs = list(dict.fromkeys(cost for gain in gains for arm in (gain.sync, gain.arm) for cost in arm.costs))
    print(
        f"{gains[0].arm.steps} of {STEPS} policy steps are timed. The {len(costs)} runs took "
        f"{sum(cost.cpu_s for cost in costs):.0f} CPU s and {sum(cost.wall_s for cost in costs):.0f} s, at loads of "
        f"{min(cost.load for cost in costs):.1f} to {max(cost.load for cost in costs):.1f} before them and commit "
        f"{', '.join(sorted({cost.commit for cost in costs}))}."
    )
    if json_file is not None:
        json_file.write_text(written(gains))
    if svg_file is not None:
        svg_file.write_text(drawn(gains))


if __name__ == "__main__":
    sys.exit(main())

"""What hundreds of simulated actors cost the learner: latency of leases, CPU, memory, and the speed of a training loop.

The parts of `python benchmarks/transport.py --only load|memory`. The learner's side is the LearnerService itself over
real sockets with keys; whoever takes its batches is the main thread, as in the trainer.
"""

import gc
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import torch

from benchmarks.simulated_actors import RESPONSES, TOKENS, Report, simulate
from common.config import AlgorithmConfig, Config, LearnerConfig, RolloutConfig, StalenessConfig, TransportConfig
from common.keys import LearnerKeys
from common.quiet import quieter
from common.types import Prompt
from learner.rollouts.service import LearnerService, StillWaiting

SPAWN = multiprocessing.get_context("spawn")
JOIN_S = 120.0
PACE_S = 0.005  # between two looks for a batch, where nothing is trained
TAKE_S = 0.05  # between two looks, where something is: a few batches a second are there


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Of something that one thread did again and again."""

    per_s: float
    cores: float  # share of the time in which it ran
    queued: float  # in which it waited for a core; in the rest it waited for the interpreter

    @property
    def per_free_s(self) -> float:
        """What the rate would have been if a core had always been free."""
        return self.per_s / (1.0 - self.queued)


@dataclass(frozen=True, kw_only=True)
class Load:
    """One measurement. Cores are CPU seconds a second; `late_*` is how late the actors themselves were."""

    service: str  # "none", "thread" or "process"
    loop: Pace | None  # of the training loop, if there is one
    groups_per_s: float = 0.0
    lease_p50_ms: float = 0.0
    lease_p99_ms: float = 0.0
    lease_max_ms: float = 0.0
    late_p99_ms: float = 0.0
    passed: int = 0  # groups that were not sent because a lease was missing
    service_cores: float = 0.0  # its thread
    io_cores: float = 0.0  # libzmq's thread: TCP, CURVE
    actors_cores: float = 0.0


def service_config() -> Config:
    return replace(
        Config(),
        rollout=RolloutConfig(prompts_per_step=64, group_size=RESPONSES, max_tokens=TOKENS),
        algorithm=AlgorithmConfig(critic_warmup_steps=1_000_000),
        staleness=StalenessConfig(max_staleness=31),
        learner=LearnerConfig(steps=1000),
        transport=TransportConfig(heartbeat_s=5.0, heartbeat_timeout_s=120.0),
    )


class Consumer:
    """Takes the batches that are there, every now and then."""

    def __init__(self, service: LearnerService) -> None:
        self._service = service
        self._steps = 0
        self._next_s = 0.0
        service.turn_s = 0.0

    def take(self) -> None:
        if time.monotonic() < self._next_s:
            return
        with suppress(StillWaiting):
            while True:
                self._service.take_batch(JOIN_S)
                self._steps += 1
                self._service.set_version(0, self._steps)
        self._next_s = time.monotonic() + TAKE_S


@contextmanager
def serving(folder: str, num_actors: int) -> Iterator[tuple[LearnerService, Connection]]:
    """A service with so many actors, who wait for a word on the pipe (simulated_actors.simulate)."""
    prompts = [Prompt(uid=f"p{i}", text="", reference="") for i in range(1000)]
    keys = LearnerKeys(Path(folder))
    with (
        quieter("learner"),  # at the end every actor is lost without a word
        LearnerService(
            service_config(), prompts, lambda prompt: [1, 2, 3], ("m", "t"), [1], (), keys=keys, incarnation=1
        ) as service,
    ):
        ours, theirs = SPAWN.Pipe()
        names = [f"a{i}" for i in range(num_actors)]
        process = SPAWN.Process(target=simulate, args=(service.endpoint, folder, names, theirs), daemon=True)
        process.start()
        service.wait_for_members(num_actors, JOIN_S)
        yield service, ours
        ours.send("leave")
        process.join(JOIN_S)


# ---- what the main thread does meanwhile


class TrainingLoop:
    """Products that let go of the interpreter, and Python that does not, half and half."""

    def __init__(self) -> None:
        self._left = torch.rand(256, 256)

    def __call__(self) -> None:
        for _ in range(4):
            self._left = (self._left @ self._left).clamp_(0.0, 1.0)
        sum(i * i for i in range(20_000))


def repeat(work: Callable[[], None], take: Callable[[], None], seconds: float) -> Pace:
    done, started_s, (ran_s, queued_s) = 0, time.perf_counter(), schedule()
    while (elapsed_s := time.perf_counter() - started_s) < seconds:
        work()
        take()
        done += 1
    ran_s, queued_s = schedule()[0] - ran_s, schedule()[1] - queued_s
    return Pace(per_s=done / elapsed_s, cores=ran_s / elapsed_s, queued=queued_s / elapsed_s)


def schedule() -> tuple[float, float]:
    """Seconds for which this thread has run, and for which it has waited for a core: Linux, sched-stats."""
    ran, queued, _ = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()
    return int(ran) / 1e9, int(queued) / 1e9


def pause() -> None:
    time.sleep(PACE_S)


# ---- measurements


def thread_seconds() -> dict[int, float]:
    """CPU seconds of each thread of this process, by native id."""
    return {thread.id: thread.user_time + thread.system_time for thread in psutil.Process().threads()}


def in_thread(folder: str, num_actors: int, rate: float, seconds: float, loop: TrainingLoop | None) -> Load:
    """The service in a thread of this process, beside `loop` or beside nothing."""
    with serving(folder, num_actors) as (service, pipe):
        consumer = Consumer(service)
        pipe.send(rate)
        repeat(pause, consumer.take, 1.0)
        pipe.send("pause")
        pipe.recv()
        before, started_s = thread_seconds(), time.perf_counter()
        pipe.send(rate)
        pace = repeat(loop or pause, consumer.take, seconds)
        elapsed_s, after = time.perf_counter() - started_s, thread_seconds()
        pipe.send("pause")
        report: Report = pipe.recv()
        serving_id = next(thread.native_id for thread in threading.enumerate() if thread.name == "service")
        cores = {thread: (after[thread] - before.get(thread, 0.0)) / elapsed_s for thread in after}
    python = {thread.native_id for thread in threading.enumerate()} | {serving_id}
    latencies_ms = np.array(report.latencies_s) * 1000
    return Load(
        service="thread",
        loop=pace if loop is not None else None,
        groups_per_s=len(report.late_s) / report.elapsed_s,
        lease_p50_ms=float(np.percentile(latencies_ms, 50)),
        lease_p99_ms=float(np.percentile(latencies_ms, 99)),
        lease_max_ms=float(latencies_ms.max()),
        late_p99_ms=float(np.percentile(np.array(report.late_s) * 1000, 99)),
        passed=report.num_passed,
        service_cores=cores[serving_id or 0],
        io_cores=sum(share for thread, share in cores.items() if thread not in python),
        actors_cores=report.cpu_s / report.elapsed_s,
    )


def _serve_elsewhere(folder: str, num_actors: int, rate: float, pipe: Connection) -> None:
    """The service and its consumer, in a process of their own, until told to stop."""
    with serving(folder, num_actors) as (service, actors):
        consumer = Consumer(service)
        actors.send(rate)
        pipe.send("ready")
        while not pipe.poll(0):
            pause()
            consumer.take()
        actors.send("pause")
        report: Report = actors.recv()
    pipe.send(len(report.late_s) / report.elapsed_s)


def in_process(folder: str, num_actors: int, rate: float, seconds: float, loop: TrainingLoop) -> Load:
    """The same beside a service that takes of the cores as much, but nothing of the interpreter of the loop."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_serve_elsewhere, args=(folder, num_actors, rate, theirs))
    process.start()
    ours.recv()
    pace = repeat(loop, lambda: None, seconds)
    ours.send("stop")
    groups_per_s = ours.recv()
    process.join(JOIN_S)
    return Load(service="process", loop=pace, groups_per_s=groups_per_s)


def measure(folder: str, num_actors: int, rate: float, seconds: float, repeats: int) -> Iterator[Load]:
    """The service beside nothing; then in turns the loop alone, beside the service, and beside one elsewhere."""
    torch.set_num_threads(1)
    yield in_thread(folder, num_actors, rate, seconds, None)
    for _ in range(repeats):
        loop = TrainingLoop()
        yield Load(service="none", loop=repeat(loop, lambda: None, seconds))
        yield in_thread(folder, num_actors, rate, seconds, loop)
        yield in_process(folder, num_actors, rate, seconds, loop)


def kept(rows: list[Load], service: str, speed: Callable[[Pace], float]) -> list[float]:
    """The loop's speed beside a service, relative to that alone, in each round."""
    alone, beside = (
        [speed(row.loop) for row in rows if row.service == name and row.loop] for name in ("none", service)
    )
    return [fast / slow for fast, slow in zip(beside, alone, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of the learner's process after so many groups."""

    groups: int
    rss_mb: float
    objects: int  # that the garbage collector knows


def measure_memory(folder: str, num_actors: int, rate: float, num_groups: int) -> Iterator[Memory]:
    """A row for each twentieth of the groups."""
    with serving(folder, num_actors) as (service, pipe):
        consumer = Consumer(service)
        pipe.send(rate)
        for share in range(21):
            while (groups := int(service.stats()["received_groups"])) < num_groups * share / 20:
                pause()
                consumer.take()
            gc.collect()
            yield Memory(
                groups=groups, rss_mb=psutil.Process().memory_info().rss / 2**20, objects=len(gc.get_objects())
            )
        pipe.send("pause")
        pipe.recv()


# ---- printing


def render(row: Load) -> str:
    loop = f"{row.loop.per_s:6.1f}/s {row.loop.cores:5.2f} {row.loop.queued:6.2f}" if row.loop else " " * 21
    text = f"{row.service:8} {loop} {row.groups_per_s:8.0f}"
    if row.service != "thread":
        return text
    return (
        f"{text} {row.lease_p50_ms:8.1f} {row.lease_p99_ms:7.1f} {row.lease_max_ms:7.1f} {row.late_p99_ms:9.1f} "
        f"{row.passed:6d} {row.service_cores:8.3f} {row.io_cores:6.3f} {row.actors_cores:7.3f}"
    )


def print_load(folder: str, num_actors: int, rate: float, seconds: float, repeats: int) -> list[Load]:
    print(
        f"{num_actors} actors, {rate:g} groups/s asked for. Loop: its rate, and for how much of the time it ran, and\n"
        "waited for a core. Late: by how much the actors were. Cores: CPU seconds a second.\n"
        "service      loop   ran waited groups/s   p50 ms     p99     max  late p99 passed  service    I/O  actors"
    )
    rows = []
    for row in measure(folder, num_actors, rate, seconds, repeats):
        rows.append(row)
        print(render(row), flush=True)
    for service in ("thread", "process"):
        for speed, what in (
            (lambda pace: pace.per_s, ""),
            (lambda pace: pace.per_free_s, ", waits for a core left out"),
        ):
            if shares := kept(rows, service, speed):
                print(
                    f"beside the service in a {service} the loop keeps {statistics.median(shares):.0%} of its speed "
                    f"({min(shares):.0%} to {max(shares):.0%}){what}"
                )
    return rows


def print_memory(folder: str, num_actors: int, rate: float, num_groups: int) -> list[Memory]:
    print("groups    RSS MiB    objects")
    rows = []
    for row in measure_memory(folder, num_actors, rate, num_groups):
        rows.append(row)
        print(f"{row.groups:7d} {row.rss_mb:9.1f} {row.objects:10d}", flush=True)
    return rows

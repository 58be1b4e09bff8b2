"""The learner's side of the transport: throughput, latency of leases, memory, and what it leaves of a training loop.

    python benchmarks/transport.py [--json FILE] [--groups N] [--actors N] [--rate N] [--seconds S]

*Throughput*: a process sends groups of 16 responses of 8192 tokens. One side receives frames with bare pyzmq and looks
at nothing, the other is LearnerSocket.receive and the check of the group against its lease. Both with CURVE, and both
without; sides alternate, and each ratio is of medians.

*Load*: simulated actors over real sockets with keys, each holding one lease and answering after a second or so, so that
all together send `rate` groups a second. Latency is from sending a group to the next lease. Memory is that of the
learner's process, after the first quarter and at the end. Beside it a loop of matrix products and Python runs in the
main thread. Its speed is compared with that of the loop alone, and of the loop beside the same load on a service in
another process, which takes the cores but not the interpreter of the loop.
"""

import argparse
import heapq
import json
import multiprocessing
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # or a module here would hide a package

import numpy as np
import psutil
import torch
import zmq

from common.config import AlgorithmConfig, Config, LearnerConfig, RolloutConfig, StalenessConfig, TransportConfig
from common.keys import LearnerKeys, actor_keys, make_keys
from common.transport import LearnerSocket
from common.types import (
    PROTOCOL_VERSION,
    CompletedGroup,
    FinishReason,
    Heartbeat,
    Hello,
    Lease,
    Prompt,
    Ready,
    Stop,
    Verdict,
    Welcome,
)
from common.wire import decode, encode, pack, unpack
from learner.rollouts.contents import problem_with
from learner.rollouts.leases import train_lease
from learner.rollouts.service import BatchTimeout, LearnerService

RESPONSES, TOKENS = 16, 8192
MAX_MB = 64
NO_IDS = np.empty(0, np.int32)
NOBODY = np.empty(0, np.float32)
SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Groups per second over one connection, and the CPU time of the receiving process, I/O thread included."""

    curve: bool
    bare: float
    ours: float
    ratio: float
    bare_cpu_ms: float  # of a group
    ours_cpu_ms: float
    cpu_ratio: float


@dataclass(frozen=True, kw_only=True)
class Load:
    """What `rate` groups a second from `actors` actors do. `loop_*` are iterations per second of the training loop."""

    actors: int
    groups: int
    groups_per_s: float
    lease_p50_ms: float
    lease_p99_ms: float
    early_mb: float
    late_mb: float
    loop_alone: float
    loop_beside: float
    loop_beside_process: float


def group(lease_id: int, responses: int, tokens: int) -> CompletedGroup:
    total = responses * tokens
    return CompletedGroup(
        lease_id=lease_id,
        lengths=np.full(responses, tokens, np.int32),
        token_ids=np.arange(total, dtype=np.int32) % 1000,
        behavior_logprobs=np.full(total, -0.5, np.float32),
        versions=np.zeros(total, np.int32),
        rewards=np.where(np.arange(responses) % 2, 1.0, -1.0).astype(np.float32),
        verdicts=tuple(Verdict.CORRECT if i % 2 else Verdict.WRONG for i in range(responses)),
        verifier_error=None,
        finish_reasons=(FinishReason.STOP,) * responses,
        generation_s=1.0,
        verification_s=0.1,
    )


def dealer(context: "zmq.Context[zmq.Socket[bytes]]", folder: str | None, identity: bytes) -> "zmq.Socket[bytes]":
    """A client with the key in `folder`, or without one."""
    channel = context.socket(zmq.DEALER)
    channel.setsockopt(zmq.IDENTITY, identity)
    channel.setsockopt(zmq.LINGER, 0)
    channel.setsockopt(zmq.SNDHWM, 64)
    if folder is not None:
        keys = actor_keys(Config(transport=TransportConfig(keys=folder)), "a")
        assert keys is not None
        channel.setsockopt(zmq.CURVE_SERVERKEY, keys.learner)
        channel.setsockopt(zmq.CURVE_PUBLICKEY, keys.own.public)
        channel.setsockopt(zmq.CURVE_SECRETKEY, keys.own.secret)
    return channel


# ---- throughput


def send_groups(port: int, folder: str | None, count: int) -> None:
    packed = pack(encode(group(0, RESPONSES, TOKENS)))
    with zmq.Context() as context, dealer(context, folder, b"sender") as channel:
        channel.setsockopt(zmq.LINGER, -1)
        channel.connect(f"tcp://127.0.0.1:{port}")
        for _ in range(count):
            channel.send(packed, copy=False)


def receive_bare(socket: LearnerSocket, count: int) -> None:
    for _ in range(count):
        socket._socket.recv_multipart(copy=False)


def receive_ours(socket: LearnerSocket, count: int) -> None:
    config = Config(rollout=RolloutConfig(group_size=RESPONSES, max_tokens=TOKENS))
    lease = train_lease(config, 0, Prompt(uid="p", text="", reference=""), [1, 2, 3], None)
    while count:
        socket.poll(1.0)
        for _, message in socket.receive():
            assert isinstance(message, CompletedGroup)
            assert problem_with(message, lease, 0, config, None) is None
            count -= 1


def throughput(keys: LearnerKeys | None, folder: str | None, count: int, repeats: int) -> Throughput:
    """The first group starts the clock, so that a handshake and the sender's start do not count."""
    sides = (receive_bare, receive_ours)
    rates: dict[Any, list[float]] = {side: [] for side in sides}
    cpu_ms: dict[Any, list[float]] = {side: [] for side in sides}
    for receive in sides * repeats:
        socket = LearnerSocket("127.0.0.1", 0, MAX_MB, keys)
        sender = SPAWN.Process(target=send_groups, args=(socket.port, folder, count + 1))
        sender.start()
        receive_bare(socket, 1)
        started, started_cpu = time.perf_counter(), time.process_time()
        receive(socket, count)
        cpu_ms[receive].append((time.process_time() - started_cpu) * 1000 / count)
        rates[receive].append(count / (time.perf_counter() - started))
        sender.join()
        socket.close()
    bare, ours = (statistics.median(rates[side]) for side in sides)
    bare_ms, ours_ms = (statistics.median(cpu_ms[side]) for side in sides)
    return Throughput(
        curve=keys is not None,
        bare=bare,
        ours=ours,
        ratio=ours / bare,
        bare_cpu_ms=bare_ms,
        ours_cpu_ms=ours_ms,
        cpu_ratio=bare_ms / ours_ms,
    )


# ---- load


def simulate(endpoint: str, folder: str, names: list[str], hold_s: float, out: Connection) -> None:
    """Actors that answer their one lease after hold_s, half of it more or less; sends their latencies at the end."""
    draw = random.Random(names[0])
    with zmq.Context(io_threads=1) as context:
        sockets = [dealer(context, folder, name.encode()) for name in names]
        poller = zmq.Poller()
        places = {}
        for i, (channel, name) in enumerate(zip(sockets, names, strict=True)):
            channel.connect(endpoint)
            hello = Hello(
                protocol_version=PROTOCOL_VERSION,
                name=name,
                capacity=1,
                model_fingerprint="m",
                tokenizer_fingerprint="t",
                run_id=None,
                incarnation=None,
                number=None,
                held=NO_IDS,
                finished=NO_IDS,
            )
            channel.send(pack(encode(hello)))
            poller.register(channel, zmq.POLLIN)
            places[channel] = i
        beats = [draw.random() * 5.0 + time.monotonic() for _ in names]
        due: list[tuple[float, int, int]] = [(beat, i, -1) for i, beat in enumerate(beats)]
        heapq.heapify(due)
        sent_s = [0.0] * len(names)
        held: list[list[int]] = [[] for _ in names]
        latencies: list[float] = []
        left = len(names)
        while left and not out.poll(0):
            for channel, _ in poller.poll(max(0, round((due[0][0] - time.monotonic()) * 1000))):
                now = time.monotonic()
                match decode(unpack(channel.recv()), MAX_MB << 20):
                    case Welcome():
                        channel.send(pack(encode(Ready(version=0, probe_logprobs=NOBODY))))
                    case Lease(lease_id=lease_id):
                        i = places[channel]
                        held[i].append(lease_id)
                        if sent_s[i]:
                            latencies.append(now - sent_s[i])
                        heapq.heappush(due, (now + hold_s * (0.5 + draw.random()), i, lease_id))
                    case Stop():
                        left -= 1
            while due[0][0] <= time.monotonic():
                _, i, lease_id = heapq.heappop(due)
                if lease_id >= 0:
                    sent_s[i] = time.monotonic()
                    held[i].remove(lease_id)
                    sockets[i].send(pack(encode(group(lease_id, 4, 32))))
                else:
                    ids = np.array(held[i], np.int32)
                    drawn = np.zeros_like(ids)
                    beat = Heartbeat(lease_ids=ids, lease_tokens=drawn, generated_tokens=0, busy_s=0.0, uptime_s=0.0)
                    sockets[i].send(pack(encode(beat)))
                    heapq.heappush(due, (time.monotonic() + 5.0, i, -1))
        out.send(latencies)
        out.recv()
        for channel in sockets:
            channel.close(linger=0)


def service_config() -> Config:
    return replace(
        Config(),
        rollout=RolloutConfig(prompts_per_step=64, group_size=4, max_tokens=32),
        algorithm=AlgorithmConfig(critic_warmup_steps=1_000_000),
        staleness=StalenessConfig(max_staleness=31),
        learner=LearnerConfig(steps=1000),
        transport=TransportConfig(heartbeat_s=5.0, heartbeat_timeout_s=120.0),
    )


@contextmanager
def service(folder: str) -> Iterator[LearnerService]:
    prompts = [Prompt(uid=f"p{i}", text="", reference="") for i in range(1000)]
    with LearnerService(
        service_config(), prompts, lambda prompt: [1, 2, 3], ("m", "t"), [1], (), LearnerKeys(Path(folder))
    ) as running:
        yield running


def consume(running: LearnerService, is_over: threading.Event) -> int:
    """Takes batches as they come; the groups taken."""
    taken, step = 0, 0
    while not is_over.is_set():
        with suppress(BatchTimeout):
            taken += len(running.take_batch(1.0))
            step += 1
            running.set_version(0, step)
    return taken


def training_loop(is_over: threading.Event) -> float:
    """Iterations per second of products that hold no lock, and Python that does, half and half."""
    left = torch.rand(256, 256)
    done, started = 0, time.perf_counter()
    while not is_over.is_set():
        for _ in range(4):
            left = (left @ left).clamp_(0.0, 1.0)
        sum(i * i for i in range(20_000))
        done += 1
    return done / (time.perf_counter() - started)


@contextmanager
def actors(endpoint: str, folder: str, count: int, rate: float, found: list[float]) -> Iterator[None]:
    """Two processes with half of the actors each; at the end their latencies are in `found`."""
    names = [f"a{i}" for i in range(count)]
    pipes = []
    for share in (names[::2], names[1::2]):
        ours, theirs = SPAWN.Pipe()
        process = SPAWN.Process(target=simulate, args=(endpoint, folder, share, count / rate, theirs))
        process.start()
        pipes.append((ours, process))
    yield
    for pipe, _ in pipes:
        pipe.send("stop")
    for pipe, process in pipes:
        found += pipe.recv()
        pipe.send("leave")
        process.join(20.0)


def serve_elsewhere(folder: str, out: Connection) -> None:
    """The service and its consumer, in a process of their own, until told to stop."""
    with service(folder) as running:
        out.send(running.endpoint)
        is_over = threading.Event()
        consumer = threading.Thread(target=consume, args=(running, is_over), daemon=True)
        consumer.start()
        out.recv()
        is_over.set()
        consumer.join(30.0)
    out.send("over")


def timed(seconds: float) -> threading.Event:
    is_over = threading.Event()
    threading.Timer(seconds, is_over.set).start()
    return is_over


def load(folder: str, count: int, rate: float, seconds: float) -> Load:
    torch.set_num_threads(1)
    memory = psutil.Process().memory_info
    alone = training_loop(timed(seconds / 4))
    ours, theirs = SPAWN.Pipe()
    elsewhere = SPAWN.Process(target=serve_elsewhere, args=(folder, theirs))
    elsewhere.start()
    with actors(ours.recv(), folder, count, rate, []):
        time.sleep(8.0)  # all have connected
        beside_process = training_loop(timed(seconds / 4))
    ours.send("stop")
    ours.recv()
    elsewhere.join()
    latencies: list[float] = []
    taken: list[int] = []
    with service(folder) as running:
        is_over = threading.Event()
        consumer = threading.Thread(target=lambda: taken.append(consume(running, is_over)))
        with actors(running.endpoint, folder, count, rate, latencies):
            running.wait_for_members(count, 120.0)
            before, started = running.stats()["received_groups"], time.monotonic()
            consumer.start()
            training_loop(timed(seconds / 4))
            early_mb = memory().rss / 2**20
            beside = training_loop(timed(seconds * 3 / 4))
            late_mb = memory().rss / 2**20
            groups, elapsed_s = running.stats()["received_groups"] - before, time.monotonic() - started
            is_over.set()
            consumer.join(130.0)
    p50, p99 = np.percentile(np.array(latencies[count:]) * 1000, [50, 99])
    return Load(
        actors=count,
        groups=int(groups),
        groups_per_s=groups / elapsed_s,
        lease_p50_ms=float(p50),
        lease_p99_ms=float(p99),
        early_mb=early_mb,
        late_mb=late_mb,
        loop_alone=alone,
        loop_beside=beside,
        loop_beside_process=beside_process,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--groups", type=int, default=300, help="of 131072 tokens each, per measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--actors", type=int, default=500)
    parser.add_argument("--rate", type=float, default=500.0, help="groups per second")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--only", choices=["throughput", "load"])
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}, pyzmq {zmq.__version__}")
    with TemporaryDirectory() as folder:
        make_keys(Path(folder))
        if arguments.only != "load":
            print("curve   bare groups/s   ours groups/s   ratio    bare CPU ms   ours CPU ms   ratio")
            for keys, place in ((None, None), (LearnerKeys(Path(folder)), folder)):
                row = throughput(keys, place, arguments.groups, arguments.repeats)
                rows.append(asdict(row))
                print(
                    f"{row.curve!s:6} {row.bare:14.0f} {row.ours:15.0f} {row.ratio:7.2f} {row.bare_cpu_ms:14.2f} "
                    f"{row.ours_cpu_ms:13.2f} {row.cpu_ratio:7.2f}",
                    flush=True,
                )
        if arguments.only != "throughput":
            found = load(folder, arguments.actors, arguments.rate, arguments.seconds)
            rows.append(asdict(found))
            print(
                f"{found.actors} actors, {found.groups} groups, {found.groups_per_s:.0f}/s: lease p50 "
                f"{found.lease_p50_ms:.1f} ms, p99 {found.lease_p99_ms:.1f} ms; memory {found.early_mb:.0f}, then "
                f"{found.late_mb:.0f} MiB\ntraining loop: {found.loop_alone:.1f}/s alone, {found.loop_beside:.1f} "
                f"beside the service, {found.loop_beside_process:.1f} with the service in another process"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The learner's side of the transport: throughput, latency of leases, memory, and what it leaves of a training loop.

    python benchmarks/transport.py [--only throughput|load|memory] [--json FILE]

*Throughput*: a process sends groups of 16 responses of 8192 tokens. One side receives frames with bare pyzmq and looks
at nothing, the other is LearnerSocket.receive and the check of the group against its lease. Both with CURVE, and both
without; sides alternate, and each ratio is of medians.

*Load*: `--actors` simulated actors in one process send `--rate` small groups a second over as many connections with
keys, whether the learner keeps up or not. Latency is from sending a group to reading the next lease. In turns a loop of
matrix products and Python runs alone, beside the service in a thread, and beside the same load on a service in another
process, which takes the cores but not the interpreter of the loop. CPU seconds say who was saturated.

*Memory*: of the learner's process over `--memory-groups` small groups, at `--memory-rate` or as fast as it can.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # or a module here would hide a package

import zmq

from benchmarks.simulated_actors import dealer, group
from common.config import Config, RolloutConfig
from common.keys import LearnerKeys, make_keys
from common.transport import LearnerSocket
from common.types import CompletedGroup, Prompt
from common.wire import encode, pack
from learner.rollouts.contents import problem_with
from learner.rollouts.leases import train_lease

RESPONSES, TOKENS = 16, 8192
MAX_MB = 64
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


def print_throughput(folder: str, count: int, repeats: int) -> list[Throughput]:
    print("curve   bare groups/s   ours groups/s   ratio    bare CPU ms   ours CPU ms   ratio")
    rows = []
    for keys, place in ((None, None), (LearnerKeys(Path(folder)), folder)):
        row = throughput(keys, place, count, repeats)
        rows.append(row)
        print(
            f"{row.curve!s:6} {row.bare:14.0f} {row.ours:15.0f} {row.ratio:7.2f} {row.bare_cpu_ms:14.2f} "
            f"{row.ours_cpu_ms:13.2f} {row.cpu_ratio:7.2f}",
            flush=True,
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--only", choices=["throughput", "load", "memory"])
    parser.add_argument("--groups", type=int, default=300, help="of 131072 tokens each, per measurement of throughput")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--actors", type=int, default=500)
    parser.add_argument("--rate", type=float, default=500.0, help="small groups per second")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement under load")
    parser.add_argument("--memory-groups", type=int, default=100_000)
    parser.add_argument("--memory-rate", type=float, default=2000.0)
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}, pyzmq {zmq.__version__}")
    rows: dict[str, list[Any]] = {}
    with TemporaryDirectory() as folder:
        make_keys(Path(folder))
        if arguments.only in (None, "throughput"):
            rows["throughput"] = print_throughput(folder, arguments.groups, arguments.repeats)
        from benchmarks import load  # with torch, which the processes that the others start need not import

        if arguments.only in (None, "load"):
            asked = (arguments.actors, arguments.rate, arguments.seconds, arguments.repeats)
            rows["load"] = load.print_load(folder, *asked)
        if arguments.only in (None, "memory"):
            rows["memory"] = load.print_memory(folder, arguments.actors, arguments.memory_rate, arguments.memory_groups)
    if arguments.json:
        plain = {name: [asdict(row) for row in part] for name, part in rows.items()}
        arguments.json.write_text(json.dumps(plain, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

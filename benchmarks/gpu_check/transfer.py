"""Part f: weights from one process to another on this device, as a publication moves them, and peers that are lost.

A second process is the actor. It reads a buffer in place (CUDA IPC), then receives broadcasts over NCCL, dies in the
middle, and is replaced; and one never comes. NCCL takes two processes on one device for two hosts when NCCL_HOSTID
differs, and sends over the loopback interface then: its rate says nothing about NVLink or InfiniBand. On the CPU it is
gloo. Without vLLM for CUDA, whose communicator is used, only reading in place is tried.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed import TCPStore

from benchmarks.gpu_check.engines import missing_engine
from benchmarks.gpu_check.report import Report
from common import ipc
from common.broadcast import BrokenTransfer, GlooGroup, Group, NcclGroup, join_gloo, nccl_unique_id

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
MIB = 2**20
SIZES_MIB: Mapping[str, tuple[int, ...]] = {"cuda": (1, 64, 1024), "cpu": (1, 4)}
REPEATS = 3
TIMEOUT_S = {"cuda": 10.0, "cpu": 3.0}  # of a collective
SLACK_S = 5.0  # above it, until who waits must have been told

Order = dict[str, Any]


class Peer:
    """The other process: takes one order at a time, a line of JSON, and answers with another."""

    def __init__(self, device: torch.device) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu_check.transfer", device.type]
        environment = os.environ | {"NCCL_HOSTID": f"peer-{time.monotonic_ns()}"}
        self.process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def tell(self, order: Order) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Order:
        """Its next answer. Raises RuntimeError when it has died or could not follow."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()  # the part's own time limit ends this wait
        answer: Order = json.loads(line) if line else {"error": f"it ended with exit code {self.process.wait()}"}
        if "error" in answer:
            raise RuntimeError(f"the other process: {answer['error']}")
        return answer

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def peer_on(device: torch.device) -> Iterator[Peer]:
    peer = Peer(device)
    try:
        yield peer
    finally:
        peer.kill()


def run(report: Report, device: torch.device, folder: Path) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
        with peer_on(device) as peer:
            read_in_place(report, peer, device)
        missing = missing_engine(device)
        if missing is not None:
            report.skip(f"broadcasts were not tried: {missing}")
            return
    with peer_on(device) as peer:
        group = meet(report, peer, device)
        for size in SIZES_MIB[device.type]:
            broadcast(report, group, peer, size, device)
        lose(report, group, peer, device)
    with peer_on(device) as peer:
        group = meet(report, peer, device)
        broadcast(report, group, peer, 1, device, label="after that, a new group")
        group.close()
    wait_for_nobody(report, device)


def pattern(num_bytes: int, seed: int, device: torch.device) -> Tensor:
    """uint8 [num_bytes] that both processes can make."""
    return (torch.arange(num_bytes // 4, dtype=torch.int32, device=device) * 2654435 + seed).view(torch.uint8)


def read_in_place(report: Report, peer: Peer, device: torch.device) -> None:
    for size in SIZES_MIB[device.type]:
        buffer = pattern(size * MIB, size, device)
        torch.cuda.synchronize(device)
        seconds = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            peer.tell({"do": "read", "buffer": ipc.export(buffer), "num_bytes": size * MIB, "seed": size})
            answer = peer.answer()
            seconds.append(time.perf_counter() - started)
            if not answer["is_right"]:
                report.fail(f"{size} MiB read in place are other bytes than were exported")
            torch.cuda.ipc_collect()
        report.number(f"in place, {size} MiB: ms with the other process's copy", 1e3 * statistics.median(seconds))


def meet(report: Report, peer: Peer, device: torch.device) -> Group:
    """A group of both processes; this one is rank 0."""
    peer.tell({"do": "load"})  # no part of what is timed: vLLM takes 20 s from a cold disk
    peer.answer()
    started = time.perf_counter()
    group = _invite(peer, device)()
    peer.answer()
    report.number("s until a group has met", time.perf_counter() - started)
    return group


def _invite(peer: Peer | None, device: torch.device) -> Callable[[], Group]:
    """Tells the peer, if there is one, how to come; what is returned waits for it."""
    timeout_s = TIMEOUT_S[device.type]
    order: Order = {"do": "join", "timeout_s": timeout_s}
    if device.type == "cpu":
        store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
        order |= {"port": store.port}
        join: Callable[[], Group] = partial(GlooGroup, store, 0, 2, HOST, timeout_s)
    else:
        unique_id = nccl_unique_id()
        order |= {"unique_id": b64encode(unique_id).decode()}
        join = partial(NcclGroup, unique_id, 0, 2, device, timeout_s)
    if peer is not None:
        peer.tell(order)
    return join


def broadcast(
    report: Report, group: Group, peer: Peer, size: int, device: torch.device, label: str = "broadcast"
) -> None:
    buffer, seconds = pattern(size * MIB, size, device), []
    for _ in range(REPEATS):
        peer.tell({"do": "receive", "num_bytes": size * MIB, "seed": size})
        peer.answer()  # its buffer is there
        started = time.perf_counter()
        group.broadcast(buffer)
        if not peer.answer()["is_right"]:
            report.fail(f"{size} MiB arrived as other bytes than were broadcast")
        seconds.append(time.perf_counter() - started)
    report.number(f"{label}, {size} MiB: GiB/s", size / 1024 / statistics.median(seconds))


def lose(report: Report, group: Group, peer: Peer, device: torch.device) -> None:
    """The peer is killed between two broadcasts."""
    peer.kill()
    buffer = pattern(MIB, 0, device)
    _expect_broken(report, "s until a killed peer is noticed", lambda: group.broadcast(buffer), device)
    group.close()


def wait_for_nobody(report: Report, device: torch.device) -> None:
    """The invited one never comes."""
    _expect_broken(report, "s until a peer that never comes is given up", _invite(None, device), device)


def _expect_broken(report: Report, name: str, call: Callable[[], object], device: torch.device) -> None:
    started = time.perf_counter()
    try:
        call()
    except BrokenTransfer:
        report.at_most(name, time.perf_counter() - started, TIMEOUT_S[device.type] + SLACK_S)
    else:
        report.fail(f"{name}: it was not noticed at all")


# ---- the other process


def follow(orders: IO[str], answers: IO[str], device: torch.device) -> None:
    """Does what it is told until there are no more orders."""
    group: Group | None = None
    for line in orders:
        order = json.loads(line)
        try:
            match order["do"]:
                case "load":
                    if device.type == "cuda":
                        nccl_unique_id()
                    answer: Order = {}
                case "read":
                    found = ipc.attach(order["buffer"], device).clone()
                    answer = {"is_right": _is_right(found, order)}
                    del found
                case "join":
                    group = _join(order, device)
                    answer = {}
                case "receive":
                    assert group is not None
                    buffer = torch.zeros(order["num_bytes"], dtype=torch.uint8, device=device)
                    print(json.dumps({}), file=answers, flush=True)
                    group.broadcast(buffer)
                    answer = {"is_right": _is_right(buffer, order)}
                case other:
                    answer = {"error": f"unknown order {other!r}"}
        except Exception as error:  # the one who ordered it has to know
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _join(order: Order, device: torch.device) -> Group:
    if device.type == "cpu":
        return join_gloo(HOST, order["port"], 1, 2, order["timeout_s"])
    return NcclGroup(b64decode(order["unique_id"]), 1, 2, device, order["timeout_s"])


def _is_right(found: Tensor, order: Order) -> bool:
    return torch.equal(found, pattern(order["num_bytes"], order["seed"], found.device))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between
    device = torch.device("cuda", 0) if sys.argv[1] == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    follow(sys.stdin, answers, device)


if __name__ == "__main__":
    main()

"""Transfer groups: every wait ends. gloo is real, NCCL's communicator is a stand-in that waits without end."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import Store, TCPStore

from common.broadcast import Background, BrokenTransfer, Buffers, GlooGroup, NcclGroup, join_gloo

HOST = "127.0.0.1"
LONG_S = 60.0


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Lest it come back while pytest ends, which aborts the process."""
    yield
    for thread in threading.enumerate():
        if thread.name == "transfer":
            thread.join(LONG_S)
            assert not thread.is_alive()


def test_a_call_in_the_background_gives_what_it_returns_or_raises() -> None:
    assert Background(lambda: 7).result(LONG_S) == 7
    with pytest.raises(ZeroDivisionError):
        Background(lambda: 1 / 0).result(LONG_S)


def test_a_call_that_does_not_come_back_is_left_behind() -> None:
    over = threading.Event()
    call = Background(lambda: over.wait(LONG_S))
    with pytest.raises(TimeoutError, match=r"still under way after 0\.01 s"):
        call.result(0.01)
    over.set()
    assert call.result(LONG_S)


# ---- memory


def test_memory_is_handed_out_again_only_when_nothing_that_was_cut_from_it_is_left() -> None:
    buffers, cpu = Buffers(), torch.device("cpu")
    first = buffers.take(1000, cpu)
    address = first.data_ptr()
    piece = first[8:24].view(torch.float32).view(2, 2)
    del first
    second = buffers.take(500, cpu)
    assert second.data_ptr() != address, "a tensor of the first bucket is still there"
    assert len(second) == 500
    del piece
    assert buffers.take(900, cpu).data_ptr() == address


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 3)), max_size=40))
def test_no_two_buckets_share_memory_and_few_are_kept(takes: list[tuple[int, int]]) -> None:
    buffers, cpu = Buffers(), torch.device("cpu")
    held: list[torch.Tensor] = []
    for number, (num_bytes, num_let_go) in enumerate(takes):
        held = held[num_let_go:]
        held.append(buffers.take(num_bytes, cpu).fill_(number))
        assert held[-1].shape == (num_bytes,)
        assert len(buffers._kept) <= Buffers.KEPT
        assert all(len(set(tensor.tolist())) <= 1 for tensor in held), "a bucket was written over"
        assert len({int(tensor[0]) for tensor in held if len(tensor)}) == sum(len(tensor) > 0 for tensor in held)


# ---- gloo


def listen(timeout_s: float = LONG_S) -> TCPStore:
    return TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def make_groups(size: int, timeout_s: float = LONG_S) -> list[GlooGroup]:
    store = listen()
    others = [
        Background(lambda rank=rank: join_gloo(HOST, store.port, rank, size, timeout_s)) for rank in range(1, size)
    ]
    return [GlooGroup(store, 0, size, HOST, timeout_s), *(other.result(LONG_S) for other in others)]


def test_rank_0_fills_everybodys_buffer() -> None:
    groups = make_groups(3)
    buffers = [torch.full((1000,), rank, dtype=torch.uint8) for rank in range(3)]
    calls = [Background(lambda g=g, b=b: g.broadcast(b)) for g, b in zip(groups, buffers, strict=True)]
    for call in calls:
        call.result(LONG_S)
    assert all(bool((buffer == 0).all()) for buffer in buffers)


def test_a_peer_that_closes_breaks_the_transfer_at_once() -> None:
    first, second, third = make_groups(3)
    second.close()
    del second
    started = time.monotonic()
    receiving = Background(lambda: third.broadcast(torch.zeros(2**22, dtype=torch.uint8)))
    with pytest.raises(BrokenTransfer):
        first.broadcast(torch.zeros(2**22, dtype=torch.uint8))
    first.close()
    third.close()
    assert time.monotonic() - started < LONG_S / 2
    del receiving
    with pytest.raises(BrokenTransfer, match="closed"):
        first.broadcast(torch.zeros(1, dtype=torch.uint8))


def test_a_peer_that_hangs_breaks_the_transfer_in_time() -> None:
    first, _hangs = make_groups(2, timeout_s=0.5)
    with pytest.raises(BrokenTransfer, match="Timed out"):
        first.broadcast(torch.zeros(2**24, dtype=torch.uint8))


def test_a_peer_that_never_comes_breaks_the_meeting_in_time() -> None:
    with pytest.raises(BrokenTransfer):
        GlooGroup(listen(0.5), 0, 2, HOST, 0.5)


class Holding(Store):
    """Takes what a member says of itself, and never tells it of the others."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store, self.has_set, self.over = store, threading.Event(), threading.Event()

    def set(self, key: str, value: Any) -> None:
        self._store.set(key, value)
        self.has_set.set()

    def wait(self, keys: list[str], timeout: timedelta = timedelta(0)) -> None:
        self.over.wait(LONG_S)
        raise RuntimeError("nobody came")

    def get(self, key: str) -> bytes:
        self.wait([key])
        return b""


def test_a_peer_that_says_where_it_is_and_does_not_connect_breaks_the_meeting_in_time() -> None:
    store = listen()
    holding = Holding(store)
    # of two addresses the larger one connects, the other waits for that
    absent = Background(lambda: GlooGroup(holding, 1, 2, "127.0.0.2", LONG_S))
    assert holding.has_set.wait(LONG_S)
    started = time.monotonic()
    with pytest.raises(BrokenTransfer, match=r"the others did not all connect within 0\.5 s"):
        GlooGroup(store, 0, 2, HOST, 0.5)
    assert time.monotonic() - started < 1.5, "gloo itself waits five times as long"
    holding.over.set()
    with pytest.raises(BrokenTransfer):
        absent.result(LONG_S)


ABANDONED = """
from common.broadcast import Background, leave
import torch

call = Background(lambda: torch.distributed.TCPStore("127.0.0.1", {port}, is_master=False))
try:
    call.result(0.5)
except TimeoutError:
    print("left behind")
leave(7)
"""


def test_a_process_with_a_call_that_was_left_behind_ends_with_its_own_exit_code() -> None:
    with socket.create_server((HOST, 0)) as mute:
        script = ABANDONED.format(port=mute.getsockname()[1])
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=LONG_S)
    assert (done.returncode, done.stdout) == (7, "left behind\n"), done.stderr


def test_a_learner_that_accepts_a_worker_and_never_answers_it_is_not_waited_for() -> None:
    with socket.create_server((HOST, 0)) as mute, pytest.raises(RuntimeError, match=r"still under way after 0\.75 s"):
        join_gloo(HOST, mute.getsockname()[1], 1, 2, 0.5)


def test_who_cannot_reach_the_learner_has_no_broken_transfer_but_a_problem_of_its_own() -> None:
    port = listen().port  # closed again
    with pytest.raises(RuntimeError, match=f"the learner cannot be reached at {HOST}:{port}") as caught:
        join_gloo(HOST, port, 1, 2, 0.5)
    assert not isinstance(caught.value, BrokenTransfer)


# ---- nccl


class Communicator:
    """vLLM's PyNcclCommunicator, as far as we use it. A lost peer: calls return only when it is destroyed."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.is_lost, self.destroyed = False, threading.Event()
        self.broadcasts: list[tuple[int, int]] = []

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any) -> None:
        self.broadcasts.append((tensor.numel(), src))
        if self.is_lost:
            self.destroyed.wait(LONG_S)

    def destroy(self) -> None:
        self.destroyed.set()


class Stream:
    def synchronize(self) -> None:
        """Nothing runs on it."""


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets what joining a group does; as it is, it gives a communicator."""

    def set_to(function: Callable[..., Communicator]) -> None:
        stand_in = SimpleNamespace(uid_init_process_group=function)  # vLLM itself takes half a minute to load
        monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer.nccl_common", stand_in)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    set_to(Communicator)
    yield set_to


def make_nccl(timeout_s: float = LONG_S) -> NcclGroup:
    return NcclGroup(b"id", 1, 3, torch.device("cuda", 0), timeout_s)


def test_nccl_broadcasts_from_rank_0_in_the_group_of_its_id(connect: Callable[..., None]) -> None:
    group = make_nccl()
    group.broadcast(torch.zeros(5, dtype=torch.uint8))
    communicator: Any = group._communicator
    assert communicator.arguments == (b"id", 1, 3, torch.device("cuda", 0))
    assert communicator.broadcasts == [(5, 0)]


def test_an_nccl_broadcast_with_a_lost_peer_is_aborted_in_time(connect: Callable[..., None]) -> None:
    group = make_nccl(timeout_s=0.05)
    communicator: Any = group._communicator
    communicator.is_lost = True
    with pytest.raises(BrokenTransfer, match=r"no broadcast: still under way after 0\.05 s"):
        group.broadcast(torch.zeros(5, dtype=torch.uint8))
    assert communicator.destroyed.wait(LONG_S)
    with pytest.raises(BrokenTransfer, match="closed"):
        group.broadcast(torch.zeros(5, dtype=torch.uint8))


def test_an_nccl_group_that_is_not_complete_in_time_is_left_and_destroyed_when_it_is(
    connect: Callable[..., None],
) -> None:
    arrived, made = threading.Event(), Communicator()

    def late(*arguments: Any) -> Communicator:
        arrived.wait(LONG_S)
        return made

    connect(late)
    with pytest.raises(BrokenTransfer, match="the others did not all come"):
        make_nccl(timeout_s=0.05)
    assert not made.destroyed.is_set()
    arrived.set()
    assert made.destroyed.wait(LONG_S), "nobody would ever abort it"


def test_an_nccl_error_is_a_broken_transfer(connect: Callable[..., None]) -> None:
    def fails(*arguments: Any) -> Communicator:
        raise RuntimeError("NCCL error: unhandled system error")

    connect(fails)
    with pytest.raises(BrokenTransfer, match="unhandled system error"):
        make_nccl()

"""The pool's template process: keeps the workers, their time limits and their replacement.

    VerifierPool (actor) --pipe--> template --socket pair each--> forked workers

It starts fresh (`python -m actors.verifier.template`), loads the verifier and nothing else, and stays
single-threaded, so a worker is a fork of a few milliseconds with everything loaded. It does no verification
itself and therefore cannot hang on an answer. A worker that is over its time limit, or dies, is killed and
reaped, its answer is `timed_out`, and another takes its place.

A worker that others wait for becomes *slow* when an answer takes it longer than usual (actors/verifier/usual.py), in
processor time, or asleep in wall-clock time: another worker stands in for it, and it goes on until its limit in what
time is left. At most MAX_SLOW are slow. Those that compute take turns, num_workers at a time, while requests wait only
one turn in SLOW_SHARE, and otherwise they are stopped: first those that have done least. While the usual time is not
known, every other turn is theirs and those that have done most come first, so that it becomes known.

While some are slow a spare worker is kept, and it takes the next request as soon as a busy one is *overdue*, a quarter
of the way to being slow. A new worker starts with the caches of the template, which the verifier's optional `warm_up`
fills.

Input lines `<id> <json>` on stdin; output lines `<id> <verdict>` on stdout, after one line `ready` or `error
<why>`.
"""

import argparse
import gc
import heapq
import importlib
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from actors.verifier.usual import UsualTime
from actors.verifier.worker import COLD, FAILED, VerifyFunction, run_worker
from common.types import Verdict

FASTEST_S = 0.004  # no answer is slow before
FIRST_SHARE = 0.1  # of the time limit: an answer is slow after it as long as the usual time is not known
OVERDUE_SHARE = 0.25  # of the time after which an answer is slow
MAX_SLOW = 100
SLOW_SHARE = 12
FIRST_SLOW_SHARE = 2  # in place of SLOW_SHARE as long as the usual time is not known
_TURN_S = 0.005
_READ_BYTES = 1 << 20


@dataclass(eq=False)
class _Worker:
    """A forked worker. Idle when `request` is None; `started_s` is when the request was sent."""

    pid: int
    channel: socket.socket
    modules: frozenset[str]  # heavy modules that the template held when it forked this worker
    request: bytes | None = None
    started_s: float = 0.0
    started_cpu_s: float = 0.0  # processor time of the worker when the request was sent
    seen_s: float = 0.0  # used_s() at the last look
    is_computing: bool = False  # at the last look; asleep it takes nobody's time
    is_stopped: bool = False
    was_stopped: bool = False  # at any time since the request was sent
    is_overdue: bool = False  # a spare, if there is one, may take the next request already

    def cpu_s(self) -> float:
        """Processor time that the worker has used so far. Raises OSError when it is gone."""
        return time.clock_gettime((~self.pid << 3) | 2)  # Linux: the clock of another process's processor time

    def used_s(self) -> float:
        """Processor time that the present answer has taken so far."""
        return self.cpu_s() - self.started_cpu_s

    def look(self) -> None:
        """Sees whether it has computed since the last look."""
        used_s = self.used_s()
        self.is_computing = used_s - self.seen_s >= _TURN_S / 5
        self.seen_s = used_s

    def is_asleep(self) -> bool:
        """Whether it waits for something other than a processor."""
        stat = Path(f"/proc/{self.pid}/stat").read_bytes()
        return stat.rpartition(b")")[2].split()[0] != b"R"


class Template:
    """Requests wait in `queue` until a worker is idle; each is answered exactly once.

    Invariant: busy workers that are not slow number at most num_workers, and one more while one of them is overdue;
    slow ones number at most MAX_SLOW.
    """

    def __init__(
        self,
        verify: VerifyFunction,
        warm_up: Callable[[str], None],
        num_workers: int,
        timeout_s: float,
        memory_mb: int,
    ) -> None:
        self._verify, self._warm_up_function = verify, warm_up
        self._num_workers, self._timeout_s, self._memory_mb = num_workers, timeout_s, memory_mb
        self._queue: deque[bytes] = deque()
        self._workers: dict[int, _Worker] = {}  # idle, or busy and not slow; by file descriptor of the channel
        self._slow: dict[int, _Worker] = {}
        self._usual_cpu = UsualTime(FASTEST_S, FIRST_SHARE * timeout_s)
        self._usual_wall = UsualTime(FASTEST_S, FIRST_SHARE * timeout_s)
        self._modules: set[str] = set()  # heavy modules loaded so far
        self._killed: list[int] = []  # not yet reaped: a process takes milliseconds to give its memory back
        self._poll = select.poll()
        self._turned_s = time.monotonic()  # when the slow workers last changed turns

    def run(self, requests_fd: int, replies_fd: int) -> None:
        """Serves until `requests_fd` is closed by the other side, then kills the workers."""
        self._replies_fd = replies_fd
        self._poll.register(requests_fd, select.POLLIN)
        partial = b""
        while True:
            self._dispatch()
            for fd, _ in self._poll.poll(self._next_wake_ms()):
                if fd != requests_fd:
                    worker = self._workers.get(fd) or self._slow.get(fd)
                    if worker is not None:  # not removed by an event before this one
                        self._receive(worker)
                    continue
                data = os.read(requests_fd, _READ_BYTES)
                if not data:
                    self._stop()
                    return
                *lines, partial = (partial + data).split(b"\n")
                self._queue.extend(lines)
            self._check_clocks()

    def _dispatch(self) -> None:
        """Hands queued requests to idle workers, forking up to the allowed number, and a spare while some are slow."""
        while self._queue:
            busy = [w for w in self._workers.values() if w.request is not None]
            num_overdue = min(1, sum(w.is_overdue for w in busy))
            idle = next((w for w in self._workers.values() if w.request is None), None)
            if len(busy) - num_overdue >= self._num_workers or (idle is None and len(busy) >= self._num_workers):
                break
            self._send(idle or self._fork(), self._queue.popleft())
        if self._queue and self._slow and len(self._workers) <= self._num_workers:
            self._fork()

    def _send(self, worker: _Worker, request: bytes) -> None:
        worker.request, worker.started_s, worker.seen_s = request, time.monotonic(), 0.0
        worker.is_overdue = worker.was_stopped = False
        try:
            worker.started_cpu_s = worker.cpu_s()
            worker.channel.sendall(request.split(b" ", 1)[1] + b"\n")
        except OSError:
            self._lose(worker)

    def _fork(self) -> _Worker:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            run_worker(self._verify, theirs, self._memory_mb)
        theirs.close()
        worker = _Worker(pid=pid, channel=ours, modules=frozenset(self._modules))
        self._workers[ours.fileno()] = worker
        self._poll.register(ours.fileno(), select.POLLIN)
        return worker

    def _receive(self, worker: _Worker) -> None:
        try:
            line = worker.channel.recv(64)
        except OSError:
            line = b""
        module = line.removeprefix(COLD).decode().strip() if line.startswith(COLD) else None
        if module is not None and module not in worker.modules:
            self._load(module, worker)
        elif module is not None or line in (b"", FAILED):
            self._lose(worker)
        else:
            self._usual_cpu.add(worker.used_s())
            if not worker.was_stopped:
                self._usual_wall.add(time.monotonic() - worker.started_s)
            self._reply(worker, line)
            self._welcome_back(worker)

    def _welcome_back(self, worker: _Worker) -> None:
        """A slow worker that came to an end after all is the next spare, unless there is one."""
        if self._slow.pop(worker.channel.fileno(), None) is None:
            return
        self._workers[worker.channel.fileno()] = worker
        if worker.is_stopped:  # after it had replied
            os.kill(worker.pid, signal.SIGCONT)
            worker.is_stopped = False
        if len(self._workers) > self._num_workers + 1:
            self._remove(worker)
        self._share_turns(time.monotonic())

    def _reply(self, worker: _Worker, verdict_line: bytes) -> None:
        assert worker.request is not None
        _write_all(self._replies_fd, worker.request.split(b" ", 1)[0] + b" " + verdict_line)
        worker.request = None

    def _lose(self, worker: _Worker) -> None:
        """The worker died, failed or ran out of time: no verdict, and another worker in its place."""
        if worker.request is not None:
            self._reply(worker, f"{Verdict.TIMED_OUT.value}\n".encode())
        self._remove(worker)

    def _remove(self, worker: _Worker) -> None:
        fd = worker.channel.fileno()
        (self._slow if fd in self._slow else self._workers).pop(fd)
        self._poll.unregister(fd)
        worker.channel.close()
        os.kill(worker.pid, signal.SIGKILL)
        self._killed.append(worker.pid)

    def _load(self, module: str, worker: _Worker) -> None:
        """Loads a heavy module here, once; the request goes to the front and idle workers are forked anew."""
        assert worker.request is not None
        self._queue.appendleft(worker.request)
        worker.request = None
        if module not in self._modules:
            started_s = time.monotonic()
            importlib.import_module(module)
            self._modules.add(module)
            self._warm_up(module)
            for other in [*self._workers.values(), *self._slow.values()]:
                other.started_s += time.monotonic() - started_s  # limits do not run while nobody listens
        for idle in [w for w in self._workers.values() if w.request is None and module not in w.modules]:
            self._remove(idle)
        if worker.channel.fileno() in self._slow:
            self._remove(worker)

    def _warm_up(self, module: str) -> None:
        """Lets the verifier fill its caches, where every worker forked from now on finds them."""
        try:
            self._warm_up_function(module)
        except Exception:  # the verifier's own; it is slower without, and judges all the same
            traceback.print_exc()
        gc.collect()
        gc.freeze()  # a collection in a worker would write to, and so copy, every page that it shares

    def _check_clocks(self) -> None:
        """Ends what is over its limit, and takes workers that others wait for out of the way."""
        now_s = time.monotonic()
        if self._killed:
            self._killed = [pid for pid in self._killed if os.waitpid(pid, os.WNOHANG)[0] == 0]
        for fd, worker in list(self._workers.items()):
            if worker.request is None:
                continue
            if now_s - worker.started_s >= self._timeout_s:
                self._lose(worker)
            elif self._queue and len(self._slow) < MAX_SLOW:
                worker.is_overdue = worker.is_overdue or self._has_taken(worker, OVERDUE_SHARE, now_s)
                if worker.is_overdue and self._has_taken(worker, 1.0, now_s):
                    worker.look()
                    self._slow[fd] = self._workers.pop(fd)
                    self._share_turns(now_s)
        if self._slow and now_s - self._turned_s >= _TURN_S:
            for worker in list(self._slow.values()):
                if now_s - worker.started_s >= self._timeout_s:
                    self._lose(worker)
                elif not worker.is_stopped:
                    worker.look()
            self._share_turns(now_s)

    def _has_taken(self, worker: _Worker, share: float, now_s: float) -> bool:
        """Whether the present answer has taken that share of what is usual, at work or asleep."""
        waited_s = now_s - worker.started_s
        return worker.used_s() >= share * self._usual_cpu.limit_s or (
            waited_s >= share * self._usual_wall.limit_s and worker.is_asleep()
        )

    def _share_turns(self, now_s: float) -> None:
        """Lets num_workers of the slow workers compute when it is their turn, and stops the others."""
        self._turned_s = now_s
        is_known = self._usual_cpu.is_known
        share, sign = (SLOW_SHARE, 1) if is_known else (FIRST_SLOW_SHARE, -1)
        is_their_turn = not self._queue or int(now_s / _TURN_S) % share == 0
        computing = [w for w in self._slow.values() if w.is_computing]
        chosen = heapq.nsmallest(self._num_workers if is_their_turn else 0, computing, key=lambda w: sign * w.seen_s)
        for worker in computing:
            is_stopped = worker not in chosen
            if is_stopped != worker.is_stopped:
                os.kill(worker.pid, signal.SIGSTOP if is_stopped else signal.SIGCONT)
                worker.is_stopped = is_stopped
                worker.was_stopped = worker.was_stopped or is_stopped

    def _next_wake_ms(self) -> float | None:
        """Milliseconds to the next look at the clocks of the workers; None: none is busy."""
        now_s = time.monotonic()
        busy = [w for w in self._workers.values() if w.request is not None]
        moments = [w.started_s + self._timeout_s for w in busy]
        if self._queue and len(self._slow) < MAX_SLOW:
            for worker in busy:
                limit_s = self._usual_cpu.limit_s * (1.0 if worker.is_overdue else OVERDUE_SHARE)
                moments.append(now_s + max(limit_s - worker.used_s(), limit_s / 20))
        if self._slow:
            moments.append(self._turned_s + _TURN_S)
        return max(0.0, 1000 * (min(moments) - now_s)) if moments else None

    def _stop(self) -> None:
        for worker in [*self._workers.values(), *self._slow.values()]:
            self._remove(worker)
        for pid in self._killed:
            os.waitpid(pid, 0)


def load_verifier(function: str) -> tuple[VerifyFunction, Callable[[str], None]]:
    """Returns the function named by "module:function", and the module's `warm_up`, or one that does nothing.

    Raises ValueError with one sentence when there is no such function.
    """
    module_name, _, name = function.partition(":")
    try:
        module = importlib.import_module(module_name)
        verify: VerifyFunction = getattr(module, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f'verifier.function "{function}" cannot be loaded ({error}); write "module:function" of a '
            "module on the Python path"
        ) from error
    if not callable(verify):
        raise ValueError(f'verifier.function "{function}" is a {type(verify).__name__}, not a function')
    return verify, getattr(module, "warm_up", lambda _: None)


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("function")
    parser.add_argument("--num-workers", type=int, required=True)
    parser.add_argument("--timeout-s", type=float, required=True)
    parser.add_argument("--memory-mb", type=int, required=True)
    args = parser.parse_args()
    # An interrupt of the terminal reaches the whole group; the pool ends this process by closing stdin.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies_fd = os.dup(1)
    os.dup2(2, 1)
    try:
        verify, warm_up = load_verifier(args.function)
    except ValueError as error:
        _write_all(replies_fd, f"error {error}\n".encode())
        return 2
    _write_all(replies_fd, b"ready\n")
    template = Template(verify, warm_up, args.num_workers, args.timeout_s, args.memory_mb)
    try:
        template.run(0, replies_fd)
    except BrokenPipeError:  # the pool is gone, and with it whoever waited for the verdicts
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

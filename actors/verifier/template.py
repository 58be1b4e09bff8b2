"""The pool's template process: keeps the workers, their time limits and their replacement.

    VerifierPool (actor) --pipe--> template --socket pair each--> forked workers

It starts fresh (`python -m actors.verifier.template`), loads the verifier and nothing else, and stays
single-threaded, so a worker is a fork of a few milliseconds with everything loaded. It does no verification
itself and therefore cannot hang on an answer. A worker that is over its time limit, or dies, is killed and
reaped, its answer is `timed_out`, and another takes its place.

A worker that others wait for becomes *slow* after SLOW_CPU_S (or SLOW_S) on one answer: another worker stands in for
it, and it goes on until its limit in what time is left. Of the slow ones (at most MAX_SLOW) num_workers run at a time,
those first that have run least, and while requests wait only one turn in SLOW_SHARE; otherwise they are stopped. So
answers that hang neither hold up the others nor take their processors, and answers that merely take long get done.

Input lines `<id> <json>` on stdin; output lines `<id> <verdict>` on stdout, after one line `ready` or `error
<why>`.
"""

import argparse
import importlib
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass

from actors.verifier.worker import COLD, FAILED, VerifyFunction, run_worker
from common.types import Verdict

SLOW_CPU_S = 0.004  # of processor time: on a busy machine a worker may wait long without being slow
SLOW_S = 0.1  # of wall-clock time
MAX_SLOW = 100
SLOW_SHARE = 4  # slow workers run one turn in so many while requests wait
_TURN_S = 0.02
_READ_BYTES = 1 << 20


@dataclass
class _Worker:
    """A forked worker. Idle when `request` is None; `started_s` is when the request was sent."""

    pid: int
    channel: socket.socket
    modules: frozenset[str]  # heavy modules that the template held when it forked this worker
    request: bytes | None = None
    started_s: float = 0.0
    started_cpu_s: float = 0.0  # processor time of the worker when the request was sent
    is_slow: bool = False
    served_s: float = 0.0  # processor time, and a tenth of the wall-clock time, that it has had since it became slow
    served_cpu_s: float = 0.0  # cpu_s() when served_s was last brought up to date
    is_warming_up: bool = False
    is_stopped: bool = False

    def cpu_s(self) -> float:
        """Processor time that the worker has used so far. Raises OSError when it is gone."""
        return time.clock_gettime((~self.pid << 3) | 2)  # Linux: the clock of another process's processor time

    def turns_slow(self, now_s: float) -> bool:
        if now_s - self.started_s >= SLOW_S:
            return True
        return now_s - self.started_s >= SLOW_CPU_S and self.cpu_s() - self.started_cpu_s >= SLOW_CPU_S


class Template:
    """Requests wait in `queue` until a worker is idle; each is answered exactly once.

    Invariant: busy workers that are not slow number at most num_workers, slow ones at most MAX_SLOW.
    """

    def __init__(
        self,
        verify: VerifyFunction,
        num_workers: int,
        timeout_s: float,
        memory_mb: int,
    ) -> None:
        self._verify = verify
        self._num_workers, self._timeout_s, self._memory_mb = num_workers, timeout_s, memory_mb
        self._queue: deque[bytes] = deque()
        self._workers: dict[int, _Worker] = {}  # by file descriptor of the channel
        self._modules: set[str] = set()  # heavy modules loaded so far
        self._warm_up: bytes | None = None  # a request that was answered quickly with those modules
        self._warmed_modules: set[str] = set()
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
                    if fd in self._workers:  # not removed by an event before this one
                        self._receive(self._workers[fd])
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
            if self._num_busy() >= self._num_workers:
                break
            idle = self._idle() or self._fork()
            self._send(idle, self._queue.popleft())
        self._prepare_stand_in()

    def _send(self, worker: _Worker, request: bytes) -> None:
        worker.request, worker.started_s = request, time.monotonic()
        try:
            worker.started_cpu_s = worker.cpu_s()
            worker.channel.sendall(request.split(b" ", 1)[1] + b"\n")
        except OSError:
            self._lose(worker)

    def _prepare_stand_in(self) -> None:
        """Forks the next stand-in while some are slow, and warms it up: a new process pays for each page it touches."""
        others = [w for w in self._workers.values() if not w.is_slow]
        if not self._queue or len(others) > self._num_workers or len(others) == len(self._workers):
            return
        stand_in = self._fork()
        if self._warm_up is not None:
            stand_in.is_warming_up = True
            self._send(stand_in, self._warm_up)

    def _num_busy(self) -> int:
        return sum(w.request is not None and not w.is_slow and not w.is_warming_up for w in self._workers.values())

    def _idle(self) -> _Worker | None:
        return next((w for w in self._workers.values() if w.request is None), None)

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
            if not worker.is_slow and worker.modules == self._modules != self._warmed_modules:
                self._warm_up = b"- " + (worker.request or b"").split(b" ", 1)[1]
                self._warmed_modules = set(self._modules)
            self._reply(worker, line)
            if worker.is_slow:  # its stand-in has taken its place
                self._remove(worker)

    def _reply(self, worker: _Worker, verdict_line: bytes) -> None:
        assert worker.request is not None
        if not worker.is_warming_up:
            _write_all(self._replies_fd, worker.request.split(b" ", 1)[0] + b" " + verdict_line)
        worker.request, worker.is_warming_up = None, False

    def _lose(self, worker: _Worker) -> None:
        """The worker died, failed or ran out of time: no verdict, and another worker in its place."""
        if worker.request is not None:
            self._reply(worker, f"{Verdict.TIMED_OUT.value}\n".encode())
        self._remove(worker)

    def _remove(self, worker: _Worker) -> None:
        del self._workers[worker.channel.fileno()]
        self._poll.unregister(worker.channel.fileno())
        worker.channel.close()
        os.kill(worker.pid, signal.SIGKILL)
        os.waitpid(worker.pid, 0)

    def _load(self, module: str, worker: _Worker) -> None:
        """Loads a heavy module here, once; the request goes to the front and idle workers are forked anew."""
        assert worker.request is not None
        self._queue.appendleft(worker.request)
        worker.request = None
        if module not in self._modules:
            started_s = time.monotonic()
            importlib.import_module(module)
            self._modules.add(module)
            for other in self._workers.values():  # their limits do not run while nobody listens to them
                other.started_s += time.monotonic() - started_s
        for idle in [w for w in self._workers.values() if w.request is None and module not in w.modules]:
            self._remove(idle)

    def _check_clocks(self) -> None:
        """Ends what is over its limit, and takes workers that others wait for out of the way."""
        now_s = time.monotonic()
        num_slow = sum(w.is_slow for w in self._workers.values())
        for worker in [w for w in self._workers.values() if w.request is not None]:
            if now_s - worker.started_s >= self._timeout_s:
                self._lose(worker)
            elif worker.is_slow or worker.is_warming_up:
                continue
            elif self._queue and num_slow < MAX_SLOW and worker.turns_slow(now_s):
                worker.is_slow, worker.served_cpu_s = True, worker.cpu_s()
                num_slow += 1
        self._share_turns(now_s)

    def _share_turns(self, now_s: float) -> None:
        """Lets the num_workers slow workers run that have run least, when it is their turn, and stops the others."""
        num_running = self._num_workers
        if self._queue and int(now_s / _TURN_S) % SLOW_SHARE:
            num_running = 0
        slow = [w for w in self._workers.values() if w.is_slow]
        for worker in slow:
            cpu_s = worker.cpu_s()
            worker.served_s += (
                cpu_s - worker.served_cpu_s + (0.0 if worker.is_stopped else (now_s - self._turned_s) / 10)
            )
            worker.served_cpu_s = cpu_s
        self._turned_s = now_s
        for position, worker in enumerate(sorted(slow, key=lambda w: w.served_s)):
            stops = position >= num_running
            if stops != worker.is_stopped:
                os.kill(worker.pid, signal.SIGSTOP if stops else signal.SIGCONT)
                worker.is_stopped = stops

    def _next_wake_ms(self) -> float | None:
        """Milliseconds to the next look at the clocks of the workers; None: none is busy."""
        now_s, num_slow = time.monotonic(), sum(w.is_slow for w in self._workers.values())
        busy = [w for w in self._workers.values() if w.request is not None]
        moments = [w.started_s + self._timeout_s for w in busy]
        if self._queue and num_slow < MAX_SLOW:
            moments += [max(w.started_s, now_s - SLOW_CPU_S / 2) + SLOW_CPU_S for w in busy if not w.is_slow]
        if num_slow > self._num_workers or (num_slow and self._queue):
            moments.append(now_s + _TURN_S)
        return max(0.0, 1000 * (min(moments) - now_s)) + 1 if moments else None

    def _stop(self) -> None:
        for worker in list(self._workers.values()):
            self._remove(worker)


def load_verifier(function: str) -> VerifyFunction:
    """Returns the function named by "module:function".

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
    return verify


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
        verify = load_verifier(args.function)
    except ValueError as error:
        _write_all(replies_fd, f"error {error}\n".encode())
        return 2
    _write_all(replies_fd, b"ready\n")
    template = Template(verify, args.num_workers, args.timeout_s, args.memory_mb)
    try:
        template.run(0, replies_fd)
    except BrokenPipeError:  # the pool is gone, and with it whoever waited for the verdicts
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

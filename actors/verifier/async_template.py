"""The template process of an async verifier: each worker awaits up to MAX_AT_ONCE answers at a time.

So an answer that waits for a service blocks no other. A worker ends an answer after its time limit itself. One whose
event loop stands still cannot: the template kills it a little later. The answers that are over their limit by then are
`timed_out`, the others are judged again by another worker. When a worker dies by itself, all it held is an `error`.
"""

import os
import select
import signal
import socket
import time
from collections import deque
from dataclasses import dataclass, field

from actors.verifier.handle import Answer
from actors.verifier.judgement import DIED, Judgement, encode, failure
from actors.verifier.plugin import Verifier
from actors.verifier.worker import run_worker
from common.types import Verdict

MAX_AT_ONCE = 256
GRACE_S = 1.0  # beyond the time limit, in which a worker that is not stuck has ended the answer itself
_READ_BYTES = 1 << 20
_TIMED_OUT = encode(Judgement(Verdict.TIMED_OUT))
_DIED = encode(failure(DIED))


@dataclass(eq=False)
class _Worker:
    """A forked worker: what it is judging, oldest first, and what it has not taken over the channel yet."""

    pid: int
    channel: socket.socket
    answers: dict[bytes, Answer] = field(default_factory=dict)
    outgoing: bytearray = field(default_factory=bytearray)
    partial: bytes = b""


class AsyncTemplate:
    """Keeps `num_workers` workers busy; each answer gets exactly one judgement, whatever becomes of its worker.

    An answer waits in the queue or is with one worker. Nothing here blocks: a worker that does not read keeps only its
    own answers from going out.
    """

    def __init__(self, verifier: Verifier, num_workers: int, timeout_s: float, memory_mb: int) -> None:
        self._verifier, self._num_workers = verifier, num_workers
        self._timeout_s, self._memory_mb = timeout_s, memory_mb
        self._queue: deque[Answer] = deque()
        self._workers: dict[int, _Worker] = {}  # by file descriptor of the channel
        self._killed: list[int] = []  # not yet reaped
        self._poll = select.poll()
        self._replies = bytearray()

    def run(self, requests_fd: int, replies_fd: int) -> None:
        """Serves until `requests_fd` is closed by the other side, then kills the workers."""
        self._poll.register(requests_fd, select.POLLIN)
        partial = b""
        while True:
            self._dispatch()
            write_all(replies_fd, bytes(self._replies))
            self._replies.clear()
            for fd, events in self._poll.poll(self._next_wake_ms()):
                if fd != requests_fd:
                    self._attend(fd, events)
                    continue
                data = os.read(requests_fd, _READ_BYTES)
                if not data:
                    self._stop()
                    return
                *lines, partial = (partial + data).split(b"\n")
                self._queue.extend(Answer(*line.split(b" ", 1)) for line in lines)
            self._check_clocks()

    def _dispatch(self) -> None:
        while self._queue:
            if len(self._workers) < self._num_workers:
                self._fork()
            least = min(self._workers.values(), key=lambda w: len(w.answers))
            if len(least.answers) >= MAX_AT_ONCE:
                return
            answer = self._queue.popleft()
            answer.started_s = time.monotonic()
            least.answers[answer.id] = answer
            least.outgoing += b"%s %s\n" % (answer.id, answer.body)
            self._poll.modify(least.channel, select.POLLIN | select.POLLOUT)

    def _fork(self) -> None:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            run_worker(self._verifier, theirs, self._memory_mb, self._timeout_s)
        theirs.close()
        ours.setblocking(False)
        self._workers[ours.fileno()] = _Worker(pid, ours)
        self._poll.register(ours, select.POLLIN)

    def _attend(self, fd: int, events: int) -> None:
        judge = self._workers.get(fd)
        if judge is None:  # removed by an event before this one
            return
        try:
            if events & select.POLLOUT:
                self._send(judge)
            if events & ~select.POLLOUT:
                self._receive(judge)
        except OSError:
            self._lose(judge)

    def _send(self, judge: _Worker) -> None:
        del judge.outgoing[: judge.channel.send(judge.outgoing)]
        if not judge.outgoing:
            self._poll.modify(judge.channel, select.POLLIN)

    def _receive(self, judge: _Worker) -> None:
        data = judge.channel.recv(_READ_BYTES)
        if not data:
            self._lose(judge)
            return
        *lines, judge.partial = (judge.partial + data).split(b"\n")
        for line in lines:
            if judge.answers.pop(line.split(b" ", 1)[0], None) is not None:
                self._replies += line + b"\n"

    def _lose(self, judge: _Worker) -> None:
        """The worker died, of which of its answers cannot be known: none of them has a verdict."""
        for answer in judge.answers.values():
            self._reply(answer, _DIED)
        judge.answers.clear()
        self._remove(judge)

    def _reply(self, answer: Answer, judgement: bytes) -> None:
        self._replies += b"%s %s\n" % (answer.id, judgement)

    def _remove(self, judge: _Worker) -> None:
        """Ends the worker; what it was judging goes back to the front of the queue."""
        self._queue.extendleft(reversed(judge.answers.values()))
        self._poll.unregister(judge.channel)
        del self._workers[judge.channel.fileno()]
        os.kill(judge.pid, signal.SIGKILL)
        judge.channel.close()
        self._killed.append(judge.pid)

    def _check_clocks(self) -> None:
        """Ends workers that are stuck, with the answers that are over their limit."""
        now_s = time.monotonic()
        self._killed = [pid for pid in self._killed if os.waitpid(pid, os.WNOHANG)[0] == 0]
        for judge in [w for w in self._workers.values() if w.answers]:
            oldest = next(iter(judge.answers.values()))
            if now_s - oldest.started_s < self._timeout_s + GRACE_S:
                continue
            over = [answer for answer in judge.answers.values() if now_s - answer.started_s >= self._timeout_s]
            for answer in over:
                self._reply(judge.answers.pop(answer.id), _TIMED_OUT)
            self._remove(judge)

    def _next_wake_ms(self) -> float | None:
        """Milliseconds until the oldest answer's worker must be stuck; None: none is busy."""
        oldest = [next(iter(w.answers.values())).started_s for w in self._workers.values() if w.answers]
        if not oldest:
            return None
        return max(0.0, 1000 * (min(oldest) + self._timeout_s + GRACE_S - time.monotonic()))

    def _stop(self) -> None:
        for judge in list(self._workers.values()):
            self._remove(judge)
        for pid in self._killed:
            os.waitpid(pid, 0)


def write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]

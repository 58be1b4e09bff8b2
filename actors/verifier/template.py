"""The pool's template process: keeps the workers, their time limits and their replacement.

    VerifierPool (actor) --pipe--> template --socket pair each--> forked workers

It starts fresh (`python -m actors.verifier.template`), loads the verifier and nothing else, and stays
single-threaded, so a worker is a fork of a few milliseconds with everything loaded. It does no verification
itself and therefore cannot hang on an answer. A worker that is over its time or memory limit is killed and
reaped, its answer is `timed_out`, and another takes its place. One that dies by itself has failed: its answer is an
`error`.

What others wait for has to make way when it takes longer than usual (actors/verifier/usual.py), in processor time, or
asleep in wall-clock time. How depends on the verifier:

* One that may be interrupted (its module has INTERRUPTIBLE) gets several answers at once, each with the usual time. The
  worker itself interrupts what takes longer and goes on to the next. An interrupted answer is tried again from its
  beginning by one of num_workers slow workers, with more time at each attempt, until its limit has passed; those that
  have had least come first. One that began while nobody waited has all the time there is, and goes on where it is, in
  what is now a slow worker beside those, num_workers at most.
* Any other answer goes on where it is, in what is now a slow worker, while another worker stands in for it. At most
  MAX_SLOW are slow.

Slow workers take turns, num_workers at a time, while answers wait only one turn in SLOW_SHARE, and otherwise they are
stopped: first those that have done least. While the usual time is not known, every other turn is theirs and those that
have done most come first, so that it becomes known. While some are slow a spare worker is kept, and it takes the next
answers as soon as a busy one is *overdue*, a quarter of the way to being slow.

A new worker starts with the caches of the template, which the verifier's optional `warm_up` fills. An async verifier
has another template, actors/verifier/async_template.py, behind the same pipes.

Input lines `<id> <json>` on stdin; output lines `<id> <judgement>` (judgement.encode) on stdout, after one line `ready`
or `error <why>`.
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

from actors.verifier.async_template import AsyncTemplate, write_all
from actors.verifier.handle import Answer, Handle
from actors.verifier.judgement import DIED, Judgement, encode, failure, raised
from actors.verifier.plugin import Verifier, load_verifier
from actors.verifier.retries import Retries
from actors.verifier.usual import UsualTime
from actors.verifier.worker import AGAIN, COLD, FULL, JUDGED, LATER, SPOILT, run_worker
from common.types import AnswerForm, Verdict

FASTEST_S = 0.004  # no answer is slow before
FASTEST_INTERRUPTED_S = 0.001  # nor interrupted: another attempt is cheap
FIRST_SHARE = 0.1  # of the time limit: an answer is slow after it as long as the usual time is not known
OVERDUE_SHARE = 0.25  # of the time after which an answer is slow
MAX_SLOW = 100
SLOW_SHARE = 10
FIRST_SLOW_SHARE = 2  # in place of SLOW_SHARE as long as the usual time is not known
MORE_TIME = 2  # each attempt may take this many times what the one before has had
_LONG_S = 0.1  # taken to have been spent on an answer that was put off before what takes long
_PATIENCE = 2  # time limits that such an answer may wait
_ASLEEP = 3  # wall-clock time that an answer may take, in its processor time: what takes more is asleep
_ASLEEP_STOPPED = 20  # the same for a slow worker, which is stopped most of the time
MAX_BATCH = 64  # answers that a worker gets at once
_BATCH_S = 0.004  # that they usually take
_BATCH_BYTES = 1 << 16
_DEAF_S = 0.02  # processor time beyond its limit after which a worker is not going to interrupt its answer
_TURN_S = 0.005
_READ_BYTES = 1 << 20
_TIMED_OUT = encode(Judgement(Verdict.TIMED_OUT))
_DIED = encode(failure(DIED))


class Template:
    """Answers wait in `queue` until a worker is idle; each gets exactly one verdict.

    Invariant: busy workers that are not slow number at most num_workers, and one more while one of them is overdue;
    slow ones number at most MAX_SLOW, and where the verifier may be interrupted num_workers for later attempts and as
    many with what began while nobody waited.
    """

    def __init__(self, verifier: Verifier, num_workers: int, timeout_s: float, memory_mb: int) -> None:
        self._verifier, self._is_interruptible = verifier, bool(verifier.interruptible)
        self._num_workers, self._timeout_s, self._memory_mb = num_workers, timeout_s, memory_mb
        self._max_slow = num_workers if self._is_interruptible else MAX_SLOW
        self._queue: deque[Answer] = deque()
        self._retries = Retries()
        self._workers: dict[int, Handle] = {}  # idle, or busy and not slow; by file descriptor of the channel
        self._slow: dict[int, Handle] = {}  # likewise; idle only where the verifier may be interrupted
        fastest_s = FASTEST_INTERRUPTED_S if self._is_interruptible else FASTEST_S
        self._usual_cpu = UsualTime(fastest_s, FIRST_SHARE * timeout_s)
        self._usual_wall = UsualTime(fastest_s, FIRST_SHARE * timeout_s)
        self._modules: set[str] = set()  # heavy modules loaded so far
        self._killed: list[int] = []  # not yet reaped: a process takes milliseconds to give its memory back
        self._poll = select.poll()
        self._turned_s = time.monotonic()  # when the slow workers last changed turns
        self._replies = bytearray()

    def run(self, requests_fd: int, replies_fd: int) -> None:
        """Serves until `requests_fd` is closed by the other side, then kills the workers."""
        self._replies_fd = replies_fd
        self._poll.register(requests_fd, select.POLLIN)
        partial = b""
        while True:
            self._dispatch()
            self._flush()
            for fd, _ in self._poll.poll(self._next_wake_ms()):
                if fd != requests_fd:
                    self._receive(fd)
                    continue
                data = os.read(requests_fd, _READ_BYTES)
                if not data:
                    self._stop()
                    return
                *lines, partial = (partial + data).split(b"\n")
                self._queue.extend(Answer(*line.split(b" ", 1)) for line in lines)
            self._check_clocks()

    def _dispatch(self) -> None:
        """Hands queued answers to idle workers, forking up to the allowed number, and retries to slow ones."""
        while self._queue:
            busy = [w for w in self._workers.values() if w.answers]
            num_overdue = min(1, sum(w.is_overdue for w in busy))
            idle = next((w for w in self._workers.values() if not w.answers), None)
            if len(busy) - num_overdue >= self._num_workers or (idle is None and len(busy) >= self._num_workers):
                break
            self._send_batch(idle or self._fork(self._workers))
        if self._queue and self._slow and len(self._workers) <= self._num_workers:
            self._fork(self._workers)
        while self._retries:
            idle = next((w for w in self._slow.values() if not w.answers), None)
            if idle is None and len(self._slow) - self._num_endless() >= self._max_slow:
                break
            answer = self._retries.pop()
            limit_s = MORE_TIME * max(answer.spent_s, self._usual_cpu.limit_s)
            self._send(idle or self._fork(self._slow), [answer], limit_s, _ASLEEP_STOPPED * limit_s, False)

    def _send_batch(self, worker: Handle) -> None:
        """Sends the next answer, or several where the worker can leave one of them for the next."""
        size = 1
        if self._is_interruptible and self._usual_cpu.is_known:
            size = min(MAX_BATCH, int(_BATCH_S / max(self._usual_wall.mean_s, 1e-6)))
            size = min(size, -(-len(self._queue) // self._num_workers))
        batch = [self._queue.popleft()]
        num_bytes = len(batch[0].body)
        while len(batch) < size and (num_bytes := num_bytes + len(self._queue[0].body)) <= _BATCH_BYTES:
            batch.append(self._queue.popleft())
        if self._is_interruptible and (self._queue or len(batch) > 1):
            limit_s = self._usual_cpu.limit_s
            self._send(worker, batch, limit_s, max(_ASLEEP * limit_s, self._usual_wall.limit_s), limit_s < _LONG_S)
        else:
            self._send(worker, batch, 0.0, 0.0, False)

    def _send(self, worker: Handle, batch: list[Answer], cpu_limit_s: float, wall_limit_s: float, hurry: bool) -> None:
        try:
            worker.send(batch, cpu_limit_s, wall_limit_s, hurry)
        except OSError:
            self._lose(worker, _DIED)

    def _fork(self, crew: dict[int, Handle]) -> Handle:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            run_worker(self._verifier, theirs, self._memory_mb, self._timeout_s)
        theirs.close()
        worker = crew[ours.fileno()] = Handle(pid, ours, frozenset(self._modules))
        self._poll.register(worker.fd, select.POLLIN)
        return worker

    def _receive(self, fd: int) -> None:
        worker = self._workers.get(fd) or self._slow.get(fd)
        if worker is None:  # removed by an event before this one
            return
        lines = worker.receive()
        if lines is None:
            self._lose(worker, _DIED)
            return
        for line in lines:
            self._take_reply(worker, line)
            if fd not in self._workers and fd not in self._slow:
                return

    def _take_reply(self, worker: Handle, line: bytes) -> None:
        match line.split(b" ", 3):
            case [kind, cpu_s, wall_s, judgement] if kind == JUDGED and worker.answers:
                self._usual_cpu.add(float(cpu_s))
                if not worker.was_stopped:
                    self._usual_wall.add(float(wall_s))
                self._reply(worker.finish_first(float(cpu_s)), judgement)
                if worker.fd in self._slow and not self._is_interruptible:
                    self._welcome_back(worker)
                elif worker.fd in self._slow and len(self._slow) - self._num_endless() > self._max_slow:
                    self._remove(worker)
            case [kind, cpu_s] if kind in (AGAIN, SPOILT, LATER) and worker.answers:
                spent_s = _LONG_S if kind == LATER else max(float(cpu_s), worker.cpu_limit_s)
                answer = worker.finish_first(float(cpu_s))
                if kind == LATER:  # it has hardly begun: its limit runs from the next attempt, or else from then
                    answer.started_s = time.monotonic() + _PATIENCE * self._timeout_s
                self._put_off(answer, spent_s)
                if kind == SPOILT:
                    self._remove(worker)
            case [kind, module] if kind == COLD and module.decode() not in worker.modules:
                self._load(module.decode(), worker)
            case [kind] if kind == FULL:
                self._lose(worker, _TIMED_OUT)
            case _:
                self._lose(worker, _DIED)

    def _welcome_back(self, worker: Handle) -> None:
        """A slow worker that came to an end after all is the next spare, unless there is one."""
        self._workers[worker.fd] = self._slow.pop(worker.fd)
        if len(self._workers) > self._num_workers + 1:
            self._remove(worker)
        self._share_turns(time.monotonic())

    def _reply(self, answer: Answer, judgement: bytes) -> None:
        self._replies += b"%s %s\n" % (answer.id, judgement)

    def _flush(self) -> None:
        data, self._replies = bytes(self._replies), bytearray()
        write_all(self._replies_fd, data)

    def _put_off(self, answer: Answer, spent_s: float) -> None:
        """The answer has had its time in this attempt; another follows unless its limit has passed."""
        answer.spent_s = max(answer.spent_s, spent_s)
        self._retries.push(answer)

    def _lose(self, worker: Handle, judgement: bytes) -> None:
        """The worker died or ran out of time or memory: that is what its answer gets, and another is in its place."""
        if worker.answers:
            self._reply(worker.answers.popleft(), judgement)
        self._remove(worker)

    def _remove(self, worker: Handle) -> None:
        """Ends the worker; answers that it had not begun go back to the front of the queue."""
        self._queue.extendleft(reversed(worker.answers))
        (self._slow if worker.fd in self._slow else self._workers).pop(worker.fd)
        self._poll.unregister(worker.fd)
        worker.kill()
        self._killed.append(worker.pid)

    def _load(self, module: str, worker: Handle) -> None:
        """Loads a heavy module here, once; workers without it are forked anew, and their answers judged again."""
        if module not in self._modules:
            self._flush()
            started_s = time.monotonic()
            try:
                importlib.import_module(module)
            except ImportError as error:  # a bug in the verifier, like any other exception that it raises
                traceback.print_exc()
                self._reply(worker.answers.popleft(), encode(raised(error)))
                self._remove(worker)
                return
            self._modules.add(module)
            self._warm_up(module)
            self._postpone(time.monotonic() - started_s)
        for idle in [w for w in self._workers.values() if not w.answers and module not in w.modules]:
            self._remove(idle)
        self._remove(worker)

    def _postpone(self, loading_s: float) -> None:
        """Limits do not run while nobody listens."""
        begun = [*self._retries]
        for worker in [*self._workers.values(), *self._slow.values()]:
            worker.started_s += loading_s
            begun += [*worker.answers][:1]
        for answer in begun:
            answer.started_s += loading_s

    def _warm_up(self, module: str) -> None:
        """Lets the verifier fill its caches, where every worker forked from now on finds them."""
        try:
            self._verifier.warm_up(module)
        except Exception:  # the verifier's own; it is slower without, and judges all the same
            traceback.print_exc()
        gc.collect()
        gc.freeze()  # a collection in a worker would write to, and so copy, every page that it shares

    def _check_clocks(self) -> None:
        """Ends what is over its limit, and takes workers that others wait for out of the way."""
        now_s = time.monotonic()
        if self._killed:
            self._killed = [pid for pid in self._killed if os.waitpid(pid, os.WNOHANG)[0] == 0]
        for worker in [w for w in self._workers.values() if w.answers]:
            if self._is_over_time(worker, now_s):
                self._lose(worker, _TIMED_OUT)
            elif self._queue:
                self._make_way(worker, now_s)
        if (self._slow or self._retries) and now_s - self._turned_s >= _TURN_S:
            self._look_after_slow(now_s)

    def _is_over_time(self, worker: Handle, now_s: float) -> bool:
        return now_s - worker.answers[0].started_s >= self._timeout_s

    def _make_way(self, worker: Handle, now_s: float) -> None:
        """Others wait for this worker: if its answer takes long, it goes elsewhere."""
        worker.is_overdue = worker.is_overdue or self._has_taken(worker, OVERDUE_SHARE, now_s)
        if worker.cpu_limit_s:
            if self._is_deaf(worker):
                self._try_again_later(worker)
        elif worker.is_overdue and self._has_taken(worker, 1.0, now_s):
            if self._num_endless() < self._max_slow:
                worker.look()
                self._slow[worker.fd] = self._workers.pop(worker.fd)
                self._share_turns(now_s)
            elif self._is_interruptible:
                self._try_again_later(worker)

    def _try_again_later(self, worker: Handle) -> None:
        """Ends a worker that does not interrupt its answer, which will have another attempt."""
        self._put_off(worker.answers.popleft(), worker.used_s())
        self._remove(worker)

    def _is_deaf(self, worker: Handle) -> bool:
        """Whether it should have interrupted its answer and has not: it may be within C code."""
        return worker.cpu_limit_s > 0 and worker.used_s() > 2 * worker.cpu_limit_s + _DEAF_S

    def _num_endless(self) -> int:
        """Slow workers whose answers were given all the time they like."""
        return sum(bool(worker.answers) and not worker.cpu_limit_s for worker in self._slow.values())

    def _look_after_slow(self, now_s: float) -> None:
        for worker in [w for w in self._slow.values() if w.answers]:
            if self._is_over_time(worker, now_s):
                self._lose(worker, _TIMED_OUT)
            elif self._retries and self._is_deaf(worker):
                self._try_again_later(worker)
            elif not worker.is_stopped:
                worker.look()
        for answer in self._retries.started_before(now_s - self._timeout_s):
            self._reply(answer, _TIMED_OUT)
        self._share_turns(now_s)

    def _has_taken(self, worker: Handle, share: float, now_s: float) -> bool:
        """Whether the present answer has taken that share of what is usual, at work or asleep."""
        return worker.used_s() >= share * self._usual_cpu.limit_s or (
            now_s - worker.started_s >= share * self._usual_wall.limit_s and worker.is_asleep()
        )

    def _share_turns(self, now_s: float) -> None:
        """Lets num_workers of the slow workers compute when it is their turn, and stops the others."""
        self._turned_s = now_s
        is_known = self._usual_cpu.is_known
        share, sign = (SLOW_SHARE, 1) if is_known else (FIRST_SLOW_SHARE, -1)
        is_their_turn = not self._queue or int(now_s / _TURN_S) % share == 0
        computing = [w for w in self._slow.values() if w.is_computing and w.answers]
        chosen = heapq.nsmallest(self._num_workers if is_their_turn else 0, computing, key=lambda w: sign * w.seen_s)
        for worker in computing:
            worker.stop(worker not in chosen)

    def _next_wake_ms(self) -> float | None:
        """Milliseconds to the next look at the clocks of the workers; None: none is busy."""
        now_s = time.monotonic()
        busy = [w for w in self._workers.values() if w.answers]
        moments = [w.answers[0].started_s + self._timeout_s for w in busy]
        if self._queue and self._num_endless() < self._max_slow:
            for worker in busy:
                if worker.cpu_limit_s and (worker.is_overdue or len(self._workers) <= self._num_workers):
                    moments.append(now_s + _DEAF_S)
                    continue
                limit_s = self._usual_cpu.limit_s * (1.0 if worker.is_overdue else OVERDUE_SHARE)
                moments.append(now_s + max(limit_s - worker.used_s(), limit_s / 20))
        if self._retries or any(w.answers for w in self._slow.values()):
            moments.append(self._turned_s + _TURN_S)
        return max(0.0, 1000 * (min(moments) - now_s)) if moments else None

    def _stop(self) -> None:
        for worker in [*self._workers.values(), *self._slow.values()]:
            self._remove(worker)
        for pid in self._killed:
            os.waitpid(pid, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("function")
    parser.add_argument("--num-workers", type=int, required=True)
    parser.add_argument("--timeout-s", type=float, required=True)
    parser.add_argument("--memory-mb", type=int, required=True)
    parser.add_argument("--correct-from", type=float, required=True)
    parser.add_argument("--answer-form", type=AnswerForm, required=True)
    args = parser.parse_args()
    # An interrupt of the terminal reaches the whole group; the pool ends this process by closing stdin.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies_fd = os.dup(1)
    os.dup2(2, 1)
    try:
        verifier = load_verifier(args.function, args.correct_from, args.answer_form)
    except ValueError as error:
        write_all(replies_fd, f"error {' '.join(str(error).split())}\n".encode("utf-8", "replace"))
        return 2
    write_all(replies_fd, b"ready\n")
    kind = AsyncTemplate if verifier.is_async else Template
    template = kind(verifier, args.num_workers, args.timeout_s, args.memory_mb)
    try:
        template.run(0, replies_fd)
    except BrokenPipeError:  # the pool is gone, and with it whoever waited for the verdicts
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

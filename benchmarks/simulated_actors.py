"""Hundreds of simulated actors in one process, so light that they are not what is measured (benchmarks/load.py).

The actors sample nothing. A group is bytes that were made once, with the id of a lease written into it; of what the
learner sends only the kind and the lease id are looked at. One group is sent every 1 / rate seconds, by one actor after
another, whatever has become of those before: an open loop. An actor without a lease has to let its turn pass.
"""

import secrets
import select
import time
from dataclasses import dataclass, field
from itertools import cycle
from multiprocessing.connection import Connection

import numpy as np
import zmq

from common.config import Config, TransportConfig
from common.keys import actor_keys
from common.types import (
    PROTOCOL_VERSION,
    CompletedGroup,
    FinishReason,
    Heartbeat,
    Hello,
    Ready,
    Verdict,
)
from common.wire import encode, pack

RESPONSES, TOKENS = 4, 32  # of a small group
NO_IDS = np.empty(0, np.int32)
BEAT_S = 5.0  # between two heartbeats of one actor
LONGEST_SLEEP_S = 0.05  # without a look at the pipe
LARGEST_ID = (1 << 31) - 1
_BEFORE_ID = b"lease_id\xce"  # as MessagePack writes the ids of a second life: 4 bytes follow


@dataclass(kw_only=True)
class Report:
    """What the actors saw while they were under way."""

    latencies_s: list[float] = field(default_factory=list)  # from sending a group to reading the next lease
    late_s: list[float] = field(default_factory=list)  # of each group: how long after its time it was sent
    num_passed: int = 0  # turns of actors without a lease
    cpu_s: float = 0.0
    elapsed_s: float = 0.0


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


class Actor:
    """One connection, at most one lease."""

    def __init__(self, channel: "zmq.Socket[bytes]", name: str) -> None:
        self.channel = channel
        self.is_ready = False
        self.lease: bytes | None = None  # its id, 4 bytes, big-endian
        self.sent_s: float | None = None  # when its last group left, until the next lease is here
        hello = Hello(
            protocol_version=PROTOCOL_VERSION,
            name=name,
            secret=secrets.token_hex(16),
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

    def read(self, report: Report) -> None:
        """All that has come."""
        while True:
            try:
                message = self.channel.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            header = message[(11 + 4 * message[0]) & ~7 :]  # behind the lengths of the frames
            kind = header[2 : 2 + header[1] % 32]
            if kind == b"Lease":
                start = header.index(_BEFORE_ID) + len(_BEFORE_ID)
                self.lease = header[start : start + 4]
                if self.sent_s is not None:
                    report.latencies_s.append(time.monotonic() - self.sent_s)
                    self.sent_s = None
            elif kind == b"Welcome":
                self.channel.send(pack(encode(Ready(version=0, probe_logprobs=np.empty(0, np.float32)))))
                self.is_ready = True
            else:
                assert kind in (b"Ack", b"Pulse", b"Stop"), kind

    def answer(self, start: bytes, end: bytes) -> None:
        """A group for its lease: `start`, its id, `end`."""
        assert self.lease is not None
        self.channel.send(b"".join((start, self.lease, end)), zmq.NOBLOCK)
        self.lease, self.sent_s = None, time.monotonic()

    def beat(self) -> None:
        """As soon as it takes part: before, a real actor has none."""
        if not self.is_ready:
            return
        ids = np.array([int.from_bytes(self.lease, "big")] if self.lease else [], np.int32)
        beat = Heartbeat(lease_ids=ids, lease_tokens=np.zeros_like(ids), generated_tokens=0, busy_s=0.0, uptime_s=0.0)
        self.channel.send(pack(encode(beat)))


class Crowd:
    """All actors of a process, whose descriptors one epoll watches: a poll of libzmq's would look at each of them."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str, folder: str, names: list[str]) -> None:
        self._epoll = select.epoll()
        self._actors: dict[int, Actor] = {}  # by descriptor
        for name in names:
            channel = dealer(context, folder, name.encode())
            channel.connect(endpoint)
            descriptor = int(channel.getsockopt(zmq.FD))
            self._actors[descriptor] = Actor(channel, name)
            self._epoll.register(descriptor, select.EPOLLIN)
        self._turns, self._beats = cycle(self._actors.values()), cycle(self._actors.values())
        packed, last = pack(encode(group(LARGEST_ID, RESPONSES, TOKENS))), LARGEST_ID.to_bytes(4, "big")
        self._start, self._end = packed.split(last)
        self._report = Report()
        self._group_s, self._interval_s = float("inf"), 1.0  # when the next one is due
        self._beat_s = time.monotonic()

    def begin(self, rate: float) -> None:
        self._report = Report()
        self._group_s, self._interval_s = time.monotonic(), 1.0 / rate
        self._started = time.monotonic(), time.process_time()

    def end(self) -> Report:
        self._group_s = float("inf")
        started_s, started_cpu_s = self._started
        self._report.elapsed_s = time.monotonic() - started_s
        self._report.cpu_s = time.process_time() - started_cpu_s
        return self._report

    def turn(self) -> None:
        """Sleep until something comes or is due, and do it."""
        timeout_s = min(self._group_s, self._beat_s, time.monotonic() + LONGEST_SLEEP_S) - time.monotonic()
        for descriptor, _ in self._epoll.poll(max(0.0, timeout_s)):
            self._actors[descriptor].read(self._report)
        while self._group_s <= time.monotonic():
            self._send_group(next(self._turns))
            self._group_s += self._interval_s
        while self._beat_s <= time.monotonic():
            actor = next(self._beats)
            actor.beat()
            actor.read(self._report)
            self._beat_s += BEAT_S / len(self._actors)

    def _send_group(self, actor: Actor) -> None:
        if actor.lease is None:
            self._report.num_passed += 1
            return
        self._report.late_s.append(time.monotonic() - self._group_s)
        actor.answer(self._start, self._end)
        actor.read(self._report)  # sending takes the signal that epoll waits for

    def close(self) -> None:
        for actor in self._actors.values():
            actor.channel.close(linger=0)


def simulate(endpoint: str, folder: str, names: list[str], pipe: Connection) -> None:
    """The process: a number on `pipe` begins to send so many groups a second, "pause" ends it and is answered with a
    Report, "leave" closes all connections."""
    with zmq.Context() as context:
        crowd = Crowd(context, endpoint, folder, names)
        while (word := pipe.recv() if pipe.poll(0) else None) != "leave":
            if isinstance(word, float):
                crowd.begin(word)
            elif word == "pause":
                pipe.send(crowd.end())
            crowd.turn()
        crowd.close()

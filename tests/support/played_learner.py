"""A learner in processes of its own, one a rank, that publishes and serves when it is told to, and its actors.

Service, publisher, sockets and groups are the real ones; there is no training but a change of every tensor.
"""

import logging
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any, Literal

import psutil
import torch
import torch.distributed as dist

from common.config import Config, Device
from common.launcher import rank_environment, reserve_port
from common.transport import model_fingerprints
from common.types import MemberId, Prompt
from learner.networks.model import Policy, load_policy
from learner.networks.parallel import make_mesh, process_group
from learner.publication.publisher import Publisher
from tests.support.faulty_actors import Strike, act, digest
from tests.support.transfer_process import NotedService, start

PATIENCE_S = 120.0  # for a process to do what it is there for
BUCKET_BYTES = 12_000  # of the tiny model: several buckets
PARTING = re.compile(r"actor (\S+) is (lost|dismissed)")


@dataclass(frozen=True)
class Order:
    """`publish` is of the next version, `serve` of the present one to joiners; carried out when `members` are there."""

    what: Literal["publish", "serve"]
    members: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of it, on rank 0."""

    reached: tuple[str, ...]
    left: tuple[MemberId, ...]  # who takes part afterwards
    told: frozenset[str]  # who was commanded anything
    partings: tuple[str, ...]  # what the learner has said of actors that were lost or dismissed
    seconds: float
    probe_difference: float | None
    held: str  # digest of the learner's weights

    @property
    def parted(self) -> list[tuple[str, str]]:
        """Each actor that was lost or dismissed, and which of the two."""
        return [found.groups() for text in self.partings if (found := PARTING.search(text)) is not None]  # type: ignore[misc]


@dataclass
class ActorProcess:
    """One that was started; `pipe` tells what it obeys (FaultyEngine)."""

    name: str
    process: ForkServerProcess
    pipe: Connection

    def news(self) -> list[tuple[str, str]]:
        """Phases since the last call, with the digest of the weights at RESUME."""
        news = []
        while self.pipe.poll():
            news.append(self.pipe.recv())
        return news

    def exit_code(self) -> int | None:
        """Of its own accord; None when it lives on."""
        self.process.join(PATIENCE_S)
        return self.process.exitcode

    def leave(self) -> None:
        """At once, as SIGINT asks it to: the learner hears of it."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGINT)
        assert self.exit_code() == 128 + signal.SIGINT, f"{self.name} ended with {self.process.exitcode}"

    def kill(self) -> None:
        """With its engine, if that is a process."""
        with suppress(psutil.NoSuchProcess):
            if self.process.is_alive():
                for child in psutil.Process(self.process.pid).children(recursive=True):
                    child.kill()
        self.process.kill()
        self.process.join(PATIENCE_S)


class PlayedLearner:
    """Of config.learner.ranks processes; made by `played_learner`."""

    def __init__(self, config: Config, orders: Connection, stack: ExitStack) -> None:
        self.config = config
        self._orders = orders
        self._stack = stack
        self._endpoint: str | None = None

    def start_actor(self, name: str, strike: Strike | None = None, main: Callable[..., None] = act) -> ActorProcess:
        if self._endpoint is None:
            self._endpoint = self._answer()
        pipe, its_end = Pipe(duplex=False)
        actor = ActorProcess(name, start(main, self.config, self._endpoint, name, its_end, strike), pipe)
        self._stack.callback(actor.kill)
        its_end.close()
        return actor

    def begin(self, what: Literal["publish", "serve"], *members: str) -> None:
        self._orders.send(Order(what, members))

    def outcome(self) -> Outcome:
        """Of what was begun."""
        outcome: Outcome = self._answer()
        return outcome

    def _answer(self) -> Any:
        assert self._orders.poll(2 * PATIENCE_S), "the learner does not answer"
        return self._orders.recv()  # raises EOFError when it has ended, and its error is on stderr


@contextmanager
def played_learner(config: Config, probe: list[int]) -> Iterator[PlayedLearner]:
    """Ends it, and every actor that is left."""
    ranks = config.learner.ranks
    with ExitStack() as stack:
        port = stack.enter_context(reserve_port())
        orders, its_end = Pipe()
        for rank in range(ranks):
            process = start(_play, rank, config, probe, port, its_end if rank == 0 else None)
            stack.callback(process.join, PATIENCE_S)
            stack.callback(process.kill)
        its_end.close()
        yield PlayedLearner(config, orders, stack)


def _play(rank: int, config: Config, probe: list[int], port: int, pipe: Connection | None) -> None:
    """One rank, until it is killed."""
    os.environ |= rank_environment(rank, config.learner.ranks, port)
    with process_group(Device.cpu, timeout_s=600.0), ExitStack() as stack:
        service, partings = None, list[str]()
        if pipe is not None:
            prompts = [Prompt(uid="p", text="", reference="")]
            fingerprints = model_fingerprints(config.model.path)
            service = stack.enter_context(NotedService(config, prompts, lambda prompt: [1], fingerprints, probe))
            logging.getLogger().addHandler(_Partings(partings))
            pipe.send(service.endpoint)
        policy = load_policy(config, torch.device("cpu"), make_mesh(config))
        publisher = Publisher(config, policy, service, rank, torch.tensor(probe), bucket_bytes=BUCKET_BYTES)
        version = 0
        while True:
            order = _agreed(pipe)
            version += order.what == "publish"
            outcome = _carry_out(order, version, publisher, service, partings)
            if pipe is not None:
                pipe.send(outcome)


def _carry_out(
    order: Order, version: int, publisher: Publisher, service: NotedService | None, partings: list[str]
) -> Outcome:
    if service is not None:
        _await_members(service, order.members)
        service.told = set[str]()
        partings.clear()
    if order.what == "publish":
        _train(publisher.policy)
        publication = publisher.publish(version)
    else:
        publication = publisher.serve(version)
    held = digest(publisher.policy.named_hf_parameters())  # a collective
    if service is not None:
        service.set_version(version, version)
    return Outcome(
        reached=tuple(member.name for member in publication.members),
        left=() if service is None else service.member_ids(),
        told=frozenset() if service is None else frozenset(service.told),
        partings=tuple(partings),
        seconds=publication.seconds,
        probe_difference=publication.probe_difference,
        held=held,
    )


class _Partings(logging.Handler):
    """Keeps what is said of actors that are lost or dismissed."""

    def __init__(self, kept: list[str]) -> None:
        super().__init__()
        self._kept = kept

    def emit(self, record: logging.LogRecord) -> None:
        if PARTING.search(text := record.getMessage()):
            self._kept.append(text)


def _agreed(pipe: Connection | None) -> Order:
    """Rank 0's next order, on all ranks."""
    orders: list[Order | None] = [pipe.recv() if pipe is not None else None]
    dist.broadcast_object_list(orders, src=0)
    assert orders[0] is not None
    return orders[0]


def _await_members(service: NotedService, names: tuple[str, ...]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while service.members() != tuple(sorted(names)):
        assert time.monotonic() < deadline, f"{service.members()} take part, not {sorted(names)}"
        time.sleep(0.02)


@torch.no_grad()
def _train(policy: Policy) -> None:
    """Away from where it was, and not ever farther: the same on every rank, whatever it holds."""
    for index, parameter in enumerate(policy.parameters()):
        parameter.mul_(-1.0 if index % 2 else 1.01)

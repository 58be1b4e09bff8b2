"""The learner: takes batches, trains, publishes. Every rank runs this under torch.distributed.

    python run.py learner --config RUN/config.yaml      (under torchrun, or alone with one rank)

Rank 0 has the Leader (actors, logs); the other ranks follow its decisions. One step of the loop is

    batch -> train -> publish -> record

Step s counts from 0, warm-up of the critic included; it trains at version max(0, s - warm-up) // publish_every.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from common.config import Config
from common.metrics import RunLog, Value
from common.tasks import load_task
from common.transport import model_fingerprints
from common.types import Prompt, TrajectoryGroup
from learner.leader import Leader, version_gaps
from learner.model import Policy, export_hf, load_critic, load_policy
from learner.packing import Batch, broadcast_batch
from learner.parallel import World, make_mesh, process_group, seed_everything
from learner.service import LearnerService, MembersWaiting
from learner.trainer import Trainer
from learner.weights import Publisher

logger = logging.getLogger(__name__)

PROBE_SEED = 20250407

Answer = TypeVar("Answer")


@dataclass
class Learner:
    """The training loop of one rank. `leader` is None on all ranks but the first."""

    config: Config
    world: World
    policy: Policy
    trainer: Trainer
    publisher: Publisher
    leader: Leader | None
    version: int = 0

    def run(self) -> None:
        warmup = self.config.algorithm.critic_warmup_steps
        num_steps = warmup + self.config.learner.steps
        self._begin()
        for step in range(num_steps):
            groups, batch, wait_s = self._next_batch(step)
            trained_at = self.version
            values: dict[str, Value] = dict(self.trainer.step(batch, trained_at, step < warmup))
            values["time/wait_for_batch_s"] = wait_s
            values["time/publish_s"] = self._publish_when_due(step)
            if self.leader is not None:
                if step >= warmup:
                    values["staleness/hist"] = version_gaps(groups, trained_at)
                self.leader.record(step + 1, self.version, groups, values)
                if self._is_evaluation_due(step):
                    self.leader.evaluate(self.version)
        self._end(num_steps)

    def _begin(self) -> None:
        if self.leader is not None:
            self.leader.begin()
        self._publish(self.version, steps_done=0)  # finds a broken transfer or a model that differs before any work
        if self.leader is not None:
            self.leader.evaluate(self.version)

    def _next_batch(self, step: int) -> tuple[Sequence[TrajectoryGroup], Batch, float]:
        """The groups (on rank 0), the batch (on every rank) and the seconds that it took to come."""
        started = time.monotonic()
        groups = self._led(Leader.next_groups, step)
        batch = broadcast_batch(Batch.from_groups(groups) if groups is not None else None)
        return groups or (), batch, time.monotonic() - started

    def _publish_when_due(self, step: int) -> float:
        """Publishes the next version when this step completes one; the seconds that it took."""
        started = time.monotonic()
        warmup, every = self.config.algorithm.critic_warmup_steps, self.config.weights.publish_every
        if step >= warmup and (step - warmup + 1) % every == 0:
            self._led(Leader.before_publication, step)
            self._publish(self.version + 1, steps_done=step + 1)
        elif self.leader is not None:
            self.leader.service.set_version(self.version, step + 1)
        return time.monotonic() - started

    def _publish(self, version: int, steps_done: int) -> None:
        publication = self.publisher.publish(version)
        self.version = version
        if self.leader is not None:
            self.leader.published(publication, steps_done)

    def _is_evaluation_due(self, step: int) -> bool:
        done = step + 1 - self.config.algorithm.critic_warmup_steps
        every = self.config.eval.every
        return every > 0 and 0 < done < self.config.learner.steps and done % every == 0

    def _end(self, num_steps: int) -> None:
        """Exports the model, evaluates it as published, and sends the actors home."""
        export_hf(self.policy, self.config.model.path, self.config.run_dir / "checkpoints" / "final")
        finish = partial(Leader.finish_evaluation, step=num_steps, version=self.version)
        self._led(finish, num_steps)  # the one that may still be running
        if self.leader is not None:
            self.leader.evaluate(self.version)
        self._led(finish, num_steps)
        if self.leader is not None:
            self.leader.service.stop("the run is complete")

    def _led(self, ask: Callable[[Leader], Answer], steps_done: int) -> Answer | None:
        """Rank 0's answer there, None elsewhere; a collective.

        An actor that joined late waits for weights: then all ranks publish the current version again, and rank 0
        asks once more.
        """
        while True:
            answer, is_answered = None, True
            if self.leader is not None:
                try:
                    answer = ask(self.leader)
                except MembersWaiting as waiting:
                    logger.info("%s", waiting)
                    is_answered = False
            if self._rank_0_says(is_answered):
                return answer
            self._publish(self.version, steps_done)

    def _rank_0_says(self, answer: bool) -> bool:
        if self.world.size == 1:
            return answer
        flag = torch.tensor([answer])
        dist.broadcast(flag, src=0)
        return bool(flag.item())


def main(config: Config) -> int:
    """Runs one rank to the end of the run. Returns the exit code; a failure is raised."""
    with process_group(config.device, config.learner.batch_timeout_s + config.actors.start_timeout_s) as world:
        seed_everything(config.seed)
        mesh = make_mesh(config)
        with _leader(config, world) as leader:
            policy = load_policy(config, world.device, mesh)
            critic = load_critic(config, world.device, mesh)
            trainer = Trainer(config, policy, critic, world.rank, world.size)
            control = leader.service if leader is not None else None
            publisher = Publisher(config, policy, control, world.rank, probe_tokens(config))
            try:
                Learner(config, world, policy, trainer, publisher, leader).run()
            finally:
                publisher.shutdown()
    return 0


@contextmanager
def _leader(config: Config, world: World) -> Iterator[Leader | None]:
    """Opens the socket first, so that actors can connect while the model loads; writes RUN/endpoint for them."""
    if not world.is_main:
        yield None
        return
    task = load_task(config.task)
    service = LearnerService(
        config,
        task.train,
        tokenizing(config),
        model_fingerprints(config.model.path),
        probe_tokens(config).tolist(),
    )
    with service, RunLog(config.run_dir) as log:
        write_endpoint(config.run_dir, service.endpoint)
        yield Leader(config, service, log, task.heldout)


def tokenizing(config: Config) -> Callable[[Prompt], list[int]]:
    """A function from prompt to token ids: chat messages through the chat template, plain text as it stands."""
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)

    def tokenize(prompt: Prompt) -> list[int]:
        if prompt.messages is None:
            ids: list[int] = tokenizer(prompt.text)["input_ids"]
            return ids
        text = tokenizer.apply_chat_template(list(prompt.messages), tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    return tokenize


def probe_tokens(config: Config) -> torch.Tensor:
    """The fixed sequence that actors and learner score after each update: int64 [probe_tokens]."""
    vocabulary = AutoTokenizer.from_pretrained(config.model.path).vocab_size
    length = min(config.weights.probe_tokens, config.model.max_model_len - 1)
    return torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(PROBE_SEED))


def write_endpoint(run_dir: Path, endpoint: str) -> None:
    """RUN/endpoint, complete or not there at all."""
    temporary = run_dir / "endpoint.tmp"
    temporary.write_text(endpoint)
    temporary.replace(run_dir / "endpoint")

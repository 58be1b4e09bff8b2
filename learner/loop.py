"""The training loop: takes batches, trains, publishes. Every rank runs it.

Rank 0 has the Leader (actors, logs); the other ranks follow its decisions. One step of the loop is

    batch -> train -> publish -> record

Step s counts from 0, warm-up of the critic included; it trains at version max(0, s - warm-up) // publish_every.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from enum import IntEnum
from typing import TypeVar

import torch
import torch.distributed as dist

from common import lastsettings
from common.config import Config, ConfigError
from common.metrics import Value
from common.stopping import Interrupted, RunEnds
from common.types import TrajectoryGroup
from learner.alarm import Alarm
from learner.algorithm.optimised import StateDict
from learner.algorithm.packing import Batch, broadcast_batch
from learner.algorithm.trainer import Trainer
from learner.checkpoint import Checkpointer
from learner.leader import Leader, version_gaps
from learner.networks.export import export_policy
from learner.networks.parallel import World
from learner.publication.publisher import Publication, Publisher
from learner.publication.sentinel import DriftSentinel
from learner.publication.sleep import actors_asleep
from learner.replay import Replay
from learner.resume import WARMUP, settings
from learner.rollouts.service import MembersWaiting, StillWaiting
from learner.samples import SampleWriter

logger = logging.getLogger(__name__)

TURN_S = 1.0  # of a wait for actors, after which all ranks look whether one of them was asked to stop

Answer = TypeVar("Answer")


class _Said(IntEnum):
    """What came of asking the leader; rank 0 decides, the others say ANSWER."""

    ANSWER = 0
    WAIT = 1  # not yet
    SERVE = 2  # actors that joined late, with the current version; then ask again
    FAILED = 3  # the run cannot go on


class Learner:
    """The training loop of one rank; saveable. `leader` is None on all ranks but the first. A replay ends after
    `last_step` at the latest.

    `step` counts the steps done, the critic's warm-up included; `version` is the published one. Both, like every
    branch of the loop, are the same on all ranks.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        trainer: Trainer,
        publisher: Publisher,
        checkpointer: Checkpointer,
        leader: Leader | Replay | None,
        asked_to_stop: Callable[[], int | None] = lambda: None,
        last_step: int | None = None,
        samples: SampleWriter | None = None,
    ) -> None:
        self.asked_to_stop = asked_to_stop  # the signal that has reached this rank, if one has
        self.config = config
        self.world = world
        self.trainer = trainer
        self.publisher = publisher
        self.checkpointer = checkpointer
        self.leader = leader
        self.last_step = last_step
        self.samples = samples
        self.step = 0
        self.version = 0
        self._saved_step = 0  # of the newest checkpoint
        self._is_mid_step = False  # trained, but not published: no state to go on from
        self._is_published = True  # the policy is what actors got as `version` when that was new, not some steps later
        self.warmup_steps = config.algorithm.critic_warmup_steps
        self.sentinel = DriftSentinel(config.weights.drift_factor, config.model.dtype)
        self.alarm = Alarm(config.alarm)

    def run(self) -> None:
        """From where it stands to the end of the run.

        Raises RunEnds on all ranks when one was asked to stop, or rank 0 cannot go on; what was trained is saved.
        """
        try:
            self._begin()
            while self.step < self.num_steps:
                self._take_step()
                if self.leader is not None and self._is_evaluation_due():
                    self.leader.evaluate(self.version)
                if self._is_checkpoint_due():
                    self._save()
                self._end_if_asked_to_or_unsaved()
            self._end()
        except RunEnds:
            self._save_what_is_new()
            raise

    @property
    def num_steps(self) -> int:
        """Of the whole run, warm-up included."""
        steps = self.warmup_steps + self.config.learner.steps
        return steps if self.last_step is None else min(steps, self.last_step)

    def resume(self, step: int) -> None:
        """Continues after `step`, whose checkpoint must be complete."""
        resumed = self.checkpointer.load(step, self)
        self.step, self.version, self._saved_step = resumed.step, resumed.version, resumed.step
        if self.leader is not None:
            self.leader.service.set_warmup(self.warmup_steps)

    def state_dict(self) -> StateDict:
        own = {
            "warmup_steps": self.warmup_steps,
            "is_published": self._is_published,
            "mismatch_floor": self.sentinel.floor,
            "alarm": self.alarm.state_dict(),
            "probe": self.publisher.probe.state_dict(),
            "settings": settings(self.config),
        }
        return self.trainer.state_dict() | own

    def load_state_dict(self, state_dict: StateDict, /) -> None:
        if state_dict["settings"][WARMUP] == self.config.algorithm.critic_warmup_steps:  # else it was changed since
            self.warmup_steps = state_dict["warmup_steps"]
        self._is_published = state_dict["is_published"]
        self.sentinel.floor = state_dict["mismatch_floor"]
        self.alarm.load_state_dict(state_dict["alarm"])
        self.publisher.probe.load_state_dict(state_dict["probe"])
        self.trainer.load_state_dict(state_dict)

    def _begin(self) -> None:
        self.publisher.hold(self.version)
        if self.leader is not None:
            self.leader.service.judge_ready(self.publisher.probe.at_ready())
        self._led(lambda leader: leader.begin())
        self._publish(self.version)  # finds a broken transfer, or a model that differs, before any work is done
        if self.leader is not None:
            lastsettings.drop(self.config.run_dir)
            if self.step == 0:
                self.leader.evaluate(self.version)

    def _take_step(self) -> None:
        groups, batch, wait_s = self._next_batch()
        self._is_mid_step = True
        version, is_warmup = self.version, self.step < self.warmup_steps
        observe = None if self.samples is None else self.samples.observer(self.step + 1, version, groups)
        with actors_asleep(self.config, self.publisher.control, version):
            values: dict[str, Value] = dict(
                self.trainer.step(batch, version, is_warmup, is_published=self._is_published, observe=observe)
            )
        self._is_published = is_warmup and self._is_published
        values |= self._watch_drift(values)
        self.step += 1
        if is_warmup:
            self._end_warmup_early(values)
        judged, crossings = ({}, []) if is_warmup else self.alarm.observe(self.step, values)
        values |= judged | {"time/wait_for_batch_s": wait_s} | self._publish_when_due(is_warmup)
        if self.leader is not None:
            if not is_warmup:
                values["staleness/hist"] = version_gaps(groups, version)
            self.leader.record(self.step, self.version, self.warmup_steps, groups, values)
            for crossing in crossings:
                self.leader.log.event(self.step, "alarm", **asdict(crossing))
        self._is_mid_step = False

    def _next_batch(self) -> tuple[Sequence[TrajectoryGroup], Batch, float]:
        """The groups (on rank 0), the batch (on every rank) and the seconds that it took to come."""
        started = time.monotonic()
        groups = self._led(lambda leader: leader.next_groups(self.step + 1))
        batch = broadcast_batch(Batch.from_groups(groups) if groups is not None else None)
        return groups or (), batch, time.monotonic() - started

    def _watch_drift(self, values: dict[str, Value]) -> dict[str, float]:
        """Judges the batch that was just trained: it was sampled and scored before the step's updates."""
        mismatch = values.get("offpolicy/mismatch_abs_mean")
        return self.sentinel.observe(
            mismatch if isinstance(mismatch, float) else None,
            is_untrained=self.step <= self.warmup_steps,
            policy=self.trainer.policy.network,
        )

    def _end_warmup_early(self, values: dict[str, Value]) -> None:
        """Opens the gate (algorithm.critic_warmup_gate) when the critic explains enough of the outcome."""
        gate, explained = self.config.algorithm.critic_warmup_gate, values.get("critic/explained_variance")
        is_open = gate is not None and isinstance(explained, float) and explained >= gate
        if self._rank_0_says(is_open):
            self.warmup_steps = self.step
            if self.leader is not None:
                self.leader.service.set_warmup(self.step)

    def _publish_when_due(self, is_warmup: bool) -> dict[str, Value]:
        """Publishes the next version when this step completes one; metrics of what it took."""
        started = time.monotonic()
        values: dict[str, Value] = {}
        if not is_warmup and (self.step - self.warmup_steps) % self.config.weights.publish_every == 0:
            self._wait_before_publication()
            values |= self._publish(self.version + 1).metrics()
            self._is_published = True
        elif self.leader is not None:
            self.leader.service.set_version(self.version, self.step)
        return values | {"time/publish_s": time.monotonic() - started}

    def _wait_before_publication(self) -> None:
        """An interrupt ends the wait but not the step, which is published all the same: only then can it be saved."""
        try:
            self._led(lambda leader: leader.before_publication())
        except RunEnds as end:
            if not isinstance(end.reason, Interrupted):
                raise
            logger.warning("version %d is published before its window is sampled: %s", self.version + 1, end)

    def _publish(self, version: int) -> Publication:
        publication = self.publisher.publish(version)
        self.version = version
        if self.leader is not None:
            self.leader.service.set_version(version, self.step)
        return publication

    def _is_checkpoint_due(self) -> bool:
        """After each `every` steps, warm-up included, and after the warm-up, but not at the end, which saves anyway."""
        every = self.config.checkpoint.every
        is_due = self.step == self.warmup_steps or (every > 0 and self.step % every == 0)
        return is_due and self.step < self.num_steps

    def _is_evaluation_due(self) -> bool:
        """After each `every` policy steps, but not after the last, which has an evaluation of its own. 0: never."""
        every, done = self.config.eval.every, self.step - self.warmup_steps
        return every > 0 and 0 < done < self.config.learner.steps and done % every == 0

    def _save(self) -> None:
        write_extra = self.leader.state() if self.leader is not None else None
        self.checkpointer.save(self.step, self.version, self, write_extra)
        self._saved_step = self.step

    def _save_what_is_new(self) -> None:
        """Returns when the newest checkpoint is complete."""
        if self.step > self._saved_step and not self._is_mid_step:
            self._save()
        self.checkpointer.wait()

    def _end(self) -> None:
        """Saves and exports the model, evaluates it as published, and sends the actors home.

        All of that but the export waits until the last checkpoint is complete: who dies here is to go on from it.
        """
        self._save()
        final = self.config.run_dir / "checkpoints" / "final"
        export_policy(self.trainer.policy.network, self.config.model.path, final)
        self.checkpointer.wait()
        self._finish_evaluation()  # the one that may still be running
        if self.leader is not None:
            self.leader.evaluate(self.version)
        self._finish_evaluation()
        if self.leader is not None:
            self.leader.service.stop("the run is complete")

    def _finish_evaluation(self) -> None:
        self._led(lambda leader: leader.finish_evaluation(step=self.step, version=self.version))

    def _led(self, ask: Callable[[Leader | Replay], Answer]) -> Answer | None:
        """Rank 0's answer there, None elsewhere; a collective. Raises RunEnds.

        An actor that joined late waits for weights: then all ranks bring the current version to it alone, as it was
        published, and rank 0 asks once more. An answer counts more than an interrupt, because what it took would be
        lost.
        """
        while True:
            answer, mine, failure = None, _Said.ANSWER, None
            try:
                answer = ask(self.leader) if self.leader is not None else None
            except StillWaiting:
                mine = _Said.WAIT
            except MembersWaiting as waiting:
                logger.info("%s", waiting)
                mine = _Said.SERVE
            except (ConfigError, TimeoutError) as error:
                mine, failure = _Said.FAILED, error
            said, number = self._agreed(mine)
            if said is _Said.ANSWER:
                return answer
            if said is _Said.FAILED:
                raise RunEnds(failure)
            if number:
                raise RunEnds(Interrupted(number))
            if said is _Said.SERVE:
                self.publisher.serve(self.version)

    def _end_if_asked_to_or_unsaved(self) -> None:
        """After each step. A save that has failed in the background fails on all ranks, on some a little later."""
        said, number = self._agreed(_Said.FAILED if self.checkpointer.has_failed() else _Said.ANSWER)
        if said is _Said.FAILED:
            self.checkpointer.wait()
        if number:
            raise RunEnds(Interrupted(number))

    def _agreed(self, said: _Said) -> tuple[_Said, int]:
        """The gravest of what ranks say, as a rule rank 0, and the signal that has reached any rank (0: none), the same
        on all; a collective."""
        number = self.asked_to_stop() or 0
        if self.world.size == 1:
            return said, number
        codes = torch.tensor([said, number])
        dist.all_reduce(codes, dist.ReduceOp.MAX)
        return _Said(int(codes[0])), int(codes[1])

    def _rank_0_says(self, answer: bool) -> bool:
        if self.world.size == 1:
            return answer
        flag = torch.tensor([answer])
        dist.broadcast(flag, src=0)
        return bool(flag.item())

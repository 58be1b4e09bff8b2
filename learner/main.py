"""The learner's process: what one rank needs, opened in order and closed in reverse, and its exit code.

    python run.py learner --config RUN/config.yaml      (under torchrun, or alone with one rank)

Every rank runs this under torch.distributed. Rank 0 has the Leader (actors, logs) or a Replay; what all of them do then
is the loop of learner/loop.py.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from common.addresses import advertised_host, prefer_interface_of
from common.child import READY_FILE
from common.config import Config, Device
from common.keys import learner_keys
from common.metrics import RunLog
from common.model_folder import vocabulary_size
from common.placement import plan_here
from common.stopping import Interrupted, RunEnds, StopSignals
from common.tasks.dataset import load_dataset
from common.trackers import Trackers
from common.transport import model_fingerprints
from learner.agreement import gather
from learner.algorithm.trainer import Trainer
from learner.checkpoint import Checkpointer, step_folder
from learner.export import tying_settled
from learner.leader import ROLLOUTS, Leader
from learner.loop import TURN_S, Learner
from learner.networks.model import load_networks
from learner.networks.parallel import World, make_mesh, process_group, refusals_of_any_rank, seed_everything
from learner.publication.probe import probe_token_ids
from learner.publication.publisher import Publisher
from learner.replay import Replay, replayed_settings
from learner.restart import former_port, refuse_loss, write_endpoint
from learner.rollouts.record import Record, Recorder, forget_after
from learner.rollouts.service import LearnerService
from learner.rollouts.snapshot import read_snapshot
from learner.rundir import agreed_standing, next_incarnation, only_learner, settle
from learner.samples import SampleWriter, forget_samples_after

logger = logging.getLogger(__name__)


def main(config: Config) -> int:
    """Runs one rank to the end of the run, from the newest complete checkpoint if there is one.

    Returns the exit code, 128 + n when signal n has stopped it; a failure is raised, by rank 0 alone where all agree on
    it. A run that is complete is left as it is.
    """
    if config.device is Device.cuda and int(os.environ.get("RANK", "0")) == 0:
        prefer_interface_of(advertised_host(config.transport))
    try:
        is_supervised = READY_FILE in os.environ  # by `train`, which ends what does not stop in time, and says so
        with StopSignals(None if is_supervised else config.learner.stop_timeout_s) as signals:
            _run_rank(config, signals)
    except Interrupted as interrupt:
        logger.warning("%s", interrupt)
        return 128 + interrupt.number
    except RunEnds as end:
        if isinstance(end.reason, Interrupted):
            return 128 + end.reason.number
        if end.reason is not None:
            raise end.reason from None
    return 0


def _run_rank(config: Config, signals: StopSignals) -> None:
    timeout_s = config.learner.batch_timeout_s + config.actors.start_timeout_s
    with process_group(config.device, timeout_s) as world, only_learner(config, world):
        stands = agreed_standing(tying_settled(config), world)
        if stands is not None and stands.is_complete:
            logger.info("%s is complete: nothing is left to do", config.run_dir)
            return
        refuse_loss(config, stands)
        config = settle(config, world)
        resume_step = None if stands is None else stands.step
        seed_everything(config.seed)
        _leave_room(config, world)
        mesh = make_mesh(config)
        last_step = _replay_threads_and_last_step(config, world)
        with _leader(config, world, resume_step) as leader, _samples(config, leader) as samples:
            networks = load_networks(config, world.device, mesh)
            policy, critic, reference = networks.policy, networks.critic, networks.reference
            trainer = Trainer(config, policy, critic, world.rank, world.size, reference=reference)
            control = leader.service if isinstance(leader, Leader) else None
            publisher = Publisher(config, policy, control, world.rank, probe_token_ids(config))
            try:
                with _checkpointer(config) as checkpointer:
                    learner = Learner(
                        config,
                        world,
                        trainer,
                        publisher,
                        checkpointer,
                        leader,
                        lambda: signals.number,
                        last_step,
                        samples,
                    )
                    if resume_step is not None:
                        learner.resume(resume_step)
                    signals.defer(_interrupt(leader))
                    _run_to_its_end(learner)
            finally:
                publisher.shutdown()


def _checkpointer(config: Config) -> Checkpointer:
    return Checkpointer(config.run_dir / "checkpoints", config.checkpoint.keep, config.checkpoint.in_background)


def _interrupt(leader: Leader | Replay | None) -> Callable[[], None]:
    return leader.service.interrupt if isinstance(leader, Leader) else lambda: None


def _run_to_its_end(learner: Learner) -> None:
    """Says on the console where an interrupted run stands."""
    try:
        learner.run()
    except RunEnds as end:
        if learner.leader is not None and isinstance(end.reason, Interrupted):
            run_dir = learner.config.run_dir
            print(f"{end} after step {learner.step}: go on with run.py train --resume {run_dir}", flush=True)
        raise


def _leave_room(config: Config, world: World) -> None:
    """Keeps torch's allocator from caching what belongs to engines on the same GPU."""
    if (plan := plan_here(config)) is not None:
        torch.cuda.set_per_process_memory_fraction(plan.learner_fraction, world.device)


def _replay_threads_and_last_step(config: Config, world: World) -> int | None:
    """Of a replay, the last step that is recorded; its ranks compute with as many threads as those of the record."""
    if config.learner.replay is None:
        return None
    found = [0, 0]
    with refusals_of_any_rank(world.size == 1):
        if world.is_main:
            record = Record(Path(config.learner.replay))
            found = [record.last_step, record.settings(1)["threads"]]
    last_step, threads = gather(found, None if world.size == 1 else dist.group.WORLD)[0]
    torch.set_num_threads(threads)
    return int(last_step)


@contextmanager
def _leader(config: Config, world: World, resume_step: int | None) -> Iterator[Leader | Replay | None]:
    """What rank 0 has beside the others: the actors, or a record in their place."""
    if not world.is_main:
        yield None
        return
    run_id, incarnation = next_incarnation(config.run_dir)
    logger.info("learner %d of run %s", incarnation, run_id)
    forget_after(config.run_dir, resume_step or 0)
    forget_samples_after(config.run_dir, resume_step or 0)
    if config.learner.replay is not None:
        with _run_log(config, resume_step) as log:
            yield Replay(config, Record(Path(config.learner.replay)), log)
        return
    with _leader_of_actors(config, resume_step, run_id, incarnation) as leader:
        yield leader


@contextmanager
def _run_log(config: Config, resume_step: int | None) -> Iterator[RunLog]:
    with Trackers(config) as trackers, RunLog(config.run_dir, resume_step or 0, trackers) as log:
        yield log


@contextmanager
def _samples(config: Config, leader: Leader | Replay | None) -> Iterator[SampleWriter | None]:
    """Who keeps samples, on rank 0."""
    if leader is None or config.samples.groups == 0:
        yield None
        return
    with SampleWriter(config, leader.log) as samples:
        yield samples


@contextmanager
def _leader_of_actors(config: Config, resume_step: int | None, run_id: str, incarnation: int) -> Iterator[Leader]:
    """Opens the socket first, so that actors can connect while the model loads; writes RUN/endpoint for them."""
    data = load_dataset(config, config.run_dir / "data")
    service = LearnerService(
        config,
        data.task.train,
        data.token_ids,
        model_fingerprints(config.model.path),
        probe_token_ids(config).tolist(),
        data.task.shares,
        keys=learner_keys(config),
        former_port=former_port(config.run_dir),
        run_id=run_id,
        incarnation=incarnation,
        vocab_size=vocabulary_size(config.model.path),
    )
    service.turn_s = TURN_S
    kept = None
    if resume_step is not None:
        folder = step_folder(config.run_dir / "checkpoints", resume_step)
        kept = read_snapshot(folder / ROLLOUTS, time.monotonic())
        service.restore(kept[0])
    recorder = Recorder(config.run_dir, replayed_settings(config)) if config.learner.record else None
    with service, _run_log(config, resume_step) as log:
        write_endpoint(config.run_dir, service.endpoint)
        leader = Leader(config, service, log, data.task.heldout, recorder)
        if kept is not None:
            leader.resume(*kept)
        yield leader

"""RUN before a learner trains in it: one folder that all ranks see, with the configuration that all roles read.

`run.py train` has made it; a learner that is started alone makes it itself. All but `next_incarnation` are collectives.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from common.config import Config, ConfigError
from common.loading import read_config, save_config
from common.runlock import ENDING_S, LEARNER_LOCK, held
from common.types import JSON
from learner.agreement import all_or_none
from learner.checkpoint import set_damaged_aside
from learner.export import tying_settled, with_tying
from learner.files import replace_synced
from learner.networks.parallel import World, refusals_of_any_rank
from learner.resume import Standing, standing

SHARED_S = 10.0  # a network file system may show a new file on other hosts a little later
POLL_S = 0.05
PLACE = {"name", "runs_dir"}
OWN = "learner.stop_timeout_s"  # of a learner that is started alone, whose script knows how long it has


@contextmanager
def only_learner(config: Config, world: World) -> Iterator[None]:
    """Rank 0 holds RUN against other learners; before anything in it is touched. Raises ConfigError on all ranks."""
    with ExitStack() as stack:
        with refusals_of_any_rank(world.size == 1):
            if world.is_main:
                stack.enter_context(held(config.run_dir / LEARNER_LOCK, config.run_dir, ENDING_S))
        yield


def next_incarnation(run_dir: Path) -> tuple[str, int]:
    """(id of the run, which of its learners this is, from 1); counted in RUN/incarnation.json.

    The id is random and made once per run directory. Called once by every learner's rank 0, which holds RUN. Raises
    ConfigError when the file is damaged.
    """
    path = run_dir / "incarnation.json"
    run_id, count = secrets.token_hex(8), 0
    if path.is_file():
        try:
            there: JSON = json.loads(path.read_bytes())
            run_id, count = str(there["run_id"]), int(there["incarnation"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ConfigError(
                f"{path} is damaged: delete it when no actor of an earlier learner of this run is left"
            ) from error
    replace_synced(path, json.dumps({"run_id": run_id, "incarnation": count + 1}).encode())
    return run_id, count + 1


def agreed_standing(config: Config, world: World) -> Standing | None:
    """What `standing` says on rank 0, on all ranks, when damaged checkpoints have been set aside.

    Raises ConfigError, on all ranks, when rank 0 cannot go on, or when a rank does not see rank 0's RUN: it would find
    other checkpoints there, and leave its pieces of new ones where nobody looks for them. Raises CannotWrite when a
    checkpoint cannot be read now.
    """
    group = None if world.size == 1 else dist.group.WORLD
    if group is not None:
        with refusals_of_any_rank(False):
            _check_shared(config, world)
    if (sentence := set_damaged_aside(config.run_dir / "checkpoints", group)) is not None and world.is_main:
        print(sentence, flush=True)
    if group is None:
        return standing(config)
    found = None
    with all_or_none(f"{config.run_dir} cannot be read", group):
        if world.is_main:
            try:
                found = standing(config)
            except FileNotFoundError as error:  # of the model: not of RUN
                raise ConfigError(f"{error.filename} does not exist") from error
    numbers = torch.tensor([-1, 0, 0] if found is None else [found.step, found.policy_steps, found.is_complete])
    dist.broadcast(numbers, src=0)
    step, policy_steps, is_complete = numbers.tolist()
    return None if step < 0 else Standing(step=step, policy_steps=policy_steps, is_complete=bool(is_complete))


def settle(config: Config, world: World) -> Config:
    """The configuration as `train` would settle it, which then is in RUN/config.yaml, for actors, resumes and exports.

    Raises ConfigError, on all ranks, when that file holds another one: it is what the run's other processes read. Only
    of how long this learner may take to stop they read nothing, and another job may give it more.
    """
    settled = tying_settled(config)
    with refusals_of_any_rank(world.size == 1):
        if world.is_main and _is_missing(settled):
            config.run_dir.mkdir(parents=True, exist_ok=True)
            save_config(with_tying(config) if settled is not config else config, config.run_dir / "config.yaml")
    return settled


def _is_missing(config: Config) -> bool:
    """Whether RUN/config.yaml has to be written: it is not there, or RUN has been moved."""
    path = config.run_dir / "config.yaml"
    if not path.is_file():
        return True
    there = read_config(path)
    before, now = dict(_flat(asdict(there))), dict(_flat(asdict(config)))
    other = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)} - {OWN}
    for key in sorted(other - PLACE):
        raise ConfigError(
            f"{path} has {key}={before.get(key)}, not {now.get(key)}: give --config {path}, changed there if that "
            "is meant, or another name=..."
        )
    return bool(other)


def _flat(settings: dict[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _check_shared(config: Config, world: World) -> None:
    """Rank 0 leaves a mark of its own in RUN, and every other rank looks for it."""
    number = torch.tensor([int.from_bytes(os.urandom(7))])
    dist.broadcast(number, src=0)
    mark = config.run_dir / f".shared-{number.item():x}"
    try:
        if world.is_main:
            config.run_dir.mkdir(parents=True, exist_ok=True)
            mark.touch()
        dist.barrier()
        is_seen = _appears(mark)
        dist.barrier()
    finally:
        if world.is_main:
            mark.unlink(missing_ok=True)
    if not is_seen:
        raise ConfigError(
            f"runs_dir={config.runs_dir} is not shared between hosts: rank {world.rank} on {socket.gethostname()} does "
            f"not see within {SHARED_S:g} s what rank 0 writes to {config.run_dir}, so put it on a file system of all"
        )


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + SHARED_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True

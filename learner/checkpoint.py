"""Checkpoints of the learner: atomic, resumable on another number of ranks, written in the background.

    RUN/checkpoints/step_00000030/     complete: the name appears when everything is written (one rename)
        .metadata, __0_0.distcp, ...   tensors, by torch.distributed.checkpoint, each rank its own shards
        state.json                     step, version, and the numbers of the state dict
        rollouts.bin                   what rank 0 knows besides; written by the caller of `save`
        checksums.json                 size and CRC-32 of each of these files (learner/checksums.py)
    RUN/checkpoints/incomplete_...     being written, being deleted, or left by a killed process; never read, removed
    by the next save
    RUN/checkpoints/damaged_...        was complete once, but is not what was written; never read, removed when the
    next save is complete
    RUN/checkpoints/kept_...           was set aside as damaged, and is whole after all: its disk did not give it back
    for a while; for the user to take

What is saved is any object with `state_dict()` and `load_state_dict()` whose state is a nested dict of
tensors, DTensors and JSON values. Tensors are read back INTO those of `state_dict()`, in place, whatever
their sharding.
"""

import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException

from common.config import ConfigError
from common.stopping import Interrupted
from common.types import JSON
from learner.agreement import all_or_none, gather
from learner.algorithm.optimised import StateDict
from learner.checksums import STATE, absent, changed, file_names, manifest_of, write_manifest
from learner.files import write_synced

logger = logging.getLogger(__name__)

# One process without a process group is a supported setup, not an accident to warn of at every save.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

RNG_KEY = "rng_state"
INCOMPLETE = "incomplete_"
DAMAGED = "damaged_"  # begins the names of checkpoints that are not what was written
KEPT = "kept_"
_NAME = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,})(?:\.([1-9][0-9]*))?")  # of a checkpoint, see _save_folder


class Saveable(Protocol):
    def state_dict(self) -> StateDict: ...

    def load_state_dict(self, state_dict: StateDict, /) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """What a checkpoint held besides the state dict."""

    step: int
    version: int


WriteExtra = Callable[[Path], None]  # writes files of rank 0's into the folder of a checkpoint


class Checkpointer:
    """Writes and reads the checkpoints of one run. Every method but `has_failed` is a collective over the ranks.

    States: idle, or one save under way in the background. `save` first waits for the one before, so there
    is never more than one; `wait` (and leaving the context) returns when none is. Background saves
    communicate over a process group of their own, so they cannot be mixed up with the training step's
    collectives. A save that fails on one rank raises ConfigError on all, at the next `save` or `wait`; `has_failed`
    (no collective) says on each rank, as soon as it is so there, that this is to come.
    """

    def __init__(self, directory: Path, keep: int, in_background: bool = False) -> None:
        """Keeps the newest `keep` complete checkpoints. With `in_background`, `save` returns once the
        tensors are copied, and they are written while training goes on."""
        self.directory = directory
        self.keep = keep
        self._is_main = not dist.is_initialized() or dist.get_rank() == 0
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._writer = ThreadPoolExecutor(1, "checkpoint") if in_background else None
        self._pending: Future[None] | None = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        if self._writer is not None:
            self._writer.shutdown(wait=kind is None)

    def save(self, step: int, version: int, state: Saveable, write_extra: WriteExtra | None = None) -> None:
        """Saves `state` as of now under `step`. Rank 0's `write_extra` adds its files when the tensors are written."""
        self.wait()
        temporary = self.directory / f"{INCOMPLETE}{step:08d}"
        with all_or_none(f"the checkpoint of step {step} cannot be written", self._group):
            if self._is_main:
                self.directory.mkdir(parents=True, exist_ok=True)
                for leftover in self.directory.glob(f"{INCOMPLETE}*"):
                    _delete(leftover)
                temporary.mkdir()
        tensors, values = _split(state.state_dict())
        tensors[RNG_KEY] = torch.get_rng_state()
        info = {"step": step, "version": version, "values": values}
        if self._writer is None:
            self._finish(lambda: dcp.save(tensors, **self._where(temporary)), temporary, info, write_extra)
        else:
            staged = dcp.async_save(tensors, **self._where(temporary))
            assert isinstance(staged, Future)
            self._pending = self._writer.submit(self._finish, staged.result, temporary, info, write_extra)

    def wait(self) -> None:
        """Returns when no save is under way; raises what the last one raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def has_failed(self) -> bool:
        return self._pending is not None and self._pending.done() and self._pending.exception(timeout=0) is not None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return complete_steps(self.directory)

    def load(self, step: int, state: Saveable) -> Resumed:
        """Restores `state`, on any number of ranks. Raises ValueError when it is of another model, and CannotWrite, on
        all ranks, when one cannot read it."""
        tensors, values = _split(state.state_dict())
        tensors[RNG_KEY] = torch.get_rng_state()
        folder, info = self.directory, {}
        with all_or_none(f"a checkpoint in {folder} cannot be read", self._group):
            folder = step_folder(self.directory, step)
            info = json.loads((folder / STATE).read_text())
        _read_tensors(folder, tensors, self._group)
        missing = sorted(values.keys() - info["values"].keys())
        if missing:
            raise ValueError(f"checkpoint {folder} lacks {missing}, it was made by another version or setup")
        torch.set_rng_state(tensors.pop(RNG_KEY))
        state.load_state_dict(_join({**tensors, **{key: info["values"][key] for key in values}}))
        return Resumed(step=info["step"], version=info["version"])

    def _finish(
        self, write: Callable[[], Any], temporary: Path, info: dict[str, JSON], write_extra: WriteExtra | None
    ) -> None:
        """Writes what is left, the manifest last, and publishes by renaming. On every rank, perhaps in a thread."""
        what = f"the checkpoint of step {info['step']} cannot be written"
        manifest: dict[str, list[int]] = {}
        with all_or_none(what, self._group):
            write()
            if self._is_main:
                write_synced(temporary / STATE, json.dumps(info).encode())
                if write_extra is not None:
                    write_extra(temporary)
            manifest = manifest_of(self._own_files(temporary))
        manifests = gather(manifest, self._group)
        with all_or_none(what, self._group):
            if self._is_main:
                self._complete(temporary, info["step"], {name: m[name] for m in manifests for name in m})

    def _own_files(self, folder: Path) -> list[Path]:
        """What this rank has written: its tensors, and on rank 0 all that is no rank's tensors."""
        rank = 0 if self._group is None else dist.get_rank(self._group)
        own = list(folder.glob(f"__{rank}_*.distcp"))
        return own + [file for file in folder.iterdir() if file.suffix != ".distcp"] if self._is_main else own

    def _complete(self, temporary: Path, step: int, manifest: dict[str, list[int]]) -> None:
        """Rank 0, once every rank has written."""
        write_manifest(temporary, manifest)
        if missing := absent(temporary):
            raise ConfigError(
                f"checkpoint {temporary} of step {step} lacks {', '.join(missing)}, which other ranks have written: "
                "runs_dir is not shared between hosts, so put it on a file system of all"
            )
        saves = [save for saved, save in _saves(self.directory) if saved == step]
        folder = _save_folder(self.directory, step, saves[-1] + 1 if saves else 0)
        temporary.rename(folder)
        logger.info("checkpoint %s is complete", folder)
        try:
            self._prune(step, folder)
        except OSError as error:
            logger.warning("which checkpoints in %s are to go is seen at the next save: %s", self.directory, error)

    def _prune(self, step: int, folder: Path) -> None:
        """Deletes what is not needed beside `folder`, the newest of `step`."""
        kept = complete_steps(self.directory)[-self.keep :]
        for saved, save in _saves(self.directory):
            old = _save_folder(self.directory, saved, save)
            if (saved not in kept or (saved == step and old != folder)) and _is_readable(old):
                _delete(old)
        for damaged in self.directory.glob(f"{DAMAGED}*"):
            _delete_damaged(damaged)

    def _where(self, folder: Path) -> dict[str, Any]:
        return {"checkpoint_id": folder, "process_group": self._group, "no_dist": self._group is None}


def step_folder(directory: Path, step: int) -> Path:
    """The complete checkpoint of `step`. Raises ValueError when there is none."""
    saves = [save for saved, save in _complete_saves(directory) if saved == step]
    if not saves:
        raise ValueError(f"there is no checkpoint of step {step} in {directory}, it has {complete_steps(directory)}")
    return _save_folder(directory, step, saves[-1])


def complete_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints in `directory`, oldest first. One whose pieces are not all there is none."""
    return sorted({step for step, _ in _complete_saves(directory)})


def torn(directory: Path, newer_than: Path | None = None) -> dict[str, str]:
    """A sentence for each checkpoint that was complete once and at a glance (learner/checksums.py) is not, by name; of
    those that are newer than that one, if one is given."""
    after = [] if newer_than is None else _saves_named([newer_than])  # an empty list comes before all
    folders = [_save_folder(directory, *save) for save in _saves(directory) if after < [save]]
    missing = {folder: absent(folder) for folder in folders}
    return {folder.name: _damaged(folder, names) for folder, names in missing.items() if names}


def damage(folder: Path, group: dist.ProcessGroup | None = None) -> list[str]:
    """Files of a checkpoint that are missing or do not hold what was written; every rank of `group` reads its share.

    Raises CannotWrite, on all ranks, when one of them cannot read a file now that may be whole.
    """
    what, names = f"checkpoint {folder} cannot be read", []
    with all_or_none(what, group):
        names = absent(folder)
    if missing := next(iter(gather(names, group))):
        return list(missing)
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    with all_or_none(what, group):
        names = changed(folder, file_names(folder)[rank::size])
    return [name for found in gather(names, group) for name in found]


def set_damaged_aside(directory: Path, group: dist.ProcessGroup | None = None) -> str | None:
    """Makes the newest intact checkpoint the newest one of all; the sentence that says what that costs, if anything.

    A collective before a resume. Damaged ones are renamed, so that no later save is measured by them. Raises
    ConfigError when there are checkpoints and none is intact, and CannotWrite when one cannot be read now: then nothing
    is renamed.
    """
    found: dict[Path, list[str]] = {}
    saves: list[tuple[int, int]] = []
    with all_or_none(f"{directory} cannot be read", group):
        saves = _saves(directory)
    saves = next(iter(gather(saves, group)))
    for step, save in reversed(saves):
        folder = _save_folder(directory, step, save)
        if not (names := damage(folder, group)):
            break
        found[folder] = names
    if not found:
        return None
    words = "; ".join(_damaged(folder, names) for folder, names in found.items())
    if len(found) == len(saves):
        raise ConfigError(
            f"no checkpoint in {directory} is what was written ({words}): bring these files there from a copy, or "
            "begin anew with another name=..."
        )
    with all_or_none(f"{directory} cannot be written", group):
        if group is None or dist.get_rank(group) == 0:
            for folder in found:
                folder.rename(directory / f"{DAMAGED}{folder.name}")
    lost = saves[-1][0] - step
    return f"{directory} is damaged ({words}): the run goes on from step {step}, {lost} step(s) are done again"


def _delete(folder: Path) -> None:
    """Under a name that nobody reads, as this may be cut short. What cannot be deleted, because somebody has it open,
    is left to the next save."""
    try:
        if not folder.name.startswith((INCOMPLETE, DAMAGED)):
            folder = folder.rename(folder.with_name(f"{INCOMPLETE}{folder.name}"))
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning("%s cannot be deleted, which the next save tries again: %s", folder, error)


def _is_readable(folder: Path) -> bool:
    """Else it stays: nothing is known of it now."""
    try:
        absent(folder)
    except OSError as error:
        logger.warning("%s stays, as it cannot be read now: %s", folder, error)
        return False
    return True


def _delete_damaged(folder: Path) -> None:
    """Unless it is whole now: nothing that was written is lost to a disk that did not give it back for a while."""
    try:
        if damage(folder):
            _delete(folder)
            return
    except OSError:
        """As good as whole."""
    kept = folder.rename(folder.with_name(KEPT + folder.name.removeprefix(DAMAGED)))
    logger.warning("%s was set aside as damaged, and is whole or cannot be read now: it stays as %s", folder, kept)


def _damaged(folder: Path, names: list[str]) -> str:
    return f"{folder.name} lacks or has other bytes in {', '.join(names)}"


def _save_folder(directory: Path, step: int, save: int) -> Path:
    """A step that is saved again (by a resumed run) gets a new name, so that the old one serves until then."""
    return directory / (f"step_{step:08d}.{save}" if save else f"step_{step:08d}")


def _complete_saves(directory: Path) -> list[tuple[int, int]]:
    """Those of `_saves` that have all their pieces. Raises OSError when that is not known of one that is newer than all
    of these; an older one counts as one that has not."""
    found: list[tuple[int, int]] = []
    for save in reversed(_saves(directory)):
        try:
            missing = absent(_save_folder(directory, *save))
        except OSError:
            if not found:
                raise
            continue
        if not missing:
            found.append(save)
    return found[::-1]


def _saves(directory: Path) -> list[tuple[int, int]]:
    """(step, how many times it had been saved before), in that order."""
    return _saves_named(directory.glob("step_*"))


def _saves_named(folders: Iterable[Path]) -> list[tuple[int, int]]:
    matches = (_NAME.fullmatch(folder.name) for folder in folders)
    return sorted((int(match[1]), int(match[2] or 0)) for match in matches if match)


def load_parameters(folder: Path, prefix: str, network: nn.Module) -> None:
    """Reads only a network's parameters from checkpoint `folder`, for example to export it.

    `prefix` is where `network_state` sits in the saved state dict, such as "policy".
    """
    tensors = {f"{prefix}/parameters/{name}": parameter.detach() for name, parameter in network.named_parameters()}
    _read_tensors(folder, tensors, None)


def _split(state: StateDict, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, JSON]]:
    """Tensors and JSON values of a nested dict, by path with slashes."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, JSON] = {}
    for key, value in state.items():
        assert "/" not in key, f"state dict key {key} contains a slash"
        if isinstance(value, Mapping):
            inner_tensors, inner_values = _split(dict(value), f"{prefix}{key}/")
            tensors |= inner_tensors
            values |= inner_values
        elif isinstance(value, Tensor):
            tensors[prefix + key] = value
        else:
            values[prefix + key] = value
    return tensors, values


def _join(flat: Mapping[str, Any]) -> StateDict:
    state: StateDict = {}
    for path, value in flat.items():
        *parents, key = path.split("/")
        inner = state
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[key] = value
    return state


def _read_tensors(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    what, saved = f"checkpoint {folder} cannot be read", {}
    with all_or_none(what, group):
        saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for name, tensor in tensors.items():
        size = getattr(saved.get(name), "size", None)
        if size != tensor.shape:
            found = "is missing" if size is None else f"has shape {tuple(size)}"
            raise ValueError(
                f"checkpoint {folder} is of another model: tensor {name} {found}, expected {tuple(tensor.shape)}"
            )
    with all_or_none(what, group), _failure_of_torch(f"checkpoint {folder} cannot be loaded"):
        dcp.load(tensors, checkpoint_id=folder, process_group=group, no_dist=group is None)


@contextmanager
def _failure_of_torch(what: str) -> Iterator[None]:
    """torch's CheckpointException, which is no Exception, as what it holds: an interrupt, an error of the file system,
    or else a RuntimeError. It is raised with the same content on all ranks, whichever of them failed."""
    try:
        yield
    except CheckpointException as error:
        failures = [failure for failure, _ in error.failures.values()]
        for failure in failures:
            if isinstance(failure, (OSError, Interrupted, KeyboardInterrupt)):
                raise failure from None
        raise RuntimeError(f"{what}: {failures[0]!r}") from error

"""Checkpoints of the learner: atomic, resumable on another number of ranks, written in the background.

    RUN/checkpoints/step_00000030/     complete: the name appears when everything is written (one rename)
        .metadata, __0_0.distcp, ...   tensors, by torch.distributed.checkpoint, each rank its own shards
        state.json                     step, version, the numbers of the state dict, and which files the tensors are in
        data.bin                       what rank 0 knows besides (coordinator), opaque here
    RUN/checkpoints/incomplete_...     being written, or left by a killed process; never read, removed by
    the next save

What is saved is any object with `state_dict()` and `load_state_dict()` whose state is a nested dict of
tensors, DTensors and JSON values. Tensors are read back INTO those of `state_dict()`, in place, whatever
their sharding.
"""

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from common.config import ConfigError
from common.types import JSON
from learner.algorithm.optimised import StateDict

logger = logging.getLogger(__name__)

# One process without a process group is a supported setup, not an accident to warn of at every save.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

RNG_KEY = "rng_state"


class Saveable(Protocol):
    def state_dict(self) -> StateDict: ...

    def load_state_dict(self, state_dict: StateDict, /) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """What a checkpoint held besides the state dict."""

    step: int
    version: int
    data: bytes


class Checkpointer:
    """Writes and reads the checkpoints of one run. Every method is a collective over the learner's ranks.

    States: idle, or one save under way in the background. `save` first waits for the one before, so there
    is never more than one; `wait` (and leaving the context) returns when none is. Background saves
    communicate over a process group of their own, so they cannot be mixed up with the training step's
    collectives. A failed save raises at the next `save` or `wait`.
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

    def save(self, step: int, version: int, state: Saveable, data: bytes = b"") -> None:
        """Saves `state` as of now under `step`; `data` is rank 0's."""
        self.wait()
        temporary = self.directory / f"incomplete_{step:08d}"
        if self._is_main:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob("incomplete_*"):
                shutil.rmtree(leftover)
            temporary.mkdir()
        self._barrier()
        tensors, values = _split(state.state_dict())
        tensors[RNG_KEY] = torch.get_rng_state()
        info = {"step": step, "version": version, "values": values}
        if self._writer is None:
            dcp.save(tensors, **self._where(temporary))
            self._complete(temporary, step, info, data)
            self._barrier()
        else:
            staged = dcp.async_save(tensors, **self._where(temporary))
            assert isinstance(staged, Future)
            self._pending = self._writer.submit(self._finish, staged, temporary, step, info, data)

    def wait(self) -> None:
        """Returns when no save is under way; raises what the last one raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()
            self._barrier()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return complete_steps(self.directory)

    def load(self, step: int, state: Saveable) -> Resumed:
        """Restores `state`, on any number of ranks. Raises ValueError when it is of another model."""
        folder = step_folder(self.directory, step)
        tensors, values = _split(state.state_dict())
        tensors[RNG_KEY] = torch.get_rng_state()
        _read_tensors(folder, tensors, self._group)
        info = json.loads((folder / "state.json").read_text())
        missing = sorted(values.keys() - info["values"].keys())
        if missing:
            raise ValueError(f"checkpoint {folder} lacks {missing}, it was made by another version or setup")
        torch.set_rng_state(tensors.pop(RNG_KEY))
        state.load_state_dict(_join({**tensors, **{key: info["values"][key] for key in values}}))
        data = (folder / "data.bin").read_bytes()
        return Resumed(step=info["step"], version=info["version"], data=data)

    def _finish(self, staged: Future[Any], temporary: Path, step: int, info: dict[str, JSON], data: bytes) -> None:
        staged.result()
        self._complete(temporary, step, info, data)

    def _complete(self, temporary: Path, step: int, info: dict[str, JSON], data: bytes) -> None:
        """Rank 0, once every rank has written (its metadata file is written last): publishes by renaming."""
        if not self._is_main:
            return
        pieces = _pieces(temporary)
        if missing := _missing(temporary, pieces):
            raise ConfigError(
                f"checkpoint {temporary} of step {step} lacks {', '.join(missing)}, which other ranks have written: "
                "runs_dir is not shared between hosts, so put it on a file system of all"
            )
        _write_synced(temporary / "state.json", json.dumps(info | {"pieces": pieces}).encode())
        _write_synced(temporary / "data.bin", data)
        saves = [save for saved, save in _saves(self.directory) if saved == step]
        folder = _save_folder(self.directory, step, saves[-1] + 1 if saves else 0)
        temporary.rename(folder)
        logger.info("checkpoint %s is complete", folder)
        kept = complete_steps(self.directory)[-self.keep :]
        for saved, save in _saves(self.directory):
            old = _save_folder(self.directory, saved, save)
            if saved not in kept or (saved == step and old != folder):
                shutil.rmtree(old)

    def _where(self, folder: Path) -> dict[str, Any]:
        return {"checkpoint_id": folder, "process_group": self._group, "no_dist": self._group is None}

    def _barrier(self) -> None:
        if self._group is not None:
            dist.barrier(self._group)


def step_folder(directory: Path, step: int) -> Path:
    """The complete checkpoint of `step`. Raises ValueError when there is none."""
    saves = [save for saved, save in _complete_saves(directory) if saved == step]
    if not saves:
        raise ValueError(f"there is no checkpoint of step {step} in {directory}, it has {complete_steps(directory)}")
    return _save_folder(directory, step, saves[-1])


def complete_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints in `directory`, oldest first. One whose pieces are not all there is none."""
    return sorted({step for step, _ in _complete_saves(directory)})


def torn(directory: Path) -> dict[str, list[str]]:
    """What is missing or too short of checkpoints that were complete once, by name."""
    missing = {
        _save_folder(directory, *save): _missing_of(_save_folder(directory, *save)) for save in _saves(directory)
    }
    return {folder.name: names for folder, names in missing.items() if names}


def _save_folder(directory: Path, step: int, save: int) -> Path:
    """A step that is saved again (by a resumed run) gets a new name, so that the old one serves until then."""
    return directory / (f"step_{step:08d}.{save}" if save else f"step_{step:08d}")


def _complete_saves(directory: Path) -> list[tuple[int, int]]:
    """Those of `_saves` that have all their pieces."""
    return [save for save in _saves(directory) if not _missing_of(_save_folder(directory, *save))]


def _saves(directory: Path) -> list[tuple[int, int]]:
    """(step, how many times it had been saved before), in that order."""
    matches = (re.fullmatch(r"step_(\d+)(?:\.(\d+))?", path.name) for path in directory.glob("step_*"))
    return sorted((int(match[1]), int(match[2] or 0)) for match in matches if match)


def _pieces(folder: Path) -> dict[str, int]:
    """The files that hold the tensors, and how many bytes of each are used: what all ranks say that they wrote."""
    pieces: dict[str, int] = {}
    for place in dcp.FileSystemReader(folder).read_metadata().storage_data.values():
        pieces[place.relative_path] = max(pieces.get(place.relative_path, 0), place.offset + place.length)
    return pieces


def _missing_of(folder: Path) -> list[str]:
    """Names of the pieces that a checkpoint lacks."""
    state = folder / "state.json"
    if not state.is_file():
        return ["state.json"]
    return _missing(folder, json.loads(state.read_text()).get("pieces", {".metadata": 0}))


def _missing(folder: Path, pieces: Mapping[str, int]) -> list[str]:
    files = {name: folder / name for name in pieces}
    return [name for name, file in files.items() if not file.is_file() or file.stat().st_size < pieces[name]]


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
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for name, tensor in tensors.items():
        size = getattr(saved.get(name), "size", None)
        if size != tensor.shape:
            found = "is missing" if size is None else f"has shape {tuple(size)}"
            raise ValueError(
                f"checkpoint {folder} is of another model: tensor {name} {found}, expected {tuple(tensor.shape)}"
            )
    dcp.load(tensors, checkpoint_id=folder, process_group=group, no_dist=group is None)


def _write_synced(path: Path, content: bytes) -> None:
    """To the disk, not only the page cache: the rename that follows must not overtake it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())

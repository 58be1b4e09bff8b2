"""Groups in a file: what a checkpoint keeps of those that wait to be trained, and the record of a step.

    frame of JSON, the caller's own; then, for each message (common/wire.py), u32 number of frames, and these

A frame is u64 length, u32 CRC-32, bytes. All numbers are little-endian. Tokens, log-probs and versions lie there as
they travelled, 12 bytes a token.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from common.types import JSON, CompletedGroup, Lease, Message, TrajectoryGroup
from common.wire import Frame, WireError, decode, encode

_COUNT = struct.Struct("<I")
_FRAME = struct.Struct("<QI")


class ArchiveError(ValueError):
    """A file that is not what was written, or whose messages are of another version of the program."""


def write_archive(path: Path, about: JSON, messages: Iterable[Message]) -> None:
    """To the disk, not only the page cache."""
    with path.open("wb") as file:
        _write_frame(file, json.dumps(about).encode())
        for message in messages:
            frames = encode(message)
            file.write(_COUNT.pack(len(frames)))
            for frame in frames:
                _write_frame(file, frame)
        file.flush()
        os.fsync(file.fileno())


def read_about(path: Path) -> JSON:
    """The JSON of an archive alone. Raises ArchiveError."""
    with path.open("rb") as file:
        about: JSON = json.loads(_frame(file, path))
        return about


def read_archive(path: Path) -> tuple[JSON, list[Message]]:
    """Raises ArchiveError."""
    messages = []
    with path.open("rb") as file:
        about = json.loads(_frame(file, path))
        while start := file.read(_COUNT.size):
            frames = [_frame(file, path) for _ in range(_COUNT.unpack(_whole(start, _COUNT.size, path))[0])]
            try:
                messages.append(decode(frames, max_bytes=sum(map(len, frames))))
            except WireError as error:
                raise ArchiveError(f"{path} holds groups of another version of the program: {error}") from error
    return about, messages


def as_messages(groups: Iterable[TrajectoryGroup]) -> Iterable[Message]:
    """Lease and completions of each, in turn. Who sampled them is for `about`."""
    for group in groups:
        yield group.lease
        yield group.completed


def as_groups(messages: Sequence[Message], actors: Sequence[str], arrived_s: float) -> list[TrajectoryGroup]:
    """The groups that `as_messages` was given; `actors` are those who sampled them. Raises ArchiveError."""
    if len(messages) != 2 * len(actors):
        raise ArchiveError(f"there are {len(messages)} messages of {len(actors)} groups")
    groups = []
    for actor, lease, completed in zip(actors, messages[::2], messages[1::2], strict=True):
        if not isinstance(lease, Lease) or not isinstance(completed, CompletedGroup):
            raise ArchiveError(f"{type(lease).__name__} and {type(completed).__name__} are no group")
        groups.append(TrajectoryGroup(lease=lease, actor=actor, completed=completed, arrived_s=arrived_s))
    return groups


def renumbered(group: TrajectoryGroup, lease_id: int) -> TrajectoryGroup:
    """The same group under another lease id."""
    lease, completed = replace(group.lease, lease_id=lease_id), replace(group.completed, lease_id=lease_id)
    return replace(group, lease=lease, completed=completed)


def _write_frame(file: BinaryIO, frame: Frame) -> None:
    file.write(_FRAME.pack(len(frame), zlib.crc32(frame)))
    file.write(frame)


def _frame(file: BinaryIO, path: Path) -> bytes:
    length, checksum = _FRAME.unpack(_whole(file.read(_FRAME.size), _FRAME.size, path))
    if length > path.stat().st_size:  # damaged itself: nothing of that size is to be read
        raise ArchiveError(f"{path} is damaged: it ends too early")
    frame = _whole(file.read(length), length, path)
    if zlib.crc32(frame) != checksum:
        raise ArchiveError(f"{path} is damaged: it has other bytes than were written")
    return frame


def _whole(content: bytes, length: int, path: Path) -> bytes:
    if len(content) != length:
        raise ArchiveError(f"{path} is damaged: it ends too early")
    return content

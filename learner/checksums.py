"""Which files a checkpoint has and what was written to them: checksums.json, {name: [bytes, CRC-32]}, written last.

A file that is missing or of another size is found at a glance, and so are changed bytes of state.json, which is small
and tells what the checkpoint is of; those of the others by reading everything (2 GB/s a core). What cannot be read now
but may be whole, as while a file server restarts, is an OSError.
"""

import errno
import json
import stat
import zlib
from collections.abc import Collection, Iterable
from pathlib import Path

from common.causes import naming
from common.types import JSON
from learner.files import write_synced

MANIFEST = "checksums.json"
STATE = "state.json"
CHUNK_BYTES = 1 << 22
# What is said of a file that is not there, or that its disk does not give back.
_LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EIO)

Manifest = dict[str, list[int]]


def manifest_of(files: Iterable[Path]) -> Manifest:
    """Size and checksum of each, by name."""
    return {file.name: [file.stat().st_size, _crc32(file)] for file in files}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_synced(folder / MANIFEST, json.dumps(manifest).encode())


def file_names(folder: Path) -> list[str]:
    """The files of a checkpoint, sorted. Raises ValueError when its manifest is missing or damaged."""
    return sorted(_manifest(folder))


def absent(folder: Path) -> list[str]:
    """Files that a checkpoint lacks or that have another size than was written, and its state if that has changed."""
    try:
        manifest = _manifest(folder)
    except ValueError:
        return [MANIFEST]
    names = [name for name in manifest if _size(folder / name) != manifest[name][0]]
    return names if STATE in names or _holds(folder / STATE, manifest[STATE]) else [*names, STATE]


def changed(folder: Path, names: Collection[str]) -> list[str]:
    """Those of the files `names` that do not hold what was written. Reads them."""
    manifest = _manifest(folder)
    return [name for name in names if not _holds(folder / name, manifest[name])]


def _manifest(folder: Path) -> Manifest:
    """Raises ValueError for anything but what `write_manifest` writes."""
    try:
        manifest: JSON = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno not in _LOST:
            raise
        raise ValueError(f"{folder} has no {MANIFEST} that can be read") from error
    is_whole = (
        isinstance(manifest, dict)
        and STATE in manifest
        and all(isinstance(pair, list) and [type(value) for value in pair] == [int, int] for pair in manifest.values())
    )
    if not is_whole:
        raise ValueError(f"{folder / MANIFEST} is damaged")
    return manifest


def _size(file: Path) -> int | None:
    """None: there is no such file."""
    try:
        found = file.stat()
    except ValueError:  # a name that no file can have
        return None
    except OSError as error:
        if error.errno not in _LOST:
            raise
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _holds(file: Path, entry: list[int]) -> bool:
    """A file that is lost holds nothing."""
    try:
        return [file.stat().st_size, _crc32(file)] == entry
    except OSError as error:
        if error.errno not in _LOST:
            raise
        return False


def _crc32(file: Path) -> int:
    checksum = 0
    with naming(file), file.open("rb") as content:
        while chunk := content.read(CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum

"""Files that are whole or not there at all, whatever happens to the process that writes them."""

import os
from pathlib import Path


def write_synced(path: Path, content: bytes) -> None:
    """To the disk, not only the page cache: a rename that follows must not overtake it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_synced(path: Path, content: bytes) -> None:
    """`path` has either its old content or all of the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    write_synced(temporary, content)
    temporary.replace(path)

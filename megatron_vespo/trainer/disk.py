"""Files and directories that survive the loss of power: what has its final name is whole, and on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any


def to_disk(file: IO[Any]) -> None:
    """Wait until all that was written to an open file is on disk."""
    file.flush()
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """The same for a closed file, or for the names in a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def give_name(partial: Path, target: Path) -> None:
    """Rename a directory whose files are on disk, and wait until its name is too."""
    sync(partial)
    os.rename(partial, target)
    sync(target.parent)

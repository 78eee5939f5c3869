"""Whether files are still those that a program opened: a digest that is computed later must be of the same bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from common.io import InputError

FileState = tuple[int, ...]  # device, inode, size, time of the last change in ns


def file_state(file: str | bytes | Path | int) -> FileState | None:
    """Return what identifies the content of a file, given by path or descriptor, without reading it; None: no file."""
    try:
        found = os.stat(file)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def files_of(path: str | Path) -> list[Path]:
    """Return a file, or the files in a folder and its folders."""
    path = Path(path)
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


class Unchanged:
    """Notices when files are replaced or changed: made before they are opened, checked after their digest is known."""

    def __init__(self, paths: Iterable[str | Path]):
        self._states = {path: file_state(path) for path in paths}

    def check(self) -> None:
        """Raise InputError if one of the files was replaced or changed since."""
        for path, state in self._states.items():
            if file_state(path) != state:
                raise InputError(f"{path}: was replaced or changed while it was read; run the same command again")

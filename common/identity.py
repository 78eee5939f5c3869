"""Whether files are still those that a program opened, and whether a file is of a program's own kind.

A digest that is computed after reading must be of the bytes that were read. A program replaces only its own files, see
`common.io.check_writable`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from common.errors import InputError
from common.io import OwnFile, read_json

HEAD_BYTES = 1 << 20  # of a file, in which its kind is recognised
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
        self.paths = list(paths)
        self.before = self.now()

    def now(self) -> list[FileState | None]:
        """Return the states of the files."""
        return [file_state(path) for path in self.paths]

    def check(self) -> None:
        """Raise InputError if one of the files was replaced or changed since."""
        for path, before, now in zip(self.paths, self.before, self.now(), strict=True):
            if before != now:
                raise changed_error(path)


def changed_error(path: str | Path) -> InputError:
    """Return the error for a file that is not the one that was opened."""
    return InputError(f"{path}: was replaced or changed while it was read; run the same command again")


def own_json(description: str, *keys: str) -> OwnFile:
    """Return the kind of JSON files that hold an object with these keys."""

    def matches(path: Path) -> bool:
        try:
            content = read_json(path)
        except InputError:
            return False
        return isinstance(content, dict) and content.keys() >= set(keys)

    return OwnFile(description, matches)


def own_file(description: str, start: bytes = b"", contains: bytes = b"") -> OwnFile:
    """Return the kind of files that start with some bytes and contain others in their first MiB."""

    def matches(path: Path) -> bool:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
        return head.startswith(start) and contains in head

    return OwnFile(description, matches)


OWN_PNG = own_file("a PNG picture", start=b"\x89PNG\r\n\x1a\n")

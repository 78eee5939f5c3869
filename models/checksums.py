"""SHA-256 of files of weights: written next to them, and compared when they are read.

A single file has its checksum in FILE.sha256, a folder has those of its files in checksums.sha256. Both have the format
of `sha256sum --check`. A file without a checksum, such as a published one, is accepted.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, TypeVar

from common.errors import InputError
from common.io import HASH_BLOCK, open_regular, sha256_of
from common.temporary import atomic_write

FOLDER_CHECKSUMS = "checksums.sha256"
LINE = re.compile(r"\\?([0-9a-fA-F]{64})(?: [ *](.+))?")  # sha256sum writes \ before lines with an escaped name
ATTEMPTS = 5  # to read a file that other processes replace

T = TypeVar("T")


class HashingFile(io.RawIOBase):
    """Writes to an open file and computes the SHA-256 of the written bytes."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)


def checksum_path(path: Path) -> Path:
    """Return the path of a single file's checksum."""
    return path.with_name(path.name + ".sha256")


def write_checksum(path: Path, digest: str) -> None:
    """Write the checksum of a single file."""
    with atomic_write(checksum_path(path), "w") as file:
        file.write(f"{digest}  {path.name}\n")


def write_folder_checksums(folder: Path, names: Iterable[str]) -> None:
    """Write the checksums of files in a folder, which `names` gives relative to it."""
    with atomic_write(folder / FOLDER_CHECKSUMS, "w") as file:
        file.writelines(f"{sha256_of(folder / name)}  {name}\n" for name in names)


def recorded_checksum(path: Path) -> tuple[str, Path] | None:
    """Return the checksum that was written for a file and the file that contains it; None if there is none.

    Looked up in FILE.sha256, in checksums.sha256 of the file's folder, and in that of the folder above.
    Raises InputError if FILE.sha256, or checksums.sha256 of the file's folder, contains no checksum.
    """
    own, folder, above = checksum_path(path), path.parent / FOLDER_CHECKSUMS, path.parent.parent / FOLDER_CHECKSUMS
    for place, name in ((own, path.name), (folder, path.name), (above, f"{path.parent.name}/{path.name}")):
        if not place.is_file():
            continue
        with open(place, encoding="utf-8-sig", errors="replace") as file:
            found = [line for text in file if (line := LINE.fullmatch(text.rstrip()))]
        if not found and place != above:
            raise InputError(f"{place}: damaged; expected lines of sha256sum, a checksum and a name")
        for line in found:
            if place == own or line[2] == name:  # a file may be renamed together with its own checksum
                return line[1].lower(), place
    return None


def digest_of(file: IO[bytes]) -> str:
    """Return the hexadecimal SHA-256 of an open file's bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(HASH_BLOCK):
        digest.update(block)
    file.seek(0)
    return digest.hexdigest()


def verify(file: IO[bytes], path: Path) -> str | None:
    """Compare an open file with its recorded checksum; return its SHA-256, or None if none is recorded.

    `path` is the name under which the file was opened.
    Raises InputError, naming both, if they differ.
    """
    if (recorded := recorded_checksum(path)) is None:
        return None
    if (digest := digest_of(file)) != recorded[0]:
        raise InputError(f"{path}: damaged; its SHA-256 is {digest}, but {recorded[1]} has {recorded[0]}")
    return digest


def verify_file(path: Path) -> None:
    """Compare a file with its recorded checksum, if there is one; see `verify`."""
    if recorded_checksum(path) is not None:
        with open(path, "rb") as file:
            verify(file, path)


def read_open(path: Path, read: Callable[[IO[bytes]], T]) -> T:
    """Return `read(file)` for the file that has this name now, again if another file gets the name and reading fails.

    best.pt and its checksum are two files: a process that replaces them does not do so at one moment.
    """
    for _ in range(ATTEMPTS):
        try:
            file = open_regular(path)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        with file:
            try:
                return read(file)
            except InputError:
                if path.is_file() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    raise
    raise InputError(f"{path}: is replaced again and again while it is read; give a file that does not change")

"""Data sets on disk: the names of their files, their dataset.json, and reading them from a folder or a zip.

images   00001/img00001234.png
latents  00001/img-mean-std-00001234.npy, of the mirrored image 00001/img-mean-std-flip-00001234.npy
tokens   00001/img-tokens-00001234.npy, of the mirrored image 00001/img-tokens-flip-00001234.npy
"""

from __future__ import annotations

import bisect
import contextlib
import math
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from common.classes import MAX_CLASSES
from common.errors import InputError, printable
from common.io import open_regular, parse_json, read_file
from common.packed import explain_packed
from common.zip_files import (
    MAX_NAME,
    MEMBER,
    SYSTEM_FOLDERS,
    encode_name,
    read_member,
    zip_members,
)

FILES_PER_FOLDER = 1000
IMAGE_NAME = re.compile(r"(?:.*/)?img(\d+)\.png")
LATENT_NAME = re.compile(r"(?:.*/)?img-mean-std-(\d+)\.npy")
TOKENS_NAME = re.compile(r"(?:.*/)?img-tokens-(\d+)\.npy")
THREADS, THREAD_CHUNK = 16, 250  # of `map_files`

HEAD_BYTES, MAX_HEAD_MEMBER = 32, 1 << 26  # of `head`: enough to recognize a format; the largest member it unpacks
MAX_VISITS = 1000  # of one folder through links; links between a few folders can make millions of paths
SHOWN = 100  # characters of a wrong value in a message
_SYSTEM_FOLDERS = {name.encode() for name in SYSTEM_FOLDERS}


def image_name(index: int) -> str:
    """Return the name of an image in its data set: index 1234 is 00001/img00001234.png."""
    return f"{index // FILES_PER_FOLDER:05d}/img{index:08d}.png"


def latents_name(index: int) -> str:
    """Return the name of an image's latents: index 1234 is 00001/img-mean-std-00001234.npy."""
    return f"{index // FILES_PER_FOLDER:05d}/img-mean-std-{index:08d}.npy"


def tokens_name(index: int) -> str:
    """Return the name of an image's encoder tokens: index 1234 is 00001/img-tokens-00001234.npy."""
    return f"{index // FILES_PER_FOLDER:05d}/img-tokens-{index:08d}.npy"


def mirrored_name(name: str) -> str:
    """Return the name of the mirrored image's latents or tokens, which are in the same folder."""
    return re.sub(r"img-(mean-std|tokens)-(?=[^/]*$)", r"img-\1-flip-", name)


def read_dataset_json(source: FileSource) -> dict[str, Any]:
    """Return the content of a data set's dataset.json, {} if there is none.

    Raises InputError if it is not an object, or if a folder below contains a dataset.json: then a data set's folder was
    packed or copied instead of its content, and to ignore its labels and codec would be wrong.
    """
    if deeper := source.find_below("dataset.json"):
        also = f" in addition to {source.describe('dataset.json')}" if "dataset.json" in source else ""
        where = f"{source.describe(deeper[0])}: found{also}; expected only at the top of {source.path}"
        folder = printable(deeper[0].rpartition("/")[0])
        move = (
            f"pack the content of {folder} without this folder"
            if source.is_zip
            else f"move its content to {source.path}"
        )
        use = "" if source.is_zip else f"use {source.path / folder}, "
        raise InputError(f"{where}; {use}{move}, or remove this file")
    return source.load("dataset.json", _json_object) if "dataset.json" in source else {}


def _json_object(data: bytes) -> dict[str, Any]:
    content = parse_json(data)
    if not isinstance(content, dict):
        raise InputError('must be a JSON object, {"labels": [[name, label], ...]}')
    return content


def label_entries(content: dict[str, Any], where: str) -> list[tuple[str, int]]:
    """Return the [name, label] entries in the content of a dataset.json; [] if its labels are null or missing.

    Raises InputError, starting with `where`, if an entry is not [name, label], a name is too long, or a label is out of
    range.
    """
    entries = content.get("labels")
    if entries is None:
        return []
    if not isinstance(entries, list):
        raise InputError(f"{where}: labels is {entries!r:.50}; expected a list of [name, label]")
    for entry in entries:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            shown = f"{entry!r:.{SHOWN}}"
            raise InputError(f'{where}: label entry {shown}; expected [name, label], ["00000/img00000000.png", 6]')
        name, label = entry
        if len(name) > MAX_NAME:
            raise InputError(f"{where}: the name {name!r:.{SHOWN}} has {len(name):,} characters; allowed: {MAX_NAME:,}")
        if type(label) is not int or not 0 <= label < MAX_CLASSES:  # isinstance would allow True and False
            wrong = f"{printable(name)} has label {label!r:.{SHOWN}}"
            raise InputError(f"{where}: {wrong}; allowed: integers from 0 to {MAX_CLASSES - 1:,}")
    return entries


def map_files(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[list[Any]]:
    """Yield lists of `function(item)` in order. Threads call it: a network file system takes about 1 ms per file."""
    chunks = [items[start : start + THREAD_CHUNK] for start in range(0, len(items), THREAD_CHUNK)]
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(lambda chunk: [function(item) for item in chunk], chunks)


class FileSource:
    """The files of a folder or a zip, by their relative names with forward slashes. Hidden files are ignored.

    Links to files that do not exist are among the names; to read them is an error. Names that are not UTF-8 have
    Python's surrogate escapes, in any locale.

    Attributes:
        path, is_zip: of the source.
        dead_links: names of links whose target does not exist or cannot be reached.
        empty_folders: names of folders that contain no files and no folders.

    It is made for millions of files and many worker processes. File names and the zip's directory are numpy arrays,
    because forked processes share an array's memory but copy Python objects when they access them. Files in a zip are
    read with `os.pread`, so threads and processes do not share a file position.
    Raises InputError if `path` is not a readable folder or zip, or if a zip contains two files of the same name or a
    path that leads outside of a folder.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._descriptor: int | None = None
        self.dead_links: list[str] = []
        self.empty_folders: list[str] = []
        self._visits: Counter[tuple[int, int]] = Counter()  # of folders, by their identity
        try:
            self.is_zip = self.path.is_file()
            if self.is_zip:
                members, self.empty_folders = zip_members(self.path)
                encoded = {encode_name(name): member for name, member in members.items()}
                keys = sorted(encoded)
                self._members = np.array([encoded[key] for key in keys], dtype=MEMBER)
            elif self.path.is_dir():
                keys = sorted(self._walk(os.fsencode(self.path)))
            elif self.path.is_symlink():
                raise InputError(f"{self.path}: {describe_dead_link(self.path)}")
            else:
                problem = "is not a folder or a regular file" if self.path.exists() else "no such folder or zip file"
                raise InputError(f"{self.path}: {problem}")
        except zipfile.BadZipFile as error:
            packed = None if self.path.suffix.lower() == ".zip" else explain_packed(self.path)
            problem = packed or "not a readable zip file; allowed: a folder, or a complete zip"
            raise InputError(f"{self.path}: {problem}") from error
        except OSError as error:
            place = printable(os.fsdecode(error.filename or self.path))
            raise InputError(f"{place}: cannot be read ({error.strerror})") from error
        self._names = np.array(keys, dtype=np.bytes_)
        self.dead_links.sort()
        self.empty_folders.sort()

    @property
    def names(self) -> list[str]:
        """All names, sorted; a new list each time."""
        return [decode_name(name) for name in self._names]

    def find_below(self, name: str) -> list[str]:
        """Return the files of this name that are in folders of the source."""
        if not len(self._names):
            return []
        found = np.char.endswith(self._names, encode_name(f"/{name}"))
        return [decode_name(key) for key in self._names[found]]

    def file_path(self, name: str) -> bytes:
        """Return the path of a file in a folder. Its type is bytes, so that it does not depend on the locale."""
        return os.path.join(os.fsencode(self.path), encode_name(name))

    def __contains__(self, name: str) -> bool:
        return self._index(name) is not None

    def size(self, name: str) -> int:
        """Return the (uncompressed) size of a file in bytes. Raises InputError if the file does not exist."""
        with self._naming(name):
            return int(self._member(name)["size"]) if self.is_zip else os.stat(self.file_path(name)).st_size

    def changed(self, name: str) -> float:
        """Return when a file or its link, or the zip, was changed last, in seconds; infinity if it does not exist."""
        return changed_at(self.path if self.is_zip else self.file_path(name))

    def describe(self, name: str) -> str:
        """Return a file's path for messages, without control characters; in a zip, archive.zip:member."""
        return printable(f"{self.path}:{name}" if self.is_zip else str(self.path / name))

    def read(self, name: str) -> bytes:
        """Return the bytes of a file. Raises InputError, naming the file, if it cannot be read or is too large."""
        with self._naming(name):
            return self._read_member(name) if self.is_zip else read_file(self.file_path(name))

    def head(self, name: str) -> bytes:
        """Return the first bytes of a file, b"" if it cannot be read. Of a zip, only files up to 64 MiB are read."""
        try:
            if self.is_zip:
                return self.read(name)[:HEAD_BYTES] if self.size(name) <= MAX_HEAD_MEMBER else b""
            with open_regular(self.file_path(name)) as file:
                return file.read(HEAD_BYTES)
        except (InputError, OSError):
            return b""

    def tail(self, name: str, count: int) -> bytes:
        """Return the last `count` bytes of a file in a folder. Raises InputError, naming it, if it cannot be read."""
        with self._naming(name), open_regular(self.file_path(name)) as file:
            file.seek(-min(count, file.seek(0, os.SEEK_END)), os.SEEK_END)
            return file.read(count)

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Raise errors of the block as InputError that names the file."""
        try:
            yield
        except InputError as error:
            raise InputError(f"{self.describe(name)}: {error}") from error
        except OSError as error:
            path, reason = None if self.is_zip else self.file_path(name), f"cannot be read ({error.strerror})"
            if path and os.path.islink(path) and not os.path.exists(path):
                reason = describe_dead_link(path)
            raise InputError(f"{self.describe(name)}: {reason}") from error

    def load(self, name: str, decode: Callable[[bytes], Any]) -> Any:
        """Return `decode(bytes of a file)`. Its ValueErrors are raised as InputError, with the file's path in front."""
        data = self.read(name)
        try:
            return decode(data)
        except ValueError as error:
            raise InputError(f"{self.describe(name)}: {error}") from error

    def _index(self, name: str) -> int | None:
        try:
            key = encode_name(name)
        except UnicodeEncodeError:  # of a dataset.json; no file can have this name
            return None
        index = bisect.bisect_left(self._names, key)
        return index if index < len(self._names) and self._names[index] == key else None

    def _member(self, name: str) -> np.void:
        index = self._index(name)
        if index is None:
            raise InputError("no such file in the zip")
        return self._members[index]

    def _read_member(self, name: str) -> bytes:
        member = self._member(name)
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        return read_member(self._descriptor, member, encode_name(name))

    def _walk(self, folder: bytes, prefix: bytes = b"", parents: frozenset[tuple[int, int]] = frozenset()) -> Iterator:
        """Yield the names (bytes) of the files below a folder, following links; note dead links and empty folders.

        `os.scandir` gives names and types without a request per file, which would be slow on a network file system.
        """
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in parents:
            raise InputError(f"{printable(os.fsdecode(folder))}: is a link to a folder that contains it")
        self._visits[identity] += 1
        if self._visits[identity] > MAX_VISITS:
            raise InputError(f"{printable(os.fsdecode(folder))}: more than {MAX_VISITS:,} paths of links lead to it")
        is_empty = True
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(b".") or entry.name in _SYSTEM_FOLDERS:
                    continue
                is_empty = False
                if len(prefix) + len(entry.name) > MAX_NAME:
                    problem = f"its path below {self.path} is too long; allowed: {MAX_NAME:,} bytes"
                    raise InputError(f"{printable(os.fsdecode(entry.path)):.{SHOWN}}...: {problem}")
                if _is_dead_link(entry):
                    self.dead_links.append(decode_name(prefix + entry.name))
                    yield prefix + entry.name
                elif entry.is_dir():
                    yield from self._walk(entry.path, prefix + entry.name + b"/", parents | {identity})
                else:  # a file; reading a fifo or a device is an error
                    yield prefix + entry.name
        if is_empty and prefix:
            self.empty_folders.append(decode_name(prefix[:-1]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}


def changed_at(path: str | Path | bytes) -> float:
    """Return when a file was changed last, in seconds; infinity if it does not exist.

    It is the time of the file system's entry (ctime): copying a file with its old modification time changes it as well.
    """
    try:
        return max(os.stat(path).st_ctime, os.lstat(path).st_ctime)
    except OSError:
        return math.inf


def describe_dead_link(path: str | Path | bytes) -> str:
    """Return what is wrong with a link whose target cannot be reached."""
    return f"is a link to {printable(os.fsdecode(os.readlink(path)))}, which does not exist or cannot be reached"


def decode_name(name: bytes) -> str:
    """Return the file name of these bytes."""
    return name.decode("utf-8", "surrogateescape")


def encode_names(names: list[str]) -> np.ndarray:
    """Return file names as an array of bytes, which forked processes share."""
    return np.array([encode_name(name) for name in names], dtype=np.bytes_)


def _is_dead_link(entry: os.DirEntry) -> bool:
    if not entry.is_symlink():
        return False
    try:
        return not (entry.is_file() or entry.is_dir() or os.path.exists(entry.path))
    except OSError:  # a loop of links, or no permission
        return True

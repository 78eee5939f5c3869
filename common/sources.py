"""Data sets on disk: the names of their files, their dataset.json, and reading them from a folder or a zip.

images   00001/img00001234.png
latents  00001/img-mean-std-00001234.npy, of the mirrored image 00001/img-mean-std-flip-00001234.npy
"""

from __future__ import annotations

import bisect
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from common.io import InputError, parse_json, printable
from common.packed import explain_packed

FILES_PER_FOLDER = 1000
IMAGE_NAME = re.compile(r"(?:.*/)?img(\d+)\.png")
LATENT_NAME = re.compile(r"(?:.*/)?img-mean-std-(\d+)\.npy")
MAX_CLASSES = 10_000_000  # the network has an embedding per class: a larger label is a mistake and would need gigabytes

THREADS, THREAD_CHUNK = 16, 250  # of `map_files`

# Absolute paths, drives of Windows, and paths with the part "..".
UNSAFE_PATH = re.compile(r"[/\\]|[A-Za-z]:|(?:.*[/\\])?\.\.(?:[/\\]|$)", re.DOTALL)
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
_SYSTEM_FOLDERS = {name.encode() for name in SYSTEM_FOLDERS}
HEAD_BYTES, MAX_HEAD_MEMBER = 32, 1 << 26  # of `head`: enough to recognize a format; the largest member it unpacks
ZIP_HEADER_BYTES = 30  # of a member, without its name and extra field
ZIP_NAME_BYTES = 512  # read in advance for name and extra field; longer ones need a second read
ZIP_MEMBER = np.dtype(
    [("offset", "u8"), ("compressed", "u8"), ("size", "u8"), ("crc", "u4"), ("method", "u2"), ("encrypted", "?")]
)


def image_name(index: int) -> str:
    """Return the name of an image in its data set: index 1234 is 00001/img00001234.png."""
    return f"{index // FILES_PER_FOLDER:05d}/img{index:08d}.png"


def latents_name(index: int) -> str:
    """Return the name of an image's latents: index 1234 is 00001/img-mean-std-00001234.npy."""
    return f"{index // FILES_PER_FOLDER:05d}/img-mean-std-{index:08d}.npy"


def mirrored_name(name: str) -> str:
    """Return the name of the mirrored image's latents, which are in the same folder."""
    return re.sub(r"img-mean-std-(?=[^/]*$)", "img-mean-std-flip-", name)


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

    Raises InputError, starting with `where`, if an entry is not [name, label] or a label is out of range.
    """
    entries = content.get("labels")
    if entries is None:
        return []
    if not isinstance(entries, list):
        raise InputError(f"{where}: labels is {entries!r:.50}; expected a list of [name, label]")
    for entry in entries:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise InputError(f'{where}: label entry {entry!r}; expected [name, label], ["00000/img00000000.png", 6]')
        name, label = entry
        if type(label) is not int or not 0 <= label < MAX_CLASSES:  # isinstance would allow True and False
            raise InputError(f"{where}: {name} has label {label!r}; allowed: integers from 0 to {MAX_CLASSES - 1:,}")
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
        self.is_zip = self.path.is_file()
        self._descriptor: int | None = None
        self.dead_links: list[str] = []
        self.empty_folders: list[str] = []
        try:
            if self.is_zip:
                members, self.empty_folders = _zip_members(self.path)
                keys = sorted(map(encode_name, members))
                self._members = np.array([members[decode_name(key)] for key in keys], dtype=ZIP_MEMBER)
            elif self.path.is_dir():
                keys = sorted(self._walk(os.fsencode(self.path)))
            elif self.path.is_symlink():
                raise InputError(f"{self.path}: {describe_dead_link(self.path)}")
            else:
                raise InputError(f"{self.path}: no such folder or zip file")
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
        if self.is_zip:
            return int(self._member(name)["size"])
        try:
            return os.stat(self.file_path(name)).st_size
        except OSError as error:
            raise InputError(f"{self.describe(name)}: {self._why(name, error)}") from error

    def describe(self, name: str) -> str:
        """Return a file's path for messages, without control characters; in a zip, archive.zip:member."""
        return printable(f"{self.path}:{name}" if self.is_zip else str(self.path / name))

    def read(self, name: str) -> bytes:
        """Return the bytes of a file. Raises InputError, naming the file, if it cannot be read."""
        try:
            if self.is_zip:
                return self._read_member(name)
            with open(self.file_path(name), "rb") as file:
                return file.read()
        except OSError as error:
            raise InputError(f"{self.describe(name)}: {self._why(name, error)}") from error
        except zlib.error as error:
            raise InputError(f"{self.describe(name)}: damaged, it cannot be decompressed") from error

    def head(self, name: str) -> bytes:
        """Return the first bytes of a file, b"" if it cannot be read. Of a zip, only files up to 64 MiB are read."""
        try:
            if self.is_zip:
                return self.read(name)[:HEAD_BYTES] if self.size(name) <= MAX_HEAD_MEMBER else b""
            with open(self.file_path(name), "rb") as file:
                return file.read(HEAD_BYTES)
        except (InputError, OSError):
            return b""

    def _why(self, name: str, error: OSError) -> str:
        """Return why a file cannot be read."""
        if not self.is_zip and os.path.islink(self.file_path(name)) and not os.path.exists(self.file_path(name)):
            return describe_dead_link(self.file_path(name))
        return f"cannot be read ({error.strerror})"

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
            raise InputError(f"{self.describe(name)}: no such file in the zip")
        return self._members[index]

    def _read_member(self, name: str) -> bytes:
        """Return a member's bytes (APPNOTE.TXT, 4.3.7: a header of 30 bytes, name, extra field, then the data)."""
        member = self._member(name)
        if member["encrypted"] or member["method"] not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            kind = "encrypted" if member["encrypted"] else f"compressed with method {member['method']}"
            raise InputError(f"{self.describe(name)}: {kind}; allowed: stored, deflated")
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        offset, length = int(member["offset"]), int(member["compressed"])
        block = os.pread(self._descriptor, ZIP_HEADER_BYTES + ZIP_NAME_BYTES + length, offset)
        start = ZIP_HEADER_BYTES + int.from_bytes(block[26:28], "little") + int.from_bytes(block[28:30], "little")
        data = block[start : start + length]
        if len(data) < length:
            data += os.pread(self._descriptor, length - len(data), offset + start + len(data))
        if member["method"] == zipfile.ZIP_DEFLATED:
            data = zlib.decompress(data, -zlib.MAX_WBITS)
        if block[:4] != b"PK\3\4" or len(data) != member["size"] or zlib.crc32(data) != member["crc"]:
            raise InputError(f"{self.describe(name)}: damaged, its checksum does not match")
        return data

    def _walk(self, folder: bytes, prefix: bytes = b"", parents: frozenset[tuple[int, int]] = frozenset()) -> Iterator:
        """Yield the names (bytes) of the files below a folder, following links; note dead links and empty folders.

        `os.scandir` gives names and types without a request per file, which would be slow on a network file system.
        """
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in parents:
            raise InputError(f"{printable(os.fsdecode(folder))}: is a link to a folder that contains it")
        is_empty = True
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(b".") or entry.name in _SYSTEM_FOLDERS:
                    continue
                is_empty = False
                if _is_dead_link(entry):
                    self.dead_links.append(decode_name(prefix + entry.name))
                    yield prefix + entry.name
                elif entry.is_file():
                    yield prefix + entry.name
                elif entry.is_dir():
                    yield from self._walk(entry.path, prefix + entry.name + b"/", parents | {identity})
        if is_empty and prefix:
            self.empty_folders.append(decode_name(prefix[:-1]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}


def describe_dead_link(path: str | Path | bytes) -> str:
    """Return what is wrong with a link whose target cannot be reached."""
    return f"is a link to {printable(os.fsdecode(os.readlink(path)))}, which does not exist or cannot be reached"


def encode_name(name: str) -> bytes:
    """Return the bytes of a file name on the disk: UTF-8, and the original bytes of names that are not UTF-8."""
    return name.encode("utf-8", "surrogateescape")


def decode_name(name: bytes) -> str:
    """Return the file name of these bytes."""
    return name.decode("utf-8", "surrogateescape")


def encode_names(names: list[str]) -> np.ndarray:
    """Return file names as an array of bytes, which forked processes share."""
    return np.array([encode_name(name) for name in names], dtype=np.bytes_)


def is_hidden(part: str) -> bool:
    """Return whether a file or folder of this name is ignored: hidden, or made by an operating system for itself."""
    return part.startswith(".") or part in SYSTEM_FOLDERS


def _is_dead_link(entry: os.DirEntry) -> bool:
    if not entry.is_symlink():
        return False
    try:
        return not (entry.is_file() or entry.is_dir() or os.path.exists(entry.path))
    except OSError:  # a loop of links, or no permission
        return True


def _zip_members(path: Path) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Return the files of a zip by name, as elements of ZIP_MEMBER, and the empty folders."""
    members: dict[str, tuple[int, ...]] = {}
    folders: set[str] = set()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename
            if UNSAFE_PATH.match(name):
                raise InputError(f"{path}: member {name!r} is an absolute or parent path; create the zip again")
            if any(map(is_hidden, name.split("/"))):
                continue
            if name.endswith("/"):
                folders.add(name.rstrip("/"))
                continue
            if name in members:
                raise InputError(f"{path}: contains {name!r} more than once; create the zip again")
            sizes, encrypted = (info.compress_size, info.file_size), info.flag_bits & 1
            members[name] = (info.header_offset, *sizes, info.CRC, info.compress_type, encrypted)
    return members, sorted(folders - folders_above([*members, *folders]))


def folders_above(names: Iterable[str]) -> set[str]:
    """Return every folder that contains one of the names, directly or in a folder of it; "" is not among them."""
    folders: set[str] = set()
    for name in names:
        folder = name.rpartition("/")[0]
        while folder and folder not in folders:
            folders.add(folder)
            folder = folder.rpartition("/")[0]
    return folders

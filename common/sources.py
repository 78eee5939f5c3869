"""The names of a data set's files, and the labels that its dataset.json gives them.

images   00001/img00001234.png
latents  00001/img-mean-std-00001234.npy, beside it 00001/img-mean-std-flip-00001234.npy of the mirrored image
"""

from __future__ import annotations

import bisect
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.io import InputError

FILES_A_FOLDER = 1000
IMAGE_NAME = re.compile(r"(?:.*/)?img(\d+)\.png")
LATENT_NAME = re.compile(r"(?:.*/)?img-mean-std-(\d+)\.npy")
MAX_CLASSES = 10_000_000  # each gets a row of the network's table: a label beyond is a slip, and a table of gigabytes


def image_name(index: int) -> str:
    """Return an image's name within its data set: index 1234 is 00001/img00001234.png."""
    return f"{index // FILES_A_FOLDER:05d}/img{index:08d}.png"


def latents_name(index: int) -> str:
    """Return the name of an image's latents: index 1234 is 00001/img-mean-std-00001234.npy."""
    return f"{index // FILES_A_FOLDER:05d}/img-mean-std-{index:08d}.npy"


def mirrored_name(name: str) -> str:
    """Return the name of the mirrored image's latents, which lie beside the plain ones, wherever those are."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.replace("img-mean-std-", "img-mean-std-flip-")


def label_entries(content: dict[str, Any], where: str) -> list[tuple[str, int]]:
    """Return names and labels that the content of a dataset.json lists, none where its labels are null or missing.

    Raises InputError, beginning with `where`, for entries that are not [name, label] and for labels that cannot be.
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
        if type(label) is not int or not 0 <= label < MAX_CLASSES:  # to isinstance, a bool is an int
            allowed = f"whole numbers from 0 to {MAX_CLASSES - 1:,}"
            raise InputError(f"{where}: {name} has label {label!r}; allowed: {allowed}")
    return entries


HEADER_BYTES = 30  # of a zip's member, before its name
HEADER_ROOM = 512  # for name and extra field: what is longer takes a second read
MEMBER = np.dtype(
    [("place", "u8"), ("length", "u8"), ("size", "u8"), ("crc", "u4"), ("method", "u2"), ("encrypted", "?")]
)


class FileSource:
    """The files of a folder or of a zip, by relative name with forward slashes. Hidden files do not count.

    Made for millions of files and many worker processes: names, and a zip's directory, are arrays, which forked
    processes go on sharing (a Python object is copied as soon as it is looked at), and reading needs no file offset.

    Raises:
        InputError: there is neither a folder nor a zip at `path`, it cannot be read, or two members have one name.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.is_zip = self.path.is_file()
        self._descriptor: int | None = None
        try:
            if self.is_zip:
                with zipfile.ZipFile(self.path) as archive:
                    members = _members(archive, self.path)
                names = sorted(members)
                self._members = np.array([_place(members[name]) for name in names], dtype=MEMBER)
            elif self.path.is_dir():
                names = sorted(_walk(self.path))
            else:
                raise InputError(f"{self.path}: no such folder or zip file")
        except zipfile.BadZipFile as error:
            raise InputError(f"{self.path}: not a readable zip file ({error})") from error
        except OSError as error:
            raise InputError(f"{error.filename or self.path}: cannot be read ({error.strerror})") from error
        self._names = encode_names(names)

    @property
    def names(self) -> list[str]:
        """All names, sorted; a new list each time."""
        return [decode_name(name) for name in self._names]

    def __contains__(self, name: str) -> bool:
        return self._index(name) is not None

    def size(self, name: str) -> int:
        """Return the file's length in bytes (uncompressed, in a zip). Raises InputError if it is not there."""
        if self.is_zip:
            return int(self._member(name)["size"])
        try:
            return (self.path / name).stat().st_size
        except OSError as error:
            raise InputError(f"{self.describe(name)}: cannot be read ({error.strerror})") from error

    def describe(self, name: str) -> str:
        """Return the name as an error message should show it: a path, or archive.zip:member."""
        return f"{self.path}:{name}" if self.is_zip else str(self.path / name)

    def read(self, name: str) -> bytes:
        """Return the file's bytes. Raises InputError, naming the file, if it cannot be read."""
        try:
            return self._read_member(name) if self.is_zip else (self.path / name).read_bytes()
        except (OSError, zlib.error) as error:
            raise InputError(f"{self.describe(name)}: cannot be read ({error})") from error

    def _index(self, name: str) -> int | None:
        key = encode_name(name)
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
            kind = "encrypted" if member["encrypted"] else f"packed by method {member['method']}"
            raise InputError(f"{self.describe(name)}: {kind}; allowed: stored, deflated")
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        place, length = int(member["place"]), int(member["length"])
        block = os.pread(self._descriptor, HEADER_BYTES + HEADER_ROOM + length, place)
        start = HEADER_BYTES + int.from_bytes(block[26:28], "little") + int.from_bytes(block[28:30], "little")
        data = block[start : start + length]
        if len(data) < length:
            data += os.pread(self._descriptor, length - len(data), place + start + len(data))
        if member["method"] == zipfile.ZIP_DEFLATED:
            data = zlib.decompress(data, -zlib.MAX_WBITS)
        if block[:4] != b"PK\3\4" or len(data) != member["size"] or zlib.crc32(data) != member["crc"]:
            raise InputError(f"{self.describe(name)}: damaged, its checksum does not fit")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """Return a zip's files by name. Raises InputError if two have the same."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if _is_visible_file(info.filename) and members.setdefault(info.filename, info) is not info:
            raise InputError(f"{path}: holds {info.filename!r} more than once; pack it anew")
    return members


def _place(info: zipfile.ZipInfo) -> tuple[int, ...]:
    """Return a row of MEMBER."""
    encrypted = info.flag_bits & 1
    return info.header_offset, info.compress_size, info.file_size, info.CRC, info.compress_type, encrypted


def encode_names(names: list[str]) -> np.ndarray:
    """Return file names as an array of bytes, which forked processes share; `decode_name` gives one back."""
    return np.array([encode_name(name) for name in names], dtype=np.bytes_)


def encode_name(name: str) -> bytes:
    """Return a file name as bytes, whatever is in it; sorted names stay sorted."""
    return name.encode("utf-8", "surrogateescape")


def decode_name(name: bytes) -> str:
    """Return the file name that `encode_name` made bytes of."""
    return name.decode("utf-8", "surrogateescape")


def read_dataset_json(source: FileSource) -> dict[str, Any]:
    """Return the content of a data set's dataset.json, {} if it has none. Raises InputError if it is not an object."""
    if "dataset.json" not in source:
        return {}
    where = source.describe("dataset.json")
    try:
        content = json.loads(source.read("dataset.json"))
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f'{where}: must be a JSON object, {{"labels": [[name, label], ...]}}')
    return content


def _is_visible_file(name: str) -> bool:
    return not name.endswith("/") and not any(part.startswith(".") for part in name.split("/"))


def _walk(folder: Path | str, prefix: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Yield the names of the files below a folder, links followed. Files are not looked at, which takes long on
    network file systems.
    """
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise InputError(f"{folder}: a link to a folder that it lies in")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_file():
                yield prefix + entry.name
            elif entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/", above | {here})

"""Reads and writes NumPy's .npz files without holding all images in memory.

Files from elsewhere are not trusted: nothing is unpickled, every array's type and size are checked before it is read,
checksums are verified, and an array that unpacks to an implausible size is refused. A file is opened once, so that
header, content and SHA-256 are of the same bytes, also if another file gets its name in the meantime.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError, printable
from common.identity import FileState, file_state
from common.io import HASH_BLOCK
from common.npy import NpyHeader, parse_header
from common.progress import progress_bar
from common.zip_files import complete_directory

MAX_RATIO = 500  # unpacked / packed size; deflate reaches 1032 on constant bytes, images stay far below
SMALL = 1 << 28  # bytes; arrays up to this size are allowed to have any ratio
MAX_HEADER = 10_000  # bytes of an array's header, NumPy's own limit; usual are 118
MAX_MEMBERS = 1000  # arrays in a file; references have 10
MAX_TEXT = 1000  # characters of a text in an .npz: names of networks

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # unpacking the others has no size limit
_ZIP_ERRORS = (struct.error, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)
_READ_ERRORS = (OSError, ValueError, OverflowError, *_ZIP_ERRORS)
_ENCRYPTED = 1  # flag of a zip's member


class NpzFile:
    """The arrays of an .npz file. All methods raise InputError, naming the file, if it is damaged."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_file():
            raise InputError(f"{self.path}: is not a file; expected an .npz file")
        try:
            self._archive = zipfile.ZipFile(self.path)
            self._descriptor = self._archive.fp.fileno()
            infos = complete_directory(self._archive)
            for info in infos[:MAX_MEMBERS]:
                if _can_be_unpacked(info):
                    self._archive.open(info).close()  # compares the name at the array with that in the directory
        except FileNotFoundError as error:
            raise InputError(f"{self.path}: no such file") from error
        except _READ_ERRORS as error:
            raise InputError(f"{self.path}: not an .npz file, or cut short") from error
        if len(infos) > MAX_MEMBERS:
            raise InputError(f"{self.path}: contains {len(infos):,} arrays; allowed: {MAX_MEMBERS:,}")
        self._members = {info.filename.removesuffix(".npy"): info for info in infos}
        if len(self._members) < len(infos):
            raise InputError(f"{self.path}: contains two arrays of the same name; write it again")

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def state(self) -> FileState | None:
        """Return what identifies the content of the open file, see `file_state`."""
        return file_state(self._descriptor)

    def header(self, name: str) -> NpyHeader:
        """Return an array's header. Raises InputError if it holds pickles, is cut short, or is a zip bomb."""
        info = self._plausible_member(name)
        try:
            with self._archive.open(info) as member:
                header = parse_header(member.read(MAX_HEADER))
        except (InputError, *_READ_ERRORS) as error:
            raise self._error(name, "is not a readable array; it is damaged or of another kind") from error
        if header.dtype.hasobject:
            raise self._error(name, "holds pickled objects, which are never loaded")
        if header.is_fortran and len(header.shape) > 1:
            raise self._error(name, "is in Fortran order; save np.ascontiguousarray of it")
        if header.file_size != info.file_size:
            sizes = f"its header needs {header.file_size:,} bytes, it has {info.file_size:,}"
            raise self._error(name, f"is cut short: {sizes}")
        return header

    def _plausible_member(self, name: str) -> zipfile.ZipInfo:
        """Return an array's entry in the zip. Raises InputError if there is none, or its sizes are not possible."""
        if name not in self._members:
            names = printable(", ".join(sorted(self._members))[:MAX_TEXT]) or "nothing"
            raise InputError(f"{self.path}: no array {name!r}; it holds {names}")
        info = self._members[name]
        if not _can_be_unpacked(info):
            found = "encrypted" if info.flag_bits & _ENCRYPTED else f"compressed by method {info.compress_type}"
            raise self._error(name, f"is {found}; allowed: stored or deflated, as np.savez and np.savez_compressed do")
        if info.file_size > max(SMALL, MAX_RATIO * info.compress_size):
            sizes = f"{info.compress_size:,} bytes to {info.file_size:,}"
            raise self._error(name, f"unpacks {sizes}; more than {MAX_RATIO} times its size is refused")
        is_stored = info.compress_type == zipfile.ZIP_STORED
        length = os.fstat(self._descriptor).st_size
        if info.header_offset + info.compress_size > length or (is_stored and info.file_size != info.compress_size):
            raise self._error(name, f"is cut short: it claims {info.file_size:,} bytes, the file has {length:,}")
        return info

    def _error(self, name: str, problem: str) -> InputError:
        return InputError(f"{self.path}: {name!r} {problem}")

    def array(self, name: str, shape: tuple[int, ...], kind: str) -> np.ndarray:
        """Return an array, which must have this shape and dtype kind ("f" float, "i" integer, "U" text)."""
        header = self.header(name)
        if header.shape != shape or header.dtype.kind != kind:
            raise self._error(name, f"is {header.dtype} {header.shape}, expected kind {kind!r} and shape {shape}")
        try:
            with self._archive.open(self._members[name]) as member:
                data = member.read(self._members[name].file_size)  # verifies the zip's checksum at its end
            if not header.dtype.itemsize:
                return np.empty(shape, header.dtype)
            return np.frombuffer(data, header.dtype, offset=header.offset).reshape(shape)
        except _READ_ERRORS as error:
            raise self._error(name, "is damaged") from error

    def tensor(self, name: str, shape: tuple[int, ...], dtype: type = np.float64) -> Tensor:
        """Return a float array of this shape as a tensor of `dtype`. Raises InputError if a number is not finite."""
        with np.errstate(over="ignore"):  # an overflow is found below
            array = self.array(name, shape, "f").astype(dtype)
        if not np.isfinite(array).all():
            raise self._error(name, "contains numbers that are not finite (NaN or infinity)")
        return torch.from_numpy(array)

    def text(self, name: str) -> str:
        """Return a text, which is an array without dimensions."""
        try:
            text = printable(str(self.array(name, (), "U")))
        except InputError:
            raise
        except (ValueError, SystemError) as error:
            raise self._error(name, "is not text") from error  # numbers that are no characters
        if len(text) > MAX_TEXT:
            raise self._error(name, f"has {len(text):,} characters; allowed: {MAX_TEXT:,}")
        return text

    def rows(self, name: str) -> Callable[[int, int], np.ndarray]:
        """Return a function (start, stop) that reads the rows start ... stop - 1 of an array.

        A stored array, as written by `np.savez`, is read at any position. A compressed array has to be unpacked up to
        the requested row, so read it in ascending order. Rows are not compared with the zip's checksum, which is that
        of the complete array: `digest` does it.
        """
        header, info = self.header(name), self._members[name]
        row_bytes = math.prod(header.shape[1:]) * header.dtype.itemsize
        is_stored = info.compress_type == zipfile.ZIP_STORED
        first = header.offset + (self._data_position(info) if is_stored else 0)
        member = None if is_stored else self._archive.open(info)

        def read(start: int, stop: int) -> np.ndarray:
            rows = np.empty((stop - start, *header.shape[1:]), header.dtype)
            content, position = rows.data.cast("B"), first + start * row_bytes
            try:
                if member is None:
                    size = _read_at(self._descriptor, content, position)
                else:
                    member.seek(position)
                    size = member.readinto(content)
            except _READ_ERRORS as error:
                raise self._error(name, "is damaged") from error
            if size != rows.nbytes:
                raise self._error(name, f"ends early, near row {start}")
            return rows

        return read

    def digest(self, name: str | None = None) -> str:
        """Return the SHA-256 of the file. Raises InputError if array `name` differs from the zip's checksum of it."""
        sha256, crc, info = hashlib.sha256(), 0, self._members[name] if name else None
        is_stored = info is not None and info.compress_type == zipfile.ZIP_STORED
        first = self._data_position(info) if is_stored else 0
        at = 0
        while block := os.pread(self._descriptor, HASH_BLOCK, at):
            sha256.update(block)
            if is_stored:
                data = memoryview(block)[max(0, first - at) : max(0, first + info.file_size - at)]
                crc = zlib.crc32(data, crc)
            at += len(block)
        if is_stored and crc != info.CRC:
            raise self._error(name, "is damaged: its checksum does not match")
        if info is not None and not is_stored:
            self._unpack(name)
        return sha256.hexdigest()

    def _unpack(self, name: str) -> None:
        """Unpack a compressed array to its end, where the zip's checksum is verified."""
        try:
            with self._archive.open(self._members[name]) as member:
                while member.read(HASH_BLOCK):
                    pass
        except _READ_ERRORS as error:
            raise self._error(name, "is damaged: its checksum does not match") from error

    def _data_position(self, info: zipfile.ZipInfo) -> int:
        """Return where a stored member's data starts: after 30 bytes, its name and its extra field."""
        lengths = os.pread(self._descriptor, 4, info.header_offset + 26)
        return info.header_offset + 30 + sum(struct.unpack("<2H", lengths))


def _can_be_unpacked(info: zipfile.ZipInfo) -> bool:
    return info.compress_type in _METHODS and not info.flag_bits & _ENCRYPTED


def _read_at(descriptor: int, buffer: memoryview, position: int) -> int:
    """Fill a buffer with the bytes at a position of an open file; return how many there are."""
    filled = 0
    while size := os.preadv(descriptor, [buffer[filled:]], position + filled):
        filled += size
    return filled


def write_npz(
    file: IO[bytes], images: Iterable[np.ndarray], shape: tuple[int, ...], arrays: Mapping[str, object] | None = None
) -> None:
    """Write an uncompressed .npz: small `arrays` by name, then images of `shape` (N, H, W, 3), uint8, as `arr_0`.

    The images are taken one at a time, so they need not fit into memory together. Equal content gives equal bytes.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def new_member(name: str) -> IO[bytes]:  # ZipInfo's date is always 1980
            return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)

        for name, array in (arrays or {}).items():
            with new_member(name) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
        with new_member("arr_0") as member:
            np.lib.format.write_array_header_1_0(member, header)
            for image in progress_bar(images, total=shape[0], desc="writing .npz", unit="image"):
                member.write(np.ascontiguousarray(image, dtype=np.uint8).tobytes())

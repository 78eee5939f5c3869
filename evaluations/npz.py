"""Reads and writes NumPy's .npz files without holding all images in memory.

Files from elsewhere are not trusted: nothing is unpickled, every array's type and size are checked before it is read,
and an array that unpacks to an implausible size is refused.
"""

from __future__ import annotations

import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.io import InputError, progress_bar

MAX_RATIO = 500  # unpacked / packed size; deflate reaches 1032 on constant bytes, images stay far below
SMALL = 1 << 28  # bytes; arrays up to this size are allowed to have any ratio

_HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_READ_ERRORS = (
    OSError, ValueError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, NotImplementedError,
)  # fmt: skip
_HEADER_ERRORS = (SyntaxError, tokenize.TokenError)  # NumPy evaluates a header as Python


class ArrayHeader(NamedTuple):
    """Shape and type of an array, and the position of its data in its member of the zip."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int


class NpzFile:
    """The arrays of an .npz file. All methods raise InputError, naming the file, if it is damaged."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                self._members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        except FileNotFoundError as error:
            raise InputError(f"{self.path}: no such file") from error
        except _READ_ERRORS as error:
            raise InputError(f"{self.path}: not an .npz file, or cut short ({error})") from error

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def header(self, name: str) -> ArrayHeader:
        """Return an array's header. Raises InputError if it holds pickles, is cut short, or is a zip bomb."""
        if name not in self._members:
            names = ", ".join(sorted(self._members)) or "nothing"
            raise InputError(f"{self.path}: no array {name!r}; it holds {names}")
        info = self._members[name]
        if info.file_size > max(SMALL, MAX_RATIO * info.compress_size):
            sizes = f"{info.compress_size:,} bytes to {info.file_size:,}"
            raise self._error(name, f"unpacks {sizes}; more than {MAX_RATIO} times its size is refused")
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(info) as member:
                header = _parse_header(member)
        except (*_READ_ERRORS, *_HEADER_ERRORS) as error:
            raise self._error(name, f"is not a readable array ({error})") from error
        size = header.offset + math.prod(header.shape) * header.dtype.itemsize
        if size != info.file_size:
            raise self._error(name, f"is cut short: its header needs {size:,} bytes, it has {info.file_size:,}")
        return header

    def _error(self, name: str, problem: str) -> InputError:
        return InputError(f"{self.path}: {name!r} {problem}")

    def array(self, name: str, shape: tuple[int, ...], kind: str) -> np.ndarray:
        """Return an array, which must have this shape and dtype kind ("f" float, "i" integer, "U" text)."""
        header = self.header(name)
        if header.shape != shape or header.dtype.kind != kind:
            raise self._error(name, f"is {header.dtype} {header.shape}, expected kind {kind!r} and shape {shape}")
        try:
            with zipfile.ZipFile(self.path) as archive:
                data = archive.read(self._members[name])  # verifies the zip's checksum
        except _READ_ERRORS as error:
            raise self._error(name, f"is damaged ({error})") from error
        return np.frombuffer(data, header.dtype, offset=header.offset).reshape(shape)

    def tensor(self, name: str, shape: tuple[int, ...], dtype: type = np.float64) -> Tensor:
        """Return a float array of this shape as a tensor of `dtype`. Raises InputError if a number is not finite."""
        array = self.array(name, shape, "f")
        if not np.isfinite(array).all():
            raise self._error(name, "contains numbers that are not finite (NaN or infinity)")
        return torch.from_numpy(array.astype(dtype))

    def rows(self, name: str) -> Callable[[int, int], np.ndarray]:
        """Return a function (start, stop) that reads the rows start ... stop - 1 of an array.

        A stored array, as written by `np.savez`, is read at any position. A compressed array has to be unpacked up to
        the requested row, so read it in ascending order.
        """
        header, info = self.header(name), self._members[name]
        row_bytes = math.prod(header.shape[1:]) * header.dtype.itemsize
        file: IO[bytes]
        if info.compress_type == zipfile.ZIP_STORED:
            file = open(self.path, "rb")  # noqa: SIM115 (stays open as long as the returned function exists)
            file.seek(info.header_offset + 26)  # a zip member's header: 30 bytes, its name, its extra field
            first = info.header_offset + 30 + sum(struct.unpack("<2H", file.read(4))) + header.offset
        else:
            file, first = zipfile.ZipFile(self.path).open(info), header.offset  # noqa: SIM115

        def read(start: int, stop: int) -> np.ndarray:
            rows = np.empty((stop - start, *header.shape[1:]), header.dtype)
            try:
                file.seek(first + start * row_bytes)
                size = file.readinto(rows.data.cast("B"))
            except _READ_ERRORS as error:
                raise self._error(name, f"is damaged ({error})") from error
            if size != rows.nbytes:
                raise self._error(name, f"ends early, near row {start}")
            return rows

        return read


def _parse_header(member: IO[bytes]) -> ArrayHeader:
    version = np.lib.format.read_magic(member)
    if version not in _HEADER_READERS:
        raise ValueError(f"format version {version}")
    shape, fortran_order, dtype = _HEADER_READERS[version](member)
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which are never loaded")
    if fortran_order and len(shape) > 1:
        raise ValueError("it is in Fortran order; save np.ascontiguousarray of it")
    return ArrayHeader(shape, dtype, member.tell())


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

"""Reading .npy files that are not trusted.

The header is matched with a pattern. NumPy evaluates it as Python, with many types of errors, and takes the memory of
the shape that it states.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from common.errors import InputError

MAGIC = b"\x93NUMPY"
LENGTH_BYTES = {b"\1\0": 2, b"\2\0": 4}  # of the header's length, by the version of the format
_HEADER = re.compile(
    rb"\{\s*'descr'\s*:\s*'([<>|=][biufcOSUV]\d{0,9})'\s*,\s*'fortran_order'\s*:\s*(True|False)\s*,"
    rb"\s*'shape'\s*:\s*\(([0-9L, ]{0,100})\)\s*,?\s*\}\s*"
)  # numpy.lib.format; the keys are sorted, and Python 2 wrote an L after each number


class NpyHeader(NamedTuple):
    """Shape and type of an array, the order of its numbers, and the position of its data in the .npy file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    is_fortran: bool
    offset: int

    @property
    def file_size(self) -> int:
        """The number of bytes of the complete .npy file."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


def parse_header(data: bytes) -> NpyHeader:
    """Return the header at the start of an .npy file. Raises InputError if it is cut short or of another kind."""
    length_bytes = LENGTH_BYTES.get(data[len(MAGIC) : len(MAGIC) + 2], 0)
    start = len(MAGIC) + 2 + length_bytes
    end = start + int.from_bytes(data[start - length_bytes : start], "little")
    header = _HEADER.fullmatch(data, start, end) if data.startswith(MAGIC) and length_bytes else None
    try:
        if header is None or end > len(data):
            raise ValueError("no header")
        shape = tuple(int(size) for size in header[3].replace(b"L", b"").split(b",") if size.strip())
        return NpyHeader(shape, np.dtype(header[1].decode("ascii")), header[2] == b"True", end)
    except (TypeError, ValueError, SyntaxError) as error:
        raise InputError("not a complete .npy file of numbers") from error


def decode_npy(data: bytes, dtypes: Sequence[str], what: str) -> np.ndarray:
    """Return the array in the bytes of an .npy file, in C order. `what` it contains is for messages, such as "latents".

    Raises InputError if the file is damaged, if bytes are missing or left over, and for a dtype whose NumPy name is not
    among `dtypes`, in the byte order of this machine.
    """
    broken = InputError(f"broken {what}: not a complete .npy file of numbers")
    try:
        header = parse_header(data)
    except InputError as error:
        raise broken from error
    if str(header.dtype) not in dtypes:
        raise InputError(f"dtype {header.dtype}; allowed: {', '.join(dtypes)}")
    if header.file_size != len(data):
        raise broken
    try:
        array = np.frombuffer(data, header.dtype, offset=header.offset)
        array = array.reshape(header.shape, order="F" if header.is_fortran else "C")
    except ValueError as error:  # too many dimensions, or an empty array with a very large one
        raise broken from error
    return np.array(array, order="C")  # a copy: PyTorch warns about arrays that cannot be written

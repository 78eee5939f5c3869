"""Reading .npy files that are not trusted.

The header is matched with a pattern. NumPy evaluates it as Python, with many types of errors, and takes the memory of
the shape that it states.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from common.errors import InputError

MAGIC = b"\x93NUMPY"
LENGTH_BYTES = {b"\1\0": 2, b"\2\0": 4}  # of the header's length, by the version of the format
_HEADER = re.compile(
    rb"\{\s*'descr'\s*:\s*'([<>|=][biufcOSUV]\d{0,9})'\s*,\s*'fortran_order'\s*:\s*(True|False)\s*,"
    rb"\s*'shape'\s*:\s*\(([0-9L, ]{0,100})\)\s*,?\s*\}\s*"
)  # numpy.lib.format; the keys are sorted, and Python 2 wrote an L after each number


def decode_npy(data: bytes, dtypes: Sequence[str], what: str) -> np.ndarray:
    """Return the array in the bytes of an .npy file, in C order. `what` it contains is for messages, such as "latents".

    Raises InputError if the file is damaged, if bytes are missing or left over, and for a dtype whose NumPy name is not
    among `dtypes`, in the byte order of this machine.
    """
    broken = InputError(f"broken {what}: not a complete .npy file of numbers")
    length_bytes = LENGTH_BYTES.get(data[len(MAGIC) : len(MAGIC) + 2])
    if not data.startswith(MAGIC) or length_bytes is None:
        raise broken
    start = len(MAGIC) + 2 + length_bytes
    end = start + int.from_bytes(data[start - length_bytes : start], "little")
    header = _HEADER.fullmatch(data, start, end)
    if header is None or end > len(data):
        raise broken
    try:
        dtype = np.dtype(header[1].decode("ascii"))
        shape = tuple(int(size) for size in header[3].replace(b"L", b"").split(b",") if size.strip())
    except (TypeError, ValueError, SyntaxError) as error:
        raise broken from error
    if str(dtype) not in dtypes:
        raise InputError(f"dtype {dtype}; allowed: {', '.join(dtypes)}")
    if end + math.prod(shape) * dtype.itemsize != len(data):
        raise broken
    try:
        array = np.frombuffer(data, dtype, offset=end).reshape(shape, order="F" if header[2] == b"True" else "C")
    except ValueError as error:  # too many dimensions, or an empty array with a very large one
        raise broken from error
    return np.array(array, order="C")  # a copy: PyTorch warns about arrays that cannot be written

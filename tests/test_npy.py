"""Arrays of .npy files are read exactly, or refused before they take memory."""

import io

import numpy as np
import pytest

from common.errors import InputError
from common.npy import decode_npy

VALUES = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version, allow_pickle=True)
    return file.getvalue()


def with_shape(data: bytes, shape: bytes) -> bytes:
    start = data.index(b"(")
    return data[:start] + (shape + b"}").ljust(127 - start) + data[127:]


def decode(data: bytes) -> np.ndarray:
    return decode_npy(data, ("float32", "float16"), "numbers")


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("array", [VALUES, VALUES.astype(np.float16), np.asfortranarray(VALUES), VALUES[0, 0, 0]])
def test_what_numpy_writes_is_read(array, version):
    found = decode(npy(array, version))
    assert found.dtype == array.dtype and found.flags.writeable and np.array_equal(found, array)


def test_spaces_and_numbers_of_python_2_are_read():
    data = npy(VALUES)
    for shape in (b"(2,3,4)", b"(2L, 3L, 4L),"):
        assert np.array_equal(decode(with_shape(data, shape)), VALUES)


BAD = {
    "nothing": (b"", "broken numbers"),
    "truncated": (npy(VALUES)[:-1], "broken numbers"),
    "one byte more": (npy(VALUES) + b"x", "broken numbers"),
    "a header of 4 GiB": (b"\x93NUMPY\2\0\xff\xff\xff\xff" + npy(VALUES)[10:], "broken numbers"),
    "a shape of 10^18": (with_shape(npy(VALUES), b"(1000000000, 1000000000)"), "broken numbers"),
    "an empty array of 10^18": (with_shape(npy(VALUES)[:128], b"(0, 9999999999999999999)"), "broken numbers"),
    "version 3": (npy(VALUES, (3, 0)), "broken numbers"),
    "pickles": (npy(np.array([{}], object)), "dtype object; allowed: float32, float16"),
    "a structure": (npy(np.zeros(2, [("a", "f4")])), "broken numbers"),
    "another byte order": (npy(VALUES.astype(">f4")), "dtype >f4; allowed"),
    "another type": (npy(VALUES.astype(np.int32)), "dtype int32; allowed"),
    "an unknown type": (npy(VALUES).replace(b"<f4", b"<q9"), "broken numbers"),
    "an expression": (with_shape(npy(VALUES), b"(2*3, 4)"), "broken numbers"),
}


@pytest.mark.parametrize("kind", BAD)
def test_other_bytes_are_refused(kind):
    data, message = BAD[kind]
    with pytest.raises(InputError, match=message):
        decode(data)

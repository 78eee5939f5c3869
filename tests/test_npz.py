"""Readers of .npz and .npy: damage, lies and bombs are errors with our words, before memory is taken."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from evaluations.batches import open_images
from evaluations.npz import NpzFile

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 3), dtype=np.uint8)


def npy(array: np.ndarray, shape: object = None, descr: object = "|u1", fortran: bool = False) -> bytes:
    """Return an .npy, with another shape or type in its header if given."""
    header = repr({"descr": descr, "fortran_order": fortran, "shape": array.shape if shape is None else shape})
    header += " " * (-(len(header) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + array.tobytes()


def write(path: Path, *members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_bit_is_noticed(tmp_path: Path, save) -> None:
    save(tmp_path / "s.npz", arr_0=IMAGES, mu=np.arange(9.0))
    content = (tmp_path / "s.npz").read_bytes()
    images = open_images(tmp_path / "s.npz")
    assert np.array_equal(images.read(0, 5), IMAGES) and len(images.digest()) == 64
    with zipfile.ZipFile(tmp_path / "s.npz") as archive:
        places = {name: archive.getinfo(f"{name}.npy").header_offset + 80 for name in ("arr_0", "mu")}
    for name, place in places.items():
        damaged = bytearray(content)
        damaged[place] ^= 4
        (tmp_path / "s.npz").write_bytes(damaged)
        with pytest.raises(InputError, match=rf"s\.npz: '{name}' (is damaged|is not a readable|ends early)"):
            npz = NpzFile(tmp_path / "s.npz")
            npz.digest("arr_0") if name == "arr_0" else npz.array("mu", (9,), "f")
    damaged = bytearray(content)
    damaged[content.rindex(b"mu.npy")] ^= 4  # in the directory: `mu` would be missing
    (tmp_path / "s.npz").write_bytes(damaged)
    with pytest.raises(InputError, match=r"s\.npz: not an \.npz file"):
        NpzFile(tmp_path / "s.npz")


def test_a_file_that_is_replaced_is_still_read(tmp_path: Path) -> None:
    for name, array in (("s", IMAGES), ("other", IMAGES[::-1])):
        np.savez(tmp_path / f"{name}.npz", arr_0=array)
    images = open_images(tmp_path / "s.npz")
    before = images.digest()
    os.replace(tmp_path / "other.npz", tmp_path / "s.npz")
    assert np.array_equal(images.read(0, 5), IMAGES) and images.digest() == before
    assert images.state() == images.opened and NpzFile(tmp_path / "s.npz").digest() != before


def test_a_file_that_is_changed_is_noticed(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", arr_0=IMAGES)
    images = open_images(tmp_path / "s.npz")
    with open(tmp_path / "s.npz", "ab") as file:
        file.write(b"x")
    assert images.state() != images.opened


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (npy(IMAGES, (10**12, 6, 4, 3)), "is cut short: its header needs 72,000,000,000,128 bytes"),
        (npy(IMAGES, (5, 6, 4, 3), fortran=True), "Fortran"),
        (npy(IMAGES, descr="|O"), "pickled objects"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b" " * 100, "is not a readable array"),
        (b"\x93NUMPY\x01\x00\x40\x1f" + b"(" * 8000, "is not a readable array"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    with pytest.raises(InputError, match=rf"s\.npz: 'arr_0' .*{problem}"):
        open_images(write(tmp_path / "s.npz", ("arr_0.npy", content)))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(tmp_path: Path, method: int) -> None:
    """They unpack without a limit."""
    with pytest.raises(InputError, match=r"is compressed by method .*; allowed: stored or deflated"):
        open_images(write(tmp_path / "s.npz", ("arr_0.npy", npy(IMAGES)), method=method))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_member_that_claims_another_size_is_refused(tmp_path: Path, method: int) -> None:
    path = write(tmp_path / "s.npz", ("mu.npy", npy(np.zeros(10**6), descr="<f8")), method=method)
    content = bytearray(path.read_bytes())
    directory = content.rindex(b"PK\1\2")
    for size in (1128, 10**9):  # of the header's 8,000,128
        content[directory + 24 : directory + 28] = size.to_bytes(4, "little")
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"s\.npz: 'mu' (is cut short|is not a readable|unpacks|is damaged)"):
            NpzFile(path).array("mu", (10**6,), "f")


def test_two_arrays_of_one_name_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "s.npz", ("arr_0.npy", npy(IMAGES)), ("arr_0", npy(IMAGES[::-1])))
    with pytest.raises(InputError, match="two arrays of the same name"):
        NpzFile(path)


def test_a_damaged_length_that_hides_an_array(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.zeros(1), b=np.zeros(1))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    entry = data.index(b"PK\1\2")
    data[entry + 32] = data.index(b"PK\1\2", entry + 4) - entry  # bytes of a comment: the second entry
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.npz: not an \.npz file"):
        NpzFile(tmp_path / "a.npz")


def test_texts_are_checked(tmp_path: Path) -> None:
    bad = npy(np.full(4, 255, np.uint8), (), "<U1")
    long = npy(np.array("x" * 2000), descr="<U2000")
    path = write(
        tmp_path / "s.npz", ("bad.npy", bad), ("long.npy", long), ("empty.npy", npy(np.zeros(0, np.uint8), (), "<U0"))
    )
    for name, problem in (("bad", "is not text"), ("long", "has 2,000 characters; allowed: 1,000")):
        with pytest.raises(InputError, match=f"'{name}' {problem}"):
            NpzFile(path).text(name)
    assert NpzFile(path).text("empty") == ""


def test_what_is_no_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    for path in (tmp_path / "pipe.npz", tmp_path):
        with pytest.raises(InputError, match="is not a file"):
            NpzFile(path)


@pytest.mark.parametrize("seed", range(3))
def test_random_damage_gives_no_other_error_than_inputerror(tmp_path: Path, seed: int) -> None:
    np.savez(tmp_path / "s.npz", arr_0=IMAGES, name=np.array("text"), mu=np.arange(9.0))
    complete, rng = (tmp_path / "s.npz").read_bytes(), np.random.default_rng(seed)
    for _ in range(100):
        content = bytearray(complete[: rng.integers(len(complete)) if rng.random() < 0.2 else None])
        for place in rng.integers(max(1, len(content)), size=rng.integers(1, 6)) if content else ():
            content[place] = rng.integers(256)
        (tmp_path / "s.npz").write_bytes(content)
        try:
            images = open_images(tmp_path / "s.npz")
            pixels, _ = images.read(0, images.count), images.digest()
        except InputError:
            continue
        assert np.array_equal(pixels, IMAGES)

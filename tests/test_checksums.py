"""Checksums of files of weights, and reading a file that another process replaces."""

import hashlib
import subprocess

import pytest

from common.errors import InputError
from models.checksums import (
    checksum_path,
    read_open,
    recorded_checksum,
    verify_file,
    write_checksum,
    write_folder_checksums,
)

DIGEST = hashlib.sha256(b"weights").hexdigest()


def test_a_checksum_of_a_file_or_of_its_folder_is_compared(tmp_path):
    path = tmp_path / "vae" / "w.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    assert recorded_checksum(path) is None
    verify_file(path)
    write_folder_checksums(tmp_path, ["vae/w.safetensors"])
    assert recorded_checksum(path) == (DIGEST, tmp_path / "checksums.sha256")
    verify_file(path)
    subprocess.run(["sha256sum", "--check", "--quiet", "checksums.sha256"], cwd=tmp_path, check=True)
    path.write_bytes(b"weighty")
    with pytest.raises(InputError, match=rf"w\.safetensors: damaged; .*checksums\.sha256 has {DIGEST}"):
        verify_file(path)
    write_checksum(path, hashlib.sha256(b"weighty").hexdigest())  # the file's own checksum counts
    verify_file(path)


@pytest.mark.parametrize("text", ["", "text", f"{DIGEST[:-1]}  w\n", "\0" * 100, "x" * 2**21])
def test_a_damaged_file_of_checksums_is_named(tmp_path, text):
    (tmp_path / "w").write_bytes(b"weights")
    checksum_path(tmp_path / "w").write_text(text)
    with pytest.raises(InputError, match=r"w\.sha256: (damaged; expected lines of sha256sum|is larger than)"):
        recorded_checksum(tmp_path / "w")


def test_a_file_is_read_again_if_it_is_replaced(tmp_path):
    path, seen = tmp_path / "best.pt", []
    path.write_bytes(b"old")

    def read(file):
        seen.append(file.read())
        if seen == [b"old"]:  # another process replaces it now
            (tmp_path / "new").write_bytes(b"new")
            (tmp_path / "new").replace(path)
            raise InputError("the checksum is that of the new file")
        return seen[-1]

    assert read_open(path, read) == b"new" and seen == [b"old", b"new"]

    def fail(file):
        raise InputError("damaged")

    with pytest.raises(InputError, match="damaged"):
        read_open(path, fail)

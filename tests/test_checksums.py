"""Checksums of files of weights, and reading a file that another process replaces."""

import hashlib
import os
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


def test_a_damaged_file_of_checksums_is_named(tmp_path):
    (tmp_path / "w").write_bytes(b"weights")
    for place in (tmp_path / "checksums.sha256", checksum_path(tmp_path / "w")):
        for text in ("", "text", f"{DIGEST[:-1]}  w\n"):
            place.write_text(text)
            with pytest.raises(InputError, match=f"{place.name}: damaged; expected lines of sha256sum"):
                recorded_checksum(tmp_path / "w")


def test_lines_of_other_files_and_comments_are_skipped(tmp_path):
    path = tmp_path / "run" / "w"
    path.parent.mkdir()
    (tmp_path / "checksums.sha256").write_text("notes of the user")
    (path.parent / "checksums.sha256").write_text(f"# comment\n{'0' * 64}  other\n")
    assert recorded_checksum(path) is None
    checksum_path(path).write_bytes(b"\xef\xbb\xbf" + f"{DIGEST.upper()} *before its new name\r\n".encode())
    assert recorded_checksum(path) == (DIGEST, checksum_path(path))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"w\.pt: is not a regular file"):
        read_open(tmp_path / "w.pt", lambda file: None)


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

"""Files are written completely or not at all, and what killed programs left is removed."""

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import temporary as files
from common.errors import explain
from common.temporary import atomic_write, clear_leftovers
from tests.conftest import ROOT


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "file.bin"
    with pytest.raises(RuntimeError, match="power cut"), atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError("power cut")
    assert list(path.parent.iterdir()) == []
    with atomic_write(path) as file:
        file.write(b"complete")
        assert not path.exists()
    assert path.read_bytes() == b"complete" and list(path.parent.iterdir()) == [path]


def test_an_old_file_survives_a_failed_write(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(OSError), atomic_write(path, "w") as file:
        file.write("new")
        raise OSError("no space left on device")
    assert path.read_text() == "old"


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if ".tmp" in path.name)


def killed_writer(path: Path, end: str = "os.kill(os.getpid(), 9)") -> subprocess.Popen:
    """Start a process that writes half a file and then ends as `end` says; return it when the half is written."""
    code = f"""
import os, sys
from common.temporary import atomic_write
with atomic_write({str(path)!r}) as file:
    file.write(b"half")
    file.flush()
    print("written", flush=True)
    {end}
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    assert process.stdout.readline() == "written\n"
    return process


def write(path: Path, content: bytes = b"complete", **options: bool) -> None:
    with atomic_write(path, **options) as file:
        file.write(content)


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_kept(tmp_path):
    path = tmp_path / "out.npz"
    living = killed_writer(path, end="sys.stdin.read()")
    killed_writer(path).wait()
    killed_writer(tmp_path / "other.npz").wait()
    assert len(leftovers(tmp_path)) == 3
    write(path, clear=False)
    assert len(leftovers(tmp_path)) == 3
    write(path)
    assert len(leftovers(tmp_path)) == 2 and path.read_bytes() == b"complete"
    living.communicate("")
    assert living.returncode == 0 and path.read_bytes() == b"half"
    clear_leftovers(tmp_path)
    assert leftovers(tmp_path) == []


def test_threads_of_one_process_write_one_file(tmp_path):
    """The second writer does not remove the first one's temporary file."""
    with atomic_write(tmp_path / "a") as first, atomic_write(tmp_path / "a") as second:
        first.write(b"first")
        second.write(b"second")
    assert (tmp_path / "a").read_bytes() == b"first" and leftovers(tmp_path) == []


@pytest.mark.parametrize("age", [0, 2])
@pytest.mark.parametrize("name", [".out.npz.0123456789abcdef.tmp", f"out.npz.{'0' * 32}.partial"])
def test_without_locks_only_old_leftovers_are_removed(tmp_path, monkeypatch, name, age):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / name).write_bytes(b"half")
    os.utime(tmp_path / name, (time.time() - age * files.DEAD_AFTER,) * 2)
    write(tmp_path / "out.npz")
    assert (tmp_path / name).exists() == (age == 0) and (tmp_path / "out.npz").read_bytes() == b"complete"


def test_files_that_somebody_placed_are_neither_followed_nor_removed(tmp_path, monkeypatch):
    """Even if the name of the temporary file were known."""
    names = iter(["a" * 16, "b" * 16, "c" * 16])
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: next(names))
    (tmp_path / "precious").write_text("content")
    (tmp_path / f".out.{'a' * 16}.tmp").symlink_to("precious")
    os.mkfifo(tmp_path / f".out.{'b' * 16}.tmp")
    write(tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "content" and (tmp_path / "out").read_bytes() == b"complete"
    assert leftovers(tmp_path) == [f".out.{'a' * 16}.tmp", f".out.{'b' * 16}.tmp"]


def test_a_temporary_file_that_is_removed_before_it_is_locked_is_created_again(tmp_path, monkeypatch):
    real, calls = files._lock_temporary, []

    def lock(descriptor, path):
        if not calls:
            os.unlink(path)  # by the clearing of another process
        calls.append(path)
        return real(descriptor, path)

    monkeypatch.setattr(files, "_lock_temporary", lock)
    write(tmp_path / "out")
    assert len(set(calls)) == 2 and (tmp_path / "out").read_bytes() == b"complete"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_permissions_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("target", ["precious", "missing"])
def test_a_link_is_replaced_and_its_target_kept(tmp_path, target):
    (tmp_path / "precious").write_text("content")
    (tmp_path / "out").symlink_to(target)
    write(tmp_path / "out")
    assert not (tmp_path / "out").is_symlink() and (tmp_path / "out").read_bytes() == b"complete"
    assert (tmp_path / "precious").read_text() == "content" and sorted(os.listdir(tmp_path)) == ["out", "precious"]


def place_read_only(path: Path) -> None:
    path.write_text("old")
    path.chmod(0o444)


KEPT = {
    "is read-only; make it writable": place_read_only,
    "Is a directory": os.mkdir,
    "is a device, pipe or socket": os.mkfifo,
    "is a device, pipe or socket; allowed": lambda path: path.symlink_to("/dev/null"),
}


@pytest.mark.parametrize("reason", KEPT)
def test_what_is_no_writable_file_is_kept(tmp_path, reason):
    path = tmp_path / "out"
    KEPT[reason](path)
    before = path.lstat()
    with pytest.raises(OSError, match=reason) as error:
        write(path)
    assert path.lstat() == before and leftovers(tmp_path) == [] and error.value.filename == str(path)


def test_the_longest_name_can_be_written(tmp_path):
    name = "\u00e9" * 127 + "x"  # 255 bytes
    write(tmp_path / name)
    killed_writer(tmp_path / name).wait()
    write(tmp_path / name)
    assert os.listdir(tmp_path) == [name]
    with pytest.raises(OSError, match="File name too long"):
        write(tmp_path / (name + "y"))


def test_a_full_disk_is_told_with_the_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "out"
    write(path, b"old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit[1]))
    try:
        with pytest.raises(OSError) as error:
            write(path, bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert explain(error.value, "") == (f"{path}: File too large", 2)
    assert path.read_bytes() == b"old" and leftovers(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_for_the_next_writer(tmp_path, number):
    path = tmp_path / "out"
    killed_writer(path, end=f"os.kill(os.getpid(), {int(number)}); sys.stdin.read()").wait()
    assert len(leftovers(tmp_path)) == (number == signal.SIGTERM) and not path.exists()  # Ctrl-C removes it at once
    write(path)
    assert leftovers(tmp_path) == []


def test_a_text_file_keeps_the_bytes_of_names(tmp_path):
    with atomic_write(tmp_path / "a.txt", "w") as file:
        file.write("caf\udce9")
    assert (tmp_path / "a.txt").read_bytes() == b"caf\xe9"

"""One process at a time writes to a folder."""

import os
import subprocess
import sys

import pytest

from common import locks
from common.errors import InputError
from common.locks import LOCK_NAME, lock_folder, unlock_folder
from tests.conftest import ROOT

LOCKER = """
import sys
from common.locks import lock_folder
lock_folder(sys.argv[1], "training")
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_lock_is_held_until_its_process_ends(tmp_path):
    folder = tmp_path / "run"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen([sys.executable, "-c", LOCKER, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, **pipes)
    assert first.stdout.readline() == "locked\n"
    with pytest.raises(InputError, match=rf"run: process {first.pid} on .* is training there"):
        lock_folder(folder, "training")
    first.kill()
    first.communicate()
    lock_folder(folder, "training")
    lock_folder(folder, "training")  # the own lock is no error
    command = [sys.executable, "-c", LOCKER, str(folder)]
    assert "locked" not in subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, **pipes).stdout
    unlock_folder(folder)
    assert not list(folder.iterdir())
    assert "locked" in subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, **pipes).stdout


def in_a_child(function) -> int:
    """Return the exit status of a forked process that calls a function: 1 if it returns False, 3 for InputError."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            status = 0 if function() else 1
        except InputError:
            status = 3
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def is_refused(folder) -> bool:
    """Return whether another process is refused the lock."""
    return in_a_child(lambda: lock_folder(folder, "testing") is None) == 3


def test_a_forked_process_neither_holds_nor_removes_the_lock(tmp_path):
    lock_folder(tmp_path, "training")
    assert in_a_child(lambda: unlock_folder(tmp_path) is None) == 0
    assert (tmp_path / LOCK_NAME).exists() and is_refused(tmp_path)
    unlock_folder(tmp_path)
    assert not is_refused(tmp_path)


def test_a_lock_that_was_removed_while_it_was_opened_is_taken_again(tmp_path, monkeypatch):
    """Its holder unlocks after this process opened the file; then a third process creates a new file and locks it."""
    opened = []

    def open_lock(path):
        file = real(path)
        if not opened:
            path.unlink()
        opened.append(file)
        return file

    real = locks._open_lock
    monkeypatch.setattr(locks, "_open_lock", open_lock)
    lock_folder(tmp_path, "training")
    assert len(opened) == 2 and opened[0].closed and is_refused(tmp_path)
    unlock_folder(tmp_path)


def test_unlocking_keeps_the_lock_of_another_process(tmp_path):
    lock_folder(tmp_path, "training")
    (tmp_path / LOCK_NAME).unlink()  # by a user
    (tmp_path / LOCK_NAME).write_text("of another process")
    unlock_folder(tmp_path)
    assert (tmp_path / LOCK_NAME).read_text() == "of another process"


def test_a_folder_that_was_removed_is_locked_again(tmp_path):
    lock_folder(tmp_path / "run", "training")
    (tmp_path / "run" / LOCK_NAME).unlink()
    (tmp_path / "run").rmdir()
    lock_folder(tmp_path / "run", "training")
    assert is_refused(tmp_path / "run")
    unlock_folder(tmp_path / "run")
    assert not is_refused(tmp_path / "run")


def make_link(path):
    path.with_name("precious").write_text("content")
    path.symlink_to("precious")


def make_second_name(path):
    path.with_name("precious").write_text("content")
    os.link(path.with_name("precious"), path)


PLACED = {
    "it is a link": [make_link, lambda path: path.symlink_to("missing")],
    "it is a folder": [os.mkdir],
    "it is not a regular file": [os.mkfifo, make_second_name],
}


@pytest.mark.parametrize(("reason", "place"), [(reason, place) for reason in PLACED for place in PLACED[reason]])
def test_only_a_file_of_its_own_is_a_lock(tmp_path, reason, place):
    place(tmp_path / LOCK_NAME)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(InputError, match=rf"\.lock: cannot be used as lock file: {reason}.*; remove it"):
        lock_folder(tmp_path, "training")
    assert sorted(os.listdir(tmp_path)) == before
    assert "precious" not in before or (tmp_path / "precious").read_text() == "content"


def test_a_folder_that_cannot_be_locked_is_left_to_the_first_write(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        lock_folder(tmp_path, "training")
    assert not any(tmp_path.iterdir())
    (tmp_path / LOCK_NAME).touch()
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match="it belongs to another user"):
        lock_folder(tmp_path, "training")


def test_the_holder_of_the_lock_clears_what_killed_programs_left(tmp_path):
    left = [tmp_path / ".samples.npz.123.tmp", tmp_path / "images" / ".000001.png.0123456789abcdef.tmp"]
    kept = [tmp_path / ".hidden.tmp", tmp_path / "images" / "000001.png"]
    (tmp_path / "images").mkdir()
    for path in left + kept:
        path.write_bytes(b"half")
    lock_folder(tmp_path, "generating")
    assert not any(path.exists() for path in left) and all(path.exists() for path in kept)
    unlock_folder(tmp_path)


def test_a_message_shows_the_text_of_a_foreign_lock_on_one_short_line(tmp_path):
    code = "import fcntl, sys; file = open(sys.argv[1], 'w'); file.write('\x1b[2J\\n' * 1000); file.flush(); "
    code += "fcntl.lockf(file, fcntl.LOCK_EX); print('locked', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / LOCK_NAME)], **pipes)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(InputError) as error:
        lock_folder(tmp_path, "training")
    other.communicate("")
    assert str(error.value).isprintable() and len(str(error.value)) < 1500 + 3 * len(str(tmp_path))

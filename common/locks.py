"""The lock of a folder, by which one process at a time writes there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from pathlib import Path
from typing import IO

from common.errors import InputError, printable
from common.io import real_path
from common.temporary import clear_leftovers

LOCK_NAME = ".lock"
REASONS = {errno.ELOOP: "it is a link", errno.EISDIR: "it is a folder", errno.EACCES: "it belongs to another user"}
LONGEST_HOLDER = 200  # bytes of a lock file that a message shows

_locks: dict[Path, IO[bytes]] = {}  # locks of this process by path; closing the file releases the lock
os.register_at_fork(after_in_child=_locks.clear)  # a forked process holds no lock and must not remove the file


def lock_folder(folder: str | Path, doing: str) -> None:
    """Lock a folder for this process until `unlock_folder` or the end of the process. Creates a missing folder.

    Removes the temporary files that killed programs left in the folder and below it. Forked processes do not hold the
    lock. Without an error, the folder may still be unlocked: some file systems have no locks, and on a full disk or in
    a read-only folder the lock file cannot be created.

    `doing` is what this process does there, for the message of another process ("training").
    Raises InputError, naming the process, if another one holds the lock, and if the lock file is a link, a folder or
    another user's.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = real_path(folder) / LOCK_NAME
    held = _locks.get(path)  # opening and closing a locked file would release the lock
    if held and _is_under(path, held):
        return
    while file := _open_lock(path):
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = printable(file.read(LONGEST_HOLDER).decode(errors="replace").strip()) or "another process"
            file.close()
            crashed = f"If that machine has crashed and the file server still holds the lock, remove {path}"
            where = f"{folder}: {holder} is {doing} there"
            raise InputError(f"{where}; wait for it, or choose another folder. {crashed}") from error
        except OSError:  # a file system without locks
            file.close()
            break
        if _is_under(path, file):
            with contextlib.suppress(OSError):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            _locks[path] = file
            break
        file.close()  # its holder removed it after it was opened here
    clear_leftovers(folder)


def unlock_folder(folder: str | Path) -> None:
    """Release the lock of `lock_folder`, if this process holds it."""
    path = real_path(folder) / LOCK_NAME
    if file := _locks.pop(path, None):
        with contextlib.suppress(OSError):
            if _is_under(path, file):  # a user may have removed it, and another process may hold a new one
                path.unlink()  # before it is released
        file.close()


def _open_lock(path: Path) -> IO[bytes] | None:
    """Open or create a lock file; None if it cannot be created: the first write of the program will say why."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # without waiting for a pipe
    try:
        file = open(os.open(path, flags, 0o666), "r+b", buffering=0)  # noqa: SIM115 (held until it is unlocked)
    except OSError as error:
        if error.errno == errno.EROFS or not os.path.lexists(path):
            return None
        reason = REASONS.get(error.errno, error.strerror)
    else:
        found = os.fstat(file.fileno())
        if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:
            return file
        file.close()
        reason = "it is not a regular file, or has a second name elsewhere"  # whose content would be lost
    raise InputError(f"{path}: cannot be used as lock file: {reason}; remove it if no program runs in this folder")


def _is_under(path: Path, file: IO[bytes]) -> bool:
    """Return whether an open file is still the one under a name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except OSError:
        return False

"""Writing files that get their name only when they are complete, and removing what killed programs left."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from common.errors import WRITE_ERRORS

# Temporary files: those of `atomic_write` and of its earlier version (a process number), and downloads of torch.hub.
TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?:[0-9a-f]{16}|\d+)\.tmp", re.DOTALL)
PARTIAL = re.compile(r"(?P<name>.+)\.[0-9a-f]{32}\.partial", re.DOTALL)
LONGEST_STEM = 200  # bytes of a file's name in the name of its temporary file: file systems allow 255 in all
DEAD_AFTER = 24 * 3600  # seconds without a change after which a temporary file that cannot be locked is a leftover


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb", sync_name: bool = True, clear: bool = True) -> Iterator[IO[Any]]:
    """Open a temporary file that is renamed to `path` when it is complete and on the disk.

    An error inside the block leaves an existing file unchanged. `mode` is "wb" or "w" (UTF-8; file names that are not
    UTF-8 keep their bytes). A missing folder is created. If `path` is a symbolic link, the link is replaced and the
    file that it points to is unchanged.
    Without `sync_name`, a crash of the machine may undo the rename, but the file under its name is always complete.
    `clear` removes what killed writers of the same file left. It lists the folder: writers of many files switch it off.

    Raises OSError, with `path`, if the file cannot be written, is read-only, or if `path` is a folder or a device.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_replaceable(path)
    if clear:
        clear_leftovers(path.parent, path.name)
    temporary = None
    try:
        with _open_temporary(path, mode) as file:
            temporary = file.name
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)  # before the file is closed, which releases its lock
            temporary = None
        if sync_name:
            _sync_folder(path.parent)
    except OSError as error:
        if (temporary and error.filename == temporary) or (error.filename is None and error.errno in WRITE_ERRORS):
            error.filename, error.filename2 = str(path), None  # the user does not know the temporary file
        raise
    finally:
        if temporary:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def _check_replaceable(path: Path) -> None:
    """Raise OSError if another file must not replace what is at `path`: a read-only file, a folder, a device."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISREG(found.st_mode) and not found.st_mode & 0o222:  # os.access allows everything to root
        raise PermissionError(errno.EACCES, "is read-only; make it writable or choose another name", str(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if str(path.parent) == "/dev" or (path.exists() and not path.is_file()):
        raise FileExistsError(errno.EEXIST, "is a device, pipe or socket; allowed: the name of a file", str(path))


def _open_temporary(path: Path, mode: str) -> IO[Any]:
    """Create and lock a temporary file for `path`. The lock shows `clear_leftovers` that its writer is alive."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC  # file servers lock only what is writable
    text = {} if "b" in mode else {"encoding": "utf-8", "errors": "surrogateescape"}
    start = os.path.join(path.parent, f".{_stem(path.name)}.")
    while True:
        name = f"{start}{secrets.token_hex(8)}.tmp"
        try:
            file = open(name, mode, opener=lambda name, _: os.open(name, flags, 0o666), **text)  # noqa: SIM115
        except FileExistsError:
            continue
        except OSError as error:
            error.filename = str(path)
            raise
        if _lock_temporary(file.fileno(), name) is not False:
            return file
        file.close()  # between its creation and its lock, `clear_leftovers` of another process removed it


def _stem(name: str) -> str:
    """Return the part of a file's name that the name of its temporary file contains."""
    data = os.fsencode(name)
    return data[:LONGEST_STEM].decode(errors="ignore") if len(data) > LONGEST_STEM else name


def _lock_temporary(descriptor: int, path: str) -> bool | None:
    """Lock an open temporary file; return whether it is locked and still under its name, None without locks.

    flock, other than lockf, also excludes other threads of the process and is not released by opening the file again.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def is_temporary(name: str) -> bool:
    """Return whether a file's name is that of a temporary file of `atomic_write`."""
    return name.endswith(".tmp") and TEMPORARY.fullmatch(name) is not None


def clear_leftovers(folder: str | Path, name: str | None = None) -> None:
    """Remove the temporary files that killed programs left: those of file `name`, or all in `folder` and below it.

    The file of a living writer is locked and stays. Where there are no locks, and for downloads of torch.hub, which
    locks nothing, files that were not changed for DEAD_AFTER are removed. Links are neither followed nor removed.
    """
    stem = None if name is None else _stem(name)
    for place, folders, files in os.walk(folder):
        if name is not None:
            folders.clear()
        for file in files:
            if not file.endswith((".tmp", ".partial")):
                continue
            match = TEMPORARY.fullmatch(file) or PARTIAL.fullmatch(file)
            if match and stem in (None, match["name"]):
                _remove_leftover(os.path.join(place, file), has_lock=file.endswith(".tmp"))


def _remove_leftover(path: str, has_lock: bool) -> None:
    """Remove a temporary file unless its writer may be alive."""
    with contextlib.suppress(OSError):  # a link, removed meanwhile, or another user's
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            locked = _lock_temporary(descriptor, path) if has_lock else None
            is_dead = time.time() - found.st_mtime > DEAD_AFTER if locked is None else locked
            if is_dead and stat.S_ISREG(found.st_mode):
                os.unlink(path)
        finally:
            os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Write a folder's entries to the disk. Without it, a crash of the machine could undo a rename."""
    with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

"""Files, as every program here treats them: written whole or not at all, read from a folder and a zip alike, and
complained about by name.

Three rules of the project live here, so that no program has to remember them:
a file appears under its final name only when it is complete (`atomic_write`);
a data set may be a folder or a zip (`FileSource`);
bad input ends a program with one clear line, not with a traceback (`InputError`, `run_cli`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
LOCK_NAME = ".lock"
HASHED_AT_ONCE = 1 << 24  # bytes

_locks: dict[Path, IO[bytes]] = {}  # of this process, by path: a lock lasts as long as its file is open


class InputError(ValueError):
    """Bad input: a file, a flag or a value that the caller can mend. The text names it and says what is allowed."""


def report_status(status: int) -> bool:
    """Write an exit status into the file that launch/launch.sh reads; return whether launch.sh started this process.

    A status that is written there is final: torchrun, which restarts failed processes, does not run the program again.
    """
    path = os.environ.get("REG_STATUS_FILE")
    if path:
        Path(path).write_text(str(status))
    return bool(path)


def run_cli(main: Callable[[], None]) -> None:
    """Run an entry point's `main` and end without a traceback where the cause lies outside the program.

    Bad input and files that cannot be read or written become one line on stderr and exit status 2, Ctrl-C one line and
    status 130.
    """
    program = Path(sys.argv[0]).name
    try:
        main()
    except InputError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        report_status(2)
        sys.exit(2)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # libraries take seconds to end: a second one would disturb them
        print(f"\n{program}: interrupted; every file that it wrote is complete", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.filename is None and error.errno not in NO_ROOM:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"{program}: error: {where}{error.strerror}", file=sys.stderr)
        report_status(2)
        sys.exit(2)


def check_writable(path: str | Path, flag: str) -> None:
    """Raise InputError, naming the flag, if no file can be written at `path`; called before the work, not after it."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{flag} {path}: is a folder; name a file")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {path}: {nearest} is no folder that may be written to")


def lock_folder(folder: str | Path, doing: str) -> None:
    """Keep a folder, made if missing, to this process until `unlock_folder` or its end. Its forks do not hold the lock.

    Raises:
        InputError: another process, which is named as far as known, is `doing` something there.
    """
    path = _lock_path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    held = _locks.get(path)  # opening and closing a locked file would give the lock up
    if held and path.exists() and os.path.samestat(os.fstat(held.fileno()), path.stat()):
        return
    try:
        file = open(path, "ab+", buffering=0)  # noqa: SIM115 (held until the folder is unlocked)
    except OSError:  # a full disk or a foreign folder: what has to be written there will say so
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        who = file.read().decode(errors="replace").strip() or "another process"
        raise InputError(
            f"{folder}: {who} is {doing} there; wait for it, or choose another folder. If its machine is dead, and the "
            f"file server does not know, remove {path}"
        ) from error
    except OSError:  # a file system without locks
        return
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    _locks[path] = file


def unlock_folder(folder: str | Path) -> None:
    """Give up a lock of `lock_folder`, if there is one."""
    path = _lock_path(folder)
    if file := _locks.pop(path, None):
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()


def _lock_path(folder: str | Path) -> Path:
    return (Path(folder) / LOCK_NAME).resolve()


def sha256_of(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that appears under `path` only once it is complete and on the disk.

    Written beside the target, flushed, synced, renamed. An error inside the block leaves the old file, if there was
    one, untouched. `mode` is "wb" or "w"; the folder is made if it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable: on POSIX the entry lives in the folder, which has to reach the disk as well."""
    with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file. Raises InputError, naming the file, if it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl: objects with a whole number as `step`.

    Lines that a crash cut short or a disk damaged are left out, wherever they stand.
    """
    rows = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get("step")) is int:
                rows.append(row)
    return rows

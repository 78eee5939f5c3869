"""Files, as every program here treats them: written whole or not at all, read from a folder and a zip alike, and
complained about by name.

Three rules of the project live here, so that no program has to remember them:
a file appears under its final name only when it is complete (`atomic_write`);
a data set may be a folder or a zip (`FileSource`);
bad input ends a program with one clear line, not with a traceback (`InputError`, `run_cli`).
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import signal
import socket
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
LOCK_NAME = ".lock"
HASHED_AT_ONCE = 1 << 24  # bytes
HEADER_BYTES = 30  # of a zip's member, before its name
HEADER_ROOM = 512  # for name and extra field: what is longer takes a second read
MEMBER = np.dtype(
    [("place", "u8"), ("length", "u8"), ("size", "u8"), ("crc", "u4"), ("method", "u2"), ("encrypted", "?")]
)

_locks: dict[Path, IO[bytes]] = {}  # of this process, by path: a lock lasts as long as its file is open


class InputError(ValueError):
    """Bad input: a file, a flag or a value that the caller can mend. The text names it and says what is allowed."""


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


class FileSource:
    """The files of a folder or of a zip, by relative name with forward slashes. Hidden files do not count.

    Made for millions of files and many worker processes: names, and a zip's directory, are arrays, which forked
    processes go on sharing (a Python object is copied as soon as it is looked at), and reading needs no file offset.

    Raises:
        InputError: there is neither a folder nor a zip at `path`, it cannot be read, or two members have one name.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.is_zip = self.path.is_file()
        self._descriptor: int | None = None
        try:
            if self.is_zip:
                with zipfile.ZipFile(self.path) as archive:
                    members = _members(archive, self.path)
                names = sorted(members)
                self._members = np.array([_place(members[name]) for name in names], dtype=MEMBER)
            elif self.path.is_dir():
                names = sorted(_walk(self.path))
            else:
                raise InputError(f"{self.path}: no such folder or zip file")
        except zipfile.BadZipFile as error:
            raise InputError(f"{self.path}: not a readable zip file ({error})") from error
        except OSError as error:
            raise InputError(f"{error.filename or self.path}: cannot be read ({error.strerror})") from error
        self._names = encode_names(names)

    @property
    def names(self) -> list[str]:
        """All names, sorted; a new list each time."""
        return [decode_name(name) for name in self._names]

    def __contains__(self, name: str) -> bool:
        return self._index(name) is not None

    def size(self, name: str) -> int:
        """Return the file's length in bytes (uncompressed, in a zip). Raises InputError if it is not there."""
        if self.is_zip:
            return int(self._member(name)["size"])
        try:
            return (self.path / name).stat().st_size
        except OSError as error:
            raise InputError(f"{self.describe(name)}: cannot be read ({error.strerror})") from error

    def describe(self, name: str) -> str:
        """Return the name as an error message should show it: a path, or archive.zip:member."""
        return f"{self.path}:{name}" if self.is_zip else str(self.path / name)

    def read(self, name: str) -> bytes:
        """Return the file's bytes. Raises InputError, naming the file, if it cannot be read."""
        try:
            return self._read_member(name) if self.is_zip else (self.path / name).read_bytes()
        except (OSError, zlib.error) as error:
            raise InputError(f"{self.describe(name)}: cannot be read ({error})") from error

    def _index(self, name: str) -> int | None:
        key = encode_name(name)
        index = bisect.bisect_left(self._names, key)
        return index if index < len(self._names) and self._names[index] == key else None

    def _member(self, name: str) -> np.void:
        index = self._index(name)
        if index is None:
            raise InputError(f"{self.describe(name)}: no such file in the zip")
        return self._members[index]

    def _read_member(self, name: str) -> bytes:
        """Return a member's bytes (APPNOTE.TXT, 4.3.7: a header of 30 bytes, name, extra field, then the data)."""
        member = self._member(name)
        if member["encrypted"] or member["method"] not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            kind = "encrypted" if member["encrypted"] else f"packed by method {member['method']}"
            raise InputError(f"{self.describe(name)}: {kind}; allowed: stored, deflated")
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        place, length = int(member["place"]), int(member["length"])
        block = os.pread(self._descriptor, HEADER_BYTES + HEADER_ROOM + length, place)
        start = HEADER_BYTES + int.from_bytes(block[26:28], "little") + int.from_bytes(block[28:30], "little")
        data = block[start : start + length]
        if len(data) < length:
            data += os.pread(self._descriptor, length - len(data), place + start + len(data))
        if member["method"] == zipfile.ZIP_DEFLATED:
            data = zlib.decompress(data, -zlib.MAX_WBITS)
        if block[:4] != b"PK\3\4" or len(data) != member["size"] or zlib.crc32(data) != member["crc"]:
            raise InputError(f"{self.describe(name)}: damaged, its checksum does not fit")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """Return a zip's files by name. Raises InputError if two have the same."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if _is_visible_file(info.filename) and members.setdefault(info.filename, info) is not info:
            raise InputError(f"{path}: holds {info.filename!r} more than once; pack it anew")
    return members


def _place(info: zipfile.ZipInfo) -> tuple[int, ...]:
    """Return a row of MEMBER."""
    encrypted = info.flag_bits & 1
    return info.header_offset, info.compress_size, info.file_size, info.CRC, info.compress_type, encrypted


def encode_names(names: list[str]) -> np.ndarray:
    """Return file names as an array of bytes, which forked processes share; `decode_name` gives one back."""
    return np.array([encode_name(name) for name in names], dtype=np.bytes_)


def encode_name(name: str) -> bytes:
    """Return a file name as bytes, whatever is in it; sorted names stay sorted."""
    return name.encode("utf-8", "surrogateescape")


def decode_name(name: bytes) -> str:
    """Return the file name that `encode_name` made bytes of."""
    return name.decode("utf-8", "surrogateescape")


def read_dataset_json(source: FileSource) -> dict[str, Any]:
    """Return the content of a data set's dataset.json, {} if it has none. Raises InputError if it is not an object."""
    if "dataset.json" not in source:
        return {}
    where = source.describe("dataset.json")
    try:
        content = json.loads(source.read("dataset.json"))
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f'{where}: must be a JSON object, {{"labels": [[name, label], ...]}}')
    return content


def _is_visible_file(name: str) -> bool:
    return not name.endswith("/") and not any(part.startswith(".") for part in name.split("/"))


def _walk(folder: Path | str, prefix: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Yield the names of the files below a folder, links followed. Files are not looked at, which takes long on
    network file systems.
    """
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise InputError(f"{folder}: a link to a folder that it lies in")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_file():
                yield prefix + entry.name
            elif entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/", above | {here})

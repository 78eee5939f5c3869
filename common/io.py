"""Reading and writing files: regular files only, JSON, rows of JSON, checksums, and which files may be replaced."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from common.errors import InputError, shortened
from common.temporary import atomic_write

HASH_BLOCK = 1 << 24  # bytes
MAX_FILE = 1 << 30  # bytes; the largest image that is decoded has less, and 20 million labels in a dataset.json
LARGEST_STEP = 1 << 53  # of a row of metrics.jsonl; float64 counts up to it
LONGEST_LINE = 1 << 24  # bytes of a row of metrics.jsonl; the longest ones written, of a bad step, have about 1e5
LONGEST_NAME = 255  # bytes of a file's or folder's name, the limit of file systems
DEEPEST = 200  # folders in a path that is created; Python creates them by recursion


class OwnFile(NamedTuple):
    """A kind of file that a program may replace, because it writes such files itself."""

    description: str  # completes the sentence "is not ..."
    matches: Callable[[Path], bool]


def check_writable(
    path: str | Path, flag: str, inputs: Iterable[str | Path | None] = (), own: OwnFile | None = None
) -> None:
    """Raise InputError, naming the flag, unless a file may be written at `path`. Programs call it before long work.

    inputs: files and folders that the program reads; None and missing ones are skipped. The output must not be one of
    them, whatever its spelling, and must not be in one of the folders.
    own: what may be replaced; None: any file. Other existing files are kept.
    """
    path = Path(path)
    try:
        _check_name(path)
        if path.is_dir():
            raise InputError("is a folder; allowed: the name of a file")
        nearest = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise InputError(f"{nearest} is not a writable folder")
        _check_not_input(path, inputs)
        if path.exists() and not path.is_file():
            raise InputError("is a device or a pipe; allowed: the name of a file")
        if own and path.exists() and not own.matches(path):
            raise InputError(f"exists and is not {own.description}; choose another name, or remove the file")
    except InputError as error:
        raise InputError(f"{flag} {shortened(path)}: {error}") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        reason = error.strerror if isinstance(error, OSError) else "a loop of links"
        raise InputError(f"{flag} {shortened(path)}: cannot be used ({reason})") from error


def _check_name(path: Path) -> None:
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > LONGEST_NAME:
        raise InputError(f"a name in it has {longest:,} bytes; allowed: {LONGEST_NAME}")
    if len(path.parts) > DEEPEST:
        raise InputError(f"has {len(path.parts):,} parts; allowed: {DEEPEST}")


def _check_not_input(path: Path, inputs: Iterable[str | Path | None]) -> None:
    """Raise InputError if `path` is one of the inputs or is in one of them, by the identities of files and folders."""
    places = [path, *real_path(path).parents]
    if path.is_symlink():
        places += path.absolute().parents
    for name in inputs:
        if name is None or not os.path.lexists(name):
            continue
        read = os.path.expanduser(name)
        for place in places:
            if place.exists() and os.path.exists(read) and os.path.samefile(place, read):
                problem = "is read by this program" if place == path else f"is in {name}, which this program reads"
                raise InputError(f"{problem}; choose another place for the output")


def real_path(path: str | Path) -> Path:
    """Return the absolute path without links. A loop of links, for which `Path.resolve` raises an error, stays."""
    return Path(os.path.realpath(path))


def sha256_of(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes. `common.identity` finds out whether it was replaced since."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically.

    Raises InputError, naming the file, for a number that is not finite: JSON has no such numbers.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError as error:
        raise InputError(f"{path} is not written: a number is NaN or infinite; JSON has finite ones only") from error
    with atomic_write(path, "w") as file:
        file.write(text + "\n")


def open_regular(path: str | Path | bytes) -> IO[bytes]:
    """Return a regular file, open for reading, and do not wait for one that is not: opening a fifo can take for ever.

    Raises OSError if it cannot be opened, and InputError, without the path, if it is a fifo, a device or a socket.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115 (returned)
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise InputError("is not a regular file, but a fifo, a device or a socket; allowed: a regular file")


def read_file(path: str | Path | bytes) -> bytes:
    """Return the bytes of a regular file.

    Raises the errors of `open_regular`, and InputError, without the path, if the file has more than MAX_FILE bytes or
    if its size changes while it is read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE:
            raise InputError(f"has {size:,} bytes; allowed: {MAX_FILE:,}")
        data = file.read(size + 1)
    if len(data) != size:
        raise InputError("its size changed while it was read; wait until it is complete")
    return data


def parse_json(data: bytes) -> Any:
    """Return the content of JSON.

    Raises InputError, with the place of the mistake, for other bytes, and for what Python reads but JSON (RFC 8259)
    does not allow or define: NaN, infinite numbers, and a name that occurs twice in an object.
    """
    hooks = {"object_pairs_hook": _object, "parse_constant": _number, "parse_float": _number}
    try:
        return json.loads(data, **hooks)
    except InputError:
        raise
    except json.JSONDecodeError as error:
        raise InputError(f"not valid JSON (line {error.lineno}, column {error.colno})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"not valid JSON: byte {error.start:,} is not UTF-8 text") from error
    except RecursionError as error:
        raise InputError("not valid JSON: its lists and objects are nested too deeply") from error
    except ValueError as error:  # Python limits the digits of integers
        raise InputError("not valid JSON: a number has too many digits") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON. Raises InputError if a name occurs twice: readers differ in the value they take."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise InputError(f"not valid JSON: the name {twice!r:.100} occurs twice in an object")
    return content


def _number(text: str) -> float:
    """Return a number of JSON with a decimal point or an exponent. Raises InputError if it is not finite."""
    if not math.isfinite(value := float(text)):
        raise InputError(f"not valid JSON: the number {text:.40} is not finite")
    return value


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file. Raises InputError, naming the file, if it is missing or not JSON."""
    try:
        return parse_json(read_file(path))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a folder; allowed: a JSON file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def parse_row(line: bytes) -> dict[str, Any] | None:
    """Return the row in a line of a metrics.jsonl, a JSON object with a `step`, an integer; None for others."""
    try:
        row = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < LARGEST_STEP
    return row if is_row else None


def iterate_metrics(path: str | Path, name: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a metrics.jsonl, only those with a value `name` if it is given. Damaged lines are skipped."""
    text = name.encode() if name and name.isascii() else b""
    with open(path, "rb") as file:
        while line := file.readline(LONGEST_LINE):
            if text in line and (row := parse_row(line)) is not None and (name is None or name in row):
                yield row


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl: its JSON objects with an integer `step`. Damaged lines are skipped."""
    return list(iterate_metrics(path))

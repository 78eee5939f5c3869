"""Reading and writing files, reporting errors, progress bars.

`atomic_write` and `write_json` never leave an incomplete file under its final name. `InputError` and `run_cli` end a
program with one line instead of a traceback.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import re
import reprlib
import secrets
import signal
import stat
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from common.text import for_terminal

WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
NO_MORE = (errno.EAGAIN, errno.EMFILE, errno.ENFILE)  # processes or threads; open files
# How PyTorch reports that a GPU's memory is full, and that another process is lost: parts of messages, types of errors.
GPU_MEMORY_MARKS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
LOST_PROCESS = ("DistBackendError", "DistNetworkError", "DistStoreError", "gloo/transport", "Connection closed by peer")
HASH_BLOCK = 1 << 24  # bytes
MAX_FILE = 1 << 30  # bytes; the largest image that is decoded has less, and 20 million labels in a dataset.json
LINE_SECONDS = 60  # between two lines of progress
# Temporary files: those of `atomic_write` and of its earlier version (a process number), and downloads of torch.hub.
TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?:[0-9a-f]{16}|\d+)\.tmp", re.DOTALL)
PARTIAL = re.compile(r"(?P<name>.+)\.[0-9a-f]{32}\.partial", re.DOTALL)
LONGEST_STEM = 200  # bytes of a file's name in the name of its temporary file: file systems allow 255 in all
DEAD_AFTER = 24 * 3600  # seconds without a change after which a temporary file that cannot be locked is a leftover
LONGEST_LINE = 1 << 24  # bytes of a row of metrics.jsonl; the longest ones written, of a bad step, have about 1e5


LONGEST_NAME = 255  # bytes of a file's or folder's name, the limit of file systems
LONGEST_SHOWN = 200  # characters of a path in a message


class InputError(ValueError):
    """Invalid input that the user can correct. The message names the file, flag or value and what is allowed."""

    said_by_another = False  # process of this run: `run_cli` prints nothing


class LostProcess(RuntimeError):
    """A helper process has ended or failed. The message says which one; starting the program again may help."""


class OwnFile(NamedTuple):
    """A kind of file that a program may replace, because it writes such files itself."""

    description: str  # completes the sentence "is not ..."
    matches: Callable[[Path], bool]


def report_status(status: int) -> bool:
    """Write an exit status into the file that launch/launch.sh reads; return whether launch.sh started this process.

    A status that is written there is final: torchrun, which restarts failed processes, does not run the program again.
    """
    path = os.environ.get("REG_STATUS_FILE")
    if path:
        Path(path).write_text(str(status))
    return bool(path)


def printable(text: str) -> str:
    """Return a text on one line: control characters (\\n) and bytes that are not UTF-8 (\\udce9) are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Short(reprlib.Repr):
    """Shortens values; an object of another class is named by its class, because its own text may have any length."""

    def repr_instance(self, x: Any, level: int) -> str:
        is_plain = isinstance(x, bool | float | complex | bytes | None)
        return repr(x)[: self.maxother] if is_plain else f"a {type(x).__name__}"


_short = _Short()
_short.maxlevel, _short.maxstring, _short.maxother = 2, 80, 80


def shown(value: Any) -> str:
    """Return a value of a file for an error message: on one line, shortened, and without running through all of it."""
    try:
        return printable(_short.repr(value))
    except ValueError:  # a number of more than 4300 digits
        return f"a very long {type(value).__name__}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run_cli(main: Callable[[], None], memory_advice: str = "give it smaller batches") -> None:
    """Run a program's `main` and exit without a traceback if the cause is outside the program.

    Invalid input, files that cannot be read or written, and too little memory give one line on stderr and exit status
    2; `memory_advice` completes that line. Ctrl-C gives one line and status 130. A process that lost the others of its
    run, or a helper process, gives one line and status 1, with which a launcher starts all of them again.
    """
    program = Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks must not end the program
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # PyTorch warns twice if there are more loader processes than cores. train.py logs the time spent waiting for data.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    try:
        main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would interrupt the exit
        print(f"\n{program}: interrupted; every file that it wrote is complete", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message, status = explain(error, memory_advice)
        if message is None:
            raise
        if not getattr(error, "said_by_another", False):
            print(f"{program}: error: {message}", file=sys.stderr)
        if status == 2:
            report_status(2)
        sys.exit(status)


def explain(error: Exception, memory_advice: str) -> tuple[str | None, int]:
    """Return the message for an error whose cause is outside the program, None for others, and the exit status."""
    if isinstance(error, InputError):
        return for_terminal(str(error)), 2
    if isinstance(error, LostProcess):
        return for_terminal(str(error)), 1
    if full := memory_message(error):
        return f"{full}{_place(error)}; {memory_advice}, or end other programs that use this memory", 2
    if type(error).__name__ in LOST_PROCESS or any(text in str(error) for text in LOST_PROCESS):
        return "another process of this run has ended or does not answer; its own message says why", 1
    if isinstance(error, OSError) and error.filename is not None:
        return f"{shortened(os.fsdecode(error.filename))}: {error.strerror}", 2
    if isinstance(error, OSError) and error.errno in WRITE_ERRORS:
        return error.strerror, 2
    if "can't start new thread" in str(error) or (isinstance(error, OSError) and error.errno in NO_MORE):
        limits = "ulimit -u and -n, and the limits of the container"
        return f"this machine allows no more processes, threads or open files ({first_line(error)}); see {limits}", 2
    return None, 1


def memory_message(error: BaseException) -> str | None:
    """Return the message for an error by which PyTorch or Python reports too little memory; None for other errors."""
    text = str(error)
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return "the memory of this machine is full"
    if type(error).__name__ != "OutOfMemoryError" and not any(mark in text for mark in GPU_MEMORY_MARKS):
        return None
    gpu = re.search(r"(GPU \d+) has a total capacity of ([\d.]+ \w+)", text)
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
    device = f"the memory of {gpu[1]} ({gpu[2]})" if gpu else "the GPU's memory"
    return f"{device} is full" + (f", {asked[1]} more were needed" if asked else "")


def _place(error: BaseException) -> str:
    """Return the function of this repository in which an error was raised, for a message."""
    root = str(Path(__file__).resolve().parents[1])
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(root)]
    frames = [frame for frame in frames if "site-packages" not in frame.filename and frame.name != "run_cli"]
    return f", in {frames[-1].name} ({Path(frames[-1].filename).name})" if frames else ""


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
        nearest = next(parent for parent in path.absolute().parents if parent.exists())
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


def _check_not_input(path: Path, inputs: Iterable[str | Path | None]) -> None:
    """Raise InputError if `path` is one of the inputs or is in one of them, by the identities of files and folders."""
    places = [path, *path.resolve().parents]
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


def shortened(path: str | Path) -> str:
    """Return a path for a message, with its middle left out if it is very long."""
    text = printable(str(path))
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN // 2]}...{text[-20:]}"


def sha256_of(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes. `common.identity` finds out whether it was replaced since."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


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


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically.

    Raises InputError, naming the file and the place, for a number that is not finite: JSON has no such numbers.
    """
    if place := _not_finite(value):
        raise InputError(f"{path} is not written: {place}, and JSON has finite numbers only")
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")


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


def _not_finite(value: Any, place: str = "") -> str | None:
    """Return what the first number in nested dicts and lists is that is not finite, such as "fid is nan"; None: none"""
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{place or 'the value'} is {value}"
    if isinstance(value, dict):
        parts = ((f"{place}.{key}".lstrip("."), item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        parts = ((f"{place}[{number}]", item) for number, item in enumerate(value))
    else:
        return None
    return next((found for name, item in parts if (found := _not_finite(item, name))), None)


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
    """Return the row in a line of a metrics.jsonl, a JSON object with an integer `step`; None for other lines."""
    try:
        row = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


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


class _ProgressLines(tqdm):
    """A hidden progress bar that prints a line every minute, for logs of long runs."""

    def __init__(self, desc: str, total: int, unit: str, **_: Any) -> None:
        super().__init__(total=total, disable=True)
        self.text, self.start = (desc, unit), time.monotonic()
        self.next_line = self.start + LINE_SECONDS

    def update(self, n: float = 1) -> None:
        self.n += n
        if 0 < self.n < self.total and (now := time.monotonic()) >= self.next_line:
            self.next_line = now + LINE_SECONDS
            (desc, unit), rate = self.text, self.n / (now - self.start)
            left = timedelta(seconds=round((self.total - self.n) / rate))
            counts = f"{int(self.n):,} of {self.total:,}, {rate:.3g} {unit}s/s, {left} left"
            print(f"{desc}: {counts}", file=sys.stderr, flush=True)


def progress_bar(items: Iterable[Any] | None = None, main: bool = True, lines: bool = False, **options: Any) -> tqdm:
    """Return tqdm's progress bar over `items`, or, without them, one to be moved by `update`.

    It is shown on stderr if that is a terminal, by the `main` process only, and not if the environment has
    TQDM_DISABLE=1. `lines`: if stderr is not a terminal, print a line every minute instead; this needs `desc`, `total`
    and `unit`, and no `items`. `options` are tqdm's.
    """
    if main and sys.stderr and sys.stderr.isatty():
        return tqdm(items, **options)
    if main and sys.stderr and lines and os.environ.get("TQDM_DISABLE", "0") in ("", "0"):
        return _ProgressLines(**options)
    return tqdm(items, **options | {"disable": True})

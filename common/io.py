"""Reading and writing files, reporting errors, progress bars.

`atomic_write` and `write_json` never leave an incomplete file under its final name. `lock_folder` lets one process at a
time write to a folder. `InputError` and `run_cli` end a program with one line instead of a traceback.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from common.text import for_terminal

WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
LOCK_NAME = ".lock"
# How PyTorch reports that a GPU's memory is full, and that another process is lost: parts of messages, types of errors.
GPU_MEMORY_MARKS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
LOST_PROCESS = ("DistBackendError", "DistNetworkError", "DistStoreError", "gloo/transport", "Connection closed by peer")
HASH_BLOCK = 1 << 24  # bytes
LINE_SECONDS = 60  # between two lines of progress

_locks: dict[Path, IO[bytes]] = {}  # locks of this process by path; closing the file releases the lock


class InputError(ValueError):
    """Invalid input that the user can correct. The message names the file, flag or value and what is allowed."""


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


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run_cli(main: Callable[[], None], memory_advice: str = "give it smaller batches") -> None:
    """Run a program's `main` and exit without a traceback if the cause is outside the program.

    Invalid input, files that cannot be read or written, and too little memory give one line on stderr and exit status
    2; `memory_advice` completes that line. Ctrl-C gives one line and status 130. A process that lost the others of its
    run gives one line and status 1, with which a launcher starts all of them again.
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
        print(f"{program}: error: {message}", file=sys.stderr)
        if status == 2:
            report_status(2)
        sys.exit(status)


def explain(error: Exception, memory_advice: str) -> tuple[str | None, int]:
    """Return the message for an error whose cause is outside the program, None for others, and the exit status."""
    if isinstance(error, InputError):
        return for_terminal(str(error)), 2
    if full := memory_message(error):
        return f"{full}{_place(error)}; {memory_advice}, or end other programs that use this memory", 2
    if type(error).__name__ in LOST_PROCESS or any(text in str(error) for text in LOST_PROCESS):
        return "another process of this run has ended or does not answer; its own message says why", 1
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}", 2
    if isinstance(error, OSError) and error.errno in WRITE_ERRORS:
        return error.strerror, 2
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


def check_writable(path: str | Path, flag: str) -> None:
    """Raise InputError, naming the flag, if no file can be written at `path`. Programs call it before long work."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{flag} {path}: is a folder; allowed: the name of a file")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {path}: {nearest} is not a writable folder")


def lock_folder(folder: str | Path, doing: str) -> None:
    """Lock a folder for this process until `unlock_folder` or the end of the process. Creates a missing folder.

    Forked processes do not hold the lock. Without an error, the folder may still be unlocked: some file systems have no
    locks, and on a full disk the lock file cannot be created.

    `doing` is what this process does there, for the message of another process ("training").
    Raises InputError, naming the process, if another one holds the lock.
    """
    path = (Path(folder) / LOCK_NAME).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    held = _locks.get(path)  # opening and closing a locked file would release the lock
    if held and path.exists() and os.path.samestat(os.fstat(held.fileno()), path.stat()):
        return
    try:
        file = open(path, "ab+", buffering=0)  # noqa: SIM115 (held until the folder is unlocked)
    except OSError:  # full disk or no permission: the first write will report it
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        who = file.read().decode(errors="replace").strip() or "another process"
        crashed = f"If that machine has crashed and the file server still holds the lock, remove {path}"
        where = f"{folder}: {who} is {doing} there"
        raise InputError(f"{where}; wait for it, or choose another folder. {crashed}") from error
    except OSError:  # a file system without locks
        return
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    _locks[path] = file


def unlock_folder(folder: str | Path) -> None:
    """Release the lock of `lock_folder`, if this process holds it."""
    path = (Path(folder) / LOCK_NAME).resolve()
    if file := _locks.pop(path, None):
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()


def sha256_of(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb", sync_name: bool = True) -> Iterator[IO[Any]]:
    """Open a temporary file that is renamed to `path` when it is complete and on the disk.

    An error inside the block leaves an existing file unchanged. `mode` is "wb" or "w" (UTF-8; file names that are not
    UTF-8 keep their bytes). A missing folder is created.
    Without `sync_name`, a crash of the machine may undo the rename, but the file under its name is always complete.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        text = {} if "b" in mode else {"encoding": "utf-8", "errors": "surrogateescape"}
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if sync_name:
            _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Write a folder's entries to the disk. Without it, a crash of the machine could undo a rename."""
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


def parse_json(data: bytes) -> Any:
    """Return the content of JSON. Raises InputError, with the place of the mistake, for other bytes."""
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        raise InputError(f"not valid JSON (line {error.lineno}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # ValueError: bytes that are not UTF-8
        raise InputError("not valid JSON") from error


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file. Raises InputError, naming the file, if it is missing or not JSON."""
    try:
        return parse_json(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a folder; allowed: a JSON file") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl: its JSON objects with an integer `step`. Damaged lines are skipped."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get("step")) is int:
                rows.append(row)
    return rows


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

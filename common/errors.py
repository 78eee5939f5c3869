"""Errors whose cause is outside a program, and how a program ends with one line instead of a traceback."""

from __future__ import annotations

import errno
import io
import os
import re
import reprlib
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
NO_MORE = (errno.EAGAIN, errno.EMFILE, errno.ENFILE)  # processes or threads; open files
# How PyTorch reports that a GPU's memory is full, and that another process is lost: parts of messages, types of errors.
GPU_MEMORY_MARKS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
LOST_PROCESS = (
    "DistBackendError", "DistNetworkError", "DistStoreError",
    "gloo/transport", "Connection closed by peer", "timeout caused pair closure",
)  # fmt: skip
LONGEST_SHOWN = 200  # characters of a path in a message


class InputError(ValueError):
    """Invalid input that the user can correct. The message names the file, flag or value and what is allowed."""

    said_by_another = False  # process of this run: `run_cli` prints nothing


class LostProcess(RuntimeError):
    """A helper process has ended or failed. The message says which one; starting the program again may help."""


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


def shortened(path: str | Path) -> str:
    """Return a path for a message, without its middle if it is very long."""
    text = printable(str(path))
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN // 2]}...{text[-20:]}"


LONGEST_WORD, LONGEST_LINE = 400, 2000  # characters; the commands that messages contain are shorter


def for_terminal(message: str) -> str:
    """Return a message of one or several lines with control characters escaped, and long words and lines cut."""
    lines = map(printable, message.split("\n"))
    cut = (re.sub(rf"\S{{{LONGEST_WORD + 1},}}", lambda word: _cut(word[0]), line) for line in lines)
    return "\n".join(line if len(line) <= LONGEST_LINE else _cut(line) for line in cut)


def _cut(text: str) -> str:
    return f"{text[: LONGEST_WORD // 2]}... ({len(text):,} characters)"

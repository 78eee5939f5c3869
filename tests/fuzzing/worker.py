"""Runs a function on many inputs in a forked process with limits of time and memory, and says how each one ended."""

from __future__ import annotations

import os
import re
import resource
import select
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import InputError, for_terminal
from tests.conftest import ROOT

SECONDS = 20  # for one input; the machine may be shared
GRACE = 10  # seconds until a process is killed that does not answer to SIGALRM
ADDRESS_SPACE = 3 << 30  # bytes in addition to what the process has at its start
PEAK = 400 << 20  # bytes of memory in addition to what the process has before an input
LONGEST_MESSAGE = 4000  # characters; some messages contain a short program
FOREIGN = (
    "object at 0x", "weights_only", "torch.serialization", "Traceback", "<class ", "numpy.core", "unsupported operand",
)  # fmt: skip
# Messages that libtiff itself writes to stderr. Pillow cannot switch them off.
LIBTIFF = re.compile(rb"(tempfile\.tif|\w*TIFF\w*|\w+Decode|\w+Setup\w*): .*")
STARTS_PROGRAMS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile"}
FAILURES = ("silent", "traceback", "message", "printed", "hang", "memory", "died", "executed")
CLASSES = ("same", "changed", "clear", *FAILURES)


class Outcome(NamedTuple):
    """How one input ended: its number, its class (see CLASSES), where, and a text to explain it."""

    number: int
    kind: str
    place: str = ""
    detail: str = ""


class Hang(BaseException):
    """Raised by the alarm; not an Exception, so that readers do not catch it."""


def run_inputs(job: Callable[[int], Outcome], numbers: Sequence[int], seconds: float = SECONDS) -> Iterator[Outcome]:
    """Yield the outcome of `job` for each number. A forked process does the work; after its death another one does."""
    waiting = list(numbers)
    while waiting:
        for outcome in _in_one_process(job, tuple(waiting), seconds):
            waiting.remove(outcome.number)
            yield outcome


def _in_one_process(job: Callable[[int], Outcome], numbers: Sequence[int], seconds: float) -> Iterator[Outcome]:
    ours, theirs = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if not process:
        os.close(ours)
        try:
            _work(job, numbers, seconds, theirs)
        finally:
            os._exit(0)
    os.close(theirs)
    waiting = iter(numbers)
    with open(ours, "rb", buffering=0) as lines:  # a buffer could hold lines when `select` waits for more
        for number in waiting:
            ready, _, _ = select.select([lines], [], [], seconds + GRACE)
            if not (line := lines.readline() if ready else b""):
                os.kill(process, signal.SIGKILL)
                _, status = os.waitpid(process, 0)
                died = f"status {os.waitstatus_to_exitcode(status)}"
                yield Outcome(number, "died", "", died) if ready else Outcome(number, "hang", "", "ignores SIGALRM")
                return
            yield Outcome(number, *line.decode("utf-8", "backslashreplace").rstrip("\n").split("\t"))
    os.waitpid(process, 0)


def _work(job: Callable[[int], Outcome], numbers: Sequence[int], seconds: float, pipe: int) -> None:
    """Write a line with the outcome of each number."""

    def ring(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + ADDRESS_SPACE, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in numbers:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            outcome = job(number)
        except Hang:
            outcome = Outcome(number, "hang")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        fields = (text.replace("\t", " ").replace("\n", " | ") for text in outcome[1:])
        os.write(pipe, ("\t".join(fields)[:3000] + "\n").encode("utf-8", "backslashreplace"))


class Watch:
    """Watches this process while it reads one input: what it prints, the programs it starts, its memory.

    Only the process that the harness forks may create one, because it takes over stdout and stderr.
    """

    def __init__(self) -> None:
        self.printed = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as this process)
        os.dup2(self.printed.fileno(), 1)
        os.dup2(self.printed.fileno(), 2)
        self.started: list[str] = []
        sys.addaudithook(lambda event, args: self.started.append(event) if event in STARTS_PROGRAMS else None)

    def outcome(self, number: int, read: Callable[[], str], expected: str, damaged: bool) -> Outcome:
        """Return how reading ended. `expected`: the result of the valid file; `damaged`: any other one is wrong."""
        self.started.clear()
        os.ftruncate(self.printed.fileno(), 0)
        os.lseek(self.printed.fileno(), 0, os.SEEK_SET)
        before = _reset_peak()
        try:
            result = read()
            kind = "same" if result == expected else "silent" if damaged else "changed"
            outcome = Outcome(number, kind, "", result[:200] if kind == "silent" else "")
        except Hang as error:
            outcome = Outcome(number, "hang", place_of(error))
        except BaseException as error:
            outcome = _of_error(number, error)
        sys.stdout.flush()
        sys.stderr.flush()
        peak = memory("VmHWM") - before
        lines = os.pread(self.printed.fileno(), 500, 0).splitlines()
        printed = b" | ".join(line for line in lines if not LIBTIFF.fullmatch(line))
        if self.started:
            return Outcome(number, "executed", "", ", ".join(self.started))
        if outcome.kind in ("same", "changed", "clear"):
            if peak > PEAK:
                return Outcome(number, "memory", outcome.place, f"{peak >> 20} MiB: {outcome.detail}")
            if printed:
                return Outcome(number, "printed", "", printed.decode(errors="replace"))
        return outcome


def _of_error(number: int, error: BaseException) -> Outcome:
    """Return the outcome of an exception."""
    chain, cause = [error], error
    while (cause := cause.__cause__ or cause.__context__) is not None and cause not in chain:
        chain.append(cause)
    for one in chain:
        if isinstance(one, MemoryError) or "DefaultCPUAllocator" in str(one) or "std::bad_alloc" in str(one):
            return Outcome(number, "memory", place_of(one), f"{type(one).__name__}: {one}")
    text = for_terminal(str(error))
    if not isinstance(error, InputError):
        return Outcome(number, "traceback", place_of(error), f"{type(error).__name__}: {text}")
    return Outcome(number, "clear" if is_clear(text) else "message", place_of(error), text)


def is_clear(text: str) -> bool:
    """Return whether a message can be shown: not empty, not endless, printable, and without words of Python."""
    printable = all(line.isprintable() for line in text.split("\n"))
    return 0 < len(text) <= LONGEST_MESSAGE and printable and not any(word in text for word in FOREIGN)


def place_of(error: BaseException) -> str:
    """Return file and line of the last frame in this repository, outside of the tests."""
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = [(path.relative_to(ROOT), line) for path, line in frames if path.is_relative_to(ROOT)]
    return next((f"{path}:{line}" for path, line in own[::-1] if path.parts[0] not in ("tests", ".venv")), "?")


def memory(name: str) -> int:
    """Return an entry of /proc/self/status in bytes, such as VmRSS; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:")), 0)


def _reset_peak() -> int:
    """Start a new measurement of the largest memory; return the present memory in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 1 << 60
    return memory("VmRSS")

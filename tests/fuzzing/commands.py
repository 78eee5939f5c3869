"""Runs command lines in forked processes, each on a new copy of the work folder, and says how each one ended."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import resource
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

from tests.conftest import ROOT
from tests.fuzzing.checkpoints import CANARY
from tests.fuzzing.command_lines import PROGRAMS, Command, Program, groups_of
from tests.fuzzing.worker import FOREIGN, Outcome, is_clear, memory
from tests.fuzzing.workfolder import new_copy, replace_slow_parts

SECONDS = 25  # for one command line; the machine may be shared
QUIET = 5  # seconds; a program that takes no CPU time in the last ones hangs
IDLE = 0.05  # seconds of CPU time that waiting takes
ADDRESS_SPACE = 6 << 30  # bytes in addition to those of the process at its start
FILE_BYTES = 1 << 28
CLASSES = (
    "accepted", "clear", "resumable", "long", "replaced", "overwritten", "message", "printed", "traceback", "hang",
    "died", "executed",
)  # fmt: skip
FAILURES = ("overwritten", "message", "printed", "traceback", "hang", "died", "executed")


def contents(folder: Path) -> dict[str, str]:
    """Return the digest of every file below a folder, and the target of every link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def run(base: Path, number: int, made: Command, folder: Path, seconds: float = SECONDS) -> Outcome:
    """Run a command line in a new copy of the folder `base`; return how it ended."""
    new_copy(base, folder)
    (folder / "config.json").write_text(made.config)
    before = contents(folder)
    sys.stdout.flush()
    sys.stderr.flush()
    output, errors = folder.with_suffix(".out"), folder.with_suffix(".err")
    process = os.fork()
    if not process:
        _become(PROGRAMS[made.program], made, folder, output, errors)
    status, busy = _wait(process, seconds)
    kind, place, detail = classify(status, busy, errors.read_text(errors="replace"))
    changed = changed_files(PROGRAMS[made.program], made, before, contents(folder))
    if (folder / CANARY).exists():
        kind, detail = "executed", "a command from a file or argument ran"
    elif changed and kind not in FAILURES:
        kind, detail = changed
    line = " ".join(word if len(word) < 80 else f"{word[:40]}...({len(word)})" for word in made.argv)
    variables = "".join(f"{key}={value} " for key, value in made.environment.items())
    config = f" [config.json: {made.config[:60]}]" if "config.json" in line else ""
    return Outcome(number, kind, place, f"{detail} <- {variables}{PROGRAMS[made.program].path} {line}{config}")


def _become(program: Program, made: Command, folder: Path, output: Path, errors: Path) -> None:
    """Turn this forked process into the program; does not return."""
    status = 1
    try:
        os.setsid()
        for descriptor, path in ((1, output), (2, errors)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        size = memory("VmSize")
        for limit, value in (("AS", size + ADDRESS_SPACE), ("CORE", 0), ("FSIZE", FILE_BYTES)):
            number = getattr(resource, f"RLIMIT_{limit}")
            resource.setrlimit(number, (value, resource.getrlimit(number)[1]))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        os.environ.update({"HOME": str(folder), **made.environment})
        sys.argv = [str(ROOT / program.path), *made.argv]
        replace_slow_parts()
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status & 255)


def _wait(process: int, seconds: float, quiet: float = QUIET) -> tuple[int | None, float]:
    """Return the status of a process, and the CPU time that it and its children took in the last `quiet` seconds.

    A process that has not ended after `seconds` is killed, and its status is None.
    """
    deadline, before = time.monotonic() + seconds, 0.0
    while (left := deadline - time.monotonic()) > 0:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            _end_group(process)
            return os.waitstatus_to_exitcode(status), 0.0
        if quiet < left < quiet + 0.5:
            before = _cpu_time(process)
        time.sleep(0.01)
    busy = abs(_cpu_time(process) - before)  # less than before if a child has ended
    _end_group(process)
    os.waitpid(process, 0)
    return None, busy


def _cpu_time(group: int) -> float:
    """Return the CPU time of all processes of a group in seconds."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text(errors="replace").rpartition(") ")[2].split()  # after the name: state, parent, ...
            ticks += (int(fields[11]) + int(fields[12])) * (int(fields[2]) == group)
    return ticks / os.sysconf("SC_CLK_TCK")


def _end_group(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def classify(status: int | None, busy: float, said: str) -> tuple[str, str, str]:
    """Return class, place and detail of a program that ended with `status` and wrote `said` to stderr."""
    if status is None:
        return ("long" if busy > IDLE else "hang"), "", f"{busy:.1f} s of CPU time in the last {QUIET} s"
    if status < 0:
        return "died", "", f"signal {-status}"
    if "Traceback (most recent call last)" in said:
        places = re.findall(rf'File "{ROOT}/((?!tests/|\.venv/)[^"]+)", line (\d+)', said)
        return "traceback", ":".join(places[-1]) if places else "", said.strip().splitlines()[-1][:300]
    foreign = [line for line in said.splitlines() if "Warning: " in line or any(word in line for word in FOREIGN)]
    if foreign:
        return "printed", "", foreign[0][:300]
    if status in (0, 75):
        return ("accepted" if status == 0 else "resumable"), "", ""
    _, found, message = said.partition(": error: ")
    kind = "clear" if found and is_clear(message.strip()) else "message"
    return kind, "", f"status {status}: {message or said}"[:400]


def changed_files(
    program: Program, made: Command, before: dict[str, str], after: dict[str, str]
) -> tuple[str, str] | None:
    """Return the class and a text if a file that was there before is another one now, or gone."""
    changed = [name for name, digest in before.items() if after.get(name) != digest]
    lost = [Path(name) for name in changed if not name.startswith(program.own or "\0")]
    if not lost:
        return None
    inputs = [os.path.normpath(g[-1]) for g in groups_of(made.argv) if g[0].split("=")[0] not in program.outputs]
    of_inputs = [path for path in lost if any(path.is_relative_to(i) or path.parent == Path(i) for i in inputs)]
    return ("overwritten" if of_inputs else "replaced"), f"changed: {', '.join(map(str, (of_inputs or lost)[:3]))}"

"""Runs command lines in forked processes, each on a new copy of the work folder, and says how each one ended."""

from __future__ import annotations

import contextlib
import hashlib
import os
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
from tests.fuzzing.workfolder import new_copy

SECONDS = 25  # for one command line; the machine may be shared
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


def run(
    base: Path, before: dict[str, str], number: int, made: Command, folder: Path, seconds: float = SECONDS
) -> Outcome:
    """Run a command line in a new copy of the folder `base`, whose contents are `before`; return how it ended."""
    new_copy(base, folder)
    (folder / "config.json").write_text(made.config)
    before = before | {"config.json": hashlib.sha256(made.config.encode()).hexdigest()}
    sys.stdout.flush()
    sys.stderr.flush()
    output, errors = folder.with_suffix(".out"), folder.with_suffix(".err")
    process = os.fork()
    if not process:
        _become(PROGRAMS[made.program], made, folder, output, errors)
    status, cpu, elapsed = _wait(process, seconds)
    said = errors.read_text(errors="replace")
    kind, place, detail = classify(status, cpu, elapsed, said)
    if (folder / CANARY).exists():
        kind, detail = "executed", "a command from a file or argument ran"
    elif changed := changed_files(PROGRAMS[made.program], made, before, contents(folder)):
        failed = kind in FAILURES
        kind, detail = (kind, detail) if failed else changed
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


def _wait(process: int, seconds: float) -> tuple[int | None, float, float]:
    """Return status (None: it was killed after `seconds`), CPU time and time of a process; end those it started."""
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        done, status, usage = os.wait4(process, os.WNOHANG)
        if done:
            _end_group(process)
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, time.monotonic() - start
        time.sleep(0.01)
    _end_group(process)
    _, _, usage = os.wait4(process, 0)
    return None, usage.ru_utime + usage.ru_stime, seconds


def _end_group(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def classify(status: int | None, cpu: float, elapsed: float, said: str) -> tuple[str, str, str]:
    """Return class, place and detail of a program that ended with `status` and wrote `said` to stderr."""
    if status is None:
        return ("long" if cpu > elapsed / 4 else "hang"), "", f"{cpu:.1f} s of CPU in {elapsed:.0f} s"
    if status < 0:
        return "died", "", f"signal {-status}"
    if "Traceback (most recent call last)" in said:
        own = [line.strip() for line in said.splitlines() if f'File "{ROOT}' in line and ".venv" not in line]
        product = [line for line in own if f"{ROOT}/tests" not in line]
        place = (
            product[-1].split('"')[1].removeprefix(f"{ROOT}/") + ":" + product[-1].split()[3].rstrip(",")
            if product
            else ""
        )
        return "traceback", place, said.strip().splitlines()[-1][:300]
    foreign = [line for line in said.splitlines() if "Warning: " in line or any(word in line for word in FOREIGN)]
    if foreign:
        return "printed", "", foreign[0][:300]
    if status in (0, 75):
        return ("accepted" if status == 0 else "resumable"), "", ""
    _, found, message = said.partition(": error: ")
    return (
        ("clear" if found and is_clear(message.strip()) else "message"),
        "",
        f"status {status}: {message or said}"[:400],
    )


def changed_files(
    program: Program, made: Command, before: dict[str, str], after: dict[str, str]
) -> tuple[str, str] | None:
    """Return the class and a text if a file that was there before is another one now, or gone."""
    lost = [
        name
        for name, digest in before.items()
        if after.get(name) != digest and not name.startswith(program.own or "\0")
    ]
    if not lost:
        return None
    inputs = [os.path.normpath(g[-1]) for g in groups_of(made.argv) if g[0].split("=")[0] not in program.outputs]
    of_inputs = [
        name for name in lost if any(Path(name).is_relative_to(i) or Path(name).parent == Path(i) for i in inputs)
    ]
    return ("overwritten" if of_inputs else "replaced"), f"changed: {', '.join((of_inputs or lost)[:3])}"

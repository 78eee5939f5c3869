"""Kill a program at random times, start it again, and compare its files with those of an uninterrupted run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ATTEMPTS_PER_KILL = 10  # a run may end before its kill
REPOSITORY = Path(__file__).resolve().parents[1]


def start(program: str, *arguments: object) -> subprocess.Popen:
    """Start one of the project's programs in its own process group."""
    command = [sys.executable, str(REPOSITORY / program), *map(str, arguments)]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def contents(path: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a folder, including hidden ones, by name; for a file, its bytes under ""."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def survives_kills(program: str, arguments: list[object], folder: Path, suffix: str, kills: int, seed: int = 0) -> int:
    """Assert that a program killed `kills` times gives the bytes of an uninterrupted run; return the number of files.

    `arguments` contain everything but --dest, which is created in `folder` with `suffix` ("" or ".zip"). Half of the
    kills hit only the main process, as the kernel's out-of-memory killer does, and half the process group. A kill comes
    between the program's first write and the duration of an uninterrupted run. A run that ends before its kill is
    compared as well, and if its destination was empty at the start, it replaces the measured duration.
    """
    uninterrupted, destination = folder / f"uninterrupted{suffix}", folder / f"killed{suffix}"
    first_write, duration = measure([program, *arguments, "--dest", uninterrupted], folder)
    expected = contents(uninterrupted)

    chance, killed, is_fresh = random.Random(seed), 0, True
    for _ in range(ATTEMPTS_PER_KILL * kills):
        start_time = time.monotonic()
        process = start(program, *arguments, "--dest", destination)
        try:
            _, errors = process.communicate(timeout=chance.uniform(0.9 * first_write, duration))
        except subprocess.TimeoutExpired:
            kill = os.killpg if chance.random() < 0.5 else os.kill
            kill(process.pid, signal.SIGKILL)
            process.communicate()
            killed, is_fresh = killed + 1, False
            assert_complete_files(destination, expected)
        else:
            took = time.monotonic() - start_time
            assert process.returncode == 0, errors
            assert contents(destination) == expected
            shutil.rmtree(destination) if destination.is_dir() else destination.unlink()
            if is_fresh:  # the first run may have been slower because of cold file caches or a busy machine
                first_write, duration = first_write * took / duration, took
            is_fresh = True
        if killed == kills:
            break
    assert killed == kills, f"only {killed} of {kills} kills came before the program's end"
    _, errors = (process := start(program, *arguments, "--dest", destination)).communicate()
    assert process.returncode == 0, errors
    assert contents(destination) == expected
    assert {path.name for path in folder.iterdir()} == {uninterrupted.name, destination.name}, "other files were left"
    return len(expected if not suffix else zipfile.ZipFile(destination).namelist())


def measure(command: list[object], folder: Path) -> tuple[float, float]:
    """Run a program; return the seconds until it first writes into an empty folder, and until it ends."""
    start_time = time.monotonic()
    process = start(*command)
    while process.poll() is None and not any(folder.iterdir()):
        time.sleep(0.01)
    first_write = time.monotonic() - start_time
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return first_write, time.monotonic() - start_time


def assert_complete_files(destination: Path, expected: dict[str, bytes]) -> None:
    """Assert that every file under its final name is complete."""
    if destination.exists():
        for name, data in contents(destination).items():
            if not name.endswith((".tmp", ".lock")):
                assert data == expected[name], f"{name} is incomplete"

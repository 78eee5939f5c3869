"""Kill a program at random moments, restart it, and compare its files with those of an uninterrupted run."""

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

ATTEMPTS_A_KILL = 10  # a run may end before it is killed
REPOSITORY = Path(__file__).resolve().parents[1]


def start(program: str, *arguments: object) -> subprocess.Popen:
    """Start a program of the repository in its own process group."""
    command = [sys.executable, str(REPOSITORY / program), *map(str, arguments)]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def contents(path: Path) -> dict[str, bytes]:
    """Return the content of every file of a folder, including hidden ones, by name; or of a single file."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def survives_kills(program: str, arguments: list[object], folder: Path, suffix: str, kills: int, seed: int = 0) -> int:
    """Assert that a program killed `kills` times at random writes the bytes of an uninterrupted run; return its files.

    `arguments` are complete except for --dest, which is a path in `folder` with `suffix` ("" or ".zip"). Half of the
    kills hit only the main process, as the out-of-memory killer does, and half hit the process group. A kill happens
    between the program's first write and the duration of an uninterrupted run. A run that ends before it is killed is
    compared as well; if it started without files, its duration is used from then on.
    """
    reference, destination = folder / f"reference{suffix}", folder / f"killed{suffix}"
    first_write, duration = measure([program, *arguments, "--dest", reference], folder)
    expected = contents(reference)

    generator, killed, is_fresh = random.Random(seed), 0, True
    for _ in range(ATTEMPTS_A_KILL * kills):
        started_at = time.monotonic()
        process = start(program, *arguments, "--dest", destination)
        try:
            _, errors = process.communicate(timeout=generator.uniform(0.9 * first_write, duration))
        except subprocess.TimeoutExpired:
            kill = os.killpg if generator.random() < 0.5 else os.kill
            kill(process.pid, signal.SIGKILL)
            process.communicate()
            killed, is_fresh = killed + 1, False
            assert_complete(destination, expected)
        else:
            took = time.monotonic() - started_at
            assert process.returncode == 0, errors
            assert contents(destination) == expected
            shutil.rmtree(destination) if destination.is_dir() else destination.unlink()
            if is_fresh:  # the first run read its files from the disk, or the machine was busy
                first_write, duration = first_write * took / duration, took
            is_fresh = True
        if killed == kills:
            break
    assert killed == kills, f"only {killed} of {kills} kills came before the program's end"
    _, errors = (process := start(program, *arguments, "--dest", destination)).communicate()
    assert process.returncode == 0, errors
    assert contents(destination) == expected
    assert {path.name for path in folder.iterdir()} == {reference.name, destination.name}, "unexpected files"
    return len(expected if not suffix else zipfile.ZipFile(destination).namelist())


def measure(command: list[object], folder: Path) -> tuple[float, float]:
    """Run a program; return the seconds until it first writes into an empty folder, and until it ends."""
    started_at = time.monotonic()
    process = start(*command)
    while process.poll() is None and not any(folder.iterdir()):
        time.sleep(0.01)
    first_write = time.monotonic() - started_at
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return first_write, time.monotonic() - started_at


def assert_complete(destination: Path, expected: dict[str, bytes]) -> None:
    """Assert that every file under its final name is complete."""
    if destination.exists():
        for name, data in contents(destination).items():
            if not name.endswith((".tmp", ".lock")):
                assert data == expected[name], f"{name} is incomplete"

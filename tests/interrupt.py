"""Kill a program at random moments, start it again, and compare what it leaves with what one quiet run leaves."""

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

ATTEMPTS_A_KILL = 10  # more than one is needed only when a run ends before its kill
REPOSITORY = Path(__file__).resolve().parents[1]


def start(program: str, *arguments: object) -> subprocess.Popen:
    """Start one of the project's programs in a process group of its own."""
    command = [sys.executable, str(REPOSITORY / program), *map(str, arguments)]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def contents(path: Path) -> dict[str, bytes]:
    """Return every file of a folder, hidden ones too, or the one file, by name."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def survives_kills(program: str, arguments: list[object], folder: Path, suffix: str, kills: int, seed: int = 0) -> int:
    """Assert that a program killed `kills` times at random leaves the bytes of an undisturbed run; return its files.

    `arguments` lack only --dest, which goes into `folder` with `suffix` ("" or ".zip"). Half of the kills hit the
    main process alone, as the system's own killer does, half the whole group. A kill falls between the moment that
    the program first writes and the time an undisturbed run takes; a run that ends before its kill is compared too,
    and if nothing had been there before it, it is the undisturbed run to measure by from then on.
    """
    quiet, destination = folder / f"quiet{suffix}", folder / f"killed{suffix}"
    first_write, duration = measure([program, *arguments, "--dest", quiet], folder)
    expected = contents(quiet)

    chance, killed, is_fresh = random.Random(seed), 0, True
    for _ in range(ATTEMPTS_A_KILL * kills):
        begun = time.monotonic()
        process = start(program, *arguments, "--dest", destination)
        try:
            _, errors = process.communicate(timeout=chance.uniform(0.9 * first_write, duration))
        except subprocess.TimeoutExpired:
            kill = os.killpg if chance.random() < 0.5 else os.kill
            kill(process.pid, signal.SIGKILL)
            process.communicate()
            killed, is_fresh = killed + 1, False
            assert_whole(destination, expected)
        else:
            took = time.monotonic() - begun
            assert process.returncode == 0, errors
            assert contents(destination) == expected
            shutil.rmtree(destination) if destination.is_dir() else destination.unlink()
            if is_fresh:  # the files of the first run were still to be read from the disk, or the machine was busy
                first_write, duration = first_write * took / duration, took
            is_fresh = True
        if killed == kills:
            break
    assert killed == kills, f"only {killed} of {kills} kills came before the program's end"
    _, errors = (process := start(program, *arguments, "--dest", destination)).communicate()
    assert process.returncode == 0, errors
    assert contents(destination) == expected
    assert {path.name for path in folder.iterdir()} == {quiet.name, destination.name}, "something was left beside"
    return len(expected if not suffix else zipfile.ZipFile(destination).namelist())


def measure(command: list[object], folder: Path) -> tuple[float, float]:
    """Run a program to its end; return the seconds until it first writes into an empty folder, and until it ends."""
    begun = time.monotonic()
    process = start(*command)
    while process.poll() is None and not any(folder.iterdir()):
        time.sleep(0.01)
    first_write = time.monotonic() - begun
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return first_write, time.monotonic() - begun


def assert_whole(destination: Path, expected: dict[str, bytes]) -> None:
    """Assert that every file under its final name is complete."""
    if destination.exists():
        for name, data in contents(destination).items():
            if not name.endswith((".tmp", ".lock")):
                assert data == expected[name], f"{name} is half-written"

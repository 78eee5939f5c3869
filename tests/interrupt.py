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
    the program first writes and the time an undisturbed run takes; a run that ends before its kill is compared too.
    """
    quiet, destination = folder / f"quiet{suffix}", folder / f"killed{suffix}"
    begun = time.monotonic()
    process = start(program, *arguments, "--dest", quiet)
    while process.poll() is None and not any(path.name.startswith((".quiet", "quiet")) for path in folder.iterdir()):
        time.sleep(0.01)
    first_write = time.monotonic() - begun
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    duration = time.monotonic() - begun
    expected = contents(quiet)

    chance, killed = random.Random(seed), 0
    while killed < kills:
        process = start(program, *arguments, "--dest", destination)
        try:
            _, errors = process.communicate(timeout=chance.uniform(0.9 * first_write, duration))
        except subprocess.TimeoutExpired:
            kill = os.killpg if chance.random() < 0.5 else os.kill
            kill(process.pid, signal.SIGKILL)
            process.communicate()
            killed += 1
            assert_whole(destination, expected)
        else:
            assert process.returncode == 0, errors
            assert contents(destination) == expected
            shutil.rmtree(destination) if destination.is_dir() else destination.unlink()
    _, errors = (process := start(program, *arguments, "--dest", destination)).communicate()
    assert process.returncode == 0, errors
    assert contents(destination) == expected
    assert {path.name for path in folder.iterdir()} == {quiet.name, destination.name}, "something was left beside"
    return len(expected if not suffix else zipfile.ZipFile(destination).namelist())


def assert_whole(destination: Path, expected: dict[str, bytes]) -> None:
    """Assert that every file under its final name is complete."""
    if destination.exists():
        for name, data in contents(destination).items():
            if not name.endswith((".tmp", ".lock")):
                assert data == expected[name], f"{name} is half-written"

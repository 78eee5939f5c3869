"""The harness itself: which faults of a program it finds. The programs are small scripts that are killed half-way."""

import random
import time

import pytest

from tests import kills
from tests.kills import Case, Counts, snapshot, try_full_disks, try_kills

# Writes one file in two halves. It waits to be killed between them, if "wait" exists, or afterwards, if "linger" does.
PROGRAM = """
import subprocess, sys, time
from pathlib import Path
place = Path(sys.argv[1])

def pause(name):
    if place.with_name(name).exists():
        place.with_name(name).rename(place.with_name("ready"))
        time.sleep(60)

def write(path):
    with open(path, "wb") as file:
        file.write(bytes(5000))
        file.flush()
        pause("wait")
        file.write(bytes(5000))

if place.with_name("linger").exists():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    pause("linger")
final, temporary = place / "out.bin", place / ".out.bin.0.tmp"
"""
CAREFUL = """
try:
    temporary.unlink(missing_ok=True)
    write(temporary)
    temporary.rename(final)
except OSError:
    temporary.unlink()
    sys.exit("error: the disk is full")
"""
CARELESS = "final.exists() or write(final)"
LEAVES_HALVES = CAREFUL.replace("temporary.unlink()", "pass").replace(".0.tmp", "")
LEAVES_FILES = CAREFUL.replace("temporary.unlink(missing_ok=True)", "temporary = place / f'.{time.time()}.tmp'")


@pytest.fixture
def case(tmp_path, monkeypatch):
    """Return a function that makes a case of a program, which is killed when it says that it is ready."""
    ready, ended_within = tmp_path / "ready", kills.ended_within

    def ended_or_ready(process, seconds):
        waits = [tmp_path / name for name in ("wait", "linger") if (tmp_path / name).exists()]
        if not waits and not ready.exists():
            return ended_within(process, max(seconds, 0.1))
        while not ready.exists():
            time.sleep(0.01)
        ready.unlink()
        return None

    def make(text, *files):
        (tmp_path / "program.py").write_text(PROGRAM + text)
        case = Case("program", [str(tmp_path / "program.py"), str(tmp_path / "place")], tmp_path / "place")
        case.place.mkdir()
        (case.place / "out.bin").write_bytes(bytes(10_000))
        case.expected, case.largest = snapshot(case.place), 10_000
        for name in files:
            (tmp_path / name).touch()
        return case

    monkeypatch.setattr(kills, "ended_within", ended_or_ready)
    return make


@pytest.mark.parametrize(
    ("program", "failure"),
    [(CAREFUL, None), (CARELESS, "other content: out.bin"), (LEAVES_FILES, "additional files: .")],
)
def test_what_a_kill_damages_is_found(case, program, failure):
    counts = Counts()
    try_kills(case(program, "wait"), 1, counts, random.Random(0))
    assert (counts.kills, counts.compared, counts.before_first_file) == (1, 1, 0)
    assert counts.with_temporary_file == (program != CARELESS)
    assert [text.startswith(f"after 1 kills: {failure}") for text in counts.failures] == [True] * (failure is not None)


@pytest.mark.parametrize(
    ("program", "failures"),
    [(CAREFUL, []), (CARELESS, ["Traceback", "other content"]), (LEAVES_HALVES, ["a temporary file was left"])],
)
def test_what_a_full_disk_damages_is_found(case, program, failures):
    counts = Counts()
    try_full_disks(case(program), 1, counts, random.Random(1))
    assert counts.full_disks == 1 and len(counts.failures) == len(failures)
    assert all(failure in text for failure, text in zip(failures, counts.failures, strict=True))


def test_a_hang_is_found(case):
    assert kills.run(case(CAREFUL, "wait")) == (kills.HANGS, f"no end after {kills.SECONDS} s")


@pytest.mark.parametrize("everything", [True, False])
def test_processes_that_outlive_a_killed_one_are_found(case, monkeypatch, everything):
    monkeypatch.setattr(kills, "LEFT_ALONE", 30 if everything else 0.1)
    process = kills.start(case(CAREFUL, "linger").command)
    assert kills.ended_within(process, 0) is None
    assert kills.kill(process, everything) == everything


def test_times_are_not_compared():
    rows = [{"step": 1, "seconds": 0.5, "log": {"loss": 2, "data_wait": 0.1}}]
    assert kills.without_times(rows) == [{"step": 1, "log": {"loss": 2}}]

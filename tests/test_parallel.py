"""Worker processes: not more than pieces of work, and none left when the caller stops."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor

import pytest

from common.errors import InputError
from preprocessing import parallel


@pytest.mark.parametrize("reason", [KeyboardInterrupt, GeneratorExit])
def test_stopping_early_kills_the_workers(reason):
    others = set(multiprocessing.active_children())
    results = parallel.in_workers(time.sleep, [0, 5, 5, 5], workers=2)
    next(results)
    start = time.monotonic()
    with pytest.raises(reason):
        results.throw(reason)
    assert time.monotonic() - start < 2 and set(multiprocessing.active_children()) <= others


def test_no_more_workers_than_pieces(monkeypatch):
    asked = []

    def record(workers, **options):
        asked.append(workers)
        return ProcessPoolExecutor(workers, **options)

    monkeypatch.setattr(parallel, "ProcessPoolExecutor", record)
    assert list(parallel.in_workers(abs, [-1, -1], workers=100)) == [1, 1] and asked == [2]
    assert list(parallel.in_workers(abs, [], workers=100)) == []


@pytest.mark.parametrize(
    "error", [BlockingIOError(11, "Resource temporarily unavailable"), OSError(12, "Cannot allocate")]
)
def test_processes_that_cannot_be_started_are_one_error(monkeypatch, error):
    def fail(self):
        raise error

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", fail)
    with pytest.raises(InputError, match=r"2 worker processes cannot be started \(.*\): use a smaller --workers"):
        list(parallel.in_workers(abs, [1, 2], workers=2))


def test_a_killed_process_is_one_error():
    with pytest.raises(
        InputError, match=r"a worker process was killed, probably because memory was full: use a smaller"
    ):
        list(parallel.in_workers(kill_this_process, [signal.SIGKILL], workers=1))


def kill_this_process(number: int) -> None:
    os.kill(os.getpid(), number)

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
    ("where", "error", "reason"),
    [
        ("multiprocessing.process.BaseProcess.start", OSError(12, "Cannot allocate"), ".*Cannot allocate"),
        (
            "multiprocessing.queues.SimpleQueue.__init__",
            OSError(28, "No space"),
            "the shared memory, /dev/shm, is full",
        ),
    ],
)
def test_processes_that_cannot_be_started_are_one_error(monkeypatch, where, error, reason):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(where, fail)
    with pytest.raises(InputError, match=rf"2 worker processes cannot be started \({reason}\): use a smaller --wo"):
        list(parallel.in_workers(abs, [1, 2], workers=2))


def test_a_killed_process_is_one_error():
    with pytest.raises(
        InputError, match=r"a worker process was killed, probably because memory was full: use a smaller"
    ):
        list(parallel.in_workers(kill_this_process, [signal.SIGKILL], workers=1))


def kill_this_process(number: int) -> None:
    os.kill(os.getpid(), number)

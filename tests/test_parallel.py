"""Worker processes: not more than pieces of work, and none left when the caller stops."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import pytest

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

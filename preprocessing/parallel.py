"""Apply one function to many pieces of work in several processes, which end with the program."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from common.errors import InputError, first_line
from common.progress import progress_bar

_job: Callable[[Any], Any]


def available_cores() -> int:
    """Return the number of cores this process may use; a container or a batch job may limit them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chunks(total: int, size: int) -> list[range]:
    """Return the ranges of `size` numbers, the last one shorter, that together contain 0 to total - 1."""
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def in_workers(job: Callable[[Any], Any], pieces: Sequence[Any], workers: int, **bar: Any) -> Iterator[Any]:
    """Yield `job(piece)` for every piece in the order of completion, computed by at most `workers` processes.

    Each process receives `job`, which must be picklable, once. On Ctrl-C, or if the caller stops iterating, the
    processes are killed during their pieces. After an error of `job`, which is raised here, they finish them. With
    arguments of tqdm, `bar`, a progress bar counts the items of the pieces.
    Raises InputError if the system killed a process.
    """
    others = set(multiprocessing.active_children())
    pool = None
    try:
        try:
            pool = ProcessPoolExecutor(min(workers, len(pieces)) or 1, initializer=_start_worker, initargs=(job,))
            running = {pool.submit(_run_job, piece): piece for piece in pieces}
        except BrokenProcessPool:
            raise
        except (OSError, RuntimeError) as error:  # the system allows no more processes or threads, or has no memory
            is_shared_memory = isinstance(error, OSError) and error.errno == errno.ENOSPC  # semaphores are files there
            reason = "the shared memory, /dev/shm, is full" if is_shared_memory else first_line(error)
            raise InputError(
                f"{workers} worker processes cannot be started ({reason}): use a smaller --workers"
            ) from error
        with progress_bar(main=bool(bar), lines=True, **bar) as progress:
            for done in as_completed(running):
                yield done.result()
                progress.update(len(running[done]) if bar else 1)
    except BrokenProcessPool as error:
        cause = "a worker process was killed, probably because memory was full"
        raise InputError(f"{cause}: use a smaller --workers; the same command continues where it stopped") from error
    except (KeyboardInterrupt, GeneratorExit):
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _start_worker(job: Callable[[Any], Any]) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """Exit when the parent process ends: workers of a killed program must not continue to write."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_job(piece: Any) -> Any:
    return _job(piece)

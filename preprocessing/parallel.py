"""One function on many pieces of work in many processes, leaving none behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from common.io import InputError

_job: Callable[[Any], Any]


def available_cores() -> int:
    """Return the number of cores this process may use, which in a container or a batch job is not all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_workers(job: Callable[[Any], Any], pieces: Sequence[Any], workers: int) -> Iterator[Any]:
    """Yield `job(piece)` for every piece, in the order of completion, computed by at most `workers` processes.

    `job` travels to each process once, so it may carry much; it must be picklable, and able to bear being killed: who
    stops asking for results, by Ctrl-C or by an error, waits for no piece that is in work. An error in the job itself
    is raised here once the pieces in work are done. Raises InputError if the system kills a process.
    """
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(workers, len(pieces)) or 1, initializer=_start_worker, initargs=(job,))
    try:
        for done in as_completed([pool.submit(_run_job, piece) for piece in pieces]):
            yield done.result()
    except BrokenProcessPool as error:
        raise InputError(
            "a worker process was killed, most likely for want of memory: give a smaller --workers; the same "
            "command goes on where it stopped"
        ) from error
    except (KeyboardInterrupt, GeneratorExit):
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(job: Callable[[Any], Any]) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """End this process with its parent: a killed program must not leave workers that write on unseen."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_job(piece: Any) -> Any:
    return _job(piece)

"""Batches from the worker processes of a DataLoader: the errors of a worker, its death, the shared memory it needs.

A worker passes its batches through shared memory, files in /dev/shm. If that is full, PyTorch loses the batch and waits
for it forever, or the system kills the worker. Here both end the worker and are reported as one `LostProcess`.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from common.errors import InputError, LostProcess, first_line, memory_message

SHARED_MEMORY = Path("/dev/shm")
SECONDS_TO_END = 5  # of a worker that has closed its connection
CANNOT_SEND = 77  # exit status of a worker that could not pass a batch on
# How a worker ended, by its exit code (a negative one is a signal).
ENDINGS = {
    -signal.SIGKILL: "was killed, probably because the memory of this machine is full",
    -signal.SIGBUS: "was killed, because the shared memory is full",
    CANNOT_SEND: "could not pass a batch on, because the shared memory is full or too many files are open",
}


@dataclass(frozen=True)
class ErrorsAsItems(Dataset):
    """Returns an InputError instead of raising it, because a DataLoader's worker would add its traceback to it."""

    data: Dataset

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        try:
            return self.data[i]
        except InputError as error:
            return error
        except (OSError, MemoryError, RuntimeError) as error:
            return _failure(error)


def collate(items: list[Any]) -> Any:
    """Return the items of `ErrorsAsItems` as a batch, or the first error among them."""
    error = next((item for item in items if isinstance(item, InputError | LostProcess)), None)
    if error is not None:
        return error
    try:
        return default_collate(items)
    except (OSError, MemoryError, RuntimeError) as error:  # in a worker: there is no shared memory for the batch
        return _failure(error)


def _failure(error: Exception) -> LostProcess:
    """Return the error of a worker as an item; raise it if this is not a worker."""
    if get_worker_info() is None:
        raise error
    return LostProcess(f"a loader process has failed: {_reason(error)}")


def start_worker(worker_id: int) -> None:
    """Let a worker exit if it cannot pass a batch on. Without this, the main process would wait for the batch forever.

    A `worker_init_fn`. PyTorch's handlers of these signals would print an error in addition to that of `batches_of`.
    """
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda error, batch: os._exit(CANNOT_SEND))
    for number in (signal.SIGBUS, signal.SIGSEGV, signal.SIGFPE):
        signal.signal(number, signal.SIG_DFL)


def check_shared_memory(flag: str, workers: int, batches: int, batch_bytes: int) -> None:
    """Raise InputError if the shared memory of this machine has no room for the batches of all its processes.

    Args:
        flag: gives the number of workers, for the message.
        workers: of each process; with 0 no shared memory is needed.
        batches: that each worker prepares in advance.
        batch_bytes: size of one.
    """
    free = _free_bytes()
    needed = (workers * batches + 1) * batch_bytes * int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if workers and free is not None and needed > free:
        raise InputError(
            f"{flag} {workers}: the loader processes of this machine keep up to {needed / 1e6:,.1f} MB of batches in "
            f"{SHARED_MEMORY}, where {free / 1e6:,.1f} MB are free; allowed: more shared memory (docker run "
            f"--shm-size {-(-needed // 10**9) + 1}g), fewer processes, or {flag} 0"
        )


def batches_of(loader: DataLoader, flag: str) -> Iterator[Any]:
    """Yield the batches of a DataLoader of `ErrorsAsItems` with `start_worker`.

    Raises:
        InputError: that of an item, or the workers cannot be started. `flag`, for the message, gives their number.
        LostProcess: a worker has ended or failed.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        if loader.num_workers:  # queues need shared memory too, and a failure within PyTorch would leave a traceback
            queues = [multiprocessing.Queue() for _ in range(loader.num_workers + 4)]
            del queues
        batches = iter(loader)
    except OSError as error:
        if not loader.num_workers:
            raise
        raise InputError(
            f"{flag} {loader.num_workers}: the loader processes cannot be started ({error.strerror or error}); "
            f"allowed: {flag} 0, or more memory, processes (ulimit -u) and shared memory{_free_shared_memory()}"
        ) from error
    if loader.num_workers and threading.current_thread() is threading.main_thread():
        # PyTorch's handler raises an error when a worker ends, wherever the program is then, even in a training step.
        # The loader itself looks for dead workers every 5 seconds while it waits for a batch.
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            if not loader.num_workers:
                raise
            raise LostProcess(_why_lost(batches, error)) from error
        if isinstance(batch, InputError | LostProcess):
            raise batch
        yield batch


def _reason(error: Exception) -> str:
    """Return why a worker failed; PyTorch's messages about shared memory name files that the user does not know."""
    text = str(error)
    if any(mark in text for mark in ("shared memory", "</torch_", "No space left")):
        return f"the shared memory is full{_free_shared_memory()}"
    return memory_message(error) or (isinstance(error, OSError) and error.strerror) or first_line(error)


def _why_lost(batches: Any, error: Exception) -> str:
    """Return how a worker has ended; its connection may be closed before it has an exit code."""
    workers = getattr(batches, "_workers", ())
    ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=SECONDS_TO_END)
    for worker in workers:
        if worker.sentinel in ended:
            worker.join(SECONDS_TO_END)
    codes = {worker.exitcode for worker in workers} - {None, 0}
    if not codes:
        return f"the batch of a loader process cannot be received: {_reason(error)}"
    return "a loader process " + next(
        (ending for code, ending in ENDINGS.items() if code in codes), f"has ended with exit status {min(codes)}"
    )


def _free_bytes() -> int | None:
    """Return the free shared memory; None if this system has no such folder."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def _free_shared_memory() -> str:
    free = _free_bytes()
    return "" if free is None else f" ({SHARED_MEMORY}: {free / 1e6:,.1f} MB free)"

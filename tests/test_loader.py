"""Loader processes that die, fail or lack shared memory: one error each, and no waiting for a lost batch."""

from __future__ import annotations

import os
import re
import signal
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from common import loader
from common.errors import InputError, LostProcess, explain
from common.loader import ErrorsAsItems, batches_of, check_shared_memory, collate, start_worker


class Items(Dataset):
    """Four items; `act` is called in the worker before each."""

    def __init__(self, act=lambda i: None):
        self.act = act

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> torch.Tensor:
        self.act(i)
        return torch.full((2,), float(i))


class Unsendable(torch.Tensor):
    """A batch for which there is no shared memory."""

    def __reduce_ex__(self, protocol):
        raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")


@pytest.fixture(autouse=True)
def short_intervals(monkeypatch):
    """PyTorch looks for dead workers every 5 seconds."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.05)
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.05,))


def load(items, workers: int = 1, **more):
    settings = {"batch_size": 2, "collate_fn": collate} | more
    return batches_of(
        DataLoader(ErrorsAsItems(items), num_workers=workers, worker_init_fn=start_worker, **settings), "-w"
    )


def raise_(error):
    raise error


def test_batches_pass_and_the_handler_of_signals_stays() -> None:
    before = signal.getsignal(signal.SIGCHLD)
    for workers in (0, 1):
        assert [batch[:, 0].tolist() for batch in load(Items(), workers)] == [[0, 1], [2, 3]]
        assert signal.getsignal(signal.SIGCHLD) == before  # torch's would raise in the middle of a step


def test_a_killed_worker_is_one_error() -> None:
    batches = load(Items(lambda i: i == 2 and os.kill(os.getpid(), signal.SIGKILL)), prefetch_factor=1)
    next(batches)
    with pytest.raises(
        LostProcess, match=r"^a loader process was killed, probably because the memory of this machine is full$"
    ):
        next(batches)


def test_a_worker_that_cannot_send_a_batch_ends() -> None:
    """PyTorch prints the error, loses the batch, and the main process waits for it forever."""
    items = Items()
    items.__class__ = type("Broken", (Items,), {"__getitem__": lambda self, i: torch.ones(2).as_subclass(Unsendable)})
    with pytest.raises(LostProcess, match="could not pass a batch on, because the shared memory is full or too many"):
        next(load(items, batch_size=None, collate_fn=None))


@pytest.mark.parametrize(
    "error",
    [RuntimeError("unable to allocate shared memory(shm)\nfor file"), MemoryError(), OSError(5, "Input/output error")],
)
def test_an_error_in_a_worker_is_one_line(error) -> None:
    with pytest.raises(LostProcess) as caught:
        list(load(Items(lambda i: raise_(error))))
    assert str(caught.value).startswith("a loader process has failed: ") and "\n" not in str(caught.value)
    assert explain(caught.value, "") == (str(caught.value), 1)
    with pytest.raises(type(error)):  # without workers it is the program's own error
        list(load(Items(lambda i: raise_(error)), workers=0))


def test_invalid_input_stays_that() -> None:
    for workers in (0, 1):
        with pytest.raises(InputError, match=r"^x\.png: broken$"):
            list(load(Items(lambda i: raise_(InputError("x.png: broken"))), workers))


def test_no_shared_memory_for_a_batch_in_a_worker_becomes_an_item(monkeypatch) -> None:
    monkeypatch.setattr(loader, "default_collate", lambda items: raise_(RuntimeError("No space left on device (28)")))
    with pytest.raises(RuntimeError, match="No space"):
        collate([torch.ones(1)])
    monkeypatch.setattr(loader, "get_worker_info", lambda: "a worker")
    found = collate([torch.ones(1)])
    assert str(found).startswith("a loader process has failed: the shared memory is full (/dev/shm: ")
    assert get_worker_info() is None


def test_workers_that_cannot_be_started_are_an_error_with_the_flag(monkeypatch) -> None:
    monkeypatch.setattr(
        "multiprocessing.process.BaseProcess.start", lambda self: raise_(BlockingIOError(11, "Resource"))
    )
    with pytest.raises(InputError, match=r"^-w 1: the loader processes cannot be started \(Resource\); allowed: -w 0"):
        next(load(Items()))


@pytest.mark.parametrize(
    ("codes", "cause"),
    [
        ((0, -7), "a loader process was killed, because the shared memory is full$"),
        ((None, -9), "memory of this machine is full$"),
        ((3,), "has ended with exit status 3$"),
        ((None,), "the batch of a loader process cannot be received: Too many open files$"),
    ],
)
def test_the_exit_code_of_a_worker_says_the_cause(codes, cause, monkeypatch) -> None:
    monkeypatch.setattr("multiprocessing.connection.wait", lambda sentinels, timeout: [])
    workers = SimpleNamespace(_workers=[SimpleNamespace(exitcode=code, sentinel=0) for code in codes])
    assert re.search(cause, loader._why_lost(workers, OSError(24, "Too many open files")))


def test_too_little_shared_memory_is_noticed_at_the_start(monkeypatch) -> None:
    monkeypatch.setattr(loader.os, "statvfs", lambda path: SimpleNamespace(f_bavail=16384, f_frsize=4096))  # 64 MiB
    check_shared_memory("--num-workers", 4, 4, 3_900_000)
    check_shared_memory("--num-workers", 0, 4, 10**12)
    with pytest.raises(
        InputError, match=r"^--num-workers 4: .* up to 68.0 MB .* 67.1 MB are free; .*--shm-size 2g.* 0$"
    ):
        check_shared_memory("--num-workers", 4, 4, 4_000_000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(InputError, match=r"up to 530\.4 MB"):
        check_shared_memory("--num-workers", 4, 4, 3_900_000)
    monkeypatch.setattr(loader.os, "statvfs", lambda path: raise_(FileNotFoundError()))  # macOS
    check_shared_memory("--num-workers", 4, 4, 10**12)

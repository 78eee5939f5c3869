"""Helpers for programs that run on several processes or on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, find_executable_batch_size, gather_object
from torch import Tensor

from common.io import InputError

LONGEST_WORK = timedelta(days=2)
Value = TypeVar("Value")


def broadcast_from_main(accelerator: Accelerator, decide: Callable[[], Value]) -> Value:
    """Return on every process the value of `decide()`, which only the main process calls. Every process must call this.

    For decisions that depend on files: a process that looks later may find files that another one has just written.
    An InputError of `decide` is raised on every process.
    """
    outcome = None
    if accelerator.is_main_process:
        try:
            outcome = decide()
        except InputError as error:
            outcome = error
    outcome = broadcast_object_list([outcome])[0]
    if isinstance(outcome, InputError):
        raise outcome
    return outcome


def long_collective_timeout() -> InitProcessGroupKwargs:
    """Return accelerate's setting that lets processes wait two days for each other instead of NCCL's 10 minutes.

    For programs that communicate rarely: one GPU may finish hours before another one. The launcher still notices a
    process that has died.
    """
    return InitProcessGroupKwargs(timeout=LONGEST_WORK)


def largest_batch(attempt: Callable[[int], object], largest: int) -> int:
    """Return the largest batch size that fits into memory: the first of `largest`, half of it, a quarter, ...

    `attempt(size)` does the work for one batch. On several processes, each must call this; the result is the minimum.
    Raises InputError if not even one image fits.
    """
    size = largest

    def halve() -> int:  # called while the out-of-memory error is handled
        nonlocal size
        if size == 1:
            raise InputError(f"the memory is too small for a batch of one image ({sys.exc_info()[1]})")
        size //= 2
        return size

    find_executable_batch_size(attempt, largest, halve)()
    torch.cuda.empty_cache()  # NCCL allocates outside PyTorch's cache; without a GPU this does nothing
    return min(gather_object([size])) if torch.distributed.is_initialized() else size


def to_host(tensor: Tensor) -> Callable[[], np.ndarray]:
    """Start copying a tensor to the host and return a function that waits for the copy and returns it as an array.

    Meanwhile the GPU continues with the next work. Any thread may call the returned function.
    """
    if tensor.device.type != "cuda":
        return tensor.numpy
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)  # waiting uses no CPU time
    copied.record()

    def wait() -> np.ndarray:
        copied.synchronize()
        return host.numpy()

    return wait

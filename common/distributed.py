"""Several processes and their devices: decisions of the main process, the largest batch, copies to the host."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from common.io import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

LONGEST_WORK = timedelta(days=2)
Value = TypeVar("Value")


def broadcast_from_main(accelerator: Accelerator, decide: Callable[[], Value]) -> Value:
    """Return on every process what `decide` returns on the main process. Only the main process calls it.

    Raises:
        InputError: on every process, if `decide` raised it on the main process.
    """
    outcome = None
    if accelerator.is_main_process:
        try:
            outcome = decide()
        except InputError as error:
            outcome = error
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        outcome = broadcast_object_list([outcome])[0]
    if isinstance(outcome, InputError):
        raise outcome
    return outcome


def largest_batch(attempt: Callable[[int], object], largest: int) -> int:
    """Return the first of `largest`, half of it, a quarter, ... with which `attempt` has enough GPU memory.

    Raises:
        InputError: not even 1 fits.
    """
    size = largest
    while True:
        try:
            attempt(size)
            return size
        except torch.cuda.OutOfMemoryError as error:
            if size == 1:
                raise InputError(f"the GPU's memory does not hold the work on a single image ({error})") from error
        finally:
            torch.cuda.empty_cache()  # does nothing where there is no GPU in use
        size //= 2


def long_collective_timeout() -> InitProcessGroupKwargs:
    """Return the setting of accelerate by which collective operations time out after days instead of 10 minutes.

    For programs in which one process can finish hours before another, and then waits in a collective operation. A
    process that died is detected by the launcher, not by this timeout.
    """
    from accelerate.utils import InitProcessGroupKwargs

    return InitProcessGroupKwargs(timeout=LONGEST_WORK)


def to_host(tensor: Tensor) -> Callable[[], np.ndarray]:
    """Start copying a tensor to the host; return what waits for the copy and gives it.

    The GPU goes on meanwhile with what it is told next, and any thread may wait.
    """
    if tensor.device.type != "cuda":
        return tensor.numpy
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)  # waits asleep
    copied.record()

    def arrived() -> np.ndarray:
        copied.synchronize()
        return host.numpy()

    return arrived

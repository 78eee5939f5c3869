"""What the programs want of a device: the largest batch that fits into its memory, copies that nobody waits for."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from common.io import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

LONGEST_WORK = timedelta(days=2)


def broadcast_from_main(accelerator: Accelerator, decide: Callable[[], Any]) -> Any:
    """Return, or raise as InputError, on every process what `decide` gives on the main process."""
    from accelerate.utils import broadcast_object_list

    outcome = None
    if accelerator.is_main_process:
        try:
            outcome = decide()
        except InputError as error:
            outcome = error
    if accelerator.num_processes > 1:
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


def patient_processes() -> InitProcessGroupKwargs:
    """Return the setting by which accelerate's processes wait days, not minutes, for one that has more to do.

    For programs whose processes meet seldom: one GPU is done hours before another, the main process joins what all have
    written. NCCL would end those that wait after 10 minutes. (A process that died is noticed by the launcher.)
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

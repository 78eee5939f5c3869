"""Batches from the host's memory to the device, beside the computation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor


def to_device(batches: Iterable[Sequence[Tensor]], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Yield the batches' tensors on `device`.

    On a GPU they are copied on a stream of their own. The host is ahead of the GPU (see `training.step_reports`), so a
    batch travels while the step before it is still being computed; the memory it comes from must be pinned.
    """
    if device.type != "cuda":
        for batch in batches:
            yield tuple(tensor.to(device) for tensor in batch)
        return
    side_stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(side_stream):
            copies = tuple(tensor.to(device, non_blocking=True) for tensor in batch)
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(side_stream)
        for tensor in copies:
            tensor.record_stream(computing)  # its memory is not used again before the step is through with it
        yield copies

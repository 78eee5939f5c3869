"""Writing checkpoints during training: an immediate copy, the file in a thread, removal of old files.

The copy into pinned memory on the current stream takes a fraction of a training step; hashing, writing and syncing
gigabytes takes seconds to minutes. If a write fails, for example on a full disk, earlier checkpoints do not change.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.io import first_line
from models.checkpoint import checksum_path, list_checkpoints, save_checkpoint


@dataclass
class CheckpointWriter:
    """Writes the checkpoints of one run into a folder, one at a time."""

    folder: Path  # of the `{step:07d}.pt` files
    keep_last: int = 0  # number of newest checkpoints to keep; 0 keeps all
    keep_every: int = 0  # checkpoints whose step is a multiple of this are kept in addition; 0: none
    background: bool = True  # write in a thread; otherwise `save` returns when the file is on the disk
    report: Callable[[str], None] = print  # called in the writing thread with the message of a failed write
    failure: str | None = field(default=None, init=False)  # why the last write failed; None if it did not

    def __post_init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._copies = TensorCopies()

    def save(self, step: int, content: dict[str, Any], name: str | None = None) -> None:
        """Write `content` as the checkpoint of `step`, or as NAME.pt, which later calls do not remove."""
        self.finish()  # the previous checkpoint
        copy = self._copies.take(content) if self.background else None
        if copy is None:
            self._write(step, content, name)
            return
        # Not a daemon thread: after an exception elsewhere, the program ends only when the file is complete.
        self._thread = threading.Thread(target=self._write, args=(step, copy, name), name="checkpoint writer")
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a file is being written."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> None:
        """Wait until the file is written, if one is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def clear_leftovers(self) -> None:
        """Remove the incomplete files of a process that was killed while it wrote."""
        for path in self.folder.glob(".*.pt.*.tmp"):  # checkpoints and their checksums
            path.unlink(missing_ok=True)

    def _write(self, step: int, content: dict[str, Any], name: str | None) -> None:
        path = self.folder / f"{name or f'{step:07d}'}.pt"
        try:
            self._copies.wait()
            save_checkpoint(path, content)
            self._prune(step)
        except Exception as error:  # whatever it is, the run must know that there is no file
            self.failure = f"{path} cannot be written: {_root_cause(error)}"
            self.report(f"warning: {self.failure}; earlier checkpoints are untouched")
        else:
            self.failure = None

    def _prune(self, step: int) -> None:
        """Remove old checkpoints, except those of later steps, which exist if the run resumed from an earlier one."""
        if not self.keep_last:
            return
        old = [path for path in list_checkpoints(self.folder) if int(path.stem) <= step][: -self.keep_last]
        for path in old:
            if not (self.keep_every and int(path.stem) % self.keep_every == 0):
                path.unlink(missing_ok=True)
                checksum_path(path).unlink(missing_ok=True)


class TensorCopies:
    """Copies the tensors in nested dicts and lists into buffers, which it keeps for the next call.

    Copies from a GPU go into pinned memory on the current stream: the call returns at once, kernels queued later run
    after the copies, and `wait` waits for them.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple, Tensor] = {}
        self._done: torch.cuda.Event | None = None

    def take(self, value: Any) -> Any | None:
        """Return `value` with copies of its tensors, valid until the next call; None if there is too little memory."""
        self.wait()
        try:
            copy = self._copy(value, ())
        except (MemoryError, RuntimeError):  # PyTorch reports missing host and pinned memory by it
            self._buffers = {}
            return None
        if any(buffer.is_pinned() for buffer in self._buffers.values()):
            self._done = torch.cuda.Event()
            self._done.record()
        return copy

    def wait(self) -> None:
        """Wait until the copies are complete."""
        if self._done is not None:
            self._done.synchronize()
            self._done = None

    def _copy(self, value: Any, path: tuple) -> Any:
        if isinstance(value, Tensor):
            buffer = self._buffers.get(path)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                pinned = value.device.type == "cuda"
                buffer = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=pinned)
                self._buffers[path] = buffer
            return buffer.copy_(value.detach(), non_blocking=True)
        if isinstance(value, Mapping):
            return {key: self._copy(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(item, (*path, number)) for number, item in enumerate(value))
        return value


def _root_cause(error: BaseException) -> str:
    """Return the message of the first error in a chain of errors."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return first_line(error)

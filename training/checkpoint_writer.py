"""Writing checkpoints while training goes on: a copy at once, the file in a thread, old files cleared away.

A copy on the GPU's own stream into pinned memory costs training a fraction of a step; hashing, writing and syncing
gigabytes takes seconds to minutes. A write that fails, on a full disk say, leaves every earlier checkpoint as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoint import checksum_path, list_checkpoints, save_checkpoint


class CheckpointWriter:
    """Writes the checkpoints of one run into a folder, one at a time.

    Args:
        folder: of the `{step:07d}.pt` files.
        keep_last: keep so many of the newest; 0 keeps all.
        keep_every: besides, keep those whose step is a multiple of this; 0: none.
        background: copy and write in a thread; otherwise `save` returns when the file is on the disk.
        report: told of a write that failed, from the writing thread.

    Attributes:
        failure: why the last write failed; None if it did not.
    """

    def __init__(
        self,
        folder: str | Path,
        keep_last: int = 0,
        keep_every: int = 0,
        background: bool = True,
        report: Callable[[str], None] = print,
    ):
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.background = background
        self.report = report
        self.failure: str | None = None
        self._thread: threading.Thread | None = None
        self._copies = TensorCopies()

    def save(self, step: int, content: dict[str, Any], name: str | None = None) -> None:
        """Write `content` as the checkpoint of `step`, or as NAME.pt beside those that are kept by their step.

        First waits for the one before, if it is still being written.
        """
        self.finish()
        copy = self._copies.take(content) if self.background else None
        if copy is None:
            self._write(step, content, name)
            return
        # Not a daemon: an exception elsewhere ends the program only when the file is complete.
        self._thread = threading.Thread(target=self._write, args=(step, copy, name), name="checkpoint writer")
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a file is being written."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def clear_leftovers(self) -> None:
        """Remove what a process that was killed while writing left behind."""
        for pattern in (".*.pt.*.tmp", ".*.pt.sha256.*.tmp"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)

    def _write(self, step: int, content: dict[str, Any], name: str | None) -> None:
        path = self.folder / f"{name or f'{step:07d}'}.pt"
        try:
            self._copies.wait()
            save_checkpoint(path, content)
            self._prune(step)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns an OSError into a RuntimeError
            self.failure = f"{path} cannot be written: {_root_cause(error)}"
            self.report(f"warning: {self.failure}; earlier checkpoints are untouched")
        else:
            self.failure = None

    def _prune(self, step: int) -> None:
        """Remove old checkpoints; not those of later steps, which a run that went back will meet again."""
        if not self.keep_last:
            return
        old = [path for path in list_checkpoints(self.folder) if int(path.stem) <= step][: -self.keep_last]
        for path in old:
            if not (self.keep_every and int(path.stem) % self.keep_every == 0):
                path.unlink(missing_ok=True)
                checksum_path(path).unlink(missing_ok=True)


class TensorCopies:
    """Copies the tensors in nested dicts and lists into memory of its own, which it uses again each time.

    Copies from a GPU go into pinned memory on the current stream: the call returns at once, work queued later sees
    them done, and `wait` waits for them.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple, Tensor] = {}
        self._done: torch.cuda.Event | None = None

    def take(self, value: Any) -> Any | None:
        """Return `value` with copies in the place of its tensors, valid until the next call; None if memory lacks."""
        self.wait()
        try:
            copy = self._copy(value, ())
        except (MemoryError, RuntimeError):  # torch reports both kinds of memory by a RuntimeError
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
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return (str(error).strip() or type(error).__name__).splitlines()[0]

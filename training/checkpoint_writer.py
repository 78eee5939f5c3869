"""Writing checkpoints during training: an immediate copy, the file in a thread, removal of old files.

The copy into pinned memory on the current stream takes a fraction of a training step; hashing, writing and syncing
gigabytes takes seconds to minutes. If a write fails, for example on a full disk, earlier checkpoints do not change.

Checkpoints by steps are kept. A checkpoint by minutes only protects against a loss of work: it is removed as soon as
the next checkpoint is complete. TEMPORARY lists it, so that a resumed run can remove it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import InputError, first_line
from common.io import read_json, write_json
from common.temporary import clear_leftovers
from models.checkpoint import checksum_path, list_checkpoints, save_checkpoint
from training.messages import logger, warn_if_unwritable

TEMPORARY = "temporary.json"  # in the folder of the checkpoints: the names of those by minutes


@dataclass
class CheckpointWriter:
    """Writes the checkpoints of one run into a folder, one at a time."""

    folder: Path  # of the `{step:07d}.pt` files
    keep_last: int = 0  # number of newest checkpoints to keep; 0 keeps all
    keep_every: int = 0  # checkpoints whose step is a multiple of this are kept in addition; 0: none
    background: bool = True  # write in a thread; otherwise `save` returns when the file is on the disk
    every_minutes: float = 0  # after which the last checkpoint is overdue; 0: never
    now: Callable[[], float] = time.monotonic
    failure: str | None = field(default=None, init=False)  # why the last write failed; None if it did not

    def __post_init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._copies = TensorCopies()
        self._saved_at = self.now()
        self._kept_one_failed = False  # the last checkpoint that was to be kept could not be written

    def save(self, step: int, content: dict[str, Any], name: str | None = None, temporary: bool = False) -> None:
        """Write `content` as the checkpoint of `step`, or as NAME.pt, which later calls do not remove.

        A `temporary` checkpoint is removed when the next one of a step is complete, unless it replaces one that could
        not be written.
        """
        self.finish()  # the previous checkpoint
        if name is None:
            self._saved_at = self.now()
            temporary = temporary and not self._kept_one_failed
        copy = self._copies.take(content) if self.background else None
        if copy is None:
            self._write(step, content, name, temporary)
            return
        # Not a daemon thread: after an exception elsewhere, the program ends only when the file is complete.
        arguments = (step, copy, name, temporary)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint writer")
        try:
            self._thread.start()
        except RuntimeError:  # the system allows no more threads
            self._thread = None
            self._write(*arguments)

    @property
    def overdue(self) -> bool:
        """Whether the last checkpoint of a step is `every_minutes` old, and no file is being written."""
        return self.every_minutes > 0 and not self.busy and self.now() - self._saved_at >= 60 * self.every_minutes

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
        clear_leftovers(self.folder)

    def _write(self, step: int, content: dict[str, Any], name: str | None, temporary: bool) -> None:
        path, started = self.folder / f"{name or f'{step:07d}'}.pt", time.perf_counter()
        try:
            if temporary:
                self._list_temporary([*self._temporary(), path.name])
            self._copies.wait()
            save_checkpoint(path, content)
        except Exception as error:  # whatever it is, the run must know that there is no file
            self.failure = f"{path} cannot be written: {_root_cause(error)}"
            self._kept_one_failed |= name is None and not temporary
            logger.warning("%s; earlier checkpoints are untouched", self.failure)
        else:
            self.failure = None
            self._kept_one_failed &= name is not None or temporary
            note = ", to be replaced by the next one" if temporary else ""
            size, seconds = path.stat().st_size, time.perf_counter() - started
            logger.info("checkpoint %s: %.4g MB written in %.1f s%s", path, size / 1e6, seconds, note)
            if name is None:
                self._remove_old(path, temporary)

    def _remove_old(self, path: Path, temporary: bool) -> None:
        """Remove the checkpoints that `path`, which is complete, replaces. A failure is a warning."""
        try:
            self._remove_temporary(path, temporary)
            self._prune(int(path.stem))
        except OSError as error:
            logger.warning("%s: old checkpoints cannot be removed, training continues: %s", self.folder, error)

    def _list_temporary(self, names: list[str]) -> None:
        """Write the names of the temporary checkpoints. Without the list, they are kept."""
        with warn_if_unwritable(str(self.folder / TEMPORARY)):
            write_json(self.folder / TEMPORARY, names)

    def _temporary(self) -> list[str]:
        """Return the names of the temporary checkpoints."""
        try:
            names = read_json(self.folder / TEMPORARY)
        except InputError:  # missing, or damaged by a crash: no reason to write no more checkpoints
            return []
        known = isinstance(names, list)
        return [path.name for path in list_checkpoints(self.folder) if known and path.name in names]

    def _remove_temporary(self, path: Path, temporary: bool) -> None:
        """Remove the temporary checkpoints of steps before that of `path`, which is complete."""
        names = self._temporary()
        for old in (name for name in names if int(Path(name).stem) < int(path.stem)):
            _remove(self.folder / old)
        left = [name for name in names if int(Path(name).stem) > int(path.stem)] + [path.name] * temporary
        if left:
            self._list_temporary(left)
        else:
            (self.folder / TEMPORARY).unlink(missing_ok=True)

    def _prune(self, step: int) -> None:
        """Remove old checkpoints, except those of later steps, which exist if the run resumed from an earlier one."""
        if not self.keep_last:
            return
        temporary = self._temporary()
        found = [path for path in list_checkpoints(self.folder) if path.name not in temporary]
        for path in [path for path in found if int(path.stem) <= step][: -self.keep_last]:
            if not (self.keep_every and int(path.stem) % self.keep_every == 0):
                _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint and its checksum."""
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

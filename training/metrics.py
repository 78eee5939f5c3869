"""The numbers of a training run: means of each step, rows of metrics.jsonl, rows for a tracker.

The numbers of a step are averaged over the processes and copied to the host while the device computes; they are read
some steps later, when they have arrived, so the device never waits. All processes read the same numbers at the same
step, and therefore take the same decisions from them.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from common.errors import InputError, first_line
from training.curves import loss_curves
from training.messages import logger, warn_if_unwritable
from training.rows import end_of_rows
from training.throughput import StepClock

COUNTS = ("bad_steps", "overflow_steps")  # summed over the steps of a row; all other numbers are averaged
GPU_LAG = 2  # steps: the GPU always has a complete step queued while the host reads an older one
DRAW_SECONDS = 60  # at least, between two pictures of the loss curves


@dataclass(frozen=True)
class StepReport:
    """The numbers of one step.

    `means` are over the global batch; `samples` holds one value per sample of this process, (n,) each, on the device.
    """

    step: int
    means: dict[str, float]
    requests: frozenset[str]  # of any process
    samples: dict[str, Tensor]
    finite_weights: bool = True  # after the step, on all processes; also true if this was not checked

    @property
    def good(self) -> bool:
        """Whether the weights were updated, which needs a finite gradient."""
        return math.isfinite(self.means["grad_norm"])

    @property
    def finite_loss(self) -> bool:
        """Whether the loss of every sample of the global batch is finite."""
        return math.isfinite(self.means["loss"])


class StepReports:
    """Sends the reports of steps from the device and receives them on the host.

    Args:
        reduce: averages a tensor over the processes.
        device: where the numbers are computed.
        requests: names of what a process can ask all processes for.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor], device: torch.device, requests: tuple[str, ...]):
        self.reduce = reduce
        self.device = device
        self.requests = requests
        self.lag = GPU_LAG if device.type == "cuda" else 0
        self._parts: list[dict[str, Tensor]] = []
        self._terms: list[str] = []
        # Referenced for one more step, so that gloo's thread does not release it last. That release needs Python's
        # lock, and a process that exits at this moment holds the lock while it waits for that thread: a deadlock.
        self._reduced: Tensor | None = None
        self._sent: deque[tuple[int, list[str], Tensor, torch.cuda.Event | None, dict[str, Tensor]]] = deque()

    def add(self, terms: dict[str, Tensor], **details: Tensor) -> None:
        """Add one micro-batch: the loss terms of each sample, and further values of each sample for the report."""
        self._parts.append({name: values.detach() for name, values in {**terms, **details}.items()})
        self._terms = list(terms)

    def send(self, step: int, grad_norm: Tensor, requests: set[str], finite_weights: Tensor | None = None) -> None:
        """Complete the report of a step and start its copy to the host.

        finite_weights: 1.0 if the weights of this process are finite, else 0.0; None if this is not checked.
        """
        samples = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        self._parts = []
        finite = torch.ones((), device=self.device) if finite_weights is None else finite_weights
        values = [samples[name].float().mean() for name in self._terms] + [grad_norm.detach().float(), finite]
        values += [torch.full((), float(name in requests), device=self.device) for name in self.requests]
        vector = self._reduced = self.reduce(torch.stack(values))
        copied = None
        if self.device.type == "cuda":
            vector = torch.empty(vector.shape, pin_memory=True).copy_(vector, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._sent.append((step, [*self._terms, "grad_norm", "finite"], vector, copied, samples))

    def receive(self, wait_for_all: bool = False) -> list[StepReport]:
        """Return the reports that have arrived, oldest first; with `wait_for_all`, wait for every report sent."""
        arrived = []
        while len(self._sent) > (0 if wait_for_all else self.lag):
            step, names, vector, copied, samples = self._sent.popleft()
            if copied is not None:
                copied.synchronize()
            values = vector.tolist()
            requests = {name for name, value in zip(self.requests, values[len(names) :], strict=True) if value > 0}
            means = dict(zip(names, values[: len(names)], strict=True))
            finite = means.pop("finite") >= 1
            arrived.append(StepReport(step, means, frozenset(requests), samples, finite))
        return arrived


class RunLog:
    """Collects the numbers of each step and writes rows of their means.

    Args:
        folder: of the run.
        batch_size: global, for images per second.
        main: whether this process writes.
        track: passes a row and its step to the tracker.
        track_picture: passes a picture and its step to the tracker.
        state: what `state()` returned when the run was saved; None for a new run.
        step: at which the run starts or resumes; rows of later steps are removed, since these steps are repeated.
        peak_images_per_second: throughput at the peak FLOP/s of the devices; None if unknown.
        clock: measures the speed. It is stopped during other work than training.
    """

    def __init__(
        self,
        folder: Path,
        batch_size: int,
        main: bool,
        track: Callable[[dict[str, float], int], None],
        track_picture: Callable[[Image, int], None] = lambda picture, step: None,
        state: dict[str, Any] | None = None,
        step: int = 0,
        peak_images_per_second: float | None = None,
        clock: StepClock | None = None,
    ):
        self.folder = folder
        self.metrics = folder / "metrics.jsonl"
        self.picture = folder / "loss.png"
        self.batch_size = batch_size
        self.main = main
        self.track = track
        self.track_picture = track_picture
        self.peak_images_per_second = peak_images_per_second
        state = state or {"sums": {}, "steps": 0, "seconds": 0.0}
        self.sums = {name: float(value) for name, value in state["sums"].items()}
        self.steps: int = state["steps"]  # good steps
        self.counts = {name: state.get(name, 0) for name in COUNTS}
        self.started = time.perf_counter() - state["seconds"]
        self.unwritten: dict[str, list[str]] = {}  # lines that could not be written because the disk was full
        self.clock = clock or StepClock()
        self._drawn_at = time.monotonic()
        self._drawing: threading.Thread | None = None
        if main:
            for name in ("log.txt", "starts.jsonl", "bad_steps.jsonl", "metrics.jsonl"):
                if (folder / name).exists() and not (folder / name).is_file():
                    raise InputError(f"{folder / name}: must be a file, not a folder, a fifo or a device")
            for path in (self.metrics, folder / "bad_steps.jsonl"):
                _remove_rows_after(path, step)

    @property
    def seconds(self) -> float:
        """Seconds of training, including earlier parts of the run."""
        return time.perf_counter() - self.started

    def add(self, means: dict[str, float]) -> None:
        """Add the means of a good step. A row has only the numbers of its last step: terms may end during the row."""
        self.sums = {name: value for name, value in self.sums.items() if name in means}
        for name, value in means.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1

    def count(self, name: str) -> None:
        """Count a bad step under one of `COUNTS`."""
        self.counts[name] += 1

    def write_row(self, step: int, **more: float) -> dict[str, Any]:
        """Write and return the means since the last row."""
        lap = self.clock.end_lap()
        speed = self.batch_size / lap.seconds_per_step
        row = {
            "step": step,
            **{name: self.sums[name] / self.steps for name in sorted(self.sums)},
            **{name: count for name, count in self.counts.items() if count},
            **more,
            "images_per_second": speed,
            "data_wait": lap.data_wait,
            "seconds": self.seconds,
        }
        if self.peak_images_per_second:
            row["mfu"] = speed / self.peak_images_per_second
        if allocated := torch.cuda.max_memory_allocated():  # 0 for a run on the CPU
            row["gpu_memory_gb"] = allocated / 1e9
        self.sums, self.steps, self.counts = {}, 0, dict.fromkeys(COUNTS, 0)
        self.append(row)
        return row

    def append(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl and pass it to the tracker. Numbers that are not finite become null."""
        if not self.main:
            return
        row = finite_or_null(row)
        self.write_line("metrics.jsonl", row)
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        self.track(numbers, row["step"])
        if time.monotonic() - self._drawn_at >= DRAW_SECONDS:
            self.draw(wait=False)

    def write_line(self, name: str, row: dict[str, Any]) -> None:
        """Append a row, which must have a step, to a file of the run's folder and sync it to the disk.

        So a checkpoint never survives a crash that its rows do not survive. If the disk is full, rows stay in memory
        until the next call.
        """
        if not self.main:
            return
        lines = self.unwritten.setdefault(name, [])
        lines.append(json.dumps(finite_or_null(row)) + "\n")
        with warn_if_unwritable(f"{name} of {self.folder}"):
            _append("".join(lines), self.folder / name)
            lines.clear()

    def draw(self, wait: bool = True) -> None:
        """Write the loss curves; without `wait` in a thread, unless a picture is being drawn."""
        if not self.main or not self.metrics.exists():
            return
        if self._drawing is not None:
            if not wait and self._drawing.is_alive():
                return
            self._drawing.join()
        self._drawn_at = time.monotonic()
        self._drawing = threading.Thread(target=self._draw, name="loss curves")
        try:
            self._drawing.start()
        except RuntimeError as error:  # the system allows no more threads
            logger.warning("%s cannot be drawn, training continues: %s", self.picture, error)
            self._drawing = None
        if wait and self._drawing is not None:
            self._drawing.join()

    def _draw(self) -> None:
        try:
            loss_curves(self.metrics, self.picture)
        except Exception as error:  # a missing picture does not end a run
            logger.warning("%s cannot be written, training continues: %s", self.picture, first_line(error))

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores, so that a resumed run writes the rows of a run that was never stopped."""
        return {"sums": dict(self.sums), "steps": self.steps, "seconds": self.seconds, **self.counts}


def _append(text: str, path: Path) -> None:
    """Append `text` and sync it, or leave the file as it was: a partial line would damage the next one.

    An incomplete last line, which a crash of the machine can leave, is ended before.
    """
    length = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a+b") as file:
            file.seek(max(length - 1, 0))
            start = "" if file.read(1) in (b"", b"\n") else "\n"
            file.write((start + text).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        if path.exists():
            os.truncate(path, length)
        raise


def _remove_rows_after(path: Path, step: int) -> None:
    if path.exists():
        with warn_if_unwritable(str(path)):
            os.truncate(path, end_of_rows(path, step))  # works on a full disk too


def finite_or_null(value: Any) -> Any:
    """Return `value` with null for numbers that JSON does not know, at any depth."""
    if isinstance(value, dict):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

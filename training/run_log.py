"""What a training run tells about itself: metrics.jsonl and loss.png in its folder, rows for a tracker."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from files import atomic_write
from pictures import loss_curves, read_metrics

COUNTS = ("bad_steps", "overflow_steps")  # summed over the steps of a row, where all else is averaged


class RunLog:
    """Collects the numbers of each step and writes a row, their means, now and then.

    Args:
        folder: of the run.
        batch_size: global, for images per second.
        main: whether this process writes.
        track: hands a row and its step to the tracker.
        state: what `state()` returned when the run was saved; None for a new run.
        step: of the run's start or continuation; rows beyond it belong to a part of the run that was lost.
        peak_images_per_second: at which the devices would do nothing but the network's arithmetic; None if unknown.
    """

    def __init__(
        self,
        folder: Path,
        batch_size: int,
        main: bool,
        track: Callable[[dict[str, float], int], None],
        state: dict[str, Any] | None = None,
        step: int = 0,
        peak_images_per_second: float | None = None,
    ):
        self.folder = folder
        self.metrics = folder / "metrics.jsonl"
        self.picture = folder / "loss.png"
        self.batch_size = batch_size
        self.main = main
        self.track = track
        self.peak_images_per_second = peak_images_per_second
        state = state or {"sums": {}, "steps": 0, "seconds": 0.0}
        self.sums = {name: float(value) for name, value in state["sums"].items()}
        self.steps: int = state["steps"]  # that counted
        self.counts = {name: state.get(name, 0) for name in COUNTS}
        self.started = time.perf_counter() - state["seconds"]
        self.waiting: dict[str, list[str]] = {}  # lines of files on a full disk
        self._begin_interval()
        if main:
            for path in (self.metrics, folder / "bad_steps.jsonl"):
                _keep_rows_up_to(path, step)

    @property
    def seconds(self) -> float:
        """Seconds of training, earlier parts of the run included."""
        return time.perf_counter() - self.started

    def add(self, means: dict[str, float]) -> None:
        """Add the means of a step that counted."""
        for name, value in means.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1

    def count(self, name: str) -> None:
        """Count a step that did not: one of `COUNTS`."""
        self.counts[name] += 1

    def end_step(self) -> None:
        """Count one step of the clock, whether it counted or not."""
        self.steps_in_interval += 1

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def write_row(self, step: int, **more: float) -> dict[str, Any]:
        """Write and return the means since the last row."""
        elapsed = time.perf_counter() - self.interval_started
        speed = self.steps_in_interval * self.batch_size / elapsed
        row = {
            "step": step,
            **{name: self.sums[name] / self.steps for name in sorted(self.sums)},
            **{name: count for name, count in self.counts.items() if count},
            **more,
            "images_per_second": speed,
            "data_wait": self.waited / elapsed,
            "seconds": self.seconds,
        }
        if self.peak_images_per_second:
            row["mfu"] = speed / self.peak_images_per_second
        if torch.cuda.is_available():
            row["gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self.sums, self.steps, self.counts = {}, 0, dict.fromkeys(COUNTS, 0)
        self._begin_interval()
        self.append(row)
        return row

    def append(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl and hand it to the tracker. Numbers that are not finite become null."""
        if not self.main:
            return
        row = _finite(row)
        self.write_line("metrics.jsonl", row)
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        self.track(numbers, row["step"])

    def write_line(self, name: str, row: dict[str, Any]) -> None:
        """Append a row, which must have a step, to a file of the run's folder; it is on the disk when this returns.

        So a checkpoint never outlives the rows before it, whatever the machine dies of. Where a disk is full, rows wait
        in memory for the next one.
        """
        if not self.main:
            return
        waiting = self.waiting.setdefault(name, [])
        waiting.append(json.dumps(_finite(row)) + "\n")
        with going_on_despite(f"{name} of {self.folder}"):
            _append("".join(waiting), self.folder / name)
            waiting.clear()

    def draw(self) -> None:
        """Write the loss curves."""
        if self.main and self.metrics.exists():
            with going_on_despite(str(self.picture)):
                loss_curves(self.metrics, self.picture)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs, so that the rows of a resumed run are those of one never stopped."""
        return {"sums": dict(self.sums), "steps": self.steps, "seconds": self.seconds, **self.counts}

    def _begin_interval(self) -> None:
        self.interval_started = time.perf_counter()
        self.steps_in_interval = 0
        self.waited = 0.0


@contextlib.contextmanager
def going_on_despite(what: str) -> Iterator[None]:
    """Turn a failure to write `what`, which a run does not depend on, into a warning."""
    try:
        yield
    except OSError as error:
        print(f"warning: {what} cannot be written, training goes on: {error}", file=sys.stderr)


def _append(text: str, path: Path) -> None:
    """Append `text` and sync it, or leave the file as it was: half a line would spoil the next."""
    length = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        if path.exists():
            os.truncate(path, length)
        raise


def _keep_rows_up_to(path: Path, step: int) -> None:
    if path.exists():
        kept = "".join(json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] <= step).encode()
        whole = path.read_bytes()
        with going_on_despite(str(path)):
            if whole.startswith(kept):  # as ever: it is cut, for which a full disk has room
                os.truncate(path, len(kept))
            else:
                with atomic_write(path) as file:
                    file.write(kept)


def _finite(value: Any) -> Any:
    """Return `value` with null for numbers that JSON does not know, at any depth."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

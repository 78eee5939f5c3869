"""What a training run tells about itself: metrics.jsonl and loss.png in its folder, rows for a tracker."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from files import atomic_write
from pictures import loss_curves, read_metrics


class RunLog:
    """Collects the terms of each step on their device and writes a row, their means, now and then.

    Args:
        folder: of the run.
        batch_size: global, for images per second.
        main: whether this process writes.
        reduce: averages a tensor over the processes.
        track: hands a row and its step to the tracker.
        state: what `state()` returned when the run was saved; None for a new run.
        step: of the run's start or continuation; rows beyond it belong to a part of the run that was lost.
    """

    def __init__(
        self,
        folder: Path,
        batch_size: int,
        main: bool,
        reduce: Callable[[Tensor], Tensor],
        track: Callable[[dict[str, float], int], None],
        state: dict[str, Any] | None = None,
        step: int = 0,
    ):
        self.metrics = folder / "metrics.jsonl"
        self.picture = folder / "loss.png"
        self.batch_size = batch_size
        self.main = main
        self.reduce = reduce
        self.track = track
        state = state or {"sums": {}, "steps": 0, "seconds": 0.0}
        self.sums: dict[str, Tensor | float] = dict(state["sums"])
        self.steps: int = state["steps"]
        self.started = time.perf_counter() - state["seconds"]
        self._begin_interval()
        if main:
            self._keep_rows_up_to(step)

    @property
    def seconds(self) -> float:
        """Seconds of training, earlier parts of the run included."""
        return time.perf_counter() - self.started

    def add(self, name: str, value: Tensor) -> None:
        """Add a scalar on the device to a name's sum. Does not wait for it."""
        self.sums[name] = self.sums.get(name, 0.0) + value.detach().float()

    def end_step(self) -> None:
        """Count one optimiser step."""
        self.steps += 1
        self.steps_in_interval += 1

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def write_row(self, step: int, **more: float) -> dict[str, float]:
        """Write and return the means since the last row. The one place in training that waits for the device."""
        names = sorted(self.sums)
        means = self.reduce(torch.stack([torch.as_tensor(self.sums[name]) for name in names])) / self.steps
        elapsed = time.perf_counter() - self.interval_started
        row = {
            "step": step,
            **dict(zip(names, means.tolist(), strict=True)),
            **more,
            "images_per_second": self.steps_in_interval * self.batch_size / elapsed,
            "data_wait": self.waited / elapsed,
            "seconds": self.seconds,
        }
        self.sums, self.steps = {}, 0
        self._begin_interval()
        self.append(row)
        return row

    def append(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl and hand it to the tracker. Numbers that are not finite become null."""
        if not self.main:
            return
        row = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.track({key: value for key, value in row.items() if value is not None and key != "step"}, row["step"])

    def draw(self) -> None:
        """Write the loss curves."""
        if self.main and self.metrics.exists():
            loss_curves(self.metrics, self.picture)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs, so that the rows of a resumed run are those of one never stopped."""
        return {"sums": dict(self.sums), "steps": self.steps, "seconds": self.seconds}

    def _begin_interval(self) -> None:
        self.interval_started = time.perf_counter()
        self.steps_in_interval = 0
        self.waited = 0.0

    def _keep_rows_up_to(self, step: int) -> None:
        if not self.metrics.exists():
            return
        rows = [row for row in read_metrics(self.metrics) if row["step"] <= step]
        with atomic_write(self.metrics, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

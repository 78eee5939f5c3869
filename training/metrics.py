"""What a training run tells about itself: metrics.jsonl and loss.png in its folder, rows for a tracker."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.io import atomic_write, read_metrics

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


GPU_LAG = 2  # steps: the GPU always has a whole step queued while the host looks at an older one


@dataclass(frozen=True)
class StepReport:
    """The numbers of one step. `samples`: what was added for each sample of this process, (n,) each, on the device."""

    step: int
    means: dict[str, float]
    wishes: frozenset[str]  # what any process asked for
    samples: dict[str, Tensor]

    @property
    def good(self) -> bool:
        """Whether the weights were updated: they are not where the gradient is not finite."""
        return math.isfinite(self.means["grad_norm"])

    @property
    def finite_loss(self) -> bool:
        """Whether the loss of every sample of the global batch is finite."""
        return math.isfinite(self.means["loss"])


class StepReports:
    """Sends the reports of steps from the device and receives them on the host.

    Args:
        reduce: averages a tensor over the processes.
        device: where the numbers come from.
        wishes: names of what a process can ask all others for.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor], device: torch.device, wishes: tuple[str, ...]):
        self.reduce = reduce
        self.device = device
        self.wishes = wishes
        self.lag = GPU_LAG if device.type == "cuda" else 0
        self._parts: list[dict[str, Tensor]] = []
        self._terms: list[str] = []
        # Held for a step, so that gloo's thread is not the last to let go of it: for that it would need Python's lock,
        # and a process that ends meanwhile holds the lock while it waits for that thread, for ever.
        self._reduced: Tensor | None = None
        self._sent: deque[tuple[int, list[str], Tensor, torch.cuda.Event | None, dict[str, Tensor]]] = deque()

    def add(self, terms: dict[str, Tensor], **details: Tensor) -> None:
        """Add what one accumulation part computed: for each of its samples the loss terms, and what else to keep."""
        self._parts.append({name: values.detach() for name, values in {**terms, **details}.items()})
        self._terms = list(terms)

    def send(self, step: int, grad_norm: Tensor, wishes: set[str]) -> None:
        """Complete the report of a step."""
        samples = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        self._parts = []
        values = [samples[name].float().mean() for name in self._terms] + [grad_norm.detach().float()]
        values += [torch.full((), float(name in wishes), device=self.device) for name in self.wishes]
        vector = self._reduced = self.reduce(torch.stack(values))
        copied = None
        if self.device.type == "cuda":
            vector = torch.empty(vector.shape, pin_memory=True).copy_(vector, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._sent.append((step, [*self._terms, "grad_norm"], vector, copied, samples))

    def receive(self, everything: bool = False) -> list[StepReport]:
        """Return the reports that have arrived by now, oldest first; with `everything`, wait for all."""
        arrived = []
        while len(self._sent) > (0 if everything else self.lag):
            step, names, vector, copied, samples = self._sent.popleft()
            if copied is not None:
                copied.synchronize()
            values = vector.tolist()
            asked = {name for name, value in zip(self.wishes, values[len(names) :], strict=True) if value > 0}
            means = dict(zip(names, values[: len(names)], strict=True))
            arrived.append(StepReport(step, means, frozenset(asked), samples))
        return arrived


SMOOTHED_SHARE = 20  # a drawn curve is averaged over one part in so many
SMOOTHED_FROM = 50  # points; fewer are shown as they are


def loss_curves(metrics: str | Path, picture: str | Path) -> None:
    """Draw the terms of the loss over the steps of a metrics.jsonl, raw and averaged, and write a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    panels = {
        "loss": "loss",
        "denoise": "latents: mean (v - target)²",
        "proj": "alignment: mean -cos",
        "cls": "class token: mean (v - target)²",
    }
    panels = {key: title for key, title in panels.items() if any(row.get(key) is not None for row in rows)}
    if not panels:
        return
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (key, title) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        steps, values = np.array([(row["step"], row[key]) for row in rows if row.get(key) is not None]).T
        if len(steps) >= SMOOTHED_FROM:
            axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8)
            values = _smooth(values)
        marker = "o" if len(steps) == 1 else None  # a line of one point is not seen
        axis.plot(steps, values, color="tab:blue", linewidth=1.5, marker=marker)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    with atomic_write(picture) as file:
        figure.savefig(file, format="png", dpi=120)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the mean over a window centred on each value, cut at the ends."""
    window = np.ones(len(values) // SMOOTHED_SHARE | 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")

"""Speed of training, floating-point operations, peak rates of GPUs, a record of the machine and code of each start."""

from __future__ import annotations

import contextlib
import math
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.sit import SiT

# Peak FLOP/s of dense matrix products in fp16 and bf16, from the manufacturers' data sheets. TF32 has half the rate.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "GH200": 989e12, "B200": 2250e12,
    "A100": 312e12, "A800": 312e12,
}  # fmt: skip
PACKAGES = ("accelerate", "timm", "diffusers", "numpy")
# Files of the repository that determine what a run does; data and results in its folder do not.
CODE = (":/*.py", ":/*.sh", ":/requirements.txt")
RECENT_LAPS = 10  # the time left is estimated from their speed


@dataclass
class Lap:
    """Some consecutive steps: their number, their duration in seconds, and how much of it was waiting for data."""

    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    @property
    def seconds_per_step(self) -> float:
        """Mean duration of a step."""
        return self.seconds / self.steps if self.steps else math.nan

    @property
    def data_wait(self) -> float:
        """Share of the time that was spent waiting for data."""
        return self.waited / self.seconds if self.seconds else math.nan


class StepClock:
    """Measures the speed of training steps. The clock stands still during other work, inside `stopped`.

    The first step since the start of the process is slow (compilation, start of the loader's workers), so it is a lap
    of its own, reported only if no other step has ended.

    `now` returns the time in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._stopped = 0.0  # seconds in total
        self._lap, self._first = Lap(), Lap()
        self._laps: deque[Lap] = deque(maxlen=RECENT_LAPS)
        self._lap_started = self.time()

    def time(self) -> float:
        """Return the time without that spent inside `stopped`."""
        return self._now() - self._stopped

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the clock inside the block. Wait for the device before, so that its steps are measured completely."""
        started = self._now()
        try:
            yield
        finally:
            self._stopped += self._now() - started

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time inside the block as waiting for data."""
        started = self.time()
        yield
        self._lap.waited += self.time() - started

    def end_step(self) -> None:
        """Count a step, good or bad."""
        self._lap.steps += 1

    @property
    def in_first_step(self) -> bool:
        """Whether `end_first_step` has not been called."""
        return not self._first.steps

    def end_first_step(self) -> None:
        """Begin the measurement, when the device has finished the first step."""
        self._first = self._end_lap()

    def end_lap(self) -> Lap:
        """Return the lap that ends now, and begin another one."""
        lap = self._end_lap()
        if not lap.steps:
            return self._first
        self._laps.append(lap)
        return lap

    def seconds_left(self, steps: int) -> float | None:
        """Return how long `steps` more steps take at the speed of the recent laps; None if it is unknown."""
        done = sum(lap.steps for lap in self._laps)
        return steps * sum(lap.seconds for lap in self._laps) / done if done else None

    def _end_lap(self) -> Lap:
        lap, now = self._lap, self.time()
        lap.seconds = now - self._lap_started
        self._lap, self._lap_started = Lap(), now
        return lap


def training_flops(network: SiT, project: bool = True) -> int:
    """Return the floating-point operations of the forward and backward pass of one image; `network` on the meta device.

    Torch counts matrix products, convolutions and attention, with `project` including the projectors ("model FLOPs").
    With SPRINT the middle blocks count for the tokens that go through them.
    """
    x = torch.empty(1, network.in_channels, network.input_size, network.input_size, device="meta")
    t, y = torch.empty(1, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta")
    cls = torch.empty(1, network.cls_token_dim, device="meta") if network.cls_token_dim else None
    t_cls = t if network.config.cls_lead else None
    route = torch.empty(1, network.config.tokens, device="meta") if network.config.sprint else None
    with FlopCounterMode(display=False) as counter:
        out = network(x, t, y, cls_token=cls, project=project, route=route, t_cls=t_cls)
        outputs = [out.velocity, *(out.projected or []), *([] if cls is None else [out.cls_velocity])]
        sum(output.sum() for output in outputs).backward()
    return counter.get_total_flops()


def peak_flops(device_name: str, mixed_precision: str, allow_tf32: bool) -> float | None:
    """Return a GPU's peak FLOP/s in a precision; None if the GPU is not in the table, or for float32 without TF32."""
    peak = next((value for name, value in PEAK_FLOPS.items() if name in device_name), None)
    if peak is None or (mixed_precision == "no" and not allow_tf32):
        return None
    return peak / 2 if mixed_precision == "no" else peak


def describe_start(seed: int, step: int, device: torch.device, num_processes: int) -> dict[str, Any]:
    """Return the record of one start of a run, a line of starts.jsonl."""
    return {
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "processes": num_processes,
        "command": shlex.join([sys.executable, *sys.argv]),
        "seed": seed,
        **describe_code(device),
    }


def describe_code(device: torch.device) -> dict[str, Any]:
    """Return device, commit and package versions with which a result is made."""
    changes = _git("status", "--porcelain", "--untracked-files=normal", "--", *CODE)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
    }


def _git(*command: str) -> str | None:
    try:
        found = subprocess.run(
            ["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):  # git is not installed, or the code is not in a git repository
        return None
    return found.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

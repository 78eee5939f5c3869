"""Functions shared by all benchmarks: time, memory, arithmetic, the rate of a large matrix product, and results."""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from common.checks import POSITIVE
from common.cli import Config, setting, uses_cuda
from common.errors import InputError
from common.identity import own_json
from common.io import check_writable, write_json
from common.progress import progress_bar
from training.throughput import describe_code

Name = TypeVar("Name", bound=Hashable)

RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes, of getrusage(2)
# Linux counts a parent's memory at the fork as memory of the child. Therefore a small process starts the program.
GO_BETWEEN = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""
MATRIX = {"cpu": 2048, "cuda": 8192}  # large enough for the device's best rate


@dataclass(frozen=True, kw_only=True)
class Benchmark(Config):
    """Device and results."""

    device: str = setting("auto", "where to measure; auto: CUDA if available", choices=("auto", "cpu", "cuda"))
    json: Path | None = setting(None, "also write the results to this file, after each form, so that none are lost")

    @property
    def torch_device(self) -> torch.device:
        """The device that --device means."""
        return torch.device("cuda" if uses_cuda(self.device) else "cpu")

    def check_combination(self) -> None:
        uses_cuda(self.device)
        if self.json:
            check_writable(self.json, "--json", own=own_json("a result of a benchmark", "command", "threads"))


@dataclass(frozen=True, kw_only=True)
class TimedBenchmark(Benchmark):
    """Device, results and time."""

    seconds: float | None = setting(
        None,
        "start no round that would end later than this after the imports; replaces the number of rounds",
        check=POSITIVE,
    )

    def until(self, start: float, share: float = 1.0) -> float | None:
        """Return when a share of --seconds will have passed since `start`, a time of `perf_counter`."""
        return None if self.seconds is None else start + share * self.seconds


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one `run`, including the device's work."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def seconds(run: Callable[[], object], device: torch.device, at_least: float) -> float:
    """Return the mean time of `run`, repeated for `at_least` seconds after one call that is not measured."""
    run()
    times: list[float] = []
    while not times or sum(times) < at_least:
        times.append(timed(run, device))
    return sum(times) / len(times)


def repeated(run: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Return the seconds of each of `repeats` calls. A GPU measures them by events, without waiting between calls."""
    if device.type == "cpu":
        return [timed(run, device) for _ in range(repeats)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    synchronise(device)
    return [start.elapsed_time(end) / 1000 for start, end in itertools.pairwise(events)]


def rounds_until(rounds: int, until: float | None = None, desc: str = "timing") -> Iterator[int]:
    """Yield the numbers of the rounds: `rounds`, or with `until` as many as end before this time of `perf_counter`.

    With `until` there is at least one round, and each is expected to take as long as the one before.
    """
    for number in progress_bar(range(rounds) if until is None else itertools.count(), desc=desc, unit="round"):
        start = time.perf_counter()
        yield number
        now = time.perf_counter()
        if until is not None and now + (now - start) > until:
            return


def in_turns(
    runs: dict[Name, Callable[[], object]],
    device: torch.device,
    rounds: int,
    until: float | None = None,
    report: Callable[[dict[Name, list[float]]], object] | None = None,
) -> dict[Name, list[float]]:
    """Return the times of each run, one per round. The runs alternate, so that other load affects all of them.

    `until` replaces `rounds`, see `rounds_until`. `report` is called with the times so far after each round.
    """
    times: dict[Name, list[float]] = {name: [] for name in runs}
    for number in rounds_until(rounds, until):
        for name in list(runs)[:: 1 if number % 2 else -1]:
            times[name].append(timed(runs[name], device))
        if report:
            report(times)
    return times


def quartiles(values: Sequence[float]) -> list[float]:
    """Return lower quartile, median and upper quartile, between the smallest and the largest value."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3


def compare(
    runs: dict[str, Callable[[], Tensor]], device: torch.device, rounds: int, until: float | None = None
) -> list[dict[str, Any]]:
    """Return a row for each run: setting, seconds (median) and their quartiles, ratio and deviation relative to the
    first, memory_gb. `until` replaces `rounds`, see `rounds_until`.
    """
    results, memory = {}, {}
    for name, run in progress_bar(runs.items(), desc="first runs", unit="form"):
        reset_peak_memory(device)
        results[name] = run().float()
        memory[name] = peak_memory(device)
    spread = {name: quartiles(times) for name, times in in_turns(runs, device, rounds, until).items()}
    first, rows = next(iter(runs)), []
    for name, (low, median, high) in spread.items():
        row = {"setting": name, "seconds": median, "seconds_quartiles": [low, high], "memory_gb": memory[name]}
        rows.append({**row, "ratio": spread[first][1] / median, **deviation(results[name], results[first])})
    return rows


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak that `peak_memory` returns. Works on CUDA devices and on Linux; does nothing elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets the peak resident set to the current one


def peak_memory(device: torch.device) -> float:
    """Return the peak memory in GB: allocated memory of a GPU, or the resident set of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / 1e9


def run_measured(command: Sequence[object], environment: dict[str, str] | None = None) -> tuple[float, float]:
    """Run a program; return its seconds and the memory of its largest process in GB.

    Raises:
        InputError: the program failed. Its output was printed.
    """
    start = time.perf_counter()
    between = [sys.executable, "-S", "-c", GO_BETWEEN, *map(str, command)]
    done = subprocess.run(between, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise InputError(f"{shlex.join(between[4:])} failed with status {done.returncode}")
    return time.perf_counter() - start, int(done.stdout) * RSS_UNIT / 1e9


def matrix_rate(device: torch.device, at_least: float, dtype: torch.dtype = torch.float32) -> float:
    """Return the operations per second of a large matrix product in `dtype` (in TF32 where that is enabled)."""
    size = MATRIX[device.type]
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / seconds(lambda: a @ a, device, at_least)


def count_flops(run: Callable[[], object]) -> int:
    """Return the floating-point operations of `run`, counted by torch."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def deviation(found: Tensor, expected: Tensor) -> dict[str, float]:
    """Return the largest absolute difference, and the root mean square relative to that of `expected`."""
    difference = found - expected
    return {
        "max_deviation": difference.abs().max().item(),
        "rms_deviation": (difference.square().mean() / expected.square().mean()).sqrt().item(),
    }


def hardware(device: torch.device) -> str:
    """Return the name of the GPU, or the number of CPU threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def markdown_table(columns: dict[str, str], rows: Iterable[dict[str, Any]]) -> str:
    """Return a Markdown table. `columns`: the format of a cell, such as "{ratio:.2f}", by its heading.

    A cell whose value is missing or None is shown as "-".
    """

    def cell(layout: str, row: dict[str, Any]) -> str:
        try:
            return layout.format(**row)
        except (LookupError, TypeError):  # None has no number format
            return "-"

    lines = [columns, ["---"] * len(columns), *([cell(layout, row) for layout in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_result(path: Path | None, result: dict[str, Any], device: torch.device) -> None:
    """Write `result` as JSON, with command, code version, package versions and device. None: write nothing.

    Numbers that are not finite, which JSON does not have, are written as null.
    """
    command = shlex.join(["python", *sys.argv])
    if path:
        about = {"command": command, **_code(device), "threads": torch.get_num_threads()}
        write_json(path, _finite({**about, **result}))


_code = functools.cache(describe_code)  # runs git, and results are written often


def _finite(value: Any) -> Any:
    """Return `value` with None in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

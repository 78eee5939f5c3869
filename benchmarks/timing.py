"""What all benchmarks share: measuring time, memory and the device's ceiling, the rate of a large matrix product; the
flag for the file of results, and the check for a package that only some of them need."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from common.io import InputError, check_writable, write_json
from training.throughput import describe_code

Name = TypeVar("Name", bound=Hashable)

RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes, of getrusage(2)
# A process is counted with the memory of the one that started it, so a small one starts what is measured.
GO_BETWEEN = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""
MATRIX = {"cpu": 2048, "cuda": 8192}  # large enough for the device's best rate


def seconds(run: Callable[[], object], device: torch.device, at_least: float) -> float:
    """Return the time of one `run`, averaged over `at_least` seconds, after one that is not counted."""
    run()
    synchronise(device)
    begun, runs = time.perf_counter(), 0
    while runs == 0 or time.perf_counter() - begun < at_least:
        run()
        synchronise(device)
        runs += 1
    return (time.perf_counter() - begun) / runs


def in_turns(runs: dict[Name, Callable[[], object]], device: torch.device, rounds: int) -> dict[Name, list[float]]:
    """Return the times of each run, one a round. They take turns: what else the machine does meets all alike."""
    times: dict[Name, list[float]] = {name: [] for name in runs}
    for number in tqdm(range(rounds), desc="timing", unit="round"):
        for name in list(runs)[:: 1 if number % 2 else -1]:
            synchronise(device)
            begun = time.perf_counter()
            runs[name]()
            synchronise(device)
            times[name].append(time.perf_counter() - begun)
    return times


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` begin anew, where the system can: on CUDA devices and on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak resident set is now the present one


def peak_memory(device: torch.device) -> float:
    """Return the most memory used so far, in GB: on a GPU its own, on a CPU the whole process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / 1e9


def run_measured(command: Sequence[object], environment: dict[str, str] | None = None) -> tuple[float, float]:
    """Run a program; return the seconds it takes and the memory of its largest process in GB.

    Raises:
        InputError: it failed; what it had to say was printed.
    """
    begun = time.perf_counter()
    between = [sys.executable, "-S", "-c", GO_BETWEEN, *map(str, command)]
    done = subprocess.run(between, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise InputError(f"{shlex.join(between[4:])} failed with status {done.returncode}")
    return time.perf_counter() - begun, int(done.stdout) * RSS_UNIT / 1e9


def matrix_rate(device: torch.device, at_least: float, dtype: torch.dtype = torch.float32) -> float:
    """Return the operations per second of a large matrix product in `dtype`, in TF32 where that is switched on."""
    size = MATRIX[device.type]
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / seconds(lambda: a @ a, device, at_least)


def parse_with_json(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Add --json, the file of the figures, to a benchmark's flags; return the settings, that file checked."""
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    args = parser.parse_args()
    if args.json:
        check_writable(args.json, "--json")
    return args


def require(package: str, purpose: str, module: str | None = None) -> None:
    """Raise InputError if a package, whose module may have another name, is not installed."""
    if importlib.util.find_spec(module or package) is None:
        raise InputError(f"{purpose}: needs the package {package}, which is not installed (pip install {package})")


def write_result(path: str | Path, result: dict[str, Any], device: torch.device) -> None:
    """Write what was measured as JSON, and by which command, code and versions, on what."""
    command = shlex.join(["python", *sys.argv])
    made = {"command": command, **describe_code(device), "threads": torch.get_num_threads()}
    write_json(path, {**made, **result})

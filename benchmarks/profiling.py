"""Where the time of a step goes: a trace of some steps, and the share of each kind of kernel."""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import markdown_table, synchronise

# Kinds of kernels. The first pattern that occurs in a kernel's name decides. Inductor names a fused elementwise kernel
# after the operations around it, so its own prefixes come before the names of operations.
ELEMENTWISE = "normalisation, elementwise"
MATRIX_PRODUCTS = "matrix products"
KINDS = [
    ("communication", r"nccl"),
    (MATRIX_PRODUCTS, r"triton_(tem|mm|bmm)"),
    (ELEMENTWISE, r"triton_|cpp_fused"),
    ("attention", r"flash|fmha|sdpa|attention"),
    ("optimizer, averaged weights, clipping", r"multi_tensor|foreach|fused_?adam|optimizer"),
    (MATRIX_PRODUCTS, r"gemm|nvjet|gemv|wgmma|xmma|cutlass|splitk|convol|fprop|dgrad|wgrad|aten::\w*mm$|linear"),
    ("copies, casts, fills", r"memcpy|memset|copy|catarray|fill|aten::(cat|stack|zero_)"),
]
IDLE = "idle"
LONGEST = 25  # kernels that are listed one by one
NAME_LENGTH = 100  # characters of their names
ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}  # categories of a trace's events
Event = tuple[str, float, float]  # name, start and duration in microseconds


def profile(step: Callable[[], object], steps: int, device: torch.device, path: Path) -> dict[str, Any]:
    """Take some steps, write their trace to `path`, and return what `shares` returns.

    On a CPU the operators take the place of the kernels, without the time of operators that they call.
    """
    with torch.profiler.profile() as profiler:  # of the CPU and of a GPU
        for _ in range(steps):
            step()
        synchronise(device)
    profiler.export_chrome_trace(str(path))
    if device.type == "cuda":
        return shares(read_kernels(path), steps)
    operators = {average.key: (average.self_cpu_time_total, average.count) for average in profiler.key_averages()}
    return tables(operators, sum(duration for duration, _ in operators.values()), steps)


def show(found: dict[str, Any]) -> None:
    """Print the tables of `shares`."""
    for key in ("kind", "name"):
        columns = {key: f"{{{key}}}", "ms a step": "{ms:.2f}", "share": "{share:.1%}", "kernels": "{kernels:.0f}"}
        rows = found["kinds" if key == "kind" else "longest"]
        print(markdown_table(columns, [{**row, key: row[key].replace("|", "/")} for row in rows]), end="\n\n")


def read_kernels(path: Path) -> list[Event]:
    """Return the kernels, copies and fills of a device in a trace file of torch.profiler, JSON or JSON in gzip."""
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        events = json.load(file)["traceEvents"]
    return [(event["name"], event["ts"], event["dur"]) for event in events if event.get("cat") in ON_DEVICE]


def shares(events: Iterable[Event], steps: int) -> dict[str, Any]:
    """Return the time of each kind of kernel, and of the longest kernels.

    Where kernels overlap, the time counts for the one that started first, so that the shares add up to 1: those of
    communication and copies contain only what other kernels do not hide. `idle` is time without any kernel.

    Returns:
        `ms`: of a step, from the first to the last kernel; `kinds`: rows with kind, ms of a step, share of the step,
        and number of kernels in a step; `longest`: such rows with the names of kernels.
    """
    names: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    ordered = sorted(events, key=lambda event: event[1])
    start = end = ordered[0][1] if ordered else 0.0
    idle = 0.0
    for name, begin, duration in ordered:
        idle += max(begin - end, 0.0)
        alone = max(begin + duration - max(begin, end), 0.0)
        end = max(end, begin + duration)
        names[name] = (names[name][0] + alone, names[name][1] + 1)
    return tables(names, end - start, steps, idle)


def tables(names: dict[str, tuple[float, int]], total: float, steps: int, idle: float | None = None) -> dict[str, Any]:
    """Return the result of `shares` from the microseconds and the number of each kernel."""
    kinds: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for name, (duration, count) in names.items():
        kind = kind_of(name)
        kinds[kind] = (kinds[kind][0] + duration, kinds[kind][1] + count)
    if idle is not None:
        kinds[IDLE] = (idle, 0)

    def rows(key: str, found: dict[str, tuple[float, int]]) -> list[dict[str, Any]]:
        ordered = sorted(found.items(), key=lambda item: -item[1][0])
        return [
            {key: name, "ms": duration / 1000 / steps, "share": duration / (total or 1), "kernels": count / steps}
            for name, (duration, count) in ordered
        ]

    longest = [{**row, "name": row["name"][:NAME_LENGTH]} for row in rows("name", names)[:LONGEST]]
    return {"ms": total / 1000 / steps, "kinds": rows("kind", kinds), "longest": longest}


def kind_of(name: str) -> str:
    """Return the kind of a kernel, from its name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), ELEMENTWISE)

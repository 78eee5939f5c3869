"""The short tables of results that on_gpu.py prints at its end, from the files that the jobs have written."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.timing import markdown_table
from common.errors import InputError
from common.io import read_json

# Columns by the key that only rows of this kind have.
COLUMNS = {
    "form": {
        "model": "{model}", "batch": "{batch_size}", "px": "{resolution}", "precision": "{precision}",
        "slot": "{class_slot}", "form": "{form}", "s/step": "{seconds:.4f}",
        "quartiles": "{seconds_quartiles[0]:.4f}, {seconds_quartiles[1]:.4f}", "images/s": "{images_per_second:.1f}",
        "ratio": "{ratio:.2f}", "utilisation": "{utilisation:.1%}", "GB": "{memory_gb:.1f}",
    },
    "images_per_s": {
        "setting": "{setting}", "images/s": "{images_per_s:.4g}", "ratio": "{ratio:.2f}",
        "utilisation": "{utilisation:.1%}", "s, guided step": "{step_guided:.4f}",
        "quartiles": "{step_guided_quartiles[0]:.4f}, {step_guided_quartiles[1]:.4f}", "GB": "{memory_gb:.1f}",
        "rms": "{rms_deviation:.1e}",
    },
    "kernel": {
        "kernel": "{kernel}", "head size": "{head_size}", "forward, ms": "{forward_ms:.3f}",
        "backward, ms": "{backward_ms:.3f}", "TFLOP/s": "{tflops:.1f}", "ratio": "{ratio:.2f}",
        "rms": "{rms_deviation:.1e}",
    },
    "program": {
        "program": "{program}", "s": "{seconds:.1f}", "images/s": "{images_per_second:.1f}",
        "waiting for data": "{data_wait:.1%}", "images": "{images}", "first loss": "{first_loss:.1e}",
        "later losses": "{later_losses:.1e}", "weights": "{weights:.1e}", "equal": "{equal}",
    },
}  # fmt: skip
KINDS = {"kind": "{kind}", "ms a step": "{ms:.2f}", "share": "{share:.1%}"}  # of a profile
TESTS = ("tests", "failures", "errors", "skipped")


def tables(folder: Path, job: str) -> list[str]:
    """Return what is known of a job's results, as Markdown tables and lines; none if it has written no results."""
    found = []
    with contextlib.suppress(OSError, ElementTree.ParseError):  # another job, or pytest was killed
        found.append(tests_line(folder / f"{job}.xml"))
    try:
        result = read_json(folder / f"{job}.json")
    except (InputError, OSError):  # a job that failed early
        return found
    rows = result.get("rows") or []
    for key, columns in COLUMNS.items():
        if matching := [row for row in rows if key in row]:
            found.append(markdown_table(used(columns, matching), matching))
    if kinds := (result.get("profile") or {}).get("kinds"):
        found.append(f"profile of {result['profile']['form']}:\n{markdown_table(KINDS, kinds)}")
    for name in ("evaluation", "class_slot"):
        if values := result.get(name):
            found.append(", ".join(f"{key} {shown(value)}" for key, value in values.items()))
    return found


def used(columns: dict[str, str], rows: list[dict[str, Any]]) -> dict[str, str]:
    """Return the columns that at least one of the rows has a value for."""

    def filled(layout: str) -> bool:
        return any(markdown_table({"": layout}, [row]).splitlines()[-1] != "| - |" for row in rows)

    return {name: layout for name, layout in columns.items() if filled(layout)}


def shown(value: Any) -> str:
    """Return a number with four digits, and several numbers separated by spaces."""
    if isinstance(value, list):
        return " ".join(map(shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def tests_line(report: Path) -> str:
    """Return the counts of a report of pytest, and the names of tests that failed."""
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = ", ".join(f"{name} {suite.get(name)}" for name in TESTS)
    cases = suite.iter("testcase")
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return counts + (f"; failed: {', '.join(failed)}" if failed else "")

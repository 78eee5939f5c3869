"""Conditions on single values of a command line, for `common.cli.setting`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

AUTO = "auto"  # value of a batch size: the largest that fits; of a time shift: that of the size of the latents


@dataclass(frozen=True)
class Check:
    """A condition on one value. `allowed` completes the sentence "must be ..."."""

    allowed: str
    fits: Callable[[Any], bool]


def between(low: int, high: int) -> Check:
    """Return the condition that a value is from `low` to `high`."""
    return Check(f"from {low:,} to {high:,}", lambda value: low <= value <= high)


POSITIVE = Check("greater than 0", lambda value: value > 0)
NON_NEGATIVE = Check("0 or greater", lambda value: value >= 0)
BELOW_ONE = Check("at least 0 and less than 1", lambda value: 0 <= value < 1)
UNIT_INTERVAL = Check("from 0 to 1", lambda value: 0 <= value <= 1)
GUIDANCE_SCALE = Check(
    "1 (no guidance) or greater; the published scripts treat smaller values as 1", lambda value: value >= 1
)
MAX_BATCH = 100_000  # images; more fit into no device's memory
BATCH_SIZE = Check(f"from 1 to {MAX_BATCH:,}, or {AUTO}", lambda value: value == AUTO or 1 <= value <= MAX_BATCH)
MAX_WORKERS = 1024  # processes; more cores are in no machine, and starting millions would stop it
MOST_TIME_SHIFT = 1000  # 140 times the largest published one, about 7, for latents of 768 channels
TIME_SHIFT = Check(
    f"greater than 0 and at most {MOST_TIME_SHIFT}, or {AUTO}",
    lambda value: value == AUTO or 0 < value <= MOST_TIME_SHIFT,
)
ENTRY_NAME = Check("a name, without a path", lambda value: bool(value.strip(". ")) and "/" not in value)
ENTRY_NAMES = Check("names, without paths", lambda value: all(map(ENTRY_NAME.fits, value.split(","))))
WORKERS = Check(f"from 1 to {MAX_WORKERS:,}", lambda value: 1 <= value <= MAX_WORKERS)

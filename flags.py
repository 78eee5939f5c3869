"""What the programs' command lines share: groups of flags, their types, and the checks that all of them make."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Mapping

import torch

from files import InputError

SWITCH = argparse.BooleanOptionalAction  # --flag and --no-flag
AUTO = "auto"  # as the value of a --...-batch-size: `devices.largest_batch`


def parse(
    description: str, groups: Mapping[str, Callable[[Callable], None]], argv: list[str] | None
) -> argparse.Namespace:
    """Return the settings of a command line; each of `groups` adds its flags by the function that it is given."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    for name, add_flags in groups.items():
        add_flags(parser.add_argument_group(name).add_argument)
    return parser.parse_args(argv)


def flag(name: str) -> str:
    """Return how a setting is given on the command line."""
    return "--" + name.replace("_", "-")


def finite_float(text: str) -> float:
    """Return a number that is neither NaN nor infinite, which would pass every comparison made to refuse it."""
    with contextlib.suppress(ValueError):
        if math.isfinite(value := float(text)):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is no finite number")


def batch_size(text: str) -> int | str:
    """Return a number of images, or AUTO."""
    return text if text == AUTO else int(text)


def check_batch_size(flag: str, value: int | str) -> None:
    """Raise InputError, naming the flag, for a number below 1."""
    if value != AUTO and value < 1:
        raise InputError(f"{flag} {value}: must be at least 1, or {AUTO}")


def uses_cuda(device: str) -> bool:
    """Return whether --device, which is auto, cpu or cuda, means a GPU. Raises InputError if there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is available; allowed here: cpu, auto")
    return device != "cpu" and torch.cuda.is_available()

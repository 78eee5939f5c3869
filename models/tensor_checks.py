"""Whether tensors can be weights: their type, their numbers, and the memory they take."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from common.errors import InputError

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Entries of an encoder's file that are not weights, in BatchNorm, BEiT and CLIP.
INTEGERS = re.compile(r"(num_batches_tracked|index|position_ids|input_resolution|context_length|vocab_size)$")
LONGEST_NAME = 1000  # characters of a parameter's name; the longest of timm has 80


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


def check_tensor(value: Tensor, name: str, source: str | Path) -> None:
    """Raise InputError if a tensor of a file is larger than the memory that stores it."""
    if value.nbytes > value.untyped_storage().nbytes():
        shape = " x ".join(map(str, value.shape))
        raise InputError(f"{source}: {name}, {shape}, is an expanded tensor, of which the file has only a part")


def check_weights(state: Mapping[Any, Any], source: str | Path, floats_only: bool = True) -> None:
    """Raise InputError, naming the first, if an entry of a state dict is not a tensor of weights.

    Weights are of `FLOAT_DTYPES`: other dtypes would be converted to other numbers without an error. Without
    `floats_only`, integers are allowed in entries with the names of `INTEGERS`.
    """
    for name, value in state.items():
        if not isinstance(name, str) or len(name) > LONGEST_NAME:
            raise InputError(f"{source}: its weights have the name {name!r:.80}; expected text of at most 1000 letters")
        if not isinstance(value, Tensor):
            raise InputError(f"{source}: {name} in its weights is a {type(value).__name__}; expected a tensor")
        is_counter = not floats_only and value.dtype in (torch.int64, torch.int32) and INTEGERS.search(name)
        if value.dtype not in FLOAT_DTYPES and not is_counter:
            allowed = ", ".join(map(dtype_name, FLOAT_DTYPES))
            raise InputError(f"{source}: {name} has dtype {dtype_name(value.dtype)}; allowed for weights: {allowed}")


@torch.no_grad()
def check_finite(state: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise InputError, naming the first, if a tensor contains NaN or infinity.

    The numbers are compared on the device where they are, and the result is read once: 0.1 s for SiT-XL on a CPU core.
    """
    names = [name for name, value in state.items() if value.is_floating_point() and value.numel() and not value.is_meta]
    if not names:
        return
    extremes = torch.stack([torch.stack(torch.aminmax(state[name])).double().sum() for name in names])
    finite = extremes.isfinite().tolist()
    if not all(finite):
        raise InputError(f"{source}: {names[finite.index(False)]} contains numbers that are not finite (NaN, infinity)")


class TooLargeError(Exception):
    """A network has more parameters than it may have."""


@contextlib.contextmanager
def parameters_at_most(limit: int) -> Iterator[None]:
    """Raise `TooLargeError` inside the block before the modules that it creates have more parameters than `limit`."""
    count = 0

    def counted(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += 0 if parameter is None else parameter.numel()
        if count > limit:
            raise TooLargeError

    handle = register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()

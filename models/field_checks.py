"""Whether the fields of a network's or a codec's description, which comes from a file, have possible values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import InputError, shown

LARGEST_CODEC_SIZE = 4096  # of a codec's channels, of pixels of one latent pixel, and of a number in its config.json
LARGEST_SIZE = 2**31 - 1  # of a number; the shapes of the weights limit most fields further
Share = float  # annotation of a field: a number from 0 to 1


def _is_size(value: Any) -> bool:
    return type(value) is int and abs(value) <= LARGEST_SIZE


# What the fields of a description may be, by their annotation: the test, and the text in errors.
FIELD_KINDS = {
    "int": (_is_size, f"a whole number up to {LARGEST_SIZE}"),
    "float": (lambda value: type(value) in (int, float) and 0 < value <= LARGEST_SIZE, "a number above 0"),
    "Share": (lambda value: type(value) in (int, float) and 0 <= value <= 1, "a number from 0 to 1"),
    "bool": (lambda value: type(value) is bool, "true or false"),
    "str": (lambda value: type(value) is str, "text"),
    "str | bool": (lambda value: type(value) in (str, bool), "text, true or false"),
    "int | None": (lambda value: value is None or _is_size(value), "a whole number or null"),
    "int | tuple[int, ...]": (
        lambda value: _is_size(value) or (isinstance(value, list | tuple) and all(map(_is_size, value))),
        f"a whole number up to {LARGEST_SIZE}, or a list of them",
    ),
    "tuple[int, ...]": (lambda value: isinstance(value, list | tuple) and all(map(_is_size, value)), "whole numbers"),
}


def check_fields(fields: Mapping[str, Any], kinds: Mapping[str, str]) -> None:
    """Raise InputError, naming the field, if a value is not of its kind, a key of `FIELD_KINDS`."""
    for name, kind in kinds.items():
        is_valid, expected = FIELD_KINDS[kind]
        if not is_valid(fields[name]):
            raise InputError(f"network: its {name} is {shown(fields[name])}; expected {expected}")


def check_codec_config(config: dict[str, Any], path: Path) -> None:
    """Raise InputError, naming the setting, for another number of colours, and for sizes that take the memory."""
    for name, value in config.items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, int) and abs(number) > LARGEST_CODEC_SIZE for number in numbers):
            raise InputError(f"{path}: {name} is {shown(value)}; allowed: whole numbers up to {LARGEST_CODEC_SIZE}")
        if name in ("in_channels", "out_channels") and value != 3:
            raise InputError(f"{path}: {name} is {shown(value)}; allowed: 3")

"""The statistics of the class token over the training data, for --standardize-cls."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.data_folder import places_of
from common.errors import InputError, shown
from common.sources import FileSource, read_dataset_json
from models.encoders import name_with_tokens

LARGEST = 65504  # the largest number of float16, in which tokens are stored
# A channel with a standard deviation of at most this, or of at most this share of its mean, is constant up to rounding.
CONSTANT = 1e-6


class ClassStatistics(NamedTuple):
    """Mean and standard deviation of each channel of the class token, (D,) float32. That of constant channels is 1."""

    mean: Tensor
    std: Tensor

    def digest(self) -> str:
        """Return the SHA-256 of the numbers."""
        return hashlib.sha256(torch.stack(self).numpy().tobytes()).hexdigest()


def read_class_statistics(data_dir: str | Path, name: str, encoder: str, weights: str, width: int) -> ClassStatistics:
    """Return the statistics that a folder or zip of tokens has in its dataset.json.

    They are the entry "cls_token": {"mean": [...], "std": [...]}, next to "encoder": {"name": ..., "weights": ...}, as
    preprocessing/encode_tokens.py writes them. No other file in the folder is read.

    Args:
        data_dir: the data folder.
        name: of the folder or zip in it, the value of --standardize-cls.
        encoder: name of the encoder that gives the class token.
        weights: SHA-256 of its weights, see `encoders_digest`.
        width: of the class token.

    Raises InputError if there is no such folder, if it is of another encoder, or if the statistics are not possible.
    """
    places = places_of(data_dir, [name])
    if len(places) != 1:
        found = " and ".join(path.name for path in places) or "none"
        raise InputError(
            f"--standardize-cls {name}: expected one folder or .zip of this name in {data_dir}; found {found}; "
            "preprocessing/encode_tokens.py writes it"
        )
    source = FileSource(places[0])
    content, where = read_dataset_json(source), source.describe("dataset.json")
    recorded = content.get("encoder")
    if not isinstance(recorded, dict) or not isinstance(recorded.get("name"), str):
        raise InputError(f'{where}: encoder is {shown(recorded)}; expected {{"name": ..., "weights": ...}}')
    if name_with_tokens(recorded["name"]) != name_with_tokens(encoder):
        of_run = f"the class token of this run is that of {encoder}"
        raise InputError(f"{where}: the statistics of encoder {shown(recorded['name'])}; {of_run}")
    if recorded.get("weights") != weights:
        raise InputError(f"{where}: the statistics of encoder {encoder} with other weights than those of this run")
    entry = content.get("cls_token")
    if not isinstance(entry, dict):
        raise InputError(f'{where}: cls_token is {shown(entry)}; expected {{"mean": [...], "std": [...]}}')
    mean = _numbers(entry, "mean", -LARGEST, width, where)
    std = _numbers(entry, "std", 0, width, where)
    is_constant = std <= CONSTANT * mean.abs().clamp(min=1)
    return ClassStatistics(mean.float(), torch.where(is_constant, 1.0, std).float())


def _numbers(entry: dict[str, Any], name: str, least: float, width: int, where: str) -> Tensor:
    """Return a list of `width` numbers from `least` to `LARGEST` as a tensor, float64."""
    values = entry.get(name)
    if not isinstance(values, list) or len(values) != width:
        found = f"has {len(values):,} numbers" if isinstance(values, list) else f"is {shown(values)}"
        raise InputError(f"{where}: {name} of cls_token {found}; expected {width:,}, one for each channel")
    for channel, value in enumerate(values):
        if type(value) not in (int, float) or not least <= value <= LARGEST:
            raise InputError(
                f"{where}: {name} of cls_token has {shown(value)} for channel {channel}; expected a number from "
                f"{least} to {LARGEST}"
            )
    return torch.tensor(values, dtype=torch.float64)

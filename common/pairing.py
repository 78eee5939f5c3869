"""Images and latents of a data set, paired by the index in their file names, and their labels."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from common.errors import InputError, printable
from common.image_files import convert_command, has_images
from common.packed import explain_packed
from common.sources import IMAGE_NAME, FileSource, label_entries


def files_by_index(source: FileSource, pattern: re.Pattern[str], example: str) -> dict[int, str]:
    """Return the names that match `pattern` by their index. Raises InputError if there are none or an index repeats."""
    names: dict[int, str] = {}
    for name in source.names:
        if match := pattern.fullmatch(name):
            index = int(match.group(1))
            if (other := names.setdefault(index, name)) != name:
                both = printable(f"{other} and {name}")
                raise InputError(f"{source.path}: {both} have the same index {index}")
    if not names:
        advice = explain_packed(source.path, source.names)
        if pattern is IMAGE_NAME and has_images(source.names):
            advice = f"its images are not converted:\n{convert_command(source.path)}"
        raise InputError(f"{source.path}: no file named like {example}{f'; {advice}' if advice else ''}")
    return names


def labels_by_index(
    described: dict[FileSource, dict[str, Any]], indices: list[int], needed: bool = True
) -> np.ndarray | None:
    """Return the label of each index, (N,) int64, from the dataset.json contents of images and latents.

    None if the data has no labels: it says so by "labels": null or, if labels are not `needed`, has no "labels" at all.
    Raises InputError if an index has no label or two different ones.
    """
    given = [content["labels"] for content in described.values() if "labels" in content]
    if all(labels is None for labels in given) and (given or not needed):
        return None
    found: dict[int, tuple[int, str]] = {}
    for source, content in described.items():
        where = source.describe("dataset.json")
        for name, label in label_entries(content, where):
            if match := re.search(r"(\d+)\.\w+$", name):
                index = int(match[1])
                other, place = found.setdefault(index, (label, where))
                if other != label:
                    raise InputError(f"index {index} has label {other} in {place} and {label} in {where}")
    if missing := [index for index in indices if index not in found]:
        places = " or ".join(source.describe("dataset.json") for source in described)
        problem = f"{len(missing)} of {len(indices)} files have no label in {places}; first: index {missing[0]}"
        raise InputError(problem if given else f'{problem}. Data without labels has "labels": null there')
    return np.array([found[index][0] for index in indices], dtype=np.int64)

"""The names of a data set's files, and the labels that its dataset.json gives them.

images   00001/img00001234.png
latents  00001/img-mean-std-00001234.npy, beside it 00001/img-mean-std-flip-00001234.npy of the mirrored image
"""

from __future__ import annotations

import re
from typing import Any

from files import InputError

FILES_A_FOLDER = 1000
IMAGE_NAME = re.compile(r"(?:.*/)?img(\d+)\.png")
LATENT_NAME = re.compile(r"(?:.*/)?img-mean-std-(\d+)\.npy")
MAX_CLASSES = 10_000_000  # each gets a row of the network's table: a label beyond is a slip, and a table of gigabytes


def image_name(index: int) -> str:
    """Return an image's name within its data set: index 1234 is 00001/img00001234.png."""
    return f"{index // FILES_A_FOLDER:05d}/img{index:08d}.png"


def latents_name(index: int) -> str:
    """Return the name of an image's latents: index 1234 is 00001/img-mean-std-00001234.npy."""
    return f"{index // FILES_A_FOLDER:05d}/img-mean-std-{index:08d}.npy"


def mirrored_name(name: str) -> str:
    """Return the name of the mirrored image's latents, which lie beside the plain ones, wherever those are."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.replace("img-mean-std-", "img-mean-std-flip-")


def label_entries(content: dict[str, Any], where: str) -> list[tuple[str, int]]:
    """Return names and labels that the content of a dataset.json lists, none where its labels are null or missing.

    Raises InputError, beginning with `where`, for entries that are not [name, label] and for labels that cannot be.
    """
    entries = content.get("labels")
    if entries is None:
        return []
    if not isinstance(entries, list):
        raise InputError(f"{where}: labels is {entries!r:.50}; expected a list of [name, label]")
    for entry in entries:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise InputError(f'{where}: label entry {entry!r}; expected [name, label], ["00000/img00000000.png", 6]')
        name, label = entry
        if type(label) is not int or not 0 <= label < MAX_CLASSES:  # to isinstance, a bool is an int
            allowed = f"whole numbers from 0 to {MAX_CLASSES - 1:,}"
            raise InputError(f"{where}: {name} has label {label!r}; allowed: {allowed}")
    return entries

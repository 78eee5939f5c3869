"""The images of a source: their order, labels and class names."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise, takewhile

from common.io import InputError
from common.sources import IMAGE_NAME, FileSource, image_name, label_entries, map_files, read_dataset_json
from preprocessing.crops import SUFFIXES

_NUMBERED_FOLDER = re.compile(r"\d{5}")  # folders of convert.py's output, which are not classes


def image_index(name: str) -> int:
    """Return the index in the name of an image. Raises InputError for other names."""
    match = IMAGE_NAME.fullmatch(name)
    if match is None:
        raise InputError(f"{name}: images are named like {image_name(0)}; run preprocessing/convert.py first")
    return int(match[1])


@dataclass(frozen=True)
class Listing:
    """The images of a source in their final order; `classes` are the class names, None if they are not known."""

    names: list[str]
    labels: list[int]
    classes: list[str] | None

    def digest(self) -> str:
        """Return a checksum of names and labels."""
        return hashlib.sha256(json.dumps([self.names, self.labels]).encode()).hexdigest()


def list_images(source: FileSource, labels: str = "auto") -> Listing:
    """Return the images of a source, sorted by name, with labels from its class folders or its dataset.json.

    `labels` is "folders", "json", or "auto": dataset.json if there is one; existing class folders must match it.
    Raises InputError if there are no images, or if labels are missing or contradict each other.
    """
    names = [name for name in source.names if name.lower().endswith(SUFFIXES)]
    if not names:
        raise InputError(f"{source.path}: contains no images ({', '.join(SUFFIXES)})")
    by_name, classes = read_labels(source) if labels != "folders" else (None, None)
    if by_name is None:
        if labels == "json":
            raise InputError(f"{source.path}: contains no dataset.json with labels, which --labels json requires")
        return _from_folders(source, names)
    if unlisted := [name for name in names if name not in by_name]:
        which = f"{source.describe(unlisted[0])} and {len(unlisted) - 1:,} other images are not in dataset.json"
        raise InputError(f"{which}; list or remove them, or ignore dataset.json with --labels folders")
    listing = Listing(sorted(by_name), [label for _, label in sorted(by_name.items())], classes)
    return _check_folders(source, listing) if labels == "auto" else listing


def read_labels(source: FileSource) -> tuple[dict[str, int] | None, list[str] | None]:
    """Return labels by file name, and class names, from a source's dataset.json; None for what it does not contain.

    Raises InputError if it has no "labels", lists a file twice, or lists a file that does not exist.
    """
    if "dataset.json" not in source:
        return None, None
    where = source.describe("dataset.json")
    content = read_dataset_json(source)
    if "labels" not in content:
        raise InputError(f'{where}: must be of the form {{"labels": [["00000/img00000000.png", 6], ...]}}')
    if content["labels"] is None:
        return None, None
    by_name: dict[str, int] = {}
    for name, label in label_entries(content, where):
        if name in by_name:
            raise InputError(f"{where}: lists {name} twice")
        if name not in source:
            raise InputError(f"{where}: lists {name}, which does not exist")
        by_name[name] = label
    return by_name, content.get("classes")


def list_converted(source: FileSource) -> Listing:
    """Return the images of a converted data set in the order of their index.

    Raises InputError if there is no dataset.json with labels, or if two images have the same index.
    """
    by_name, classes = read_labels(source)
    if not by_name:
        raise InputError(f"{source.path}: contains no dataset.json with labels; run preprocessing/convert.py first")
    names = sorted(by_name, key=image_index)
    for name, following in pairwise(names):
        if image_index(name) == image_index(following):
            raise InputError(f"{source.path}: {name} and {following} have the same index; allowed: one image per index")
    return Listing(names, [by_name[name] for name in names], classes)


def describe_files(source: FileSource, names: list[str]) -> str:
    """Return number, total bytes and a checksum of the sizes of files. The files are not read."""
    sizes = [size for found in map_files(source.size, names) for size in found]
    digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    return f"{len(sizes):,} files, {sum(sizes):,} bytes, their sizes {digest[:16]}"


def _from_folders(source: FileSource, names: list[str]) -> Listing:
    """Return class folders numbered in sorted order. Folders that contain all images (train/...) are not classes."""
    folders = [name.split("/")[:-1] for name in names]
    pairs = zip(min(folders), max(folders), strict=False)
    depth = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if all(len(folder) == depth for folder in folders):  # a single folder of images
        only = folders[0][-1] if depth else source.path.stem
        return Listing(names, [0] * len(names), [only])
    subfolders = defaultdict(set)
    for name, folder in zip(names, folders, strict=True):
        if len(folder) == depth:
            raise InputError(f"{source.describe(name)}: is next to class folders; move it into one of them")
        if len(folder) > depth + 1:
            subfolders[folder[depth + 1]].add(folder[depth])
    repeated = sorted(name for name, parents in subfolders.items() if len(parents) > 1)
    if len(repeated) > 1:  # one is normal, as in Tiny ImageNet's n01443537/images
        one, other = sorted(subfolders[repeated[0]])[:2]
        where = f"{source.path}: {one} and {other} both contain folders {repeated[0]} and {repeated[1]}"
        advice = f"if these are the classes, use {one} as --source, otherwise list the labels in a dataset.json"
        raise InputError(f"{where}; {advice}")
    classes = sorted({folder[depth] for folder in folders})
    number = {name: index for index, name in enumerate(classes)}
    return Listing(names, [number[folder[depth]] for folder in folders], classes)


def _check_folders(source: FileSource, listing: Listing) -> Listing:
    """Return the listing with names of its class folders. Raises InputError if a label is not its folder's number."""
    folders = sorted({name.split("/")[0] for name in listing.names if "/" in name})
    if len(folders) < 2 or all(_NUMBERED_FOLDER.fullmatch(folder) for folder in folders):
        return listing
    by_folder = _from_folders(source, listing.names)
    for name, label, expected in zip(listing.names, listing.labels, by_folder.labels, strict=True):
        if label != expected:
            numbers = f"has label {label} in dataset.json, but its class folder has number {expected} in sorted order"
            advice = "choose one with --labels json or --labels folders"
            raise InputError(f"{source.describe(name)}: {numbers}; {advice}")
    return by_folder

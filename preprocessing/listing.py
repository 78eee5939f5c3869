"""The images of a source: their order, labels and class names."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from common.classes import class_names
from common.errors import InputError, printable
from common.image_files import ImageFiles, check_one_part, convert_command, find_images
from common.sources import IMAGE_NAME, FileSource, image_name, label_entries, map_files, read_dataset_json
from preprocessing.class_folders import find_class_folders

_NUMBERED_FOLDER = re.compile(r"\d{5}")  # folders of convert.py's output, which are not classes


def image_index(name: str) -> int:
    """Return the index in the name of an image. Raises InputError for other names."""
    match = IMAGE_NAME.fullmatch(name)
    if match is None:
        raise InputError(f"{printable(name)}: images are named like {image_name(0)}; convert.py writes them")
    return int(match[1])


@dataclass(frozen=True)
class Listing:
    """The images of a source in their final order.

    Attributes:
        names: of the images.
        labels: of the images; all 0 if the source has no labels.
        classes: the class names, None if they are not known.
        is_labelled: whether the source has labels.
        found: what the source contains, None for a converted data set.
        bare_classes: class folders without images, and why they have none.
        notes: lines about the source for the user.
    """

    names: list[str]
    labels: list[int]
    classes: list[str] | None
    is_labelled: bool = True
    found: ImageFiles | None = None
    bare_classes: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def digest(self) -> str:
        """Return a checksum of names and labels."""
        return hashlib.sha256(json.dumps([self.names, self.labels]).encode()).hexdigest()

    def first(self, count: int | None) -> Listing:
        """Return the first images, all if `count` is None; the classes keep their names and numbers."""
        return replace(self, names=self.names[:count], labels=self.labels[:count])

    def left_out(self) -> dict[str, str]:
        """Return files and class folders that are not in the list, and why."""
        listed = set(self.names)
        dead_links = {name: reason for name, reason in self.found.dead_links.items() if name not in listed}
        return {**self.found.not_read, **dead_links, **self.bare_classes}

    def table(self, names: Mapping[int, str]) -> dict[str, Any]:
        """Return labels and classes for a dataset.json, with the final name of each image by its position."""
        labels = [[name, self.labels[i]] for i, name in names.items()] if self.is_labelled else None
        return {"labels": labels, **({"classes": self.classes} if self.classes else {})}


def list_images(source: FileSource, labels: str = "auto") -> Listing:
    """Return the images of a source, sorted by name, with labels from its class folders or its dataset.json.

    `labels` is "folders", "json", "none", or "auto": dataset.json if there is one; existing class folders must match
    it, and numbered folders (00000, 00001) of a dataset.json whose labels are null are not classes.
    Raises InputError if there are no images, or if labels are missing or contradict each other.
    """
    found = find_images(source)
    content = read_dataset_json(source) if labels in ("auto", "json") else {}
    has_json = labels in ("auto", "json") and "dataset.json" in source
    by_name, classes = read_labels(source, content) if has_json else (None, None)
    if by_name is not None:
        return _from_json(source, found, by_name, classes, must_match=labels == "auto")
    if labels == "json":
        raise InputError(f"{source.path}: contains no dataset.json with labels, which --labels json requires")
    is_numbered = all(_NUMBERED_FOLDER.fullmatch(name.split("/")[0]) for name in found.images)
    if labels == "none" or (has_json and (is_numbered or not any("/" in name for name in found.images))):
        check_one_part(source, found.images)
        return Listing(found.images, [0] * len(found.images), None, False, found, notes=found.notes())
    if labels == "auto" and is_numbered and all(map(IMAGE_NAME.fullmatch, found.images)):
        raise InputError(
            f"{source.path}: has the layout of convert.py's output ({found.images[0]}), but no dataset.json with the "
            "labels; copy it as well, or choose --labels none (no labels) or --labels folders (a class per folder)"
        )
    folders = find_class_folders(source, found.images, found)
    notes = found.notes() + folders.notes
    return Listing(found.images, folders.labels, folders.classes, True, found, folders.bare, notes)


def read_labels(source: FileSource, content: Mapping[str, Any]) -> tuple[dict[str, int] | None, list[str] | None]:
    """Return labels by file name, and class names, from a dataset.json's content; None for what it does not contain.

    Raises InputError if it has no "labels", lists a file twice or one that does not exist, or if its classes are not a
    list of names.
    """
    where = source.describe("dataset.json")
    if "labels" not in content:
        raise InputError(f'{where}: must be of the form {{"labels": [["00000/img00000000.png", 6], ...]}}')
    if content["labels"] is None:
        return None, None
    class_names({where: content})
    by_name: dict[str, int] = {}
    for name, label in label_entries(content, where):
        if name in by_name:
            raise InputError(f"{where}: lists {printable(name)} twice")
        if name not in source:
            raise InputError(f"{where}: lists {printable(name)}, which does not exist")
        by_name[name] = label
    return by_name, content.get("classes")


def list_converted(source: FileSource) -> Listing:
    """Return the images of a converted data set in the order of their index.

    Raises InputError if there is no dataset.json, or if two images have the same index.
    """
    content = read_dataset_json(source)
    if "dataset.json" not in source:
        find_images(source)  # explains packed data and sources without images
        problem = "contains no dataset.json, which convert.py writes; convert the photographs first"
        advice = "and use its --dest as --source"
        raise InputError(f"{source.path}: {problem}:\n{convert_command(source.path)}\n{advice}")
    by_name, classes = read_labels(source, content)
    is_labelled = by_name is not None
    if not is_labelled:
        by_name = dict.fromkeys(filter(IMAGE_NAME.fullmatch, source.names), 0)
    if not by_name:
        problem = f"contains no images named like {image_name(0)}; convert them first"
        raise InputError(f"{source.path}: {problem}:\n{convert_command(source.path)}")
    if others := [name for name in by_name if not IMAGE_NAME.fullmatch(name)]:
        problem = f"images are named like {image_name(0)} after convert.py; convert them first"
        raise InputError(f"{source.describe(others[0])}: {problem}:\n{convert_command(source.path)}")
    if unlisted := [name for name in source.names if IMAGE_NAME.fullmatch(name) and name not in by_name]:
        problem = f"and {len(unlisted) - 1:,} other images are not in {source.describe('dataset.json')}"
        raise InputError(f"{source.describe(unlisted[0])} {problem}; list or remove them")
    names = sorted(by_name, key=image_index)
    for name, following in pairwise(names):
        if image_index(name) == image_index(following):
            both = printable(f"{name} and {following}")
            raise InputError(f"{source.path}: {both} have the same index; allowed: one image per index")
    return Listing(names, [by_name[name] for name in names], classes, is_labelled)


def describe_files(source: FileSource, names: list[str]) -> str:
    """Return number, total bytes and a checksum of the sizes of files. The files are not read."""
    sizes = [size for found in map_files(source.size, names) for size in found]
    digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    return f"{len(sizes):,} files, {sum(sizes):,} bytes, their sizes {digest[:16]}"


def _from_json(
    source: FileSource, found: ImageFiles, by_name: dict[str, int], classes: list[str] | None, must_match: bool
) -> Listing:
    """Return the listing of labels from a dataset.json; with `must_match`, clear class folders must have these numbers.

    Raises InputError if an image is not in dataset.json, or if a label is not the number of its class folder.
    """
    if unlisted := [name for name in found.images if name not in by_name]:
        which = f"{source.describe(unlisted[0])} and {len(unlisted) - 1:,} other images are not in dataset.json"
        raise InputError(f"{which}; list or remove them, or ignore dataset.json with --labels folders")
    names = sorted(by_name)
    labels = [by_name[name] for name in names]
    top = {name.split("/")[0] for name in names if "/" in name}
    folders = None
    if must_match and len(top) > 1 and not all(map(_NUMBERED_FOLDER.fullmatch, top)):
        # Where it is not clear which folders are the classes, the listed labels cannot contradict them.
        with contextlib.suppress(InputError):
            folders = find_class_folders(source, names, found)
    if folders is None:
        return Listing(names, labels, classes, True, found, notes=found.notes())
    for name, label, expected in zip(names, labels, folders.labels, strict=True):
        if label != expected:
            numbers = f"has label {label} in dataset.json, but its class folder has number {expected} in sorted order"
            advice = "choose one with --labels json or --labels folders"
            raise InputError(f"{source.describe(name)}: {numbers}; {advice}")
    return Listing(names, labels, folders.classes, True, found, folders.bare, found.notes() + folders.notes)

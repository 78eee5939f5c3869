"""Which images a source holds, in which order, with which labels."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile

from common.io import InputError
from common.sources import IMAGE_NAME, FileSource, image_name, label_entries, read_dataset_json
from preprocessing.crops import SUFFIXES

LOOKING_THREADS = 16  # on a network file system, to look at a file is to wait for a millisecond
LOOKED_AT_ONCE = 250  # by a thread
_NUMBERED_FOLDER = re.compile(r"\d{5}")  # our own layout: folders count files and say nothing on classes


def image_index(name: str) -> int:
    """Return the index in an image's name. Raises InputError if the name has none."""
    match = IMAGE_NAME.fullmatch(name)
    if match is None:
        raise InputError(f"{name}: images are named like {image_name(0)}; run preprocessing/convert.py first")
    return int(match[1])


@dataclass(frozen=True)
class Listing:
    """The images of a source in their final order; `classes` are the class names, None where they are not known."""

    names: list[str]
    labels: list[int]
    classes: list[str] | None

    def digest(self) -> str:
        """Return a checksum of names and labels, which together decide what each output file is."""
        return hashlib.sha256(json.dumps([self.names, self.labels]).encode()).hexdigest()


def list_images(source: FileSource, labels: str = "auto") -> Listing:
    """Return the images of a source, sorted by name, with labels from its class folders or its dataset.json.

    `labels`: "folders", "json", or "auto": the dataset.json if there is one, and class folders have to agree with it.
    Raises InputError if there are no images, if names are unsafe or not unique, if labels are missing or disagree.
    """
    _check_members(source)
    names = [name for name in source.names if name.lower().endswith(SUFFIXES)]
    if not names:
        raise InputError(f"{source.path}: holds no images ({', '.join(SUFFIXES)})")
    described = read_labels(source) if labels != "folders" and "dataset.json" in source else None
    if described is None:
        if labels == "json":
            raise InputError(f"{source.path}: holds no dataset.json with labels, which --labels json needs")
        return _from_folders(source, names)
    by_name, classes = described
    unlisted = [name for name in names if name not in by_name]
    if unlisted:
        raise InputError(
            f"{source.describe(unlisted[0])} and {len(unlisted) - 1:,} other images are not in dataset.json; "
            "list or remove them, or leave dataset.json aside with --labels folders"
        )
    listing = Listing(sorted(by_name), [by_name[name] for name in sorted(by_name)], classes)
    return _agree(source, listing) if labels == "auto" else listing


def read_labels(source: FileSource) -> tuple[dict[str, int], list[str] | None] | None:
    """Return the labels in a source's dataset.json by file name, and the class names if it has them.

    Returns None if its labels are null. Raises InputError if it is not of the form {"labels": [["a/b.png", 6], ...]},
    names a file twice or one that is not there.
    """
    where = source.describe("dataset.json")
    content = read_dataset_json(source)
    if "labels" not in content:
        raise InputError(f'{where}: must be of the form {{"labels": [["00000/img00000000.png", 6], ...]}}')
    if content["labels"] is None:
        return None
    by_name: dict[str, int] = {}
    for name, label in label_entries(content, where):
        if name in by_name:
            raise InputError(f"{where}: lists {name} twice")
        if name not in source:
            raise InputError(f"{where}: lists {name}, which is not there")
        by_name[name] = label
    return by_name, content.get("classes")


def list_converted(source: FileSource) -> Listing:
    """Return the images of a converted data set in the order of their index.

    Raises InputError if there is no dataset.json with labels or two images have the same index.
    """
    described = read_labels(source) if "dataset.json" in source else None
    if not described or not described[0]:
        raise InputError(f"{source.path}: holds no dataset.json with labels; run preprocessing/convert.py first")
    by_name, classes = described
    by_index: dict[int, str] = {}
    for name in by_name:
        other = by_index.setdefault(image_index(name), name)
        if other != name:
            raise InputError(f"{source.path}: {other} and {name} have the same index, so their latents the same name")
    names = [by_index[index] for index in sorted(by_index)]
    return Listing(names, [by_name[name] for name in names], classes)


def describe_files(source: FileSource, names: list[str]) -> str:
    """Return number, bytes and a digest of the sizes of files: what is to be had of their contents without reading."""
    pieces = [names[start : start + LOOKED_AT_ONCE] for start in range(0, len(names), LOOKED_AT_ONCE)]
    with ThreadPoolExecutor(LOOKING_THREADS) as pool:
        sizes = [size for piece in pool.map(lambda piece: [*map(source.size, piece)], pieces) for size in piece]
    digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    return f"{len(sizes):,} files, {sum(sizes):,} bytes, their sizes {digest[:16]}"


def _from_folders(source: FileSource, names: list[str]) -> Listing:
    """Number the class folders in sorted order. Folders around all images (train/...) are not classes."""
    folders = [name.split("/")[:-1] for name in names]
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(min(folders), max(folders), strict=False))
    depth = len(list(shared))
    if all(len(folder) == depth for folder in folders):  # a single folder of images
        only = folders[0][-1] if depth else source.path.stem
        return Listing(names, [0] * len(names), [only])
    subfolders = defaultdict(set)
    for name, folder in zip(names, folders, strict=True):
        if len(folder) == depth:
            raise InputError(f"{source.describe(name)}: lies beside class folders; move it into one of them")
        if len(folder) > depth + 1:
            subfolders[folder[depth + 1]].add(folder[depth])
    repeated = sorted(name for name, parents in subfolders.items() if len(parents) > 1)
    if len(repeated) > 1:  # one name alone is a habit, like Tiny ImageNet's n01443537/images
        parents = sorted(subfolders[repeated[0]])
        raise InputError(
            f"{source.path}: {parents[0]} and {parents[1]} both hold folders {repeated[0]} and {repeated[1]}; if these "
            f"are the classes, give {parents[0]} as --source, else say the labels in a dataset.json"
        )
    classes = sorted({folder[depth] for folder in folders})
    number = {name: index for index, name in enumerate(classes)}
    return Listing(names, [number[folder[depth]] for folder in folders], classes)


def _agree(source: FileSource, listing: Listing) -> Listing:
    """Check a dataset.json against class folders, if the images lie in such, and take the class names from them."""
    folders = sorted({name.split("/")[0] for name in listing.names if "/" in name})
    if len(folders) < 2 or all(_NUMBERED_FOLDER.fullmatch(folder) for folder in folders):
        return listing
    by_folder = _from_folders(source, listing.names)
    for name, said, meant in zip(listing.names, listing.labels, by_folder.labels, strict=True):
        if said != meant:
            raise InputError(
                f"{source.describe(name)}: dataset.json says class {said}, its folder's place in sorted order is "
                f"{meant}; say which is right: --labels json or --labels folders"
            )
    return by_folder


def _check_members(source: FileSource) -> None:
    """Refuse zip files with members that point outside."""
    if not source.is_zip:
        return
    with zipfile.ZipFile(source.path) as archive:
        members = archive.namelist()
    for name in members:
        parts = name.replace("\\", "/").split("/")
        if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
            raise InputError(f"{source.path}: member {name!r} is an absolute or parent path; pack it anew")

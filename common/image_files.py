"""The images of a folder or zip, and what is not taken: dead links, other image formats, folders without images."""

from __future__ import annotations

import os
import re
import shlex
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from common.errors import InputError, printable
from common.io import real_path
from common.packed import TAR, explain_packed, packed_kind, unpack_command
from common.sources import FileSource, describe_dead_link, map_files
from common.zip_files import folders_above

# Names of images that are read. Their format is known from their content, not from their name.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
# Images that are not read.
OTHER_IMAGES = (
    ".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".jpx", ".jif", ".dib", ".apng", ".tga", ".svg", ".ico", ".psd",
    ".exr", ".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".eps", ".pcx", ".xcf", ".dcm",
)  # fmt: skip
# Files that are not images and are often next to them.
NO_IMAGES = (
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".rst", ".html", ".htm", ".pdf", ".log",
    ".db", ".ini", ".lnk", ".url", ".mat", ".npy", ".npz", ".pkl", ".pt", ".pth", ".caption", ".cls", ".py", ".sh",
    ".ipynb", ".sha256", ".md5", ".safetensors",
)  # fmt: skip
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|BM.{4}\0\0\0\0|RIFF.{4}WEBP|II\*\0|MM\0\*|P[1-6]\s|"
    rb".{4}ftyp(?:avif|avis|heic|heix|mif1|msf1)|\xff\x0a|\0\0\0\x0cJXL |\0\0\0\x0cjP  ",
    re.DOTALL,
)  # the first bytes of JPEG, PNG, GIF, BMP, WebP, TIFF, PPM, AVIF, HEIC, JPEG XL, JPEG 2000
SHOWN = 5  # names in a message, of each kind
# Parts of data sets: train, val2017, test_images, seg_train, ILSVRC2012_img_val, train.X1. Groups: what is before the
# word, and one for each word.
_SPLIT = re.compile(
    r"(.*[_.-])?(?:(train(?:ing)?)|(val(?:id(?:ation)?)?|dev|eval(?:uation)?)|(test(?:ing)?))"
    r"(?:[_.-]?(?:x?\d+|x|set|data|images?|split|[ab]))?",
    re.IGNORECASE,
)


@dataclass
class ImageFiles:
    """The files of a source.

    Attributes:
        images: names of the images, among them dead links with the name of an image; sorted.
        not_read: names of images whose format or name is not one of those that are read, and why.
        bare_folders: folders, at any depth, that have files or links but no images, or are empty; and why.
        other_folders: those of them that have only files that are not images and no packed data.
        dead_links: why a link cannot be read, by name.
        others: number of other files by the ending of their name.
    """

    source: FileSource
    images: list[str] = field(default_factory=list)
    not_read: dict[str, str] = field(default_factory=dict)
    bare_folders: dict[str, str] = field(default_factory=dict)
    other_folders: set[str] = field(default_factory=set)
    dead_links: dict[str, str] = field(default_factory=dict)
    others: Counter = field(default_factory=Counter)

    def notes(self) -> list[str]:
        """Return a line that counts the files that are not images, if there are any."""
        if not self.others:
            return []
        counts = ", ".join(f"{count:,} {ending}" for ending, count in self.others.most_common())
        total = self.others.total()
        return [f"{self.source.path}: {total:,} {'file is' if total == 1 else 'files are'} not an image: {counts}"]


def find_images(source: FileSource) -> ImageFiles:
    """Return the images of a source and what is not taken. Raises InputError if there are no images."""
    found, rest = ImageFiles(source), []
    for name in source.names:
        if name.lower().endswith(IMAGE_SUFFIXES):
            found.images.append(name)
        elif name != "dataset.json":
            rest.append(name)
    dead = set(source.dead_links)
    found.dead_links = {name: describe_dead_link(source.file_path(name)) for name in source.dead_links}
    unknown = []
    for name in rest:
        ending = os.path.splitext(name)[1].lower()
        if name in dead:
            if ending in NO_IMAGES:
                del found.dead_links[name]
                found.others[ending] += 1
        elif ending in OTHER_IMAGES:
            found.not_read[name] = f"{ending} images are not read; allowed: {', '.join(IMAGE_SUFFIXES)}"
        elif ending in NO_IMAGES or packed_kind(name):
            found.others[ending] += 1
        else:
            unknown.append(name)
    heads = (head for part in map_files(source.head, unknown) for head in part)
    for name, head in zip(unknown, heads, strict=True):
        if _MAGIC.match(head):
            found.not_read[name] = f"is an image without one of the endings {', '.join(IMAGE_SUFFIXES)}; rename it"
        else:
            found.others[printable(os.path.splitext(name)[1].lower()) or "without ending"] += 1
    if not found.images:
        raise InputError(f"{source.path}: {_no_images(found, rest)}")
    _find_bare_folders(found, rest)
    return found


def stop_if_incomplete(found: ImageFiles, bare_folders: dict[str, str], advice: str) -> None:
    """Raise InputError that counts and names dead links, images that are not read, and folders without images.

    `bare_folders`: those of `found.bare_folders` that matter.
    """
    folders = {name: reason for name, reason in bare_folders.items() if name not in found.dead_links}
    kinds = (
        ("link to a file that does not exist", "links to files that do not exist", found.dead_links),
        ("image that is not read", "images that are not read", found.not_read),
        ("folder without images", "folders without images", folders),
    )
    lines = []
    for singular, plural, reasons in kinds:
        if reasons:
            lines.append(f"  {len(reasons):,} {singular if len(reasons) == 1 else plural}:")
            lines += [f"    {printable(name)}: {reason}" for name, reason in list(reasons.items())[:SHOWN]]
            lines += [f"    and {len(reasons) - SHOWN:,} more"] if len(reasons) > SHOWN else []
    if lines:
        raise InputError("\n".join([f"{found.source.path}: not all of its content can be used", *lines, advice]))


def common_depth(folders: list[list[str]]) -> int:
    """Return the number of folders that contain all others, from paths as lists of folder names."""
    pairs = zip(min(folders), max(folders), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def check_one_part(source: FileSource, names: list[str]) -> None:
    """Raise InputError if images are in different parts of a data set (train, val, test)."""
    folders = [name.split("/")[:-1] for name in names]
    depth = common_depth(folders)
    check_split(source, {"/".join(folder[: depth + 1]) for folder in folders if len(folder) > depth})


def check_split(source: FileSource, folders: Iterable[str]) -> None:
    """Raise InputError if the folders are the parts of a data set (train, val, test), not classes.

    `folders` are paths below the source that have the same parent.
    """
    found: dict[str, dict[int, str]] = {}  # by what is before train, val, test
    for folder in sorted(folders):
        if match := _SPLIT.fullmatch(folder.rpartition("/")[2]):
            found.setdefault(match[1], {}).setdefault(match.lastindex, folder)
    for parts in (parts for parts in found.values() if len(parts) > 1):
        names = " and ".join(parts[number] for number in sorted(parts))
        first = parts[min(parts)]
        use = f"unpack the zip and use {first}" if source.is_zip else f"use {shlex.quote(str(source.path / first))}"
        problem = printable(f"contains the parts {names} of a data set, not classes; {use} as the source")
        raise InputError(f"{source.path}: {problem}")


def suggested_images(source: Path) -> Path:
    """Return a folder for the converted images of a source, next to it: photos-256/images for photos."""
    path = source if source.name not in ("", "..") else real_path(source)
    return path.parent / f"{path.name.removesuffix('.zip') or 'data'}-256" / "images"


def convert_command(source: Path) -> str:
    """Return the command that converts photographs to images for training."""
    paths = f"--source {shlex.quote(str(source))} --dest {shlex.quote(str(suggested_images(source)))}"
    return f"python preprocessing/convert.py {paths} --resolution 256"


def encode_command(images: Path) -> str:
    """Return the command that encodes converted images."""
    source, dest = (shlex.quote(str(path)) for path in (images, images.with_name("vae-sd")))
    return f"python preprocessing/encode.py --source {source} --dest {dest}"


def preparation(source: Path) -> str:
    """Return the commands that prepare photographs for training; what a file is, if it contains no photographs."""
    if not source.is_dir() and not source.is_file():  # a fifo or a device
        return ""
    if source.is_file() and not zipfile.is_zipfile(source):
        packed = explain_packed(source)
        return f"; it {packed}" if packed else ""
    images = suggested_images(source)
    commands = f"{convert_command(source)}\n{encode_command(images)}"
    train = f"python train.py --data-dir {shlex.quote(str(images.parent))} ..."
    return f"; it contains photographs, prepare them first:\n{commands}\n{train}"


def has_images(names: Iterable[str]) -> bool:
    """Return whether one of the names is that of an image."""
    return any(name.lower().endswith(IMAGE_SUFFIXES) for name in names)


def _no_images(found: ImageFiles, rest: list[str]) -> str:
    """Return what a source without images contains."""
    if packed := explain_packed(found.source.path, rest):
        return packed
    if found.not_read:
        name, reason = next(iter(found.not_read.items()))
        return f"contains no images that are read; {printable(name)}: {reason}"
    if found.dead_links:
        name, reason = next(iter(found.dead_links.items()))
        return f"contains no images; {printable(name)} {reason}"
    counts = ", ".join(f"{count:,} {ending}" for ending, count in found.others.most_common(SHOWN))
    return f"contains no images ({', '.join(IMAGE_SUFFIXES)}); its files: {counts or 'none'}"


def _find_bare_folders(found: ImageFiles, rest: list[str]) -> None:
    """Fill in the folders without images and what they contain instead. A dead link may have been one to a folder."""
    with_images = folders_above(found.images)
    contents: dict[str, list[str]] = {folder: [] for folder in found.source.empty_folders}
    for name in rest:
        folder = name if name in found.dead_links else name.rpartition("/")[0]
        if folder and folder not in with_images:
            contents.setdefault(folder, []).append(name)
    for folder, names in sorted(contents.items()):
        packed = [name for name in names if packed_kind(name)]
        if folder in found.dead_links:
            reason = found.dead_links[folder]
        elif packed and packed_kind(packed[0]) == TAR and not found.source.is_zip:
            reason = f"contains only a {TAR}; unpack with: {unpack_command(found.source.path, packed[0])}"
        elif packed:
            reason = f"contains only a {packed_kind(packed[0])}; unpack it"
        elif names:
            reason = f"contains {len(names):,} file{'s' if len(names) > 1 else ''}, but no image that is read"
            if not any(name in found.not_read for name in names):
                found.other_folders.add(folder)
        else:
            reason = "is empty"
        found.bare_folders[folder] = reason

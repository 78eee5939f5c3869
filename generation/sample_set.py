"""The folder of a sample set: its settings, the images that are still missing, and the files of the complete set.

images/000000.png ...     the images; images/dataset.json has their labels, or null without labels
samples.npz               all images as one array, arr_0 (N, R, R, 3) uint8, the format that evaluators read
cls_tokens.npy            class tokens (M, D) float32; M > N if more images were generated before
samples.json, grid.png    the settings; a grid of the first images
cls/                      class tokens of single batches, until cls_tokens.npy is written
"""

from __future__ import annotations

import filecmp
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.classes import ClassSet
from common.cli import fixed_settings, flag, settings
from common.errors import InputError, printable
from common.images import decode_rgb, image_grid, save_png, to_png
from common.io import check_writable, read_json, write_json
from common.locks import lock_folder, unlock_folder
from common.npy import decode_npy
from common.temporary import atomic_write
from evaluations.npz import NpzFile, write_npz
from generation.config import GenerateConfig

GRID_ROWS, GRID_COLUMNS = 8, 12  # at most; with balanced labels, one column for each class if they fit
THREADS = 4  # for reading images
READ_AHEAD = 64  # images read at a time; 50,000 decoded images do not fit into memory
CLS_PART = re.compile(r"(\d+)-(\d+)\.npy")  # class tokens of one batch: first image number, and last one + 1
IGNORED = re.compile(r"\.lock|\..+\.tmp", re.DOTALL)  # what a killed run leaves before its first file
SET_NPZ = re.compile(r"[^/]+/samples\.npz")  # target of a link to a sample set
REMEDY = "remove it and run the same command again"
DIGEST = "checkpoint_sha256"
ADDED = {"time_shift": 1.0}  # what sets of earlier versions, which did not record it, were made with


@dataclass(frozen=True)
class SampleSet:
    """The folder of a sample set, which is created when the first file is written."""

    folder: Path
    total: int  # number of images
    resolution: int  # image size in pixels

    def image_path(self, number: int) -> Path:
        """Return the path of image `number`."""
        return self.folder / "images" / f"{number:06d}.png"

    @property
    def image_paths(self) -> list[Path]:
        """The paths of all images, in order."""
        return [self.image_path(number) for number in range(self.total)]

    @staticmethod
    def started_with(folder: Path) -> int | None:
        """Return the number of images of the set that was started in a folder, None if there is no such set."""
        path = folder / "samples.json"
        saved = read_json(path) if path.exists() else None
        count = saved.get("num_fid_samples") if isinstance(saved, dict) else None
        return count if type(count) is int and count > 0 else None

    def claim(self, made_with: dict[str, Any], inputs: Sequence[str | Path | None] = ()) -> None:
        """Lock the folder for this process and write the settings to samples.json.

        `made_with` is everything that determines the images; under `DIGEST` the checkpoint's SHA-256. Raises InputError
        if the folder is not writable, is in one of the `inputs` or in a data set, contains other files than a sample
        set, another process is generating there, or its images were made with other settings.
        """
        check_writable(self.folder / "samples.json", "--sample-dir", inputs)
        if data := next((parent for parent in self.folder.absolute().parents if (parent / "dataset.json").exists()), 0):
            raise InputError(f"--sample-dir {self.folder}: is in the data set {data}; choose a place outside")
        self._check_settings(made_with)  # before the lock file is created, which would change a foreign folder
        lock_folder(self.folder, "generating")
        try:
            self._check_settings(made_with)
            write_json(self.folder / "samples.json", made_with)
        except BaseException:  # leave no lock file in a folder of other images
            self.release()
            raise

    def release(self) -> None:
        """Unlock the folder."""
        unlock_folder(self.folder)

    def _check_settings(self, made_with: dict[str, Any]) -> None:
        path, is_there = self.folder / "samples.json", self.folder.exists()
        if not path.exists():
            others = [name for name in os.listdir(self.folder) if not IGNORED.fullmatch(name)] if is_there else []
            if others:
                first = "images" if "images" in others else printable(sorted(others)[0])
                raise InputError(f"{self.folder} contains {first} but no samples.json; choose another --name")
            return
        saved = read_json(path)
        if not isinstance(saved, dict):
            raise InputError(f"{path}: is a {type(saved).__name__}; expected an object with the images' settings")
        if DIGEST not in saved:
            reason = "was started by an earlier version, whose seeds gave other noise"
            raise InputError(f"{self.folder} {reason}; choose another --name")
        saved, made_with = ADDED | saved, ADDED | made_with
        changeable = settings(GenerateConfig).keys() - fixed_settings(GenerateConfig)
        for name, value in saved.items():
            if name not in changeable and made_with.get(name) != value:
                before, now = _shown_setting(name, value), _shown_setting(name, made_with.get(name))
                raise InputError(f"{self.folder} contains images made with {before}, not {now}; choose another --name")

    def missing_batches(self, size: int, with_cls: bool) -> list[range]:
        """Return the batches, as image numbers, that lack an image or, if `with_cls`, a class token."""
        cls_tokens = self._known_cls_tokens() if with_cls else {}

        def complete(number: int) -> bool:
            path = self.image_path(number)
            return (not with_cls or number in cls_tokens) and path.exists() and path.stat().st_size > 0

        return [numbers for numbers in self._batches(size) if not all(map(complete, numbers))]

    def _batches(self, size: int) -> list[range]:
        return [range(first, min(first + size, self.total)) for first in range(0, self.total, size)]

    def write_image(self, number: int, pixels: np.ndarray) -> None:
        """Write image `number`, pixels (R, R, 3) uint8."""
        with atomic_write(self.image_path(number), clear=False) as file:
            file.write(to_png(Image.fromarray(pixels)))

    def write_cls_tokens(self, numbers: range, cls_tokens: np.ndarray) -> None:
        """Write the class tokens of a batch, (len(numbers), D) float32, to a file of the batch."""
        with atomic_write(self.folder / "cls" / f"{numbers.start:06d}-{numbers.stop:06d}.npy", clear=False) as file:
            np.save(file, cls_tokens)

    def finish(
        self, labels: list[int] | None, balanced: bool, with_cls: bool, npz: bool, classes: ClassSet | None = None
    ) -> None:
        """Write labels and grid of a complete set; if `with_cls`, cls_tokens.npy; if `npz`, samples.npz.

        `labels` is None for images without labels. `balanced` labels let the grid have one column for each class;
        `classes` has their names. Raises InputError if a file is damaged.
        """
        listed = None
        if labels is not None:
            listed = [[path.name, label] for path, label in zip(self.image_paths, labels, strict=True)]
        write_json(self.folder / "images" / "dataset.json", {"labels": listed})
        self._write_grid(labels or [], balanced, classes or ClassSet.of_data(labels or [0]))
        if with_cls:
            self._join_cls_tokens()
        shape = (self.total, self.resolution, self.resolution, 3)
        if npz and not self._has_current_npz(shape):
            with atomic_write(self.folder / "samples.npz") as file:
                write_npz(file, self.read_images(), shape)

    def _write_grid(self, labels: list[int], balanced: bool, classes: ClassSet) -> None:
        """Write a grid of the first images. Captions are the classes, if there are labels of several classes."""
        count = len(set(labels))
        by_class = balanced and 1 < count <= GRID_COLUMNS
        columns = count if by_class else GRID_COLUMNS
        paths = self.image_paths[: GRID_ROWS * columns]
        captions = None
        if labels and len(classes.labels) > 1:
            captions = [classes.caption(label) for label in labels[: len(paths)]]
        if captions and by_class:
            captions[columns:] = [None] * (len(paths) - columns)
        images = np.stack([self._read_image(path) for path in paths])
        save_png(self.folder / "grid.png", image_grid(images, min(columns, len(paths)), captions=captions))

    def link_npz(self, name: str) -> Path | None:
        """Let NAME.npz next to the folder be samples.npz, and return its path; None if another file has that name.

        It is a relative symbolic link, or a copy if the file system has no links. A link to another set is replaced.
        """
        npz, link = self.folder / "samples.npz", self.folder.parent / f"{name}.npz"
        target = str(npz.relative_to(link.parent))
        if link.is_symlink():
            if os.readlink(link) == target:
                return link
            if not SET_NPZ.fullmatch(os.readlink(link)):
                return None
            link.unlink(missing_ok=True)  # a temporary link would stay if the program were killed
        elif link.exists():
            return link if filecmp.cmp(link, npz) else None
        try:
            link.symlink_to(target)
        except FileExistsError:  # another process has just created it
            return None
        except OSError:
            with open(npz, "rb") as source, atomic_write(link) as copy:
                shutil.copyfileobj(source, copy)
            shutil.copystat(npz, link)
        return link

    def read_images(self) -> Iterator[np.ndarray]:
        """Yield the images in order, (R, R, 3) uint8. Raises InputError with the file's name if one is damaged."""
        with ThreadPoolExecutor(THREADS) as pool:
            for numbers in self._batches(READ_AHEAD):
                yield from pool.map(self._read_image, map(self.image_path, numbers))

    def _read_image(self, path: Path) -> np.ndarray:
        try:
            return decode_rgb(path.read_bytes(), self.resolution)
        except InputError as error:
            raise InputError(f"{path}: {error}; {REMEDY}") from error

    def _has_current_npz(self, shape: tuple[int, ...]) -> bool:
        """Return whether samples.npz is sound, has the expected shape, and is newer than every image."""
        path = self.folder / "samples.npz"
        try:
            npz = NpzFile(path)
            header = npz.header("arr_0")
            npz.digest("arr_0")  # verifies the checksum
        except InputError:
            return False
        newest = max(image.stat().st_ctime_ns for image in self.image_paths)  # copying keeps the other time
        return (header.shape, header.dtype) == (shape, np.uint8) and path.stat().st_ctime_ns > newest

    def read_cls_tokens(self) -> np.ndarray:
        """Return the class tokens of a finished set, (N, D) float32."""
        path = self.folder / "cls_tokens.npy"
        cls_tokens = _read_cls_tokens(path)
        if len(cls_tokens) < self.total:
            raise InputError(f"{path}: {len(cls_tokens):,} class tokens of {self.total:,} images; {REMEDY}")
        return cls_tokens[: self.total]

    def _known_cls_tokens(self) -> dict[int, np.ndarray]:
        """Return all class tokens that have been written, by image number."""
        joined = self.folder / "cls_tokens.npy"
        known = dict(enumerate(_read_cls_tokens(joined))) if joined.exists() else {}
        for part, numbers in self._cls_parts():
            known.update(zip(numbers, _read_cls_tokens(part, len(numbers)), strict=True))
        return known

    def _cls_parts(self) -> list[tuple[Path, range]]:
        """Return the files with the class tokens of single batches, each with its image numbers."""
        found = [(path, CLS_PART.fullmatch(path.name)) for path in sorted((self.folder / "cls").glob("*.npy"))]
        return [(path, range(int(match[1]), int(match[2]))) for path, match in found if match]

    def _join_cls_tokens(self) -> None:
        """Write cls_tokens.npy from the files of single batches: all class tokens before the first missing one."""
        known, parts = self._known_cls_tokens(), self._cls_parts()
        if not parts:
            return
        joined = next(number for number in count() if number not in known)
        if len({known[number].shape for number in range(joined)}) > 1:
            raise InputError(f"{self.folder}: its class tokens have different widths; choose another --name")
        with atomic_write(self.folder / "cls_tokens.npy") as file:
            np.save(file, np.stack([known[number] for number in range(joined)]))
        for part, numbers in parts:
            if numbers.stop <= joined:
                part.unlink()
        if not self._cls_parts():
            shutil.rmtree(self.folder / "cls", ignore_errors=True)


def _shown_setting(name: str, value: Any) -> str:
    """Return a setting in samples.json as a message shows it."""
    if name == DIGEST:
        return f"weights of SHA-256 {value}"
    return f"the default of {flag(name)}" if value is None else f"{flag(name)} {value}"


def _read_cls_tokens(path: Path, rows: int | None = None) -> np.ndarray:
    """Return an array (rows, D). Raises InputError with the file's name if it is damaged."""
    try:
        cls_tokens = decode_npy(path.read_bytes(), ["float32"], "class tokens")
        is_sound = cls_tokens.ndim == 2 and rows in (None, len(cls_tokens)) and np.isfinite(cls_tokens).all()
        if not is_sound:
            raise InputError(f"shape {cls_tokens.shape}, or numbers that are not finite")
    except (OSError, InputError) as error:
        raise InputError(f"{path}: broken class tokens, not a complete array (N, D); {REMEDY}") from error
    return cls_tokens

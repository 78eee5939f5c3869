"""The folder of a set of samples: what it was made with, what of it is missing, and what is made of it once complete.

images/000000.png ...     and their labels, images/dataset.json
samples.npz               the same as one array, arr_0 (N, R, R, 3) uint8, as evaluators read it
cls_tokens.npy            class tokens (M, D) float32, M >= N: those of further images, where there are some, stay
samples.json, grid.png    the settings; the first images
"""

from __future__ import annotations

import re
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.images import decode_rgb, image_grid, save_png
from common.io import InputError, atomic_write, check_writable, lock_folder, read_json, unlock_folder, write_json
from evaluations.npz import NpzFile, write_npz

GRID_ROWS, GRID_COLUMNS = 8, 12  # at most; of balanced labels, a column a class where there is room
THREADS = 4  # that read images
READ_AHEAD = 64  # images: all 50,000 decoded at once would not fit into memory
CLS_PART = re.compile(r"(\d+)-(\d+)\.npy")  # class tokens of one batch: first number, and that after the last
REMEDY = "remove it, and the same command makes anew what it held"
DIGEST = "checkpoint_sha256"
# What may differ when an interrupted folder is completed: none of it changes an image.
MAY_CHANGE = {
    "ckpt", "sample_dir", "name", "per_proc_batch_size", "num_fid_samples", "device", "local_rank", "npz", "fused_attn",
    "coherence", "enc_weights",
}  # fmt: skip


class SampleSet:
    """One folder.

    Args:
        folder: the set's own; made when it is first written to.
        total: number of images wanted.
        resolution: of the images, in px.
    """

    def __init__(self, folder: Path, total: int, resolution: int):
        self.folder = folder
        self.total = total
        self.resolution = resolution

    def image_path(self, number: int) -> Path:
        """Return where image `number` lies."""
        return self.folder / "images" / f"{number:06d}.png"

    @property
    def image_paths(self) -> list[Path]:
        """Where the images lie, in their order."""
        return [self.image_path(number) for number in range(self.total)]

    def claim(self, settings: dict[str, Any]) -> None:
        """Take the folder for this process and these settings, and note them there.

        Args:
            settings: all that made the images; under `DIGEST` the checkpoint's SHA-256.

        Raises:
            InputError: nothing can be written there, another process is generating there, or there are images of other
                settings.
        """
        check_writable(self.folder / "samples.json", "--sample-dir")
        lock_folder(self.folder, "generating")
        self._check_settings(settings)
        write_json(self.folder / "samples.json", settings)

    def release(self) -> None:
        """Leave the folder to others."""
        unlock_folder(self.folder)

    def _check_settings(self, settings: dict[str, Any]) -> None:
        path = self.folder / "samples.json"
        if not path.exists():
            if (self.folder / "images").exists():
                raise InputError(f"{self.folder} holds images but no samples.json; choose another --name")
            return
        noted = read_json(path)
        if not isinstance(noted, dict):
            raise InputError(f"{path}: is a {type(noted).__name__}; expected the settings of its images, an object")
        if DIGEST not in noted:
            raise InputError(
                f"{self.folder} was begun by an earlier version, whose seeds gave other noise; choose another --name"
            )
        for name, value in noted.items():
            if name not in MAY_CHANGE and settings.get(name) != value:
                raise InputError(
                    f"{self.folder} holds images made with {name} {value}, not {settings.get(name)}; choose another "
                    f"--name"
                )

    def missing_batches(self, size: int, with_cls: bool) -> list[range]:
        """Return the batches, as image numbers, of which an image or, if wanted, a class token is not on the disk."""
        cls_tokens = self._known_cls_tokens() if with_cls else {}

        def complete(number: int) -> bool:
            return (not with_cls or number in cls_tokens) and _has_content(self.image_path(number))

        batches = [range(first, min(first + size, self.total)) for first in range(0, self.total, size)]
        return [numbers for numbers in batches if not all(map(complete, numbers))]

    def write_image(self, number: int, pixels: np.ndarray) -> None:
        """Write image `number`, pixels (R, R, 3) uint8."""
        save_png(self.image_path(number), Image.fromarray(pixels))

    def write_cls_tokens(self, numbers: range, cls_tokens: np.ndarray) -> None:
        """Write the class tokens of a batch (len(numbers), D), float32, where they lie until all are there."""
        with atomic_write(self.folder / "cls" / f"{numbers.start:06d}-{numbers.stop:06d}.npy") as file:
            np.save(file, cls_tokens)

    def finish(self, labels: list[int], balanced: bool, with_cls: bool, npz: bool) -> None:
        """Write the labels, the grid and, if wanted, class tokens and .npz of a complete set.

        Raises:
            InputError: a file of the set is damaged, or is none of this set's.
        """
        listed = [[path.name, label] for path, label in zip(self.image_paths, labels, strict=True)]
        write_json(self.folder / "images" / "dataset.json", {"labels": listed})
        classes = len(set(labels))
        columns = classes if balanced and 1 < classes <= GRID_COLUMNS else GRID_COLUMNS
        first = [self._read_image(path) for path in self.image_paths[: GRID_ROWS * columns]]
        save_png(self.folder / "grid.png", image_grid(np.stack(first), min(columns, len(first))))
        if with_cls:
            self._join_cls_tokens()
        if npz and not self._has_current_npz():
            with atomic_write(self.folder / "samples.npz") as file:
                write_npz(file, self.read_images(), self._npz_shape)

    def read_images(self) -> Iterator[np.ndarray]:
        """Yield the images (R, R, 3), uint8, in their order. Raises InputError, naming the file, if one is damaged."""
        coming: deque[Future[np.ndarray]] = deque()
        with ThreadPoolExecutor(THREADS) as pool:
            for path in self.image_paths:
                coming.append(pool.submit(self._read_image, path))
                if len(coming) == READ_AHEAD:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()

    def check_images(self) -> None:
        """Raise InputError, naming the file, if an image is damaged; one in a current samples.npz is not."""
        if not self._has_current_npz():
            deque(self.read_images(), maxlen=0)

    def _read_image(self, path: Path) -> np.ndarray:
        try:
            return decode_rgb(path.read_bytes(), self.resolution)
        except InputError as error:
            raise InputError(f"{path}: {error}; {REMEDY}") from error

    @property
    def _npz_shape(self) -> tuple[int, ...]:
        return (self.total, self.resolution, self.resolution, 3)

    def _has_current_npz(self) -> bool:
        """Return whether samples.npz has the images: it is of their shape, and newer than each of them."""
        path = self.folder / "samples.npz"
        try:
            header = NpzFile(path).header("arr_0")
        except InputError:
            return False
        newest = max(image.stat().st_mtime_ns for image in self.image_paths)
        return (header.shape, header.dtype) == (self._npz_shape, np.uint8) and path.stat().st_mtime_ns > newest

    def read_cls_tokens(self) -> np.ndarray:
        """Return the class tokens (N, D), float32, of a finished set."""
        return _read_cls_tokens(self.folder / "cls_tokens.npy")[: self.total]

    def _known_cls_tokens(self) -> dict[int, np.ndarray]:
        """Return all class tokens on the disk by the number of their image."""
        known: dict[int, np.ndarray] = {}
        if (self.folder / "cls_tokens.npy").exists():
            known.update(enumerate(_read_cls_tokens(self.folder / "cls_tokens.npy")))
        for part, numbers in self._cls_parts():
            known.update(zip(numbers, _read_cls_tokens(part, len(numbers)), strict=True))
        return known

    def _cls_parts(self) -> list[tuple[Path, range]]:
        """Return the files of batches' class tokens and the numbers of their images."""
        found = [(path, CLS_PART.fullmatch(path.name)) for path in sorted((self.folder / "cls").glob("*.npy"))]
        return [(path, range(int(match[1]), int(match[2]))) for path, match in found if match]

    def _join_cls_tokens(self) -> None:
        """Write the class tokens of the batches into cls_tokens.npy, which has all from the first to the first gap."""
        known, parts = self._known_cls_tokens(), self._cls_parts()
        if not parts:
            return
        joined = next(number for number in count() if number not in known)
        with atomic_write(self.folder / "cls_tokens.npy") as file:
            np.save(file, np.stack([known[number] for number in range(joined)]))
        for part, numbers in parts:
            if numbers.stop <= joined:
                part.unlink()
        if not self._cls_parts():
            shutil.rmtree(self.folder / "cls", ignore_errors=True)


def _read_cls_tokens(path: Path, rows: int | None = None) -> np.ndarray:
    """Return an array (rows, D). Raises InputError, naming the file, if it is damaged."""
    try:
        with open(path, "rb") as file:
            cls_tokens = np.lib.format.read_array(file, allow_pickle=False)
        if cls_tokens.ndim != 2 or (rows is not None and len(cls_tokens) != rows):
            raise ValueError(f"their shape is {cls_tokens.shape}")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: broken class tokens ({error}); {REMEDY}") from error
    return cls_tokens


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False

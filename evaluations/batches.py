"""Batches of images for the evaluation: an .npz with `arr_0`, as written by ADM's samplers, a folder, or a zip.

Only parts of a batch are in memory at the same time.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError
from common.identity import FileState, file_state
from common.image_files import check_one_part, find_images, stop_if_incomplete
from common.images import open_image, to_mode
from common.sources import FileSource, encode_name, map_files
from evaluations.npz import NpzFile

MAX_SIDE = 4096  # px; an image with a longer side is treated as damaged
DECODERS = 8  # threads that decode image files while the network runs


class ImageBatch(ABC):
    """Images of one size.

    `readers` is the number of threads that may read at the same time, `notes` are lines on what was ignored. If `state`
    is not `opened` any more, the images that were read may not be those of `digest`.
    """

    readers = 1
    notes: Sequence[str] = ()
    opened: FileState | str | None  # `state` before the first image was read
    path: Path
    count: int
    height: int
    width: int

    @abstractmethod
    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the images start ... stop - 1 as (n, H, W, 3), uint8. Raises InputError if one is damaged."""

    @abstractmethod
    def digest(self) -> str:
        """Return the SHA-256 of the file, or of the names and contents of all images in a folder.

        Raises InputError if the file does not have the checksum that it contains.
        """

    @abstractmethod
    def state(self) -> FileState | str | None:
        """Return what identifies the content of the files now, without reading them; see `file_state`."""

    def batches(self, start: int, stop: int, size: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (number of the first image, images (n, 3, H, W) uint8) for start ... stop - 1, reading ahead."""
        firsts, pending = range(start, stop, size), deque()
        unread = iter(firsts)
        with ThreadPoolExecutor(self.readers) as threads:
            for first in firsts:
                for ahead in islice(unread, self.readers + 1 - len(pending)):
                    pending.append(threads.submit(self.read, ahead, min(ahead + size, stop)))
                yield first, torch.from_numpy(pending.popleft().result()).permute(0, 3, 1, 2)


def open_images(path: str | Path) -> ImageBatch:
    """Return the images of an .npz, a folder or a zip, or of a folder that generate.py wrote (samples.npz or images/).

    Raises InputError, naming the path, if there are none.
    """
    folder = Path(path)
    if (folder / "samples.json").exists():
        path = folder / "samples.npz" if (folder / "samples.npz").exists() else folder / "images"
    return NpzImages(NpzFile(path)) if Path(path).suffix.lower() == ".npz" else FileImages(path)


class NpzImages(ImageBatch):
    """The array `arr_0` (N, H, W, 3), uint8, of an .npz."""

    def __init__(self, npz: NpzFile):
        path = npz.path
        self.opened = npz.state()
        shape, dtype, *_ = npz.header("arr_0")
        if dtype != np.uint8:
            raise InputError(f"{path}: arr_0 is {dtype}, expected uint8 (pixels 0 ... 255)")
        if len(shape) != 4 or shape[3] != 3:
            raise InputError(f"{path}: arr_0 has shape {shape}, expected (N, H, W, 3)")
        self.path, self._npz = path, npz
        self.count, self.height, self.width, _ = shape
        if not self.count:
            raise InputError(f"{path}: arr_0 contains no images")
        if max(self.width, self.height) > MAX_SIDE or not self.width * self.height:
            raise InputError(f"{path}: {self.width} x {self.height} pixels; allowed: 1 to {MAX_SIDE} per side")
        self._read_rows = npz.rows("arr_0")

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._read_rows(start, stop)

    def digest(self) -> str:
        return self._npz.digest("arr_0")

    def state(self) -> FileState | None:
        return self._npz.state()


class FileImages(ImageBatch):
    """Image files of a folder or zip, in the order of their names. Grey images are converted to RGB."""

    readers = DECODERS

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._source = FileSource(path)
        if sets := [name for name in self._source.names if name.rpartition("/")[2] == "samples.json"]:
            where = self._source.describe(sets[0])
            raise InputError(f"{where}: a sample set of generate.py; give its folder, its samples.npz or its images/")
        found = find_images(self._source)
        bare = {folder: reason for folder, reason in found.bare_folders.items() if folder not in found.other_folders}
        stop_if_incomplete(found, bare, "correct or remove this, and start again")
        check_one_part(self._source, found.images)
        self._names, self.notes = found.images, found.notes()
        self.count = len(self._names)
        self.opened = self.state()
        self.height, self.width = self._decode(self._names[0]).shape[:2]

    def read(self, start: int, stop: int) -> np.ndarray:
        images = np.empty((stop - start, self.height, self.width, 3), np.uint8)
        for row, name in zip(images, self._names[start:stop], strict=True):
            image = self._decode(name)
            if image.shape != row.shape:
                raise self._other_size(name, image)
            row[:] = image
        return images

    def _other_size(self, name: str, image: np.ndarray) -> InputError:
        """Return the error for an image whose size is not that of the first; it names the odd one of the two."""
        odd, sizes = name, [f"{image.shape[1]} x {image.shape[0]}", f"{self.width} x {self.height}"]
        if all(self._decode(other).shape == image.shape for other in self._names[1:3]) and self.count > 2:
            odd, sizes = self._names[0], sizes[::-1]
        problem = f"{sizes[0]} pixels, but others have {sizes[1]}; allowed: images of one size"
        advice = "remove it if it is a grid or a plot; photographs are resized by preprocessing/convert.py"
        return InputError(f"{self._source.describe(odd)}: {problem}; {advice}")

    def digest(self) -> str:
        digest = hashlib.sha256()
        for name in self._names:
            digest.update(encode_name(name))
            digest.update(self._source.read(name))
        return digest.hexdigest()

    def state(self) -> FileState | str | None:
        """Return the state of the zip, or the SHA-256 of the states of all images in a folder."""
        if self._source.is_zip:
            return file_state(self.path)
        digest = hashlib.sha256()
        for states in map_files(lambda name: file_state(self._source.file_path(name)), self._names):
            digest.update(repr(states).encode())
        return digest.hexdigest()

    def _decode(self, name: str) -> np.ndarray:
        place = self._source.describe(name)
        data = self._source.read(name)
        try:
            image = open_image(data, max_side=MAX_SIDE)
            pixels = to_mode(image, "RGB")
        except InputError as error:
            raise InputError(f"{place}: {error}") from error
        if image.mode not in ("RGB", "L"):
            raise InputError(f"{place}: mode {image.mode}, expected 8-bit RGB or grey")
        return np.asarray(pixels)

"""Training data: an image, the moments of its latents and its label, paired by the index in the file names.

    DATA/images/   (or imagenet_256_vae, imagenet_512_vae)   00000/img00000000.png            uint8 RGB, R x R
    DATA/vae-sd/   (or latents)                              00000/img-mean-std-00000000.npy  (2 C, h, w), mean then std

each a folder or a zip, each with dataset.json {"labels": [[name, label], ...]}. The latents' dataset.json may name
the codec that made them; where it does not, they are Stable Diffusion's. Latents of the mirrored images may lie beside
the plain ones, as 00000/img-mean-std-flip-00000000.npy.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from common.io import InputError
from common.sources import (
    IMAGE_NAME,
    LATENT_NAME,
    FileSource,
    decode_name,
    encode_names,
    label_entries,
    mirrored_name,
    read_dataset_json,
)
from models.autoencoder import LatentFormat

IMAGE_FOLDERS = ("images", "imagenet_256_vae", "imagenet_512_vae")
LATENT_FOLDERS = ("vae-sd", "latents")
PNG_END = b"IEND\xaeB`\x82"  # the last eight bytes of every complete PNG (PNG specification, section 11.2.5)
PROBLEMS_SHOWN = 5
CHECK_THREADS = 16
CHECKED_AT_ONCE = 250  # by a thread


class LatentDataset(Dataset):
    """Images, moments and labels of a data folder.

    Item i is (image uint8 (3, R, R), moments float32 (2 C, h, w), label int64 scalar), item len + i its mirror image.

    Args:
        data_dir: the folder with images and latents.
        flip: whether the latents of mirrored images are wanted as well.

    Attributes:
        num_classes: the largest label plus one, or as many as dataset.json has names of classes.
        resolution: R. latent_size: h. latent_format: channels, scale and codec of the latents.

    Raises:
        InputError: something is missing or does not fit together; the text names it.
    """

    def __init__(self, data_dir: str | Path, flip: bool = False):
        self.data_dir = Path(data_dir)
        if not self.data_dir.is_dir():
            raise InputError(f"--data-dir {data_dir}: no such folder")
        self.images = _find(self.data_dir, IMAGE_FOLDERS, "images")
        self.latents = _find(self.data_dir, LATENT_FOLDERS, "latents")
        image_names = _by_index(self.images, IMAGE_NAME)
        latent_names = _by_index(self.latents, LATENT_NAME)
        _require_partners(image_names, self.images, latent_names, self.latents)
        _require_partners(latent_names, self.latents, image_names, self.images)

        indices = sorted(image_names)
        # Arrays of bytes, not lists of strings: a worker process that reads a list copies it, reference counts and all.
        self.image_names = encode_names([image_names[i] for i in indices])
        self.latent_names = encode_names([latent_names[i] for i in indices])
        self.labels = _labels(self.images, self.latents, indices)
        named = [len(read_dataset_json(source).get("classes") or []) for source in (self.images, self.latents)]
        self.num_classes = max(int(self.labels.max()) + 1, *named)  # images of the last ones may have been left out
        about_latents = read_dataset_json(self.latents)
        try:
            self.latent_format = LatentFormat.from_json(about_latents.get("codec"))
        except InputError as error:
            raise InputError(f"{self.latents.describe('dataset.json')}: {error}") from error
        self.flip = flip
        if flip and not about_latents.get("flip"):
            raise InputError(
                f"--flip: {self.latents.path} has no mirrored latents; preprocessing/encode.py --flip makes them"
            )

        image, moments = self._image(0), self._moments(0)
        self.resolution = image.shape[-1]
        self.moments_shape = moments.shape
        self.latent_size = moments.shape[-1]
        self._check_geometry()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        mirrored, i = divmod(i, len(self))
        image, moments = self.image(i), self._moments(i, bool(mirrored))
        if moments.shape != self.moments_shape:
            raise InputError(f"{self.latent_path(i)}: shape {moments.shape}, not {self.moments_shape} as the first")
        return image.flip(2) if mirrored else image, torch.from_numpy(moments), torch.tensor(self.labels[i])

    def image(self, i: int) -> Tensor:
        """Return image i, uint8 (3, R, R), without reading its latents. Raises InputError if it is broken."""
        image = self._image(i)
        if image.shape[1:] != (self.resolution, self.resolution):
            size = f"{image.shape[2]} x {image.shape[1]}"
            raise InputError(f"{self._image_path(i)}: {size}, not {self.resolution} x {self.resolution} as the first")
        return torch.from_numpy(image)

    def check(self, progress: Callable[[int], object] = lambda count: None, part: int = 0, parts: int = 1) -> None:
        """Look at every file, without decoding it: PNGs that end early, latents that are not of the first one's size.

        Processes may share the work: each takes its own of `parts`. `progress` is told of files done.
        Raises InputError that counts the broken files and names the first.
        """
        expected = self.latents.size(decode_name(self.latent_names[0]))

        def problems_among(items: range) -> tuple[int, list[str]]:
            return len(items), [text for i in items if (text := self._problem(i, expected))]

        mine = range(len(self) * part // parts, len(self) * (part + 1) // parts)
        pieces = [mine[first : first + CHECKED_AT_ONCE] for first in range(0, len(mine), CHECKED_AT_ONCE)]
        problems = []
        with ThreadPoolExecutor(CHECK_THREADS) as pool:
            for count, found in pool.map(problems_among, pieces):
                problems += found
                progress(count)
        if problems:
            raise InputError(f"{len(problems)} broken files:\n  " + "\n  ".join(problems[:PROBLEMS_SHOWN]))

    def _problem(self, i: int, expected: int) -> str | None:
        """Return what is wrong with the files of image i, whose latents should have `expected` bytes."""
        try:
            for mirrored in (False, True) if self.flip else (False,):
                name = self._latent_name(i, mirrored)
                if (size := self.latents.size(name)) != expected:
                    return f"{self.latents.describe(name)}: {size} bytes, not {expected} as the first"
            return _png_problem(self.images, decode_name(self.image_names[i]))
        except InputError as error:
            return str(error)

    def latent_path(self, i: int) -> str:
        """Return the path of item i's latents, as messages should show it."""
        mirrored, i = divmod(i, len(self))
        return self.latents.describe(self._latent_name(i, bool(mirrored)))

    def _image(self, i: int) -> np.ndarray:
        """Return image i, uint8 (3, R, R)."""
        try:
            with Image.open(io.BytesIO(self.images.read(decode_name(self.image_names[i])))) as picture:
                return np.array(picture.convert("RGB")).transpose(2, 0, 1).copy()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{self._image_path(i)}: broken image ({error})") from error

    def _moments(self, i: int, mirrored: bool = False) -> np.ndarray:
        """Return the moments of image i, or of its mirror image, float32 (2 C, h, w)."""
        name = self._latent_name(i, mirrored)
        path = self.latents.describe(name)
        data = self.latents.read(name)
        try:
            moments = decode_moments(data)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        if moments.dtype not in (np.float32, np.float16):
            raise InputError(f"{path}: dtype {moments.dtype}; allowed: float32, float16")
        if moments.ndim != 3 or moments.shape[0] % 2 or moments.shape[1] != moments.shape[2]:
            raise InputError(f"{path}: shape {moments.shape}; allowed: (2 C, h, h), mean, deviation")
        return moments.astype(np.float32, copy=False)

    def _latent_name(self, i: int, mirrored: bool) -> str:
        name = decode_name(self.latent_names[i])
        return mirrored_name(name) if mirrored else name

    def _image_path(self, i: int) -> str:
        return self.images.describe(decode_name(self.image_names[i]))

    def _check_geometry(self) -> None:
        channels, fmt = self.moments_shape[0] // 2, self.latent_format
        if channels != fmt.channels:
            raise InputError(f"{self.latent_path(0)}: {channels} channels, but codec {fmt.codec} has {fmt.channels}")
        if self.resolution != self.latent_size * fmt.factor:
            raise InputError(
                f"{self.data_dir}: images of {self.resolution} px and latents of {self.latent_size}, "
                f"but codec {fmt.codec} reduces by {fmt.factor}"
            )


class ErrorsAsItems(Dataset):
    """A data set for a loader's worker processes: what they raise arrives as a traceback, what they return as it is."""

    def __init__(self, data: Dataset):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        try:
            return self.data[i]
        except InputError as error:
            return error


def collate(items: list[Any]) -> Any:
    """Return the items of `ErrorsAsItems` as a batch, or the first error among them."""
    return next((item for item in items if isinstance(item, InputError)), None) or default_collate(items)


def raise_errors(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches of `collate`; raise the InputError that comes in place of one."""
    for batch in batches:
        if isinstance(batch, InputError):
            raise batch
        yield batch


class GlobalBatchSampler(Sampler):
    """The order of training: the same global batches for any number of processes and of accumulation steps.

    All epochs, each shuffled by (seed, epoch), are laid end to end; step s takes samples s B .. (s + 1) B - 1 of that
    line. So no sample is left out at an epoch's end, and a run goes on where it stopped by its step alone. Each
    process takes its rows of the global batch, in `micro_batches` parts; it yields one list of indices for each part.
    With `flip`, half of an epoch's samples, chosen by (seed, epoch), are mirror images.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        steps: range,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
        flip: bool = False,
    ):
        if batch_size % (world_size * micro_batches):
            raise InputError(
                f"--batch-size {batch_size} (global) does not divide by {world_size} processes "
                f"x {micro_batches} gradient accumulation steps"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.steps = steps
        self.rank = rank
        self.world_size = world_size
        self.micro_batches = micro_batches
        self.flip = flip
        self._epoch: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.steps) * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        size = self.batch_size // self.world_size // self.micro_batches
        for step in self.steps:
            first = step * self.batch_size + self.rank * size * self.micro_batches
            for part in range(self.micro_batches):
                start = first + part * size
                yield [self._sample_at(position) for position in range(start, start + size)]

    def _sample_at(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_samples)
        if self._epoch is None or self._epoch[0] != epoch:
            generator = np.random.default_rng([self.seed, epoch])
            order = generator.permutation(self.num_samples)
            if self.flip:
                order += self.num_samples * generator.integers(2, size=self.num_samples)
            self._epoch = (epoch, order)
        return int(self._epoch[1][offset])


def decode_moments(data: bytes) -> np.ndarray:
    """Return the array in the bytes of an .npy file. Raises InputError for any other bytes."""
    try:
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # numpy's reader raises nearly anything
        raise InputError(f"broken latents ({error})") from error


def _find(data_dir: Path, names: tuple[str, ...], what: str) -> FileSource:
    """Return the one folder or zip among `names`."""
    found = [path for name in names for path in (data_dir / name, data_dir / f"{name}.zip") if path.exists()]
    if len(found) != 1:
        state = "none of" if not found else f"{' and '.join(path.name for path in found)}; one allowed of"
        raise InputError(f"{data_dir}: {what} expected, found {state} {', '.join(names)}, each a folder or .zip")
    return FileSource(found[0])


def _by_index(source: FileSource, pattern: re.Pattern[str]) -> dict[int, str]:
    """Return the names that fit `pattern`, by the number in them."""
    names: dict[int, str] = {}
    for name in source.names:
        if match := pattern.fullmatch(name):
            index = int(match.group(1))
            if index in names:
                raise InputError(f"{source.path}: {names[index]} and {name} have the same index {index}")
            names[index] = name
    if not names:
        raise InputError(f"{source.path}: no file named like {pattern.pattern}")
    return names


def _require_partners(names: dict[int, str], source: FileSource, partners: dict[int, str], where: FileSource) -> None:
    if alone := sorted(names.keys() - partners.keys()):
        first = source.describe(names[alone[0]])
        raise InputError(f"{len(alone)} files have no partner of the same index in {where.path}; first: {first}")


def _label_table(source: FileSource) -> dict[int, int]:
    """Return the labels that dataset.json lists, by the number in the file name."""
    table: dict[int, int] = {}
    where = source.describe("dataset.json")
    for name, label in label_entries(read_dataset_json(source), where):
        if match := re.search(r"(\d+)\.\w+$", name):
            index = int(match.group(1))
            if table.setdefault(index, label) != label:
                raise InputError(f"{where}: index {index} has labels {table[index]} and {label}")
    return table


def _labels(images: FileSource, latents: FileSource, indices: list[int]) -> np.ndarray:
    """Return the label of each index, int64; both dataset.json may list them, and must then agree."""
    of_images, of_latents = _label_table(images), _label_table(latents)
    for index in of_images.keys() & of_latents.keys():
        if of_images[index] != of_latents[index]:
            raise InputError(
                f"index {index} has label {of_images[index]} in {images.describe('dataset.json')} "
                f"and {of_latents[index]} in {latents.describe('dataset.json')}"
            )
    table = of_images | of_latents
    missing = [index for index in indices if index not in table]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(indices)} files have no label in {latents.describe('dataset.json')} "
            f"or {images.describe('dataset.json')}; first: index {missing[0]}"
        )
    return np.array([table[index] for index in indices], dtype=np.int64)


def _png_problem(source: FileSource, name: str) -> str | None:
    if source.is_zip:  # whole or not at all: the archive's directory, read at the start, stands at its end
        return None if source.size(name) else f"{source.describe(name)}: empty"
    try:
        with open(source.path / name, "rb") as file:
            file.seek(-min(len(PNG_END), file.seek(0, io.SEEK_END)), io.SEEK_END)
            return None if file.read() == PNG_END else f"{source.describe(name)}: truncated, a PNG's end is missing"
    except OSError as error:
        return f"{source.describe(name)}: cannot be read ({error.strerror})"

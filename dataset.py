"""Training data: images, latents (as moments or as one draw) and labels, paired by the index in their file names.

    DATA/images/   (or imagenet_256_vae, imagenet_512_vae)   00000/img00000000.png            uint8 RGB, R x R
    DATA/vae-sd/   (or latents, or as given)                 00000/img-mean-std-00000000.npy  (2 C, h, w), mean then std

Both are a folder or a zip with a dataset.json {"labels": [[name, label], ...]}. The dataset.json of the latents may
describe their codec; the default is Stable Diffusion's. With "latents": "draw" in it, the files contain one draw of the
latents of each image, (C, h, w), not yet shifted and scaled. The folder may also contain the latents of the mirrored
images, 00000/img-mean-std-flip-00000000.npy. Data with "labels": null has no labels: it is one class, label 0. Next to
images and latents can be cached tokens of encoders (models/cached_tokens.py).
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from common.classes import ClassSet, class_names
from common.data_folder import IMAGE_FOLDERS, LATENT_FOLDERS, find_part
from common.errors import InputError
from common.image_files import preparation
from common.images import open_image, to_mode
from common.io import real_path
from common.npy import decode_npy
from common.pairing import files_by_index, labels_by_index
from common.sources import (
    IMAGE_NAME,
    LATENT_NAME,
    FileSource,
    decode_name,
    encode_names,
    image_name,
    latents_name,
    map_files,
    mirrored_name,
    read_dataset_json,
)
from models.autoencoder import codec_format
from models.cached_tokens import CachedTokens
from models.latent_format import LatentFormat

STORED = ("moments", "draw")  # what the files of latents contain
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # of Pillow; others lose values as 8-bit RGB
PNG_END = b"IEND\xaeB`\x82"  # the last eight bytes of every complete PNG (PNG specification, section 11.2.5)
ERRORS_SHOWN = 5
DIGEST_SAMPLE = 64  # images whose bytes are part of the digest: enough to notice other data, read in a second


class LatentDataset(Dataset):
    """Images, latents and labels of a data folder.

    Item i is (image (3, R, R) uint8, stored latents float32, label int64 scalar), item len + i its mirror image. Stored
    are moments (2 C, h, w) or a draw (C, h, w); `LatentFormat.sample` takes both. With cached tokens, the tokens
    (1 + T, D) float16 of each encoder take the place of the image, which is not read: (tokens, ..., latents, label).

    `data_dir` contains images and latents. With `flip`, the latents of the mirrored images are required.
    `latents_folder` is the name of the latents' folder or zip, by default one of `LATENT_FOLDERS`. `latents_codec` is
    the codec of latents whose dataset.json names none, its name or its format; by default Stable Diffusion's. Without
    `needs_labels`, data of which no dataset.json has an entry "labels" are data without labels. `tokens` are the cached
    tokens of encoders, as `CachedTokens.open` returns them.

    Attributes:
        has_labels: whether there are labels; without them, the label of each image is 0.
        tokens: those of the images of this data set, in its order.
        item_bytes: memory of an item.
        class_names: the "classes" of a dataset.json, [] if there are none.
        classes: the labels that occur, with their names if there are any.
        num_classes: the largest label plus one, or the number of class names in dataset.json if that is larger.
        resolution: R.
        latent_size: h.
        latent_format: channels, scale and codec of the latents.
        names_codec: whether dataset.json or `latents_codec` states them; otherwise they are Stable Diffusion's.
        stored: what the files of latents contain, "moments" or "draw".
        stored_shape: of one of these files, (2 C, h, h) or (C, h, h).
        has_mirrored: whether the latents of the mirrored images exist.

    Raises InputError, naming them, if files or labels are missing or inconsistent.
    """

    def __init__(
        self,
        data_dir: str | Path,
        flip: bool = False,
        latents_folder: str | None = None,
        latents_codec: str | LatentFormat | None = None,
        tokens: Sequence[CachedTokens] = (),
        needs_labels: bool = True,
    ):
        self.data_dir = Path(data_dir)
        if not self.data_dir.is_dir():
            problem = "no such folder"
            if self.data_dir.exists():
                is_half = self.data_dir.stem in (*IMAGE_FOLDERS, *LATENT_FOLDERS)
                advice = f"; use {real_path(self.data_dir).parent}" if is_half else preparation(self.data_dir)
                problem = f"is a file; allowed: the folder of images and latents{advice}"
            raise InputError(f"{data_dir}: {problem}")

        # Pair the files by their index. The names are arrays: worker processes would copy lists of strings.
        self.images = find_part(self.data_dir, IMAGE_FOLDERS, "images")
        self.latents = find_part(self.data_dir, (latents_folder,) if latents_folder else LATENT_FOLDERS, "latents")
        image_names = files_by_index(self.images, IMAGE_NAME, image_name(0))
        latent_names = files_by_index(self.latents, LATENT_NAME, latents_name(0))
        if unpaired := sorted(image_names.keys() ^ latent_names.keys()):
            source, names = (self.images, image_names) if unpaired[0] in image_names else (self.latents, latent_names)
            first = source.describe(names[unpaired[0]])
            raise InputError(f"{self.data_dir}: {len(unpaired)} files have no partner of the same index, first {first}")
        indices = sorted(image_names)
        self.image_names = encode_names([image_names[i] for i in indices])
        self.latent_names = encode_names([latent_names[i] for i in indices])

        # Read labels and codec.
        described = {source: read_dataset_json(source) for source in (self.images, self.latents)}
        self._check_place_of_json()
        labels = labels_by_index(described, indices, needs_labels)
        self.has_labels = labels is not None
        self.labels = labels if self.has_labels else np.zeros(len(indices), dtype=np.int64)
        self.class_names = class_names(
            {source.describe("dataset.json"): content for source, content in described.items()}
        )
        self.classes = ClassSet.of_data(np.unique(self.labels), self.class_names)
        self.num_classes = max(int(self.labels.max()) + 1, len(self.class_names))  # the last class may have no image
        try:
            self.latent_format, self.names_codec = _recorded_format(described[self.latents], latents_codec)
        except InputError as error:
            raise InputError(f"{self.latents.describe('dataset.json')}: {error}") from error
        self.latent_format.check_statistics()
        self.has_mirrored = bool(described[self.latents].get("flip"))
        self.flip = flip
        if flip and not self.has_mirrored:
            advice = "preprocessing/encode.py --flip creates them"
            raise InputError(f"--flip: {self.latents.path} has no mirrored latents; {advice}")

        # The first image and its latents define the shapes.
        self.resolution = self.stored_shape = None
        self.resolution = self.image(0).shape[-1]
        self.stored_shape = self.read_latents(0).shape
        self.latent_size, form = self.stored_shape[-1], self.latent_format
        self.stored = self._stored_kind(described[self.latents].get("latents"))
        if self.resolution != self.latent_size * form.factor:
            sizes = f"images of {self.resolution} px and latents of {self.latent_size}"
            raise InputError(f"{self.data_dir}: {sizes}, but codec {form.codec} reduces by {form.factor}")
        self.tokens = [one.of_images(indices, flip) for one in tokens]
        for one in self.tokens:
            one.check_images(self.images, [decode_name(name) for name in self.image_names])

    def _stored_kind(self, recorded: Any) -> str:
        """Return what the files of latents contain: what is recorded, or what their number of channels means.

        Raises InputError if the channels fit neither, or contradict the record; and for one draw without a record of
        the codec, because as many channels can also be the moments of another codec.
        """
        form, where = self.latent_format, self.latents.describe("dataset.json")
        if recorded is not None and recorded not in STORED:
            raise InputError(f"{where}: latents is {recorded!r:.50}; allowed: {', '.join(STORED)}")
        channels = dict(zip(STORED, (2 * form.channels, form.channels), strict=True))
        known = [recorded] if recorded else STORED if self.names_codec else ["moments"]
        if found := [kind for kind in known if channels[kind] == self.stored_shape[0]]:
            return found[0]
        allowed = " or ".join(f"({channels[kind]}, h, h), {kind}" for kind in known)
        problem = f"{self.latent_path(0)}: shape {self.stored_shape}; allowed for codec {form.codec}: {allowed}"
        if not self.names_codec:
            problem += f"; {where} names no codec: add it there, or name it by --latents-codec"
        raise InputError(problem)

    def _check_place_of_json(self) -> None:
        """Raise InputError if a dataset.json is next to images and latents and one of them has none."""
        lacking = [source.path for source in (self.images, self.latents) if "dataset.json" not in source]
        if lacking and (self.data_dir / "dataset.json").exists():
            problem = f"is not read there, and {' and '.join(map(str, lacking))} has none; move it to where it belongs"
            raise InputError(f"{self.data_dir / 'dataset.json'}: {problem}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        mirrored, i = divmod(i, len(self))
        if self.tokens:
            seen = [tokens.read(i, bool(mirrored)) for tokens in self.tokens]
        else:
            seen = [self.image(i).flip(2) if mirrored else self.image(i)]
        return *seen, torch.from_numpy(self.read_latents(i, bool(mirrored))), torch.tensor(self.labels[i])

    @property
    def item_bytes(self) -> int:
        """Bytes of an item in memory."""
        seen = sum(one.item_bytes for one in self.tokens) if self.tokens else 3 * self.resolution**2
        return seen + 4 * math.prod(self.stored_shape)

    def keep(self, count: int) -> None:
        """Reduce the data set to `count` images, or to all if it has fewer: the first ones of each class in turn.

        The number of classes stays; `classes` are those of the images that stay.
        """
        order = np.argsort(self.labels, kind="stable")
        _, starts, sizes = np.unique(self.labels[order], return_index=True, return_counts=True)
        rank = np.empty(len(order), dtype=np.int64)  # of an image among those of its class
        rank[order] = np.arange(len(order)) - np.repeat(starts, sizes)
        kept = np.sort(np.lexsort((self.labels, rank))[:count])
        self.image_names, self.latent_names = self.image_names[kept], self.latent_names[kept]
        self.labels, self.tokens = self.labels[kept], [one.keep(kept) for one in self.tokens]
        self.classes = ClassSet.of_data(np.unique(self.labels), self.class_names)

    def digest(self) -> str:
        """Return the SHA-256 of file names, labels, class names, and the bytes of `DIGEST_SAMPLE` images and latents.

        It is the same for a folder and a zip, in any place, and with cached tokens. Raises InputError for a file that
        cannot be read.
        """
        names = [os.path.basename(name) for name in (*self.image_names.tolist(), *self.latent_names.tolist())]
        digest = hashlib.sha256(repr((names, self.labels.tolist(), self.class_names)).encode())
        for i in sorted(set(np.linspace(0, len(self) - 1, DIGEST_SAMPLE).astype(int).tolist())):
            files = [self.images.read(self.image_file(i))]
            files += [self.latents.read(self.latents_file(i, m)) for m in ((False, True) if self.flip else (False,))]
            digest.update(b"".join(hashlib.sha256(data).digest() for data in files))
        return digest.hexdigest()

    def image(self, i: int) -> Tensor:
        """Return image i, (3, R, R) uint8, without reading its latents. Raises InputError if it is broken."""
        return self.images.load(self.image_file(i), partial(_decode_image, side=self.resolution))

    def check(self, progress: Callable[[int], object] = lambda count: None, part: int = 0, parts: int = 1) -> None:
        """Check every file without decoding it: PNGs must be complete, others must have the size of the first ones.

        Each of several processes checks its own of `parts` equal parts. `progress` receives numbers of items done.
        Raises InputError that states the number of broken files and names the first ones.
        """
        sizes = [source.size(name) for source, name in self._arrays(0)]
        errors: list[str] = []
        share = range(len(self) * part // parts, len(self) * (part + 1) // parts)
        for found in map_files(lambda i: self._file_error(i, sizes), share):
            errors += filter(None, found)
            progress(len(found))
        if errors:
            raise InputError(f"{len(errors)} broken files:\n  " + "\n  ".join(errors[:ERRORS_SHOWN]))

    def image_file(self, i: int) -> str:
        """Return the name of image i in `images`."""
        return decode_name(self.image_names[i])

    def latents_file(self, i: int, mirrored: bool = False) -> str:
        """Return the name of image i's latents in `latents`."""
        name = decode_name(self.latent_names[i])
        return mirrored_name(name) if mirrored else name

    def latent_path(self, i: int) -> str:
        """Return the path of item i's latents, for messages."""
        mirrored, i = divmod(i, len(self))
        return self.latents.describe(self.latents_file(i, bool(mirrored)))

    def read_latents(self, i: int, mirrored: bool = False) -> np.ndarray:
        """Return the stored latents of image i, or of its mirror image, (2 C, h, w) or (C, h, w) float32."""
        decode = partial(decode_latents, shape=self.stored_shape)
        return self.latents.load(self.latents_file(i, mirrored), decode).astype(np.float32, copy=False)

    def _arrays(self, i: int) -> list[tuple[FileSource, str]]:
        """Return the files of latents and tokens of image i; with `flip`, those of its mirror image as well."""
        mirrors = (False, True) if self.flip else (False,)
        latents = [(self.latents, self.latents_file(i, mirrored)) for mirrored in mirrors]
        return latents + [(one.source, one.file(i, mirrored)) for one in self.tokens for mirrored in mirrors]

    def _file_error(self, i: int, sizes: list[int]) -> str | None:
        """Return why a file of image i is broken, None if none is. `sizes`: those of `_arrays`."""
        image = self.image_file(i)
        path = self.images.describe(image)
        try:
            for (source, name), expected in zip(self._arrays(i), sizes, strict=True):
                if (size := source.size(name)) != expected:
                    what = "latents" if source is self.latents else "tokens"
                    return f"{source.describe(name)}: {size} bytes; the first {what} have {expected}"
            if self.images.is_zip:  # its directory is at its end, so a zip that could be opened is complete
                return None if self.images.size(image) else f"{path}: empty"
            is_complete = self.images.tail(image, len(PNG_END)) == PNG_END
            return None if is_complete else f"{path}: truncated, no end of a PNG"
        except InputError as error:
            return str(error)


@dataclass(eq=False)
class GlobalBatchSampler(Sampler):
    """The order of training samples: the same global batches for any number of processes and of accumulation steps.

    The samples of all epochs, each shuffled by (seed, epoch), form one sequence. Step s takes positions s B to
    (s + 1) B - 1, so that an epoch's end skips no sample and a resumed run needs only its step. Each process takes its
    share of the global batch in `micro_batches` parts. The sampler yields one list of indices per part. With `flip`,
    half of an epoch's samples, chosen by (seed, epoch), are mirror images.
    """

    num_samples: int
    batch_size: int
    seed: int
    steps: range
    rank: int = 0
    world_size: int = 1
    micro_batches: int = 1
    flip: bool = False

    def __post_init__(self) -> None:
        if self.batch_size % (self.world_size * self.micro_batches):
            parts = f"{self.world_size} processes x {self.micro_batches} gradient accumulation steps"
            raise InputError(f"--batch-size {self.batch_size} (global) is not divisible by {parts}")
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


def _recorded_format(content: dict[str, Any], latents_codec: str | LatentFormat | None) -> tuple[LatentFormat, bool]:
    """Return the format of latents from their dataset.json, and whether it or `latents_codec` names a codec.

    The files of the codec are read, or downloaded, only if dataset.json does not name the same codec. Raises InputError
    if both name one and they differ.
    """
    recorded = content.get("codec")
    found = LatentFormat.from_json(recorded)
    if latents_codec in (None, "", found.codec if recorded is not None else None):
        return found, recorded is not None
    given = codec_format(latents_codec) if isinstance(latents_codec, str) else latents_codec
    if recorded is None:
        return given, True
    if found.codec != given.codec:
        raise InputError(f"the latents are of codec {found.codec}, but --latents-codec is {given.codec}")
    return found, True


def decode_latents(data: bytes, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Return the stored latents in the bytes of an .npy file, (2 C, h, h) or (C, h, h), float32 or float16.

    Raises InputError for other bytes, another dtype, or a shape other than `shape` (None: any of this form).
    """
    latents = decode_npy(data, ("float32", "float16"), "latents")
    channels, *sides = latents.shape if latents.ndim == 3 else (0, 0, 0)
    if channels == 0 or sides[0] != sides[1] or sides[0] == 0:
        allowed = "(2 C, h, h), mean, then standard deviation, or (C, h, h), one draw"
        raise InputError(f"shape {latents.shape}; allowed: {allowed}")
    if shape not in (None, latents.shape):
        raise InputError(f"shape {latents.shape}; expected {shape}, the shape of the first")
    return latents


def _decode_image(data: bytes, side: int | None) -> Tensor:
    """Return the image in a file's bytes, (3, R, R) uint8. Raises InputError if it is not `side` (None: any) wide."""
    image = open_image(data, max_side=side)
    if image.mode not in MODES:
        raise InputError(f"pixels of mode {image.mode}; allowed: 8-bit RGB, grey or palette")
    pixels = np.asarray(to_mode(image, "RGB"))
    height, width, _ = pixels.shape
    side = side or height
    if (height, width) != (side, side):
        raise InputError(f"{width} x {height} pixels; expected {side} x {side}")
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())

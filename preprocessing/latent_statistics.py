"""Mean and standard deviation of latents per channel, measured from the written files of latents.

They give latents about zero mean and unit variance in each channel, as the network expects, for a codec whose files do
not state them. Because they are computed from the files, in float64 and in the order of the images, they do not depend
on how the work was divided or interrupted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from common.errors import InputError
from common.sources import map_files
from models.latent_format import LatentFormat

ROUNDING = 1e-6  # of the mean: the largest standard deviation of a constant channel; rounding causes about 1e-8


def mean_and_std(latents: np.ndarray, stored: str) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each latent pixel, both (C, h, w) float64; 0 for that of a draw.

    latents: moments (2 C, h, w) or a draw (C, h, w), as `stored` says ("moments" or "draw").
    """
    latents = latents.astype(np.float64)
    mean, std = np.split(latents, 2) if stored == "moments" else (latents, np.zeros_like(latents))
    return mean, std


def latent_sums(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Return the sums over the pixels of mean and of mean^2 + std^2 per channel, (2, C) float64."""
    return np.stack([mean.sum(axis=(1, 2)), (mean**2 + std**2).sum(axis=(1, 2))])


def mean_and_deviation(sums: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation (C,) of latents from `latent_sums` of `count` pixels in total.

    For moments these are the values of draws from them: the variance is that of the means plus the mean variance.
    """
    mean, square = sums / count
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


def spread(total: int, count: int) -> list[int]:
    """Return the positions of up to `count` of `total` images, at equal distances: images are sorted by class."""
    return [position * total // min(count, total) for position in range(min(count, total))]


def measured_format(
    latent_format: LatentFormat, names: Sequence[str], read: Callable[[str], np.ndarray], stored: str
) -> LatentFormat:
    """Return the format with scale = 1 / standard deviation and shift = mean of each channel, over the files `names`.

    `read` returns the stored latents of a file. Raises InputError, naming the channel, if a channel is constant.
    """

    def sums_of(name: str) -> tuple[np.ndarray, int]:
        mean, std = mean_and_std(read(name), stored)
        return latent_sums(mean, std), mean[0].size

    parts = [part for found in map_files(sums_of, names) for part in found]
    total = np.sum([sums for sums, _ in parts], axis=0)
    mean, deviation = mean_and_deviation(total, sum(pixels for _, pixels in parts))
    if (constant := deviation <= ROUNDING * np.abs(mean)).any():
        channel = int(np.argmax(constant))
        raise InputError(
            f"codec {latent_format.codec}: the latents of {len(names):,} images have the same value everywhere in "
            f"channel {channel}, so its scale cannot be measured; is --vae the right codec?"
        )
    scale, shift = tuple((1 / deviation).tolist()), tuple(mean.tolist())
    return dataclasses.replace(latent_format, scale=scale, shift=shift)

"""Whether a network has memorised its training images: the nearest training image of each generated image.

The reference are held-out images: copies of training images are nearer. Distances are measured in the judge's features.
The judge was trained on the held-out images, but this does not change their distances: on the digits, the median
distance to the nearest training image is 1.53 for held-out images, and 1.52 from one training image to another; on
Imagenette both are 2.39.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 1024  # of a matrix of distances that is computed at once
CLOSE = 0.01  # quantile of the reference distances below which an image counts as close


def nearest(queries: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Return distance (N,) and index (N,) of the nearest of references (M, D) to each of queries (N, D)."""
    found = [torch.cdist(part, references).min(dim=1) for part in queries.split(ROWS)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def closeness(distances: Tensor, reference: Tensor) -> dict[str, float]:
    """Return scores of memorisation from nearest distances of generated images (N,) and of held-out images (M,).

    nearest_ratio: median of the generated images divided by that of the held-out images; far below 1 for copies.
    close: share of the generated images that are nearer than the 1 % quantile of the held-out images; 0.01 is expected
    of images as different from the training images as the held-out ones.
    """
    limit = reference.double().quantile(CLOSE)
    return {
        "nearest_ratio": float(distances.double().median() / reference.double().median()),
        "close": float((distances.double() < limit).double().mean()),
    }


def pairs_shown(distances: Tensor, count: int) -> Tensor:
    """Return indices of the images to look at: the first `count` and the `count` nearest to a training image."""
    return torch.cat([torch.arange(min(count, len(distances))), distances.argsort()[:count]])

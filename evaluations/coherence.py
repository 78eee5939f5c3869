"""Coherence: does the class token that was generated with an image say what the encoder says of that image?

REG (arXiv 2507.01467) generates image and class token together, but reports the image alone. Here the generated token
is compared with the encoder's token of the decoded image: by its cosine, beside what the same cosine is with tokens of
other images and with the mean token of its class, and by how often the nearest class mean is that of its label. Class
means are those of real images: of the training data, or, in benchmarks, of data held out.

Pure functions of tokens; everything is a sum, so batches and processes simply add up.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.io import InputError
from evaluations.metrics import Sums

CENTRE_IMAGES = 10_000  # for the means of all classes together


def centre_images(labels: np.ndarray) -> list[int]:
    """Return which images of a data set, given by its labels (N,), make the class means: equally many of each class."""
    each = max(1, CENTRE_IMAGES // len(np.unique(labels)))
    return sorted(int(i) for label in np.unique(labels) for i in np.flatnonzero(labels == label)[:each])


class CentreSums(Sums):
    """Sum and count of the encoder's tokens (N, D) of real images, for each class."""

    def __init__(self, classes: int, width: int, device: str | torch.device = "cpu"):
        self.totals = torch.zeros(classes, width, dtype=torch.float64, device=device)
        self.counts = torch.zeros(classes, dtype=torch.float64, device=device)

    def update(self, tokens: Tensor, labels: Tensor) -> None:
        """Add tokens (N, D) of images with labels (N,) int64."""
        self.totals.index_add_(0, labels, tokens.to(self.totals))
        self.counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))

    def centres(self) -> Tensor:
        """Return the mean token of each class, (K, D) float64; NaN for a class that has no image."""
        return self.totals / self.counts[:, None]


class CoherenceSums(Sums):
    """What the scores need of generated tokens and of the encoder's tokens of the decoded images, both (N, D)."""

    def __init__(self, width: int, device: str | torch.device = "cpu"):
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.pairs = torch.zeros((), dtype=torch.float64, device=device)
        self.to_class_mean = torch.zeros((), dtype=torch.float64, device=device)
        self.right = torch.zeros((), dtype=torch.float64, device=device)
        self.generated = torch.zeros(width, dtype=torch.float64, device=device)  # sums of unit vectors
        self.encoded = torch.zeros(width, dtype=torch.float64, device=device)

    def update(self, generated: Tensor, encoded: Tensor, labels: Tensor, centres: Tensor) -> None:
        """Add the tokens of images asked for with `labels` (N,) int64; `centres` (K, D): see `CentreSums.centres`.

        Images of a class without centre are left out.
        """
        known = centres.isfinite().all(1)[labels]
        generated, encoded, labels = generated[known].to(self.generated), encoded[known].to(self.encoded), labels[known]
        centres = centres.to(self.encoded)
        self.count += len(labels)
        nearest = torch.cdist(generated, centres).nan_to_num(torch.inf).argmin(1)
        self.right += (nearest == labels).sum()
        self.to_class_mean += F.cosine_similarity(generated, centres[labels]).sum()
        generated, encoded = F.normalize(generated), F.normalize(encoded)
        self.pairs += (generated * encoded).sum()
        self.generated += generated.sum(0)
        self.encoded += encoded.sum(0)

    def scores(self) -> dict[str, float]:
        """Return the four numbers, cosines in [-1, 1] and a share in [0, 1]. Raises InputError for fewer than 2 images.

        coherence: mean cosine of a generated token and the encoder's token of its own image.
        coherence_shuffled: the same with another image's, the mean over all such pairs.
        coherence_class_mean: mean cosine of a generated token and the mean token of its class.
        cls_tokens_right: share of generated tokens whose nearest class mean is that of their label.
        """
        n = int(self.count)
        if n < 2:
            raise InputError(f"coherence needs at least 2 images, there are {n}")
        all_pairs = self.generated @ self.encoded  # the cosines of every token with every image's
        return {
            "coherence": float(self.pairs / n),
            "coherence_shuffled": float((all_pairs - self.pairs) / (n * (n - 1))),
            "coherence_class_mean": float(self.to_class_mean / n),
            "cls_tokens_right": float(self.right / n),
        }

"""The five numbers of the ADM evaluation (arXiv 2105.05233, appendix), as pure functions: features in, numbers out.

Frechet distance (FID, arXiv 1706.08500; sFID, arXiv 2103.03841; any encoder's features), Inception Score
(arXiv 1606.03498), improved precision and recall (arXiv 1904.06991). Sums over images are float64 and can be added over
batches and processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.errors import InputError

INCEPTION_SCORE_SPLIT = 5000  # images, as in ADM; a shorter last split has the same weight as a full one
NEAREST_NEIGHBOURS = 3
MOST_NEGATIVE = 1e-3  # eigenvalue of a covariance, relative to the largest; rounding of float32 gives about 1e-8


class Sums(nn.Module):
    """Sums over images, which can be added over batches and processes: float64 buffers of `shapes`, initially 0."""

    def __init__(self, device: str | torch.device, **shapes: tuple[int, ...]):
        super().__init__()
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64, device=device))


class FeatureSums(Sums):
    """Count, sum and sum of outer products of features (N, D), from which mean and covariance are computed."""

    def __init__(self, width: int, device: str | torch.device = "cpu"):
        super().__init__(device, count=(), total=(width,), products=(width, width))

    def update(self, features: Tensor) -> None:
        """Add the features (N, D) of N images."""
        features = features.to(self.total)
        self.count += len(features)
        self.total += features.sum(0)
        self.products.addmm_(features.t(), features)

    def statistics(self) -> GaussianStatistics:
        """Return mean and covariance. Raises InputError if there are fewer than 2 images or features are not finite."""
        count = int(self.count)
        if count < 2:
            raise InputError(f"a covariance needs at least 2 images, there are {count}")
        if not (self.total.isfinite().all() and self.products.isfinite().all()):
            raise InputError("the network gave features that are not finite (NaN or infinity)")
        mean = self.total / count
        covariance = (self.products - count * torch.outer(mean, mean)) / (count - 1)
        return GaussianStatistics(mean.cpu(), covariance.cpu(), count)


@dataclass(frozen=True)
class GaussianStatistics:
    """Mean (D,) and covariance (D, D) with ddof 1, float64 on the CPU; the number of images, None if not known."""

    mean: Tensor
    covariance: Tensor
    count: int | None = None


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """Return the squared Frechet distance of two Gaussians: |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)).

    The distance is equation 6 of arXiv 1706.08500. The trace of the root is the sum of the singular values of
    A^(1/2) B^(1/2), which is real and non-negative, also for singular covariances. Raises InputError if the widths
    differ, a number or the distance is not finite, or a matrix is no covariance.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(f"features of width {len(a.mean)} cannot be compared with features of width {len(b.mean)}")
    if not all(tensor.isfinite().all() for tensor in (a.mean, a.covariance, b.mean, b.covariance)):
        raise InputError("the statistics hold numbers that are not finite")
    root_of_product = torch.linalg.svdvals(_factor(a.covariance).t() @ _factor(b.covariance)).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root_of_product
    return finite(distance, "the Frechet distance")


def finite(score: Tensor, name: str) -> float:
    """Return a score as a number. Raises InputError if it is NaN or infinite."""
    if not score.isfinite():
        raise InputError(f"{name} is not finite: its features are too large, or damaged")
    return float(score)


def _factor(covariance: Tensor) -> Tensor:
    """Return F (D, rank) with F F^T = covariance, without eigenvalues that are only rounding errors."""
    try:
        values, vectors = torch.linalg.eigh((covariance + covariance.t()) / 2)
    except RuntimeError as error:  # numbers near the limits of float64
        raise InputError("a covariance cannot be decomposed: its numbers are too large") from error
    if values[0] < -MOST_NEGATIVE * values[-1].abs():
        raise InputError(f"a covariance has the negative eigenvalue {values[0]:.3g}: the matrix is damaged")
    keep = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, keep] * values[keep].sqrt()


class InceptionScoreSums(Sums):
    """Sums over class probabilities (N, K) for the Inception Score of `total` images, in splits of 5,000."""

    def __init__(self, total: int, classes: int, device: str | torch.device = "cpu"):
        splits = -(-total // INCEPTION_SCORE_SPLIT)
        # negentropies: sums of p log p
        super().__init__(device, counts=(splits,), negentropies=(splits,), probabilities=(splits, classes))

    def update(self, logits: Tensor, first: int) -> None:
        """Add the logits (N, K) of the images number `first`, `first` + 1, ..."""
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        split = torch.arange(first, first + len(logits), device=logits.device) // INCEPTION_SCORE_SPLIT
        self.counts.index_add_(0, split, torch.ones_like(p[:, 0]))
        self.negentropies.index_add_(0, split, torch.where(p > 0, p * log_p, 0).sum(1))
        self.probabilities.index_add_(0, split, p)

    def score(self) -> float:
        """Return the mean over splits of exp(mean KL(p(y|x) || p(y))), 1 to K."""
        mean = self.probabilities / self.counts[:, None]
        divergence = self.negentropies / self.counts - torch.special.xlogy(mean, mean).sum(1)
        return finite(divergence.exp().mean(), "the Inception Score")


def precision_recall(reference: Tensor, samples: Tensor, block: int = 4096) -> tuple[float, float]:
    """Return precision, the fraction of samples in the reference's manifold, and recall, the reverse.

    reference (N, D), samples (M, D), float32, on one device. A manifold is the union of balls around the points; each
    radius is the distance to the third nearest neighbour. Distances are float32, computed in blocks of `block` x
    `block`. Raises InputError for fewer than 4 points or features that are not finite.
    """
    for name, features in (("reference", reference), ("samples", samples)):
        if len(features) <= NEAREST_NEIGHBOURS:
            needed = f"at least {NEAREST_NEIGHBOURS + 1} images on both sides"
            raise InputError(f"precision and recall need {needed}, the {name} have {len(features)}")
        if not features.isfinite().all():
            raise InputError(f"the features of the {name} are not finite (NaN or infinity)")
        if not features.square().sum(1).isfinite().all():  # all distances would be infinite, and all points inside
            raise InputError(f"the features of the {name} are too large for distances in float32")
    precision = _inside(samples, reference, squared_radii(reference, block), block).double().mean()
    recall = _inside(reference, samples, squared_radii(samples, block), block).double().mean()
    return float(precision), float(recall)


def squared_radii(features: Tensor, block: int = 4096) -> Tensor:
    """Return the squared distance (N,) of each of the features (N, D) to its third nearest neighbour."""
    nearest = NEAREST_NEIGHBOURS + 1  # the nearest point is the point itself
    radii = []
    for rows in features.split(block):
        candidates = [
            _squared_distances(rows, columns).topk(min(nearest, len(columns)), largest=False).values
            for columns in features.split(block)
        ]
        radii.append(torch.cat(candidates, 1).topk(nearest, largest=False).values[:, -1])
    return torch.cat(radii)


def _inside(points: Tensor, centres: Tensor, radii: Tensor, block: int) -> Tensor:
    """Return for each point (N,) whether it lies in a ball around any of the centres."""
    inside = []
    for rows in points.split(block):
        found = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for columns, reach in zip(centres.split(block), radii.split(block), strict=True):
            found |= (_squared_distances(rows, columns) <= reach).any(1)
        inside.append(found)
    return torch.cat(inside)


def _squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """Return |u|^2 - 2 u v + |v|^2, clamped at 0, as in ADM."""
    products = torch.addmm(rows.square().sum(1, keepdim=True), rows, columns.t(), alpha=-2)
    return products.add_(columns.square().sum(1)).clamp_(min=0)

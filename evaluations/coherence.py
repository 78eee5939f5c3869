"""Coherence: does a generated class token match the encoder's class token of the image generated with it?

REG (arXiv 2507.01467) generates an image together with a class token, but reports scores of the image only. Here the
generated token is compared with the encoder's token of the decoded image by the cosine of the two. For comparison, the
same cosine is computed with the tokens of other images and with the mean token of the class. Another score is how often
the nearest class mean is that of the label. Class means are computed from real images: the training data, or other data
of the same classes. Samples without labels have no scores that need a class.

The scores are made from sums over images, which can be added over batches and processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.checks import ENTRY_NAME
from common.data_folder import places_of
from common.errors import InputError
from common.progress import progress_bar
from dataset import LatentDataset
from evaluations.batches import DECODERS
from evaluations.metrics import Sums, finite
from loss import FROM_ENCODER, entangled_token
from models.checkpoint import saved_settings
from models.conditioning import is_unconditional
from models.encoders import AFTER_NORM, Encoder, load_encoder, name_with_tokens
from models.latent_format import LatentFormat

BATCH_SIZE = 64
CENTRE_IMAGES = 10_000  # number of images for the means of all classes together


def centre_images(labels: np.ndarray) -> list[int]:
    """Return the numbers of the images for the class means, equally many per class, of a data set with labels (N,)."""
    each = max(1, CENTRE_IMAGES // len(np.unique(labels)))
    return sorted(int(i) for label in np.unique(labels) for i in np.flatnonzero(labels == label)[:each])


class CentreSums(Sums):
    """Sum and count of the encoder's tokens (N, D) of real images, per class."""

    def __init__(self, classes: int, width: int, device: str | torch.device = "cpu"):
        super().__init__(device, totals=(classes, width), counts=(classes,))

    def update(self, tokens: Tensor, labels: Tensor) -> None:
        """Add tokens (N, D) of images with labels (N,) int64."""
        self.totals.index_add_(0, labels, tokens.to(self.totals))
        self.counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))

    def centres(self) -> Tensor:
        """Return the mean token of each class, (K, D) float64; NaN for a class without images."""
        return self.totals / self.counts[:, None]


class CoherenceSums(Sums):
    """Sums over pairs of a generated token and the encoder's token of the decoded image, both (N, D).

    `labelled`: whether the samples have labels.
    """

    def __init__(self, width: int, device: str | torch.device = "cpu", labelled: bool = True):
        # generated, encoded: sums of unit vectors
        super().__init__(device, count=(), pairs=(), to_class_mean=(), right=(), generated=(width,), encoded=(width,))
        self.labelled = labelled

    def update(
        self, generated: Tensor, encoded: Tensor, labels: Tensor | None = None, centres: Tensor | None = None
    ) -> None:
        """Add the tokens of images with `labels` (N,) int64; `centres` (K, D) are those of `CentreSums.centres`.

        Both are needed if the samples have labels. Images of a class without a mean token are skipped.
        """
        generated, encoded = generated.to(self.generated), encoded.to(self.encoded)
        if self.labelled:
            known = centres.isfinite().all(1)[labels]
            generated, encoded, labels = generated[known], encoded[known], labels[known]
            centres = centres.to(self.encoded)
            nearest = torch.cdist(generated, centres).nan_to_num(torch.inf).argmin(1)
            self.right += (nearest == labels).sum()
            self.to_class_mean += F.cosine_similarity(generated, centres[labels]).sum()
        self.count += len(generated)
        generated, encoded = F.normalize(generated), F.normalize(encoded)
        self.pairs += (generated * encoded).sum()
        self.generated += generated.sum(0)
        self.encoded += encoded.sum(0)

    def scores(self) -> dict[str, float]:
        """Return three cosines in [-1, 1] and a fraction in [0, 1]; for samples without labels, the first two cosines.

        Raises InputError for fewer than 2 images, and for tokens that are not finite.

        coherence: mean cosine of a generated token and the encoder's token of its own image.
        coherence_shuffled: mean cosine of a generated token and the encoder's token of another image, over all pairs.
        coherence_class_mean: mean cosine of a generated token and the mean token of its class.
        cls_tokens_right: fraction of generated tokens whose nearest class mean is that of their label.
        """
        n = int(self.count)
        if n < 2:
            raise InputError(f"coherence needs at least 2 images, there are {n}")
        all_pairs = self.generated @ self.encoded  # sum of the cosines of all generated with all encoded tokens
        scores = {
            "coherence": self.pairs / n,
            "coherence_shuffled": (all_pairs - self.pairs) / (n * (n - 1)),
        }
        if self.labelled:
            scores |= {"coherence_class_mean": self.to_class_mean / n, "cls_tokens_right": self.right / n}
        return {name: finite(score, name) for name, score in scores.items()}


def class_mean_sums(
    encoder: Encoder,
    kind: str,
    data: LatentDataset,
    batch_size: int,
    device: torch.device | str,
    process: int = 0,
    processes: int = 1,
) -> CentreSums:
    """Return the sums over this process's part of the images; the sums of all processes give the class means.

    kind: the encoder's output that is used, one of `loss.FROM_ENCODER`. Raises InputError for a broken image.
    """
    sums = CentreSums(data.num_classes, encoder.width, device)
    mine = centre_images(data.labels)[process::processes]
    with ThreadPoolExecutor(DECODERS) as pool:
        for first in progress_bar(range(0, len(mine), batch_size), desc="class means", main=process == 0):
            numbers = mine[first : first + batch_size]
            images = torch.stack(list(pool.map(data.image, numbers)))
            # `forward`: a call would compile the training's encoder again for each batch size.
            tokens = entangled_token(kind, encoder.forward(images.to(device)), None)
            sums.update(tokens, torch.from_numpy(data.labels[numbers]).to(device))
    return sums


class CoherenceReport:
    """Computes the coherence of a checkpoint's samples with the encoder of its training.

    Args:
        checkpoint, source: the checkpoint as `load_checkpoint` returns it, and its name in errors.
        data_dir: the training data, for the class means.
        enc_weights: the encoder's file; None: the file of the training run.
        device: of the encoder.
        num_images: number of samples, if known.

    Raises InputError if the class token of the checkpoint is not an encoder's, if data or encoder are missing or do not
    match the checkpoint, or if there are too few samples.
    """

    def __init__(
        self,
        checkpoint: dict[str, Any],
        data_dir: str | Path,
        enc_weights: str | None = None,
        device: torch.device | str = "cpu",
        source: str | Path = "checkpoint",
        num_images: int | None = None,
    ):
        settings = saved_settings(checkpoint, source)
        self.kind = settings.get("entangle", "class" if settings.get("cls_token", True) else "none")
        if self.kind not in FROM_ENCODER or not settings.get("enc_type"):
            raise InputError(f"--coherence: {source} was not trained with an encoder's class token")
        if num_images is not None and num_images < 2:
            raise InputError(f"--coherence: needs at least 2 images, not {num_images}")
        self.data, self.device = _open_data(Path(data_dir), settings), device
        for name in ("resolution",) if is_unconditional(settings) else ("num_classes", "resolution"):
            found = getattr(self.data, name)
            if settings.get(name, found) != found:
                raise InputError(f"--coherence {data_dir}: {name} {found}, but {source} has {settings[name]}")
        weights = enc_weights or (settings.get("enc_weights") or "").split(",")[0] or None
        name = name_with_tokens(settings["enc_type"].split(",")[0], AFTER_NORM)
        self.encoder = load_encoder(name, self.data.resolution, weights, device)

    def __call__(
        self, images: Iterable[np.ndarray], cls_tokens: np.ndarray, labels: list[int] | None
    ) -> dict[str, float]:
        """Return the scores of N images (R, R, 3) uint8 with their generated tokens (N, D) and labels, if any.

        Without labels there are no scores that need a class.
        """
        count = len(cls_tokens if labels is None else labels)
        if cls_tokens.shape != (wanted := (count, self.encoder.width)):
            raise InputError(f"--coherence: class tokens of shape {cls_tokens.shape}; images and encoder need {wanted}")
        sums, images = CoherenceSums(self.encoder.width, labelled=labels is not None), iter(images)
        if sums.labelled:
            centres = class_mean_sums(self.encoder, self.kind, self.data, BATCH_SIZE, self.device).centres().cpu()
        for first in progress_bar(range(0, count, BATCH_SIZE), desc="coherence"):
            rows = slice(first, first + BATCH_SIZE)
            pixels = torch.from_numpy(np.stack(list(islice(images, BATCH_SIZE)))).permute(0, 3, 1, 2)
            encoded = entangled_token(self.kind, self.encoder(pixels.to(self.device)), None).cpu()
            classes = (torch.tensor(labels[rows]), centres) if sums.labelled else ()
            sums.update(torch.from_numpy(cls_tokens[rows]), encoded, *classes)
        return sums.scores()


def _open_data(data_dir: Path, settings: dict[str, Any]) -> LatentDataset:
    """Return training data; their latents are in the folder, and of the codec, that the run's flags named, if any."""
    folder = settings.get("latents_folder") or ""
    if not ENTRY_NAME.fits(folder) or not places_of(data_dir, [folder]):
        folder = None
    assumed = LatentFormat.from_json(settings.get("codec")) if settings.get("latents_codec") else None
    needs_labels = not is_unconditional(settings)
    return LatentDataset(data_dir, latents_folder=folder, latents_codec=assumed, needs_labels=needs_labels)

"""Scores of a checkpoint: samples of the averaged network, with the same labels and noise for all checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common.images import image_grid, save_png
from common.progress import progress_bar
from evaluations.coherence import CentreSums, CoherenceSums
from evaluations.metrics import FeatureSums, GaussianStatistics, frechet_distance
from experiments.judge import load_images, load_judge
from experiments.nearest import closeness, nearest, pairs_shown
from loss import FROM_ENCODER, entangled_token
from models.autoencoder import load_codec
from models.checkpoint import build_model, load_checkpoint
from models.encoders import load_encoder
from models.interpolant import Interpolant
from samplers import image_seeds, sample_images

SAMPLING_SEED = 1_000_000  # not a seed of training
BATCH_SIZE = 128  # of real images
PAIRS = 8  # first images, and nearest images, in the picture of nearest training images


@dataclass(frozen=True)
class Judges:
    """Files and settings that scores depend on. They can be passed to another process.

    held_out: folder of images with dataset.json, which no compared network is trained on. encoder: its --enc-type.
    train: folder of the images that networks are trained on, for the scores of memorisation; None: no such scores.
    """

    held_out: Path
    judge: Path
    encoder: str
    encoder_weights: str | None
    vae: str
    device: str
    train: Path | None = None


@dataclass(frozen=True)
class Sampling:
    """Number of images of a score, and their generation: by an ODE, whose only noise is the start, the same for all."""

    images: int
    num_steps: int
    batch_size: int
    solver: str = "heun"
    shown: int = 40  # images in the grid
    labelled: bool = True  # False: of the null class, for networks trained without labels
    proportional: bool = False  # labels as frequent as among the held-out images; False: equally frequent


class Reading(NamedTuple):
    """What judge and encoder say about N images, on the CPU.

    features (N, D), classes (N,) int64: of the judge. tokens: the encoder's (N, W) float32 of each kind in
    `FROM_ENCODER`.
    """

    features: Tensor
    classes: Tensor
    tokens: dict[str, Tensor]

    def statistics(self) -> dict[str, GaussianStatistics]:
        """Return mean and covariance of the judge's features and of the encoder's class tokens."""
        return {"distance": gaussian(self.features), "encoder_distance": gaussian(self.tokens["class"])}

    def share_right(self, labels: Tensor) -> float:
        """Return the share of images that the judge assigns to their labels (N,)."""
        return float((self.classes == labels).double().mean())


def gaussian(rows: Tensor) -> GaussianStatistics:
    """Return mean and covariance of rows (N, D)."""
    sums = FeatureSums(rows.shape[1])
    sums.update(rows)
    return sums.statistics()


class Scorer:
    """Scores checkpoints by comparison with the held-out images. Images, judge and encoder are loaded once."""

    def __init__(self, judges: Judges):
        self.device = torch.device(judges.device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as in generate.py
        real, self.labels = load_images(judges.held_out)
        self.classes = int(self.labels.max()) + 1
        self.judge = load_judge(judges.judge, self.device)
        self.encoder = load_encoder(judges.encoder, real.shape[-1], judges.encoder_weights, self.device)
        self.codec = load_codec(judges.vae, self.device)
        self.held_out = self.read(real)
        self.reference = self.held_out.statistics()
        self.train = judges.train and load_images(judges.train)[0]

    @torch.no_grad()
    def read(self, images: Tensor) -> Reading:
        """Return what judge and encoder say about images (N, 3, H, W) uint8."""
        features, classes, tokens = [], [], {kind: [] for kind in FROM_ENCODER}
        for batch in images.split(BATCH_SIZE):
            batch = batch.to(self.device)
            found, logits = self.judge(batch)
            features.append(found.cpu())
            classes.append(logits.argmax(1).cpu())
            output = self.encoder(batch)
            for kind, parts in tokens.items():
                parts.append(entangled_token(kind, output, None).cpu())
        return Reading(
            torch.cat(features), torch.cat(classes), {kind: torch.cat(parts) for kind, parts in tokens.items()}
        )

    @cached_property
    def centres(self) -> dict[str, Tensor]:
        """The mean token of each class over the held-out images, for each kind of token in `FROM_ENCODER`."""
        sums = {kind: CentreSums(self.classes, self.encoder.width) for kind in FROM_ENCODER}
        for kind, part in sums.items():
            part.update(self.held_out.tokens[kind], self.labels)
        return {kind: part.centres() for kind, part in sums.items()}

    @cached_property
    def train_features(self) -> Tensor:
        """The judge's features of the images that networks are trained on."""
        with torch.no_grad():
            return torch.cat([self.judge(part.to(self.device))[0].cpu() for part in self.train.split(BATCH_SIZE)])

    @cached_property
    def held_out_distances(self) -> Tensor:
        """The distance of each held-out image to its nearest training image."""
        return nearest(self.held_out.features, self.train_features)[0]

    def requested_labels(self, sampling: Sampling) -> Tensor:
        """Return the labels (N,) of generated images."""
        numbers = torch.arange(sampling.images)
        if not sampling.proportional:
            return numbers % self.classes
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(SAMPLING_SEED))
        return self.labels[order[numbers % len(order)]]

    def score_images(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Return scores of images (N, 3, H, W) uint8.

        distance, encoder_distance: see `distances`. right: share of images that the judge assigns to their label.
        """
        reading = self.read(images)
        return {**self.distances(reading), "right": reading.share_right(labels)}

    def distances(self, reading: Reading) -> dict[str, float]:
        """Return the Frechet distances to the held-out images in the features of the judge and of the encoder."""
        found = reading.statistics()
        return {name: frechet_distance(found[name], self.reference[name]) for name in found}

    def score(self, path: Path, sampling: Sampling, grid: Path) -> dict[str, float]:
        """Return the scores of a checkpoint's averaged network, and write a grid of its images.

        With training images, a second picture, GRID-nearest, shows some images (above) with their nearest training
        images (below): the first ones, and the nearest ones.

        Without labels, a class token is right if it belongs to the class that the judge assigns to the image.
        """
        checkpoint = load_checkpoint(path)
        model = build_model(checkpoint, device=self.device, source=path)
        settings = checkpoint["args"]
        decoded, tokens, labels = [], [], self.requested_labels(sampling)
        parts = range(0, sampling.images, sampling.batch_size)
        for first in progress_bar(parts, desc=f"sampling {settings.exp_name} {path.stem}", unit="batch", leave=False):
            numbers = range(first, min(first + sampling.batch_size, sampling.images))
            latents, cls_tokens = sample_images(
                model,
                [int(labels[n]) if sampling.labelled else model.null_class for n in numbers],
                image_seeds(SAMPLING_SEED, numbers),
                Interpolant.of_run(vars(settings)),
                mode="ode",
                solver=sampling.solver,
                num_steps=sampling.num_steps,
            )
            decoded.append(self.codec.decode(latents.float()).cpu())
            tokens.append(cls_tokens)
        images = torch.cat(decoded)
        save_png(grid, image_grid(images[: sampling.shown].permute(0, 2, 3, 1).numpy(), columns=self.classes))
        reading = self.read(images)
        scores = self.distances(reading)
        if sampling.labelled:
            scores["right"] = reading.share_right(labels)
        if self.train is not None:
            scores |= self.memorisation(images, reading.features, grid.with_stem(f"{grid.stem}-nearest"))
        if (kind := settings.entangle) in FROM_ENCODER:
            sums = CoherenceSums(self.encoder.width)
            classes = labels if sampling.labelled else reading.classes
            sums.update(torch.cat(tokens).cpu(), reading.tokens[kind], classes, self.centres[kind])
            scores |= sums.scores()
        return scores

    def memorisation(self, images: Tensor, features: Tensor, picture: Path) -> dict[str, float]:
        """Return how near generated images (N, 3, H, W) uint8 are to training images; draw some pairs.

        features: the judge's features (N, D) of the images.
        """
        distances, index = nearest(features, self.train_features)
        shown = pairs_shown(distances, PAIRS)
        pairs = torch.cat([images[shown], self.train[index[shown]]])
        save_png(picture, image_grid(pairs.permute(0, 2, 3, 1).numpy(), columns=len(shown)))
        return closeness(distances, self.held_out_distances)

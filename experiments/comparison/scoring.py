"""Scores of a checkpoint: EMA samples of the same labels and the same noise for all, compared with held-out images."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.images import image_grid, save_png
from common.sources import FileSource, read_dataset_json
from evaluations.coherence import CentreSums, CoherenceSums
from evaluations.metrics import FeatureSums, frechet_distance
from experiments.comparison.judge import load_judge
from loss import FROM_ENCODER, entangled_token
from models.autoencoder import load_codec
from models.checkpoint import build_model, load_checkpoint
from models.encoders import load_encoder
from models.interpolant import Interpolant
from samplers import image_seeds, sample_images

SAMPLING_SEED = 1_000_000  # far from those of training
BATCH_SIZE = 128  # of real images


@dataclass(frozen=True)
class Judges:
    """Files and settings that scores rest on; all of it can be handed to another process.

    held_out: folder of images with dataset.json that no compared network saw. encoder: specification and weights.
    """

    held_out: Path
    judge: Path
    encoder: str
    encoder_weights: str | None
    vae: str
    device: str


@dataclass(frozen=True)
class Sampling:
    """How many images a score is of, and how they are made: by an ODE, whose only noise is the start, alike for all."""

    images: int
    num_steps: int
    batch_size: int
    solver: str = "heun"
    shown: int = 40  # of them, in a grid
    labelled: bool = True  # else of the null class, for networks trained without labels


class Scorer:
    """Scores checkpoints against the held-out images; reads them, the judge and the encoder once."""

    def __init__(self, judges: Judges):
        self.device = torch.device(judges.device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as generate.py, for sampling
        self.real, self.labels = load_images(judges.held_out)
        self.classes = int(self.labels.max()) + 1
        self.judge = load_judge(judges.judge, self.device)
        weights = judges.encoder_weights
        self.encoder = load_encoder(judges.encoder, self.real.shape[-1], weights, self.device)
        self.codec = load_codec(judges.vae, self.device)
        self.reference = self.statistics(self.real)

    @torch.no_grad()
    def statistics(self, images: Tensor) -> dict[str, Any]:
        """Return mean and covariance of images (N, 3, H, W) uint8 in the judge's features and the encoder's tokens."""
        sums = {"distance": FeatureSums(self.judge.width), "encoder_distance": FeatureSums(self.encoder.width)}
        for batch in images.split(BATCH_SIZE):
            batch = batch.to(self.device)
            sums["distance"].update(self.judge(batch)[0])
            sums["encoder_distance"].update(self.encoder(batch).cls_token)
        return {name: part.statistics() for name, part in sums.items()}

    @cached_property
    def centres(self) -> dict[str, Tensor]:
        """The mean token of each class over the held-out images, for the kinds of token that an encoder gives."""
        sums = {kind: CentreSums(self.classes, self.encoder.width) for kind in FROM_ENCODER}
        for images, labels in zip(self.real.split(BATCH_SIZE), self.labels.split(BATCH_SIZE), strict=True):
            output = self.encoder(images.to(self.device))
            for kind, part in sums.items():
                part.update(entangled_token(kind, output, None).cpu(), labels)
        return {kind: part.centres() for kind, part in sums.items()}

    @torch.no_grad()
    def read(self, images: Tensor) -> Tensor:
        """Return the classes (N,) that the judge reads in images (N, 3, H, W) uint8."""
        return torch.cat([self.judge(batch.to(self.device))[1].argmax(1).cpu() for batch in images.split(BATCH_SIZE)])

    def score_images(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Return `distance`, in the judge's features, and `encoder_distance` of images (N, 3, H, W) uint8, and `right`,
        the share that the judge reads as their label."""
        found = self.statistics(images)
        distances = {name: frechet_distance(found[name], self.reference[name]) for name in found}
        return {**distances, "right": float((self.read(images) == labels).double().mean())}

    def score(self, path: Path, sampling: Sampling, grid: Path) -> dict[str, float]:
        """Return the scores of a checkpoint's averaged network, and write a grid of its images.

        Without labels, a token is right if its class is the one that the judge reads in the image.
        """
        checkpoint = load_checkpoint(path)
        model = build_model(checkpoint, device=self.device, source=path)
        settings = checkpoint["args"]
        made, tokens, labels = [], [], torch.arange(sampling.images) % self.classes
        parts = range(0, sampling.images, sampling.batch_size)
        for first in tqdm(parts, desc=f"sampling {settings.exp_name} {path.stem}", unit="batch", leave=False):
            numbers = range(first, min(first + sampling.batch_size, sampling.images))
            latents, cls_tokens = sample_images(
                model,
                [int(labels[n]) if sampling.labelled else model.null_class for n in numbers],
                image_seeds(SAMPLING_SEED, numbers),
                Interpolant(settings.path_type),
                mode="ode",
                solver=sampling.solver,
                num_steps=sampling.num_steps,
            )
            made.append(self.codec.decode(latents.float()).cpu())
            tokens.append(cls_tokens)
        images = torch.cat(made)
        save_png(grid, image_grid(images[: sampling.shown].permute(0, 2, 3, 1).numpy(), columns=self.classes))
        labels = labels if sampling.labelled else self.read(images)
        scores = self.score_images(images, labels)
        if not sampling.labelled:
            del scores["right"]
        if settings.entangle in FROM_ENCODER:
            scores |= self.coherence(settings.entangle, images, torch.cat(tokens), labels)
        return scores

    def coherence(self, kind: str, images: Tensor, tokens: Tensor, labels: Tensor) -> dict[str, float]:
        """Return how well generated tokens (N, D) agree with the encoder's of the generated images."""
        sums = CoherenceSums(self.encoder.width)
        batches = zip(images.split(BATCH_SIZE), tokens.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True)
        for pixels, generated, y in batches:
            encoded = entangled_token(kind, self.encoder(pixels.to(self.device)), None)
            sums.update(generated.cpu(), encoded.cpu(), y, self.centres[kind])
        return sums.scores()


def load_images(folder: Path) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, R, R) uint8 and labels (N,) of a folder that preprocessing/convert.py wrote."""
    source = FileSource(folder)
    table = read_dataset_json(source)["labels"]
    pixels = np.stack([np.array(Image.open(io.BytesIO(source.read(name))).convert("RGB")) for name, _ in table])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor([label for _, label in table])

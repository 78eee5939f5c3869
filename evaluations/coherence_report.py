"""Coherence of a finished set of samples: its class tokens against the encoder's tokens of its images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from dataset import LatentDataset
from evaluations.coherence import CentreSums, CoherenceSums, centre_images
from files import InputError
from loss import FROM_ENCODER, entangled_token
from models.encoders import load_encoder

BATCH_SIZE = 64


class CoherenceReport:
    """Measures samples of a checkpoint by the encoder it was trained with.

    Args:
        checkpoint: as `load_checkpoint` returns it.
        data_dir: the training data, for the class means.
        enc_weights: the encoder's file; None: the one that the run was given.
        device: where to.
        source: the checkpoint's name in errors.

    Raises:
        InputError: the class slot does not hold an encoder's token; data or encoder are missing or do not fit.
    """

    def __init__(
        self,
        checkpoint: dict[str, Any],
        data_dir: str | Path,
        enc_weights: str | None = None,
        device: torch.device | str = "cpu",
        source: str | Path = "checkpoint",
    ):
        settings = vars(checkpoint["args"]) if "args" in checkpoint else {}
        self.kind = settings.get("entangle", "class" if settings.get("cls_token", True) else "none")
        if self.kind not in FROM_ENCODER or not settings.get("enc_type"):
            raise InputError(f"--coherence: {source} entangles no encoder's token with the latents")
        self.data, self.device = LatentDataset(data_dir), device
        weights = enc_weights or (settings.get("enc_weights") or "").split(",")[0] or None
        self.encoder = load_encoder(settings["enc_type"].split(",")[0], self.data.resolution, weights, device)

    def __call__(self, images: list[Path], cls_tokens: np.ndarray, labels: list[int]) -> dict[str, float]:
        """Return the scores of images, given by file, with their generated tokens (N, D) and labels."""
        centres = self._class_centres()
        sums = CoherenceSums(self.encoder.width)
        for first in tqdm(range(0, len(images), BATCH_SIZE), desc="coherence"):
            rows = slice(first, first + BATCH_SIZE)
            pixels = torch.from_numpy(np.stack([np.array(Image.open(path)) for path in images[rows]]))
            encoded = self._tokens(pixels.permute(0, 3, 1, 2))
            sums.update(torch.from_numpy(cls_tokens[rows]), encoded, torch.tensor(labels[rows]), centres)
        return sums.scores()

    def _class_centres(self) -> Tensor:
        sums = CentreSums(self.data.num_classes, self.encoder.width)
        real = DataLoader(Subset(self.data, centre_images(self.data.labels)), BATCH_SIZE)
        for images, _, labels in tqdm(real, desc="class means"):
            sums.update(self._tokens(images), labels)
        return sums.centres()

    def _tokens(self, images: Tensor) -> Tensor:
        return entangled_token(self.kind, self.encoder(images.to(self.device)), None).cpu()

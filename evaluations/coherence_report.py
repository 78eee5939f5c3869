"""Coherence (see `evaluations.coherence`) with its data, encoder and files: class means of real images, and the scores
of a finished set of samples.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.io import InputError
from dataset import LatentDataset
from evaluations.batches import DECODERS
from evaluations.coherence import CentreSums, CoherenceSums, centre_images
from loss import FROM_ENCODER, entangled_token
from models.checkpoint import saved_settings
from models.encoders import Encoder, load_encoder

BATCH_SIZE = 64


def class_mean_sums(
    encoder: Encoder,
    kind: str,
    data: LatentDataset,
    batch_size: int,
    device: torch.device | str,
    process: int = 0,
    processes: int = 1,
) -> CentreSums:
    """Return the sums whose `centres()` are the mean tokens of the data's classes: one process's share, to be added up.

    kind: of `loss.FROM_ENCODER`, what is taken of the encoder. Raises InputError for a broken image.
    """
    sums = CentreSums(data.num_classes, encoder.width, device)
    mine = centre_images(data.labels)[process::processes]
    with ThreadPoolExecutor(DECODERS) as pool:
        for first in tqdm(range(0, len(mine), batch_size), desc="class means", disable=process > 0):
            numbers = mine[first : first + batch_size]
            images = torch.stack(list(pool.map(data.image, numbers)))
            tokens = entangled_token(kind, encoder(images.to(device)), None)
            sums.update(tokens, torch.from_numpy(data.labels[numbers]).to(device))
    return sums


class CoherenceReport:
    """Measures samples of a checkpoint by the encoder it was trained with.

    Args:
        checkpoint: as `load_checkpoint` returns it.
        data_dir: the training data, for the class means.
        enc_weights: the encoder's file; None: the one that the run was given.
        device: where to.
        source: the checkpoint's name in errors.
        num_images: how many samples there will be, where that is known.

    Raises:
        InputError: the class slot does not hold an encoder's token; data or encoder are missing or do not fit; there
            are too few samples.
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
            raise InputError(f"--coherence: {source} entangles no encoder's token with the latents")
        if num_images is not None and num_images < 2:
            raise InputError(f"--coherence: needs at least 2 images, not {num_images}")
        self.data, self.device = LatentDataset(data_dir), device
        for name in ("num_classes", "resolution"):
            found = getattr(self.data, name)
            if settings.get(name, found) != found:
                raise InputError(f"--coherence {data_dir}: {name} {found}, but {source} has {settings[name]}")
        weights = enc_weights or (settings.get("enc_weights") or "").split(",")[0] or None
        self.encoder = load_encoder(settings["enc_type"].split(",")[0], self.data.resolution, weights, device)

    def __call__(self, images: list[Path], cls_tokens: np.ndarray, labels: list[int]) -> dict[str, float]:
        """Return the scores of images, given by file, with their generated tokens (N, D) and labels."""
        centres = class_mean_sums(self.encoder, self.kind, self.data, BATCH_SIZE, self.device).centres().cpu()
        sums = CoherenceSums(self.encoder.width)
        for first in tqdm(range(0, len(images), BATCH_SIZE), desc="coherence"):
            rows = slice(first, first + BATCH_SIZE)
            pixels = torch.from_numpy(np.stack([np.array(Image.open(path)) for path in images[rows]]))
            encoded = entangled_token(self.kind, self.encoder(pixels.permute(0, 3, 1, 2).to(self.device)), None).cpu()
            sums.update(torch.from_numpy(cls_tokens[rows]), encoded, torch.tensor(labels[rows]), centres)
        return sums.scores()

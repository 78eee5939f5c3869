"""Scores of a network while it trains: FID, and the Frechet distance in the encoder's class tokens, of images that all
processes draw and none keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from common.io import InputError
from evaluations.features import Reference, check_reference, encoder_name, load_reference
from evaluations.inception.graph import NUM_FEATURES
from evaluations.inception.network import SPATIAL_FEATURES, full_precision, load_inception
from evaluations.metrics import FeatureSums, GaussianStatistics, Sums, frechet_distance
from evaluations.notes import count_notes, weights_notes
from models.encoders import Encoder


class TrainingEvaluation:
    """Scores images against a reference .npz.

    Args:
        accelerator: the run's.
        reference: .npz with mu and sigma (ADM's files; ours, by reference.py), for the encoder's distance mu_enc too.
        count: how many images.
        batch_size: images at a time on each process.
        inception: Inception weights; None: the published ones, downloaded once.
        encoder: gives the second distance, if the reference has its statistics.
        encoder_weights: the encoder's file, as reference.py was told of it.

    Attributes:
        notes: what the scores are worth, as the evaluator puts it; printed at once.

    Raises:
        InputError: the reference lacks statistics, or has another network's.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        reference: str | Path,
        count: int,
        batch_size: int,
        inception: str | Path | None = None,
        encoder: Encoder | None = None,
        encoder_weights: str | Path | None = None,
    ):
        self.accelerator, self.count, self.batch_size = accelerator, count, batch_size
        self.reference: Reference = load_reference(reference)
        if self.reference.pool is None:
            raise InputError(
                f"--eval-ref {reference}: no statistics (mu, sigma) in it; evaluations/reference.py makes one"
            )
        with accelerator.local_main_process_first():  # one process of a machine downloads, the others find the file
            self.inception = load_inception(inception, accelerator.device)
        check_reference(self.reference, self.inception)
        self.notes = weights_notes(self.inception) + count_notes(count)
        for note in self.notes if accelerator.is_main_process else []:
            print(f"note: evaluation while training: {note}")
        same = encoder is not None and self.reference.encoder == encoder_name(encoder.name, encoder_weights)
        self.encoder = encoder if same and self.reference.encoder_cls is not None else None

    @torch.no_grad()
    def __call__(self, draw: Callable[[range], Tensor]) -> dict[str, Any]:
        """Return `fid`, `sfid` and `encoder_fd`, those that the reference has; the same on every process.

        Beside the numbers, `num_samples` and `notes`: a row of a log is read long after what was printed is gone.

        draw: returns the images of the given numbers, (n, 3, H, W), uint8, on the run's device.
        """
        device = self.accelerator.device
        sums: dict[str, Sums] = {
            "fid": FeatureSums(NUM_FEATURES, device),
            "sfid": FeatureSums(SPATIAL_FEATURES, device),
        }
        if self.encoder is not None:
            sums["encoder_fd"] = FeatureSums(self.encoder.width, device)
        batches = [range(i, min(i + self.batch_size, self.count)) for i in range(0, self.count, self.batch_size)]
        mine = batches[self.accelerator.process_index :: self.accelerator.num_processes]
        for numbers in tqdm(mine, desc="evaluating", unit="batch", disable=not self.accelerator.is_main_process):
            images = draw(numbers)
            output = self.inception(images)
            sums["fid"].update(output.pool)
            sums["sfid"].update(output.spatial)
            if self.encoder is not None:
                with full_precision(device):  # as reference.py computed its statistics
                    sums["encoder_fd"].update(self.encoder(images).cls_token)
        expected: dict[str, GaussianStatistics | None] = {
            "fid": self.reference.pool,
            "sfid": self.reference.spatial,
            "encoder_fd": self.reference.encoder_cls,
        }
        for part in sums.values():
            part.load(self.accelerator.reduce(part.state(), "sum"))
        scores = [None]
        if self.accelerator.is_main_process:
            scores = [
                {name: frechet_distance(expected[name], sums[name].statistics()) for name in sums if expected[name]}
            ]
        return {**broadcast_object_list(scores)[0], "num_samples": self.count, "notes": self.notes}

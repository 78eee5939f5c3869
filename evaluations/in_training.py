"""Scores of a network during training: FID, sFID, and the Frechet distance in the encoder's class tokens.

All processes draw the images, and none of them is stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from common.distributed import broadcast_from_main
from common.errors import InputError
from common.progress import progress_bar
from evaluations.comparison import check_reference, count_notes, encoder_name, load_reference, weights_notes
from evaluations.inception.layers import NUM_FEATURES
from evaluations.inception.network import SPATIAL_FEATURES, full_precision, load_inception
from evaluations.metrics import FeatureSums, frechet_distance
from models.encoders import Encoder
from models.tensor_checks import dtype_name


class TrainingEvaluation:
    """Scores images against a reference .npz.

    `notes` says how far the scores are comparable, as in the evaluator. Raises InputError if the reference has no
    statistics, or those of another network.

    Args:
        accelerator: the run's.
        reference: .npz with mu and sigma (from ADM or reference.py); for the encoder's distance also mu_enc.
        count: number of images.
        batch_size: images per batch and process.
        inception: Inception weights; None: the published ones, downloaded once.
        encoder: adds its Frechet distance, if the reference has its statistics.
        encoder_weights: the encoder's file, the same as given to reference.py.
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
        statistics = load_reference(reference)
        if statistics.pool is None:
            raise InputError(f"--eval-ref {reference}: no statistics (mu, sigma); evaluations/reference.py makes them")
        with accelerator.local_main_process_first():  # one process per machine downloads, the others find the file
            self.inception = load_inception(inception, accelerator.device)
        check_reference(statistics, self.inception)
        numbers = (statistics.pool.mean, statistics.pool.covariance)
        self.reference = hashlib.sha256(b"".join(part.numpy().tobytes() for part in numbers)).hexdigest()[:16]
        self.expected = {"fid": statistics.pool, "sfid": statistics.spatial}
        self.encoder = encoder
        if encoder is not None:
            name = encoder_name(encoder.name, encoder_weights)
            self.expected["encoder_fd"] = statistics.of_encoder(name, encoder.input_size)
        self.expected = {name: part for name, part in self.expected.items() if part is not None}
        self.notes = weights_notes(self.inception) + count_notes(count)
        if "encoder_fd" in self.expected and encoder.dtype != torch.float32:
            self.notes.append(
                f"encoder_fd: the encoder computes in {dtype_name(encoder.dtype)}; the reference: float32"
            )

    @torch.no_grad()
    def __call__(self, draw: Callable[[range], Tensor]) -> dict[str, Any]:
        """Return `fid`, `sfid` and `encoder_fd` for which the reference has statistics, and how they were measured.

        That is: `num_samples`, `notes`, and `reference`, a digest of the reference's statistics.

        The result is the same on every process.

        draw: returns the images of the given numbers, (n, 3, H, W), uint8, on the run's device.
        """
        accelerator, device = self.accelerator, self.accelerator.device
        widths = {"fid": NUM_FEATURES, "sfid": SPATIAL_FEATURES, "encoder_fd": self.encoder and self.encoder.width}
        sums = nn.ModuleDict({name: FeatureSums(widths[name], device) for name in self.expected})
        batches = [range(i, min(i + self.batch_size, self.count)) for i in range(0, self.count, self.batch_size)]
        mine = batches[accelerator.process_index :: accelerator.num_processes]
        for numbers in progress_bar(mine, desc="evaluating", unit="batch", main=accelerator.is_main_process):
            images = draw(numbers)
            output = self.inception(images)
            features = {"fid": output.pool, "sfid": output.spatial}
            if "encoder_fd" in sums:
                with full_precision(device):  # as reference.py computed its statistics
                    # `forward`: a call would compile the training's encoder again for this batch size.
                    features["encoder_fd"] = self.encoder.forward(images).cls_token
            for name in sums:
                sums[name].update(features[name])
        sums.load_state_dict(accelerator.reduce(sums.state_dict(), "sum"))
        distances = broadcast_from_main(
            accelerator, lambda: {name: frechet_distance(self.expected[name], sums[name].statistics()) for name in sums}
        )
        return {**distances, "num_samples": self.count, "reference": self.reference, "notes": self.notes}

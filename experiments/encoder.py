"""Training of a small encoder that takes the place of DINOv2."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from common.io import atomic_write
from experiments.judge import train_classifier
from models.encoders import untrained_encoder

SEED = 0


def train_encoder(dest: Path, spec: str, images: Tensor, labels: Tensor, steps: int) -> None:
    """Train an encoder to classify images by its class token, and write its weights.

    Args:
        dest: safetensors file, for `load_encoder`.
        spec: the encoder, as for `load_encoder`, with `mean=0.5:std=0.5`.
        images, labels: (N, 3, R, R) uint8 and (N,).
    """
    torch.manual_seed(SEED)
    encoder = untrained_encoder(f"{spec}:num_classes={int(labels.max()) + 1}", images.shape[-1])
    network, size = encoder.network.train().requires_grad_(True), (encoder.input_size, encoder.input_size)

    def logits_of(pixels: Tensor) -> Tensor:
        return network(F.interpolate(pixels, size, mode="bicubic", align_corners=False))

    train_classifier(network.parameters(), logits_of, images.float() / 127.5 - 1, labels, steps, "encoder")
    with atomic_write(dest) as file:
        file.write(save({name: weights.contiguous() for name, weights in network.state_dict().items()}))

"""Training of a small encoder that takes the place of DINOv2."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from common.errors import InputError
from common.identity import files_of
from common.io import OwnFile
from common.temporary import atomic_write
from experiments.judge import train_classifier
from models.encoders import untrained_encoder

SEED = 0
PICTURE = re.compile(r"((train|held_out)/)?[^/]+/\d{4,}\.png", re.DOTALL)  # half, class folder, number


def train_encoder(
    dest: Path,
    spec: str,
    images: Tensor,
    labels: Tensor,
    steps: int,
    factors: Tensor | None = None,
    device: str = "cpu",
) -> None:
    """Train an encoder to classify images by its class token, and write its weights.

    Args:
        dest: safetensors file, for `load_encoder`.
        spec: the encoder, as for `load_encoder`, with `mean=0.5:std=0.5`.
        images, labels: (N, 3, R, R) uint8 and (N,).
        factors: (N, F), further properties of the images, which the class token must also predict.
    """
    torch.manual_seed(SEED)
    outputs = int(labels.max()) + 1 + (0 if factors is None else factors.shape[1])
    encoder = untrained_encoder(f"{spec}:num_classes={outputs}", images.shape[-1])
    network, size = encoder.network.to(device).train().requires_grad_(True), (encoder.input_size, encoder.input_size)

    def logits_of(pixels: Tensor) -> Tensor:
        return network(F.interpolate(pixels, size, mode="bicubic", align_corners=False))

    pixels = images.float() / 127.5 - 1
    train_classifier(network.parameters(), logits_of, pixels, labels, steps, "encoder", device, factors)
    with atomic_write(dest) as file:
        file.write(save({name: weights.cpu().contiguous() for name, weights in network.state_dict().items()}))


def own_encoder(spec: str, resolution: int) -> OwnFile:
    """Return the kind of files that `train_encoder` writes: the tensors of a network have these names and widths."""

    def matches(path: Path) -> bool:
        expected = untrained_encoder(f"{spec}:num_classes=10", resolution).network.state_dict()
        try:
            with safe_open(path, "pt") as file:
                found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError):
            return False
        return found == {name: list(tensor.shape) for name, tensor in expected.items()}

    return OwnFile("an encoder of this program", matches)


def check_own_pictures(folder: Path) -> None:
    """Raise InputError if a folder contains other files than the pictures of an earlier call."""
    for path in files_of(folder) if folder.exists() else ():
        if not PICTURE.fullmatch(path.relative_to(folder).as_posix()):
            raise InputError(f"--dest {folder}: contains {path.name}, which this program did not write; choose another")

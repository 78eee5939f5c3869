"""Training of a small encoder that takes the place of DINOv2."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from common.errors import InputError
from common.identity import files_of
from common.io import OwnFile
from common.temporary import atomic_write
from experiments.judge import train_on_images
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
    maps: Tensor | None = None,
    device: str = "cpu",
) -> None:
    """Train an encoder to classify images by its class token, and write its weights.

    Properties of the images are standardised and learned by their squared error, those of the image by the class
    token, those of pixels by the patch token at their place.

    Args:
        dest: safetensors file, for `load_encoder`.
        spec: the encoder, as for `load_encoder`, with `mean=0.5:std=0.5`.
        images, labels: (N, 3, R, R) uint8 and (N,).
        factors: (N, F), properties of the images.
        maps: (N, M, R, R), properties of the pixels; means over quarters of a patch are learned. For networks with a
            feature map.
    """
    torch.manual_seed(SEED)
    classes, patch_head = int(labels.max()) + 1, None
    factors = torch.empty(len(images), 0) if factors is None else standardised(factors, (0,))
    encoder = untrained_encoder(f"{spec}:num_classes={classes + factors.shape[1]}", images.shape[-1])
    network, size = encoder.network.to(device).train().requires_grad_(True), (encoder.input_size, encoder.input_size)
    parameters, pixels = [*network.parameters()], images.float() / 127.5 - 1
    if maps is not None:
        patch_head = nn.Conv2d(encoder.width, 4 * maps.shape[1], kernel_size=1).to(device)
        parameters += patch_head.parameters()
        pixels = torch.cat([pixels, standardised(maps, (0, 2, 3))], dim=1)

    def loss_of(batch: Tensor, rows: Tensor) -> Tensor:
        resized = F.interpolate(batch[:, :3], size, mode="bicubic", align_corners=False)
        features = network.forward_features(resized)
        logits, found = network.forward_head(features).tensor_split([classes], dim=1)
        loss = F.cross_entropy(logits, labels[rows].to(device))
        if factors.shape[1]:
            loss = loss + F.mse_loss(found, factors[rows].to(device))
        if patch_head is not None:
            quarters = F.adaptive_avg_pool2d(batch[:, 3:], (2 * features.shape[2], 2 * features.shape[3]))
            loss = loss + F.mse_loss(patch_head(features), F.pixel_unshuffle(quarters, 2))
        return loss

    train_on_images(parameters, loss_of, pixels, steps, "encoder", device)
    with atomic_write(dest) as file:
        file.write(save({name: weights.cpu().contiguous() for name, weights in network.state_dict().items()}))


def standardised(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return values with mean 0 and standard deviation 1 over the dimensions `dims`."""
    return (values - values.mean(dims, keepdim=True)) / values.std(dims, keepdim=True)


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

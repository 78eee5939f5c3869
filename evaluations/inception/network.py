"""The feature network of the ADM evaluation (arXiv 2105.05233), in PyTorch, from the original weights.

It equals TensorFlow's graph of 2015-12-05 up to float32 rounding: the bilinear resize of TensorFlow 1 to 299 x 299, the
layers of `layers.py`, and the classifier without its bias, as ADM's Inception Score uses it. Batch norms are folded
into the convolutions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from evaluations.inception.layers import INPUT_SIZE, SPATIAL_LAYER, convolutions, inception_layers
from evaluations.inception.weights import InceptionWeights, fetch_graph, load_weights

SPATIAL_CHANNELS = 7  # as in ADM's sFID: about as many features as FID's 2048
SPATIAL_FEATURES = SPATIAL_CHANNELS * 17 * 17


class InceptionOutput(NamedTuple):
    """Features of N images, float32."""

    pool: Tensor  # (N, 2048): pool_3, for FID, precision and recall
    spatial: Tensor  # (N, 2023): channels 0-6 of mixed_6/conv, flattened row, column, channel, for sFID
    logits: Tensor  # (N, 1008): the classifier without its bias, for the Inception Score


class Inception(nn.Module):
    """The frozen network, always float32. Scores are comparable only between networks of the same `name`.

    `path` and `sha256` identify the file of the weights; `published` is true for the two published files.
    """

    def __init__(self, weights: InceptionWeights):
        super().__init__()
        self.name, self.published = weights.name, weights.published
        self.path, self.sha256 = weights.path, weights.sha256
        self.layers = inception_layers()
        tensors = dict(weights.tensors)
        self.register_buffer("classifier", tensors.pop("fc.weight").contiguous())
        self.layers.load_state_dict(tensors, strict=False, assign=True)  # without num_batches_tracked
        self.requires_grad_(False).eval()
        for name in convolutions(self.layers):
            _fold_batch_norm(self.layers.get_submodule(name))

    def forward(self, images: Tensor) -> InceptionOutput:
        """Return the features of images (N, 3, H, W), uint8, of any size. Autocast and TF32 are disabled inside."""
        with full_precision(images.device):
            x = (resize_bilinear_tf1(images, INPUT_SIZE) - 128) * (1 / 128)
            if x.device.type == "cpu":  # oneDNN's fastest layout; cuDNN without TF32 prefers channels first
                x = x.contiguous(memory_format=torch.channels_last)
            for name, layer in self.layers.named_children():
                x = layer(x)
                if name == SPATIAL_LAYER:
                    spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
            pool = x.mean((2, 3))
            return InceptionOutput(pool, spatial, pool @ self.classifier.t())


def _fold_batch_norm(block: nn.Module) -> None:
    """Replace a convolution and its batch norm by one convolution with bias. Computed in float64."""
    conv, norm = block.conv, block.bn
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = norm.bias.double() - norm.running_mean.double() * scale
    weight = conv.weight.double() * scale[:, None, None, None]
    conv.weight = nn.Parameter(weight.float().contiguous(), requires_grad=False)
    conv.bias = nn.Parameter(bias.float(), requires_grad=False)
    block.bn = nn.Identity()


def load_inception(path: str | Path | None = None, device: str | torch.device = "cpu") -> Inception:
    """Return the network with the weights at `path`: the original graph (.pb) or its PyTorch port.

    Without a path, the published graph is used; it is downloaded once. Raises InputError if the file is missing,
    damaged, or holds other tensors, and if the download fails.
    """
    network = Inception(load_weights(path if path is not None else fetch_graph())).to(device)
    return network.to(memory_format=torch.channels_last) if torch.device(device).type == "cpu" else network


def resize_bilinear_tf1(images: Tensor, size: int) -> Tensor:
    """Return images (N, C, H, W) of any dtype, resized to size x size, float32, as ResizeBilinear of TensorFlow 1 does.

    Source coordinate = index * in/out in float32: no half-pixel offset, corners not aligned, no antialiasing.
    """
    for dim in (3, 2):  # TensorFlow also interpolates along rows first
        length = images.shape[dim]
        position = torch.arange(size, device=images.device, dtype=torch.float32)
        position = position * torch.tensor(length, dtype=torch.float32).div(size)
        low = position.floor().long()
        high = (low + 1).clamp(max=length - 1)
        weight = (position - low).view(-1, *[1] * (3 - dim))
        below, above = (images.index_select(dim, index).float() for index in (low, high))
        images = below + (above - below) * weight
    return images


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute in float32 without TF32, without autocast and without gradients; restore the settings afterwards."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn

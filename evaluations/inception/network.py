"""The feature network of the ADM evaluation (arXiv 2105.05233), in PyTorch, from the original weights.

Equal to TensorFlow's graph of 2015-12-05 to float32 rounding: TensorFlow-1's bilinear resize to 299 x 299, the layers
of `inception_graph`, and the classifier without its bias, as ADM's Inception Score applies it. Batch norms are folded
into the convolutions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluations.inception.graph import BATCH_NORM_EPSILON, HEAD, INPUT_SIZE, TRUNK, Chain, Conv, Pool, convolutions
from evaluations.inception.weights import ConvWeights, InceptionWeights, fetch_graph, load_weights

SPATIAL_CHANNELS = 7  # of mixed_6/conv, as ADM's sFID takes them: about as many features as FID's 2048
SPATIAL_FEATURES = SPATIAL_CHANNELS * 17 * 17


class InceptionOutput(NamedTuple):
    """Features of N images, float32."""

    pool: Tensor  # (N, 2048): pool_3, for FID, precision and recall
    spatial: Tensor  # (N, 2023): channels 0-6 of mixed_6/conv, flattened row, column, channel, for sFID
    logits: Tensor  # (N, 1008): the classifier without its bias, for the Inception Score


class Inception(nn.Module):
    """The frozen network, always float32. Scores compare only between networks of the same `name`.

    `path` and `sha256` say which file the weights are from, `published` whether it is one of the two published ones.
    """

    def __init__(self, weights: InceptionWeights):
        super().__init__()
        self.name, self.published = weights.name, weights.published
        self.path, self.sha256 = weights.path, weights.sha256
        self.convs = nn.ModuleDict()
        for conv in convolutions(TRUNK + HEAD):
            self.convs[_key(conv)] = _folded(conv, weights.convs[conv.port])
        self.register_buffer("classifier", weights.classifier.contiguous())
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> InceptionOutput:
        """Return the features of images (N, 3, H, W), uint8, any size; autocast and TF32 are off inside."""
        with full_precision(images.device):
            x = (resize_bilinear_tf1(images, INPUT_SIZE) - 128) * (1 / 128)
            if x.device.type == "cpu":  # oneDNN's fastest layout; cuDNN without TF32 prefers channels first
                x = x.contiguous(memory_format=torch.channels_last)
            x = self._run(TRUNK, x)
            spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
            pool = self._run(HEAD, x).mean((2, 3))
            return InceptionOutput(pool, spatial, pool @ self.classifier.t())

    def _run(self, chain: Chain, x: Tensor) -> Tensor:
        for layer in chain:
            if isinstance(layer, Conv):
                x = F.relu_(self.convs[_key(layer)](x))
            elif isinstance(layer, Pool):
                x = _pool(layer, x)
            else:
                x = torch.cat([self._run(branch, x) for branch in layer.branches], dim=1)
        return x


def load_inception(path: str | Path | None = None, device: str | torch.device = "cpu") -> Inception:
    """Return the network with the weights at `path`: the original graph (.pb) or its PyTorch port.

    Without a path the published graph is used, downloaded once. Raises InputError for a file that is missing, damaged
    or of another structure, and when the download fails.
    """
    network = Inception(load_weights(path if path is not None else fetch_graph()))
    network = network.to(device)
    if torch.device(device).type == "cpu":
        network = network.to(memory_format=torch.channels_last)
    return network


def resize_bilinear_tf1(images: Tensor, size: int) -> Tensor:
    """Return images (N, C, H, W) of any dtype resized to size x size, float32, as TensorFlow 1's ResizeBilinear does.

    Source coordinate = index * in/out in float32: no half pixel, corners not aligned, no antialiasing.
    """
    for dim in (3, 2):  # TensorFlow too interpolates along rows first
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
    """Compute in true float32 and without gradients, whatever TF32 and autocast a training has switched on."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


def _key(conv: Conv) -> str:
    return conv.port.replace(".", "/")  # a ModuleDict allows no dots


def _folded(conv: Conv, weights: ConvWeights) -> nn.Conv2d:
    """Return one convolution with bias that equals convolution and batch norm; folded in float64."""
    kernel, gamma, beta, mean, variance = (tensor.double() for tensor in weights)
    scale = gamma / (variance + BATCH_NORM_EPSILON).sqrt()
    padding = tuple(size // 2 for size in conv.kernel) if conv.padding == "SAME" else 0
    module = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel, conv.stride, padding)
    module.weight.data.copy_(kernel * scale[:, None, None, None])
    module.bias.data.copy_(beta - mean * scale)
    return module


def _pool(layer: Pool, x: Tensor) -> Tensor:
    padding = 1 if layer.padding == "SAME" else 0
    if layer.op == "MaxPool":
        return F.max_pool2d(x, 3, layer.stride, padding)
    return F.avg_pool2d(x, 3, layer.stride, padding, count_include_pad=False)

"""The units of a standardised class token.

An encoder's class token has channels of very different mean and scale. The scale of a channel decides at which time of
the denoising it rises above the noise. With a `ClassTokenScale`, the network denoises (token - mean) / std, so each
channel has mean 0 and variance 1 over the training data. The statistics are a part of the network: checkpoints and
exports contain them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from common.errors import InputError
from models.buffers import FixedDtypeBuffers


class ClassTokenScale(FixedDtypeBuffers):
    """Mean and standard deviation of each channel of the class token, (width,) float32; at first 0 and 1."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def standardize(self, cls_token: Tensor) -> Tensor:
        """Return the standardised token (N, width) of an encoder's class token (N, width)."""
        return (cls_token - self.mean) / self.std

    def restore(self, standardized: Tensor) -> Tensor:
        """Return the class token (N, width) in the encoder's units; the inverse of `standardize`."""
        return standardized * self.std + self.mean

    def check(self, source: str | Path) -> None:
        """Raise InputError, naming the file `source`, if a standard deviation is not above 0."""
        if not bool((self.std > 0).all()):
            raise InputError(f"{source}: cls_scale.std contains {self.std.min():g}; expected numbers above 0")

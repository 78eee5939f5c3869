"""The projectors, whose outputs are aligned with the tokens of a frozen encoder: REPA's MLP, or iREPA's convolution."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.sit_config import SiTConfig


class Projector(nn.Sequential):
    """The three-layer MLP of REPA (section 3): tokens (N, T, D) to tokens of an encoder's width (N, T, z_dim)."""

    def __init__(self, hidden_size: int, projector_dim: int, z_dim: int):
        first, second = nn.Linear(hidden_size, projector_dim), nn.Linear(projector_dim, projector_dim)
        super().__init__(first, nn.SiLU(), second, nn.SiLU(), nn.Linear(projector_dim, z_dim))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:  # an explicit loop, because torch 2.6 does not compile the forward of nn.Sequential
            x = layer(x)
        return x


class ConvProjector(nn.Module):
    """The 3 x 3 convolution of iREPA (arXiv 2512.10794) on the grid of patch tokens, and a linear layer for the class
    slot: tokens (N, 1 + T, D) to tokens of an encoder's width (N, 1 + T, z_dim); without a class slot (N, T, ...).
    """

    def __init__(self, hidden_size: int, z_dim: int, grid_size: int, has_slot: bool):
        super().__init__()
        self.grid_size = grid_size
        self.patches = nn.Conv2d(hidden_size, z_dim, kernel_size=3, padding=1)
        self.slot = nn.Linear(hidden_size, z_dim) if has_slot else None

    def forward(self, x: Tensor) -> Tensor:
        patches = x if self.slot is None else x[:, 1:]  # (N, T, D)
        grid = patches.transpose(1, 2).unflatten(2, (self.grid_size, self.grid_size))  # (N, D, H / patch, W / patch)
        patches = self.patches(grid).flatten(2).transpose(1, 2)  # (N, T, z_dim)
        return patches if self.slot is None else torch.cat([self.slot(x[:, :1]), patches], dim=1)  # (N, 1 + T, z_dim)

    def initialize(self, stream: Callable[[str], torch.Generator]) -> None:
        """Initialise the convolution as PyTorch does, from the random streams of its weights, `stream(name)`."""
        nn.init.kaiming_uniform_(self.patches.weight, a=math.sqrt(5), generator=stream("patches.weight"))
        bound = self.patches.weight[0].numel() ** -0.5
        nn.init.uniform_(self.patches.bias, -bound, bound, generator=stream("patches.bias"))


def make_projectors(config: SiTConfig) -> nn.ModuleList:
    """Return the projectors: for the first encoder depth one for each encoder, then those of the next depth."""
    widths = config.z_dims * len(config.encoder_depths)
    if config.projector == "conv":
        has_slot = config.tokens > config.grid_size**2
        return nn.ModuleList(ConvProjector(config.hidden_size, width, config.grid_size, has_slot) for width in widths)
    return nn.ModuleList(Projector(config.hidden_size, config.projector_dim, width) for width in widths)

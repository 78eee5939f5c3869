"""What the network embeds besides the class token: patches of the latents, times and labels (DiT, arXiv 2212.09748)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TIME_FEATURES = 256  # width of the sinusoidal features of t (DiT)


class PatchEmbed(nn.Module):
    """Embeds latents (N, C, H, W) as one token for each patch (N, T, D), in row-major order."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # (N, D, H / patch, W / patch), then (N, T, D)


class TimestepEmbedder(nn.Module):
    """Embeds times (N,) in [0, 1] as vectors (N, D)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    @staticmethod
    def features(t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return [cos, sin] of t at geometric frequencies, (N, 256) of `dtype`. t is not multiplied by 1000."""
        half = TIME_FEATURES // 2
        frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
        angles = t.to(dtype)[:, None] * frequencies  # (N, 128)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (N, 256)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.features(t).to(self.mlp[0].weight.dtype))  # (N, D)


class LabelEmbedder(nn.Module):
    """Embeds class labels (N,) as vectors (N, D). Label num_classes is the null class of classifier-free guidance."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)  # (N, D)

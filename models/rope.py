"""Rotary positions on a grid (RoPE, arXiv 2104.09864): queries and keys are rotated by the position of their patch.

Of the d channels of a head, the first d/2 are rotated by the row of the patch and the last d/2 by its column. Two
neighbouring channels are one pair, which turns by position * theta_j; theta_j = 10000^(-2 j / (d/2)), j = 0 .. d/4 - 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.buffers import FixedDtypeBuffers

Rotation = tuple[Tensor, Tensor]  # cosines and sines, (tokens, d) or, if the samples differ, (N, 1, tokens, d)


class RotaryPositions(FixedDtypeBuffers):
    """Cosines and sines of the angles of all patches. They stay float32 if the network is converted to half precision.

    Args:
        grid_size: patches in a row and in a column.
        head_size: width d of an attention head, a multiple of 4.
    """

    def __init__(self, grid_size: int, head_size: int):
        super().__init__()
        angles = patch_angles(grid_size, head_size)
        self.register_buffer("freqs_cos", angles.cos().float())
        self.register_buffer("freqs_sin", angles.sin().float())

    def forward(self, tokens: int) -> Rotation:
        """Return cosines and sines (tokens, d). Tokens before the patches, such as the class token, are not rotated."""
        before = tokens - len(self.freqs_cos)
        return F.pad(self.freqs_cos, (0, 0, before, 0), value=1.0), F.pad(self.freqs_sin, (0, 0, before, 0))


def patch_angles(grid_size: int, head_size: int) -> Tensor:
    """Return the angles (grid_size^2, head_size), float64, patches in row-major order. Each angle occurs twice."""
    half = head_size // 2
    frequencies = 10000.0 ** -(torch.arange(0, half, 2, dtype=torch.float64) / half)  # (d / 4,)
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies  # (grid, d / 4)
    line = angles.repeat_interleave(2, dim=1)  # (grid, d / 2)
    rows = line.repeat_interleave(grid_size, dim=0)  # (grid^2, d / 2)
    columns = line.repeat(grid_size, 1)  # (grid^2, d / 2)
    return torch.cat([rows, columns], dim=1)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Return queries or keys (N, heads, tokens, d), rotated: (a, b) -> (a cos - b sin, b cos + a sin) for each pair.

    The result is float32 for inputs in half precision, because the cosines and sines are float32.
    """
    cos, sin = rotation
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)  # (a, b) -> (-b, a)
    return x * cos + turned * sin

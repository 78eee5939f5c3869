"""The norms of the network: LayerNorm, or RMSNorm (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.sit_config import SiTConfig

EPS = 1e-6  # of the norms of tokens (DiT)
# Of RMSNorm of queries and keys: the default of nn.RMSNorm in float32. Its default in half precision is larger.
HEAD_EPS = torch.finfo(torch.float32).eps


class RMSNorm(nn.RMSNorm):
    """RMSNorm (arXiv 1910.07467), computed in the dtype of its weight: under autocast in float32, like LayerNorm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.weight is None else x.to(self.weight.dtype))


def token_norm(config: SiTConfig, affine: bool = False) -> nn.Module:
    """Return the norm over the width of a token, with a learned weight (LayerNorm: and bias) if `affine`."""
    norm = nn.LayerNorm if config.norm == "layer" else RMSNorm
    return norm(config.hidden_size, eps=EPS, elementwise_affine=affine)


def head_norm(config: SiTConfig) -> nn.Module:
    """Return the norm of queries or keys over the width of a head."""
    if config.qk_norm == "rms":
        return RMSNorm(config.head_size, eps=HEAD_EPS)
    return nn.LayerNorm(config.head_size) if config.qk_norm == "layer" else nn.Identity()

"""The averaged weights: what is sampled and evaluated.

ema <- decay ema + (1 - decay) weights, after each optimiser step, starting as a copy (REG's recipe: decay 0.9999).
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def averaged_copy(model: Module) -> Module:
    """Return a frozen copy of `model` in eval mode, to be kept by `update`."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def update(ema: nn.Module, model: nn.Module, decay: float = 0.9999) -> None:
    """Move `ema` towards `model` by 1 - decay, all tensors in a few fused operations."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)

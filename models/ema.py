"""The averaged weights: what is sampled and evaluated.

ema <- decay ema + (1 - decay) weights, after each optimiser step, starting as a copy (REG's recipe: decay 0.9999).
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Module = TypeVar("Module", bound=nn.Module)


def averaged_copy(model: Module) -> Module:
    """Return a frozen copy of `model` in eval mode, to be kept by `update`."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def update(ema: nn.Module, model: nn.Module, decay: float = 0.9999, good: Tensor | None = None) -> None:
    """Move `ema` towards `model` by 1 - decay; not at all where the scalar `good` is 0, without reading it."""
    weights, averages = local_parameters(model), local_parameters(ema)
    if good is None:
        torch._foreach_lerp_(averages, weights, 1 - decay)
    else:
        torch._foreach_lerp_(averages, weights, [good * (1 - decay)] * len(weights))


def local_parameters(network: nn.Module) -> list[Tensor]:
    """Return the parameters, or what of them lies on this process if they are sharded among several."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in network.parameters()]

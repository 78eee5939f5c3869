"""The exponential moving average (EMA) of the weights, which is used for sampling and evaluation.

ema <- decay ema + (1 - decay) weights, after each optimizer step, starting as a copy (REG: decay 0.9999).
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Module = TypeVar("Module", bound=nn.Module)


def averaged_copy(model: Module) -> Module:
    """Return a frozen copy of `model` in eval mode: the average at the start."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def update(ema: nn.Module, model: nn.Module, decay: float = 0.9999, good: Tensor | None = None) -> None:
    """Move `ema` towards `model` by 1 - decay, or not at all if the scalar tensor `good` is 0, without a host sync."""
    weights, averages = local_parameters(model), local_parameters(ema)
    if good is None:
        torch._foreach_lerp_(averages, weights, 1 - decay)
    else:
        torch._foreach_lerp_(averages, weights, [good * (1 - decay)] * len(weights))


def local_parameters(network: nn.Module) -> list[Tensor]:
    """Return the parameters, or this process's shards of them if they are sharded."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in network.parameters()]

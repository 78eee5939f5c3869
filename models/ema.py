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
    """Move `ema` towards `model` by 1 - decay, or not at all if the scalar tensor `good` is 0, without a host sync.

    The weights, float32, do not change.
    """
    # A fused SGD step from `ema`, with the weights as gradient and a weight decay of -1, is this update:
    # ema - lr (weights - ema) with lr = decay - 1. On a GPU a kernel updates many tensors, and a step with `found_inf`
    # 1 is skipped on the device, as in the optimizer. `maximize` is not used: older versions order it differently.
    torch._fused_sgd_(
        local_parameters(ema),
        local_parameters(model),
        [],
        weight_decay=-1.0,
        momentum=0.0,
        lr=decay - 1,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        found_inf=None if good is None else 1 - good,
    )


def local_parameters(network: nn.Module) -> list[Tensor]:
    """Return the parameters, or this process's shards of them if they are sharded."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in network.parameters()]

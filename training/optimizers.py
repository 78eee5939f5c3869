"""The optimizers of a run: AdamW, or Muon for the matrices of the blocks and AdamW for all other parameters.

Muon: Jordan et al., https://kellerjordan.github.io/posts/muon/; for REG's network: SR-DiT (arXiv 2512.12386).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training.config import TrainConfig

# Muon's settings, besides the learning rate. "original": the rate of a matrix is multiplied by
# sqrt(max(1, rows / columns)).
MUON = {"momentum": 0.95, "nesterov": True, "weight_decay": 0.0, "adjust_lr_fn": "original"}


def make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a run. Any optimizer may be returned here: `GuardedOptimizer` skips bad steps of all."""
    matrices = []
    others = list(network.parameters())
    if config.optimizer == "muon":
        named = list(network.named_parameters())
        matrices = [parameter for name, parameter in named if is_for_muon(name, parameter)]
        others = [parameter for name, parameter in named if not is_for_muon(name, parameter)]
    adamw = torch.optim.AdamW(
        others,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,  # honours `found_inf`, so a bad step is skipped without a host sync
    )
    if config.optimizer == "adamw":
        return adamw
    return MuonWithAdamW(adamw, torch.optim.Muon(matrices, lr=config.muon_learning_rate, **MUON))


def is_for_muon(name: str, parameter: Tensor) -> bool:
    """Return whether Muon trains a parameter: a matrix of attention, of an MLP, or of SPRINT's fusion."""
    inside_block = name.startswith("blocks.") and "adaLN_modulation" not in name
    return parameter.ndim == 2 and (inside_block or name == "fusion_proj.weight")


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon and a fused AdamW as one optimizer, whose two groups of parameters are AdamW's and Muon's.

    A step with `found_inf` 1 changes neither weights nor state, without a host sync. torch's Muon does not honour
    `found_inf`, so such a step is done with a finite gradient that leaves the momentum as it is, and the weights are
    put back from a copy. During a step this copy needs as much memory as the second moment that Muon does not have.

    `torch.amp.GradScaler` must have removed its scale from the gradients before, as for gradient clipping.
    """

    _step_supports_amp_scaling = True  # a GradScaler sets `found_inf` and does not read it on the host

    def __init__(self, adamw: torch.optim.AdamW, muon: torch.optim.Muon):
        self.adamw, self.muon = adamw, muon
        super().__init__([*adamw.param_groups, *muon.param_groups], {})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # `load_state_dict` calls this with new groups and a new state
        self._share()

    def _share(self) -> None:
        """Give both optimizers their group and the common state."""
        for optimizer, group in zip((self.adamw, self.muon), self.param_groups, strict=True):
            optimizer.param_groups = [group]
            optimizer.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the weights, unless `found_inf`, a scalar tensor on their device, is 1. There is no closure."""
        found_inf = getattr(self, "found_inf", None)
        self.adamw.found_inf = found_inf
        self.adamw.step()
        if found_inf is None:
            self.muon.step()
            return
        good = found_inf == 0
        trained = [parameter for parameter in self.param_groups[1]["params"] if parameter.grad is not None]
        for parameter in trained:
            state, gradient = self.state[parameter], local(parameter.grad)
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter.grad)
            # momentum + (1 - 0.95) (momentum - momentum) is the momentum, to the bit.
            gradient.copy_(torch.where(good, gradient, local(state["momentum_buffer"])))
        before = [local(parameter).clone() for parameter in trained]
        self.muon.step()
        for parameter, copy in zip(map(local, trained), before, strict=True):
            parameter.copy_(torch.where(good, parameter, copy))


def local(tensor: Tensor) -> Tensor:
    """Return a tensor, or this process's shard of it if it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

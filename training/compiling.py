"""Compiling a training step by torch.compile, region by region.

Each region is one graph: blocks, projectors and final layer, the loss before and after the network, the encoders. All
blocks share one compiled graph, so compiling takes as long for 28 of them as for one; between the regions gradients are
reduced as soon as they are there, activations can be checkpointed, and names of parameters stay what they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loss import REGLoss
from models.encoders import Encoder
from models.sit import SiT


def compile_training(network: SiT, encoders: Sequence[Encoder], criterion: REGLoss, backend: str = "inductor") -> None:
    """Compile, in place, the regions of a training step; they are built at their first use.

    A region that cannot be one graph is an error, not a slower step, and shapes are taken as fixed: every step of a run
    has the same. `backend`: of torch.compile.
    """
    how = {"backend": backend, "fullgraph": True, "dynamic": False}
    for module in (*network.blocks, *network.projectors, network.final_layer, *encoders):
        module.compile(**how)
    criterion.mix = torch.compile(criterion.mix, **how)
    criterion.compare = torch.compile(criterion.compare, **how)

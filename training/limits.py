"""Whether a run of given sizes can fit the memory at all, computed before any memory is taken."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from common.errors import InputError
from models.sit import SiT, SiTConfig
from models.sit_config import OUTER_BLOCKS

STATE_BYTES = 16  # of a parameter, float32: weight, average, and the two moments of AdamW
NUMBER_BYTES = 4  # of a float32


def parameter_count(network: SiTConfig) -> int:
    """Return the number of parameters of a network, positions included, from two networks with few blocks."""
    least = 2 * OUTER_BLOCKS + 1 if network.sprint else 1
    with torch.device("meta"):
        small = (SiT(replace(network, depth=depth, encoder_depth=1)) for depth in (least, least + 1))
        one, two = (sum(parameter.numel() for parameter in model.parameters()) for model in small)
    return one + (network.depth - least) * (two - one)


def check_memory(network: SiTConfig, batch_size: int, processes: int, sharded: bool, available: int) -> None:
    """Raise InputError if the state of a run, or the random numbers of its batch, need more than `available` bytes.

    Both are lower bounds of what a process needs: a run that passes may still be too large.
    """
    parameters = parameter_count(network)
    state = STATE_BYTES * parameters // (processes if sharded else 1)
    if state > available:
        raise InputError(
            f"the network of these flags has {parameters:,} parameters, whose weights, averages and optimizer state "
            f"take {in_gb(state)} on each process; it has {in_gb(available)}. Sizes come from --model, --hidden-size, "
            "--depth, --projector-dim and --num-classes (or the largest label of the data)"
        )
    sample = 2 * network.in_channels * network.input_size**2 + (network.cls_token_dim or 0)
    if (noise := NUMBER_BYTES * batch_size * sample) > available:
        raise InputError(
            f"--batch-size {batch_size}: the noise of a batch takes {in_gb(noise)}; a process has {in_gb(available)}"
        )


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory of a GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def in_gb(count: int) -> str:
    """Return a number of bytes as text."""
    return f"{count / 1e9:,.1f} GB"

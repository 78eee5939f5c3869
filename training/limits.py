"""Whether a run of given sizes can fit the memory at all, computed before any memory is taken."""

from __future__ import annotations

import os

import torch

from common.errors import InputError
from models.sit import TIME_FEATURES, SiTConfig

STATE_BYTES = 16  # of a parameter, float32: weight, average, and the two moments of AdamW
NUMBER_BYTES = 4  # of a float32


def parameter_count(network: SiTConfig) -> int:
    """Return the number of parameters of a network, positions included, without building it."""
    width, patch = network.hidden_size, network.patch_size**2 * network.in_channels
    inner, cls_dim = int(width * network.mlp_ratio), network.cls_token_dim or 0
    has_slot = bool(cls_dim) or network.learnable_token
    tokens = (network.input_size // network.patch_size) ** 2 + has_slot

    def linear(inputs: int, outputs: int) -> int:
        return (inputs + 1) * outputs

    embedders = linear(patch, width) + linear(TIME_FEATURES, width) + linear(width, width)
    embedders += (network.num_classes + 1) * width + tokens * width
    block = linear(width, 3 * width) + linear(width, width) + linear(width, inner) + linear(inner, width)
    block += linear(width, 6 * width) + (4 * (width // network.num_heads) if network.qk_norm else 0)
    hidden = network.projector_dim
    projectors = sum(linear(width, hidden) + linear(hidden, hidden) + linear(hidden, z) for z in network.z_dims)
    final = linear(width, patch) + linear(width, 2 * width)
    slot = linear(width, cls_dim) + linear(cls_dim, width) + 2 * width if cls_dim else 0
    slot += width if network.learnable_token else 0
    return embedders + network.depth * block + projectors + final + slot


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

"""The memory of a run, computed before any is taken: whether it can fit at all, and how small micro-batches must be."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from common.errors import InputError
from models.sit import SiT, SiTConfig
from training.activations import Activations, count_activations
from training.messages import logger

STATE_BYTES = 16  # of a parameter, float32: weight, average, and the two moments of AdamW
NUMBER_BYTES = 4  # of a float32
# Share of a GPU's memory that an estimate may reach. The rest is for what is not counted: gaps between the blocks of
# PyTorch's allocator, workspaces of libraries, batches in transfer, buffers of communication.
USABLE_SHARE = 0.9


def parameter_count(network: SiTConfig) -> int:
    """Return the number of parameters of a network, positions included, from two networks with few blocks."""
    block, rest = parameter_parts(network)
    return rest + network.depth * block


@functools.cache
def parameter_parts(network: SiTConfig) -> tuple[int, int]:
    """Return the number of parameters of a block, and of all that is not a block."""
    least = network.least_depth
    with torch.device("meta"):
        small = (SiT(network.with_depth(depth)) for depth in (least, least + 1))
        one, two = (sum(parameter.numel() for parameter in model.parameters()) for model in small)
    return two - one, one - least * (two - one)


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


class Estimate(NamedTuple):
    """Bytes that a training step takes on one process."""

    state: int  # weights, gradients, averages, moments of the optimizer
    loaded: int  # encoders and what else is on the device before
    activations: int  # what the backward pass needs

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


@dataclass(frozen=True)
class StepMemory:
    """The memory of a training step on one process, for any division of its samples into micro-batches.

    Args:
        network: the network.
        activations: what `count_activations` returns for it.
        samples: of an optimizer step, on each process.
        processes: number of processes.
        loaded: bytes on the device before: encoders, codec.
        sharded: whether --fsdp is given.
        checkpointing: whether --activation-checkpointing is given.
        multiple: the samples of a micro-batch must be a multiple of this number.
    """

    network: SiTConfig
    activations: Activations
    samples: int
    processes: int = 1
    loaded: int = 0
    sharded: bool = False
    checkpointing: bool = False
    multiple: int = 1

    def estimate(self, micro_batches: int) -> Estimate:
        """Return an upper estimate of the bytes of a step."""
        images = self.samples // micro_batches
        return Estimate(self.state, self.loaded, self.activations.peak(images, self.checkpointing))

    @property
    def state(self) -> int:
        """Bytes of the state. Sharded, some layers are complete: those outside the blocks, one block and the next."""
        block, rest = parameter_parts(self.network)
        state = (STATE_BYTES + NUMBER_BYTES) * (rest + self.network.depth * block)
        if not self.sharded:
            return state
        return state // self.processes + 2 * NUMBER_BYTES * (rest + 2 * block)  # weights and gradients

    def fewest_micro_batches(self, available: int) -> int | None:
        """Return the smallest number of equal micro-batches that fits `available` bytes; None if none does."""
        return next((number for number in self.divisors if self.fits(number, available)), None)

    @property
    def divisors(self) -> list[int]:
        """The possible numbers of micro-batches, in ascending order."""
        groups = self.samples // self.multiple
        return [number for number in range(1, groups + 1) if groups % number == 0]

    def fits(self, micro_batches: int, available: int) -> bool:
        """Return whether a step fits `available` bytes of a GPU."""
        return self.estimate(micro_batches).total <= USABLE_SHARE * available

    def advice(self, micro_batches: int, available: int) -> str:
        """Return which flags make a step fit `available` bytes, for a division that does not."""
        checkpointed, shards = replace(self, checkpointing=True), replace(self, sharded=True)
        fewest = self.fewest_micro_batches(available)
        options = {
            f"--gradient-accumulation-steps {fewest}": fewest is not None,
            "--activation-checkpointing": not self.checkpointing and checkpointed.fits(micro_batches, available),
            "--fsdp": self.processes > 1 and not self.sharded and shards.fits(micro_batches, available),
        }
        fitting = [option for option, fits in options.items() if fits]
        if fitting:
            return f"it fits with {' or '.join(fitting)}"
        least = "one image" if self.multiple == 1 else f"{self.multiple} images"
        return f"micro-batches of {least} do not fit either; use a smaller --model, or several GPUs with --fsdp"


def step_memory(
    network: SiTConfig,
    precision: str,
    compiled: bool,
    fused_attn: bool,
    device_type: str,
    loss_weights: dict[str, float] | None = None,
    **more: int | bool,
) -> StepMemory:
    """Return the memory of a training step. `more`: arguments of `StepMemory`; the others: `count_activations`."""
    activations = count_activations(network, precision, fused_attn, device_type, loss_weights)
    return StepMemory(network, activations.compiled(precision) if compiled else activations, **more)


def choose_micro_batches(memory: StepMemory, given: int | None, before: Any, free: int) -> int:
    """Return the number of micro-batches of a step on a GPU, and warn if a step may not fit.

    Args:
        memory: of a step.
        given: value of --gradient-accumulation-steps, which is taken as it is.
        before: number of the checkpoint from which the run resumes, kept if it fits, so that the sums are rounded as
            before; any value that is no such number is not used.
        free: bytes that the process can use.

    Without `given` and `before` this is the smallest number that fits; if none does, the largest possible number.
    """
    fewest = memory.fewest_micro_batches(free)
    parts = given or fewest or memory.divisors[-1]
    if given is None and type(before) is int and before in memory.divisors and memory.fits(before, free):
        parts = before
    if not memory.fits(parts, free):
        needed = f"a step in micro-batches of {memory.samples // parts} takes {in_gb(memory.estimate(parts).total)}"
        limit = f"{in_gb(free)} of the GPU are free, and an estimate should not exceed {in_gb(USABLE_SHARE * free)}"
        logger.warning("%s by an estimate; %s: %s", needed, limit, memory.advice(parts, free))
    elif given is None and parts > fewest:
        again = f"--gradient-accumulation-steps {fewest}"
        logger.info("note: %d micro-batches, as before; %d would fit, by an estimate: %s", parts, fewest, again)
    return parts


def free_memory(device: torch.device) -> int | None:
    """Return the bytes of a GPU that are free or held by this process; None for the CPU, which has no such limit."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory of a GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def in_gb(count: float) -> str:
    """Return a number of bytes as text."""
    return f"{count / 1e9:,.1f} GB"

"""Networks too large for every GPU to hold whole: weights, averages and AdamW's state cut up among the processes (FSDP:
PyTorch FSDP, arXiv 2304.11277; ZeRO, arXiv 1910.02054, stage 3), by torch's `fully_shard`.

Files hold whole tensors, so a checkpoint is the same whether its run was sharded or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from common.io import InputError
from loss import REGLoss
from models.ema import local_parameters
from models.encoders import Encoder
from models.sit import SiT


def check_sharding(accelerator: Accelerator, fsdp: bool) -> None:
    """Raise InputError if the processes cannot shard, or were told to shard by somebody else."""
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise InputError(
            f"accelerate is configured for {accelerator.distributed_type.value}; allowed is --fsdp instead"
        )
    if fsdp and accelerator.num_processes == 1:
        raise InputError("--fsdp with 1 process: there is nobody to share with; allowed: 2 processes or more")
    if fsdp and accelerator.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise InputError(f"--fsdp on the CPU with torch {torch.__version__}: needs a later one; on GPUs 2.6 will do")


def device_mesh(accelerator: Accelerator) -> DeviceMesh:
    """Return all processes in one row."""
    return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))


def shard(network: SiT, mesh: DeviceMesh) -> None:
    """Move a network, the same on all processes, to the mesh's devices, each its share. A block is gathered when it is
    to compute, while the one before it computes, and let go afterwards."""
    for block in network.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def shard_like(state: dict[int, dict[str, Tensor]], network: SiT) -> dict[int, dict[str, Tensor]]:
    """Return an optimiser's state, by index of the parameter, cut up as the network's parameters are."""
    parameters = list(network.parameters())

    def cut(value: Tensor, parameter: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
            return value
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    return {
        index: {name: cut(value, parameters[index]) for name, value in values.items()}
        for index, values in state.items()
    }


def count_parameters(network: torch.nn.Module) -> dict[str, int]:
    """Return how many parameters a network has, and how many of them this process keeps."""
    counts = {"parameters": network.parameters(), "parameters_kept": local_parameters(network)}
    return {name: sum(p.numel() for p in parameters) for name, parameters in counts.items()}


def whole_norm(norm: Tensor) -> Tensor:
    """Return a gradient's norm on the device, of all shards where it is sharded. Nothing waits for it."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def whole(value: Any, keep: bool = True) -> Any:
    """Return `value`, nested dicts and lists, with whole tensors on the CPU in place of shards; all else as it is.

    To be called on all processes. Without `keep` a process only gives its shares, and has None where shards were.
    """
    if isinstance(value, DTensor):
        gathered = value.full_tensor()
        return gathered.cpu() if keep else None
    if isinstance(value, Mapping):
        return {key: whole(item, keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item, keep) for item in value)
    return value


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


def to_device(batches: Iterable[Sequence[Tensor]], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Yield the batches' tensors on `device`.

    On a GPU they are copied on a stream of their own. The host is ahead of the GPU (see `training.step_reports`), so a
    batch travels while the step before it is still being computed; the memory it comes from must be pinned.
    """
    if device.type != "cuda":
        for batch in batches:
            yield tuple(tensor.to(device) for tensor in batch)
        return
    side_stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(side_stream):
            copies = tuple(tensor.to(device, non_blocking=True) for tensor in batch)
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(side_stream)
        for tensor in copies:
            tensor.record_stream(computing)  # its memory is not used again before the step is through with it
        yield copies

"""How a step uses the devices: sharding (FSDP), compiled regions, copies of batches that run next to the computation.

Networks too large for one GPU are sharded over the processes: weights, averages and optimizer state (PyTorch FSDP,
arXiv 2304.11277; ZeRO, arXiv 1910.02054, stage 3), by torch's `fully_shard`. Files hold full tensors, so a checkpoint
is the same with and without sharding.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from common.errors import InputError
from loss import REGLoss
from models.ema import local_parameters
from models.encoders import Encoder
from models.sit import SiT


def check_sharding(accelerator: Accelerator, fsdp: bool) -> None:
    """Raise InputError if the processes cannot shard."""
    if fsdp and accelerator.num_processes == 1:
        raise InputError("--fsdp with 1 process: sharding needs 2 processes or more")
    if fsdp and accelerator.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise InputError(f"--fsdp on the CPU with torch {torch.__version__}: needs a later version (on GPUs 2.6 works)")


def device_mesh(accelerator: Accelerator) -> DeviceMesh:
    """Return a one-dimensional mesh of all processes."""
    return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))


def shard(network: SiT, mesh: DeviceMesh, autocast: torch.dtype | None = None) -> None:
    """Move a network, identical on all processes, to the devices of the mesh, each with its shard.

    The weights of a block are gathered while the block before it computes, and released after use. `autocast`: the
    dtype of the autocast in which the network is used; None: it computes in float32.
    """
    for block in network.blocks:
        fully_shard(block, mesh=mesh, mp_policy=gathering(block, autocast))
    fully_shard(network, mesh=mesh)


def gathering(block: nn.Module, autocast: torch.dtype | None) -> MixedPrecisionPolicy:
    """Return in which dtypes the weights of a block are gathered, and their gradients reduced.

    Autocast casts the weights of linear layers, and returns their gradients, in its dtype. If a block has no other
    weights, they are gathered in this dtype: half of the communication, and the same results to the bit. A norm of
    queries and keys computes in float32, so blocks with it are gathered in float32. Gradients are always reduced in
    float32: their sum in half precision is less accurate, and in fp16 it can overflow.
    """
    owners = (module for module in block.modules() if next(module.parameters(recurse=False), None) is not None)
    if autocast is None or not all(isinstance(module, nn.Linear) for module in owners):
        return MixedPrecisionPolicy()
    # Inputs are not cast, because the sum of the blocks' outputs stays in float32.
    return MixedPrecisionPolicy(param_dtype=autocast, reduce_dtype=torch.float32, cast_forward_inputs=False)


def shard_like(state: dict[int, dict[str, Any]], parameters: Sequence[Tensor]) -> dict[int, dict[str, Any]]:
    """Return an optimizer's state, by index of the parameter, sharded as these parameters are."""

    def shard_value(value: Any, parameter: Tensor) -> Any:
        if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
            return value
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    return {
        index: {name: shard_value(value, parameters[index]) for name, value in values.items()}
        for index, values in state.items()
    }


def count_parameters(network: nn.Module) -> dict[str, int]:
    """Return the number of parameters of a network, and the number that this process holds."""
    counts = {"parameters": network.parameters(), "parameters_kept": local_parameters(network)}
    return {name: sum(p.numel() for p in parameters) for name, parameters in counts.items()}


def projectors_in_ddp(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of the projectors if the network is replicated by DDP, which needs a gradient of each weight.

    Otherwise return an empty list.
    """
    return list(model.module.projectors.parameters()) if isinstance(model, DistributedDataParallel) else []


def zero_with_gradients(weights: Sequence[nn.Parameter]) -> Tensor:
    """Return 0, whose gradient with respect to each of `weights` is zeros."""
    return 0 * torch.stack([weight.flatten()[0] for weight in weights]).sum()


def full_norm(norm: Tensor) -> Tensor:
    """Return a gradient norm over all shards, on the device, without a host sync."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def gather_full(value: Any, keep: bool = True) -> Any:
    """Return `value`, nested dicts and lists, with full tensors on the CPU in place of shards.

    All processes must call it. Without `keep` a process only contributes its shards, and gets None in their place.
    """
    if isinstance(value, DTensor):
        gathered = value.full_tensor()
        return gathered.cpu() if keep else None
    if isinstance(value, Mapping):
        return {key: gather_full(item, keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gather_full(item, keep) for item in value)
    return value


def compile_training(network: SiT, encoders: Sequence[Encoder], criterion: REGLoss, backend: str = "inductor") -> None:
    """Compile, in place, the regions of a training step; each is built at its first use.

    Each region is one graph: blocks, projectors, final layer, the loss before and after the network, the encoders. All
    blocks share one compiled graph, so 28 blocks compile as fast as one; gradients are reduced between the regions, and
    the names of parameters do not change. A region that cannot be one graph is an error, not a slower step. Shapes are
    fixed, since every step of a run has the same. `backend`: of torch.compile.
    """
    for variable in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
        if os.environ.get(variable) == "1":
            raise InputError(
                f"environment variable {variable}=1: --compile would do nothing; unset it, or --no-compile"
            )
    # By default a region is split at DDP's buckets, so that their gradients are reduced during its backward pass. They
    # are reduced between the regions already.
    torch._dynamo.config.optimize_ddp = False
    how = {"backend": backend, "fullgraph": True, "dynamic": False}
    for module in (*network.blocks, *network.projectors, network.final_layer, *encoders):
        module.compile(**how)
    criterion.mix = torch.compile(criterion.mix, **how)
    criterion.compare = torch.compile(criterion.compare, **how)


def to_device(batches: Iterable[Sequence[Tensor]], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors of the batches on `device`.

    For a GPU they are copied on a separate stream. The host is ahead of the GPU (see `training.metrics`), so a batch is
    copied while the step before it is computed; its host memory must be pinned.
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
            tensor.record_stream(computing)  # its memory is not reused before the step has finished with it
        yield copies

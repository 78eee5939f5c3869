"""Helpers for programs that run on several processes or on a GPU."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    check_cuda_p2p_ib_support,
    find_executable_batch_size,
    gather_object,
)
from torch import Tensor

from common.cli import uses_cuda
from common.errors import InputError, memory_message
from common.identity import changed_error

LONGEST_WORK = timedelta(days=2)
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
# Variables by which accelerate's launcher passes on its configuration, and what to use instead of them.
REFUSED_SETTINGS = {
    "ACCELERATE_USE_FSDP": "train.py --fsdp shards",
    "ACCELERATE_USE_DEEPSPEED": "train.py --fsdp shards",
    "ACCELERATE_USE_MEGATRON_LM": "train.py --fsdp shards",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "processes share the batch, or train.py --fsdp shards",
    "ACCELERATE_USE_SAGEMAKER": "start the processes by torchrun or accelerate launch",
    "ACCELERATE_DYNAMO_BACKEND": "--compile compiles",
    "ACCELERATE_TORCH_DEVICE": "--device chooses, and CUDA_VISIBLE_DEVICES among GPUs",
    "ACCELERATE_GRADIENT_CLIPPING": "train.py --max-grad-norm clips",
    "ACCELERATE_FP8_BACKEND": "--mixed-precision allows no, fp16 and bf16",
    "ACCELERATE_FP8_OPT_LEVEL": "--mixed-precision allows no, fp16 and bf16",
}
PRECISION = "ACCELERATE_MIXED_PRECISION"
OTHER_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")  # set by MPI's launchers in place of RANK
# Names of all variables that launchers set, or their first parts.
LAUNCHERS = ("ACCELERATE_", "FORK_LAUNCHED", "OMPI_", "PMI_", "MV2_", "MPI_", "MASTER_")
LAUNCHERS += ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
Value = TypeVar("Value")


def start_processes(
    device: str, mixed_precision: str = "no", gradient_accumulation_steps: int = 1, **more: Any
) -> Accelerator:
    """Return accelerate's object for the processes of a program: those of a launcher, or this one alone.

    Processes without GPUs are connected by gloo. Of accelerate's own configuration, which its launcher passes on as
    environment variables, CPU and processes are followed, and what this code does by flags of its own is refused.

    Args:
        device: value of --device: auto, cpu or cuda.
        mixed_precision: no, fp16 or bf16.
        gradient_accumulation_steps: micro-batches of a step.
        more: further arguments of `Accelerator`.

    Raises InputError if there are fewer GPUs than processes, or for a setting of accelerate that is not supported.
    """
    check_launch_settings(os.environ, gradient_accumulation_steps)
    try:
        check_process_numbers(os.environ)
        return _start_processes(device, mixed_precision, gradient_accumulation_steps, **more)
    except InputError:
        raise
    except ValueError as error:
        found = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(LAUNCHERS)]
        if not found:
            raise
        raise InputError(
            f"environment variables {' '.join(found)}: no process can start with these values; a launcher (torchrun, "
            "accelerate launch) sets them; without a launcher, unset them"
        ) from error


def _start_processes(device: str, mixed_precision: str, gradient_accumulation_steps: int, **more: Any) -> Accelerator:
    wanted = os.environ.get(PRECISION, "").lower()
    if wanted not in ("", "no", mixed_precision) and os.environ.get("LOCAL_RANK", "0") == "0":
        used = "float32" if mixed_precision == "no" else mixed_precision
        print(f"note: environment variable {PRECISION}={wanted} is not used: this program computes in {used}")
    on_gpu, number = uses_cuda(device), int(os.environ.get("LOCAL_RANK") or 0)
    if on_gpu and number >= torch.cuda.device_count():
        found = f"PyTorch finds {torch.cuda.device_count()} GPUs (CUDA_VISIBLE_DEVICES may hide some)"
        raise InputError(f"process {number + 1} of this machine has no GPU: {found}; start fewer processes")
    if device == "auto" and not on_gpu and number == 0 and torch.backends.mps.is_available():
        print("note: Apple's GPU (MPS) is not used, because it has no float64: this program runs on the CPU")
    if on_gpu and not check_cuda_p2p_ib_support():  # RTX 40: as accelerate's launcher does
        os.environ.update(NCCL_P2P_DISABLE="1", NCCL_IB_DISABLE="1")
    # If True, cuDNN times its algorithms and takes the fastest, which can be another one after a restart. Results of an
    # interrupted program (latents, images, scores, weights) would then differ from those of an uninterrupted one.
    torch.backends.cudnn.benchmark = False
    return Accelerator(
        cpu=not on_gpu,
        mixed_precision=mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=gradient_accumulation_steps),
        **more,
    )


def check_launch_settings(environment: Mapping[str, str], gradient_accumulation_steps: int = 1) -> None:
    """Raise InputError, naming the variable and what to do, for a setting of accelerate that is not supported."""
    for variable, instead in REFUSED_SETTINGS.items():
        value = environment.get(variable, "")
        if value.lower() not in ("", "no", "false", "0"):
            where = "set by accelerate's configuration or launcher"
            raise InputError(f"environment variable {variable}={value} ({where}): not supported; {instead}")
    steps = environment.get(ACCUMULATION, "1")
    if steps not in ("1", str(gradient_accumulation_steps)):
        instead = "accumulation is set by train.py --gradient-accumulation-steps alone"
        raise InputError(f"environment variable {ACCUMULATION}={steps} (set by accelerate's configuration): {instead}")


def check_process_numbers(environment: Mapping[str, str]) -> None:
    """Raise ValueError if a launcher's variables describe processes for which a program would wait without end."""
    rank, size = (int(environment.get(name) or default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    has_rank = any(environment.get(name) for name in ("RANK", *OTHER_RANKS))
    if (size > 1 and not has_rank) or not 0 <= rank < max(size, 1):
        raise ValueError(f"RANK {rank}, WORLD_SIZE {size}")


def broadcast_from_main(accelerator: Accelerator, decide: Callable[[], Value]) -> Value:
    """Return on every process the value of `decide()`, which only the main process calls. Every process must call this.

    For decisions that depend on files: a process that looks later may find files that another one has just written.
    An InputError of `decide` is raised on every process.
    """
    outcome = None
    if accelerator.is_main_process:
        try:
            outcome = decide()
        except InputError as error:
            outcome = error
    outcome = broadcast_object_list([outcome])[0]
    if isinstance(outcome, InputError):
        outcome.said_by_another = not accelerator.is_main_process
        raise outcome
    return outcome


def check_same_files(path: str | Path, before: Any, now: Any) -> None:
    """Raise InputError on every process if a file changed on one of them, or if those of a machine opened others.

    `before` and `now` are states of files (`common.identity`) before they were opened, and after they were read. Every
    process must call this. Processes of different machines may read copies.
    """
    states = gather_object([(socket.gethostname(), before, now)])
    opened = {host: state for host, state, _ in states}
    if any(not opened[host] == before == now for host, before, now in states):
        raise changed_error(path)


def long_collective_timeout() -> InitProcessGroupKwargs:
    """Return accelerate's setting that lets processes wait two days for each other instead of NCCL's 10 minutes.

    For programs that communicate rarely: one GPU may finish hours before another one. The launcher still notices a
    process that has died.
    """
    return InitProcessGroupKwargs(timeout=LONGEST_WORK)


def largest_batch(attempt: Callable[[int], object], largest: int) -> int:
    """Return the largest batch size that fits into memory: the first of `largest`, half of it, a quarter, ...

    `attempt(size)` does the work for one batch. On several processes, each must call this; the result is the minimum.
    Raises InputError if not even one image fits.
    """
    size = largest

    def halve() -> int:  # called while the out-of-memory error is handled
        nonlocal size
        if size == 1:
            full = memory_message(sys.exc_info()[1]) or "the memory is full"
            raise InputError(f"{full}: it is too small for a batch of one image")
        size //= 2
        return size

    find_executable_batch_size(attempt, largest, halve)()
    torch.cuda.empty_cache()  # NCCL allocates outside PyTorch's cache; without a GPU this does nothing
    return min(gather_object([size])) if torch.distributed.is_initialized() else size


def to_host(tensor: Tensor) -> Callable[[], np.ndarray]:
    """Start copying a tensor to the host and return a function that waits for the copy and returns it as an array.

    Meanwhile the GPU continues with the next work. Any thread may call the returned function.
    """
    if tensor.device.type != "cuda":
        return tensor.numpy
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)  # waiting uses no CPU time
    copied.record()

    def wait() -> np.ndarray:
        copied.synchronize()
        return host.numpy()

    return wait

"""Faster sampling from a trained network: half precision, compiled blocks, CUDA graphs.

Each of them changes images only by rounding; benchmarks/sample.py measures the change and the gain in speed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from models.sit import SiT, SiTOutput
from models.tensor_checks import check_finite, dtype_name

NETWORK_DTYPES = {"float32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WARM_UP_CALLS = 3  # before a capture, because libraries choose kernels and allocate memory in the first calls


def convert(model: SiT, dtype: torch.dtype) -> SiT:
    """Convert the weights to `dtype` in place, except those of the time embedders, and return the network.

    bfloat16 has 8 bits of precision: two consecutive times of 250 steps can be equal in it. An embedder is called once
    for a complete batch, so its float32 costs no time.
    Raises InputError if a weight is too large for `dtype`; float16 ends at 65504.
    """
    for part in model.children():
        if part not in (model.t_embedder, model.t_cls_embedder):
            part.to(dtype)
    model.pos_embed.data = model.pos_embed.to(dtype)
    check_finite(dict(model.named_parameters()), f"weights converted to {dtype_name(dtype)}")
    return model


def compile_blocks(model: SiT, backend: str = "inductor") -> None:
    """Let the first call compile the blocks and the final layer, once for each shape of a batch.

    All blocks share one compilation, which is much faster than compiling the complete network.
    """
    for part in (*model.blocks, model.final_layer):
        part.compile(fullgraph=True, dynamic=False, backend=backend)


class FastNetwork(NamedTuple):
    """How `samplers.sample_images` calls a network: its arguments `network` and `rows`."""

    network: Callable[..., SiTOutput]
    rows: int


def fast_network(model: SiT, batch_size: int, compiled: bool, cuda_graphs: bool) -> FastNetwork:
    """Return how a network is called for many batches of `batch_size` images, of which the last one may be smaller.

    compiled: compile the blocks of `model`, in place.
    cuda_graphs: call the network through CUDA graphs, whose memory is in use as long as the result exists.

    Compiled code and CUDA graphs are specific to a batch size, so a smaller batch is padded for them.
    """
    if compiled:
        compile_blocks(model)
    return FastNetwork(CudaGraphs(model) if cuda_graphs else model, batch_size if compiled or cuda_graphs else 1)


class _Captured(NamedTuple):
    """A graph, its input tensors and its output tensors."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor | None, ...]
    output: SiTOutput


class CudaGraphs:
    """Calls a network through CUDA graphs: one kernel launch for each call instead of hundreds.

    The first call with each shape and each value of `project` and `skip_middle` captures a graph. Each call overwrites
    the output of the previous call. `model` is on a CUDA device. Its weights may change their values, but not their
    addresses.
    """

    def __init__(self, model: SiT):
        self.model = model
        self._captured: dict[tuple, _Captured] = {}
        self._memory = torch.cuda.graph_pool_handle()  # shared by all graphs, because only one runs at a time

    @torch.inference_mode()
    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cls_token: Tensor | None = None,
        project: bool = False,
        skip_middle: bool = False,
        t_cls: Tensor | None = None,
    ) -> SiTOutput:
        """Return the network's velocities; the arguments are those of `SiT.forward`."""
        inputs = (x, t, y, cls_token, t_cls)
        key = (project, skip_middle, *((tensor.shape, tensor.dtype) for tensor in inputs if tensor is not None))
        if key not in self._captured:
            self._captured[key] = self._capture(inputs, project, skip_middle)
        captured = self._captured[key]
        for static, given in zip(captured.inputs, inputs, strict=True):
            if static is not None:
                static.copy_(given)
        captured.graph.replay()
        return captured.output

    def _capture(self, given: tuple[Tensor | None, ...], project: bool, skip_middle: bool) -> _Captured:
        inputs = tuple(None if tensor is None else tensor.clone() for tensor in given)
        x, t, y, cls_token, t_cls = inputs
        options = {"project": project, "skip_middle": skip_middle}
        call = partial(self.model, x, t, y, cls_token=cls_token, t_cls=t_cls, **options)
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(WARM_UP_CALLS):
                call()
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads may draw noise and write images during the capture.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            output = call()
        return _Captured(graph, inputs, output)

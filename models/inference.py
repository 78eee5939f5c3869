"""A trained network made fast for sampling: half precision, compiled blocks, CUDA graphs.

Each changes an image by rounding alone; benchmarks/sample.py measures by how much, and what each is worth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.sit import SiT, SiTOutput

NETWORK_DTYPES = {"float32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WARM_UP_CALLS = 3  # before a capture: libraries choose their kernels and take their memory in the first calls


def convert(model: SiT, dtype: torch.dtype) -> SiT:
    """Return the network with its weights turned to `dtype`, in place; the time's embedder stays as it is.

    bfloat16 keeps 8 bits: it cannot tell two neighbouring times of 250 steps apart. The embedder is called once for a
    whole batch, so its precision costs nothing.
    """
    for part in model.children():
        if part is not model.t_embedder:
            part.to(dtype)
    model.pos_embed.data = model.pos_embed.to(dtype)
    return model


def compile_blocks(model: SiT, backend: str = "inductor") -> None:
    """Have the blocks and the final layer compiled at their first call, once for each shape of a batch.

    All blocks share one compilation, which takes a fraction of the whole network's time.
    """
    for part in (*model.blocks, model.final_layer):
        part.compile(fullgraph=True, dynamic=False, backend=backend)


@dataclass(frozen=True)
class _Captured:
    """A graph, the tensors it reads and those it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor | None, ...]
    output: SiTOutput


class CudaGraphs:
    """Calls a network through CUDA graphs: one launch for each call in place of hundreds.

    A graph is captured at the first call with each shape. What a call returns is overwritten by the next one.

    Args:
        model: on a CUDA device; its weights may change, but not move.
    """

    def __init__(self, model: SiT):
        self.model = model
        self._captured: dict[tuple, _Captured] = {}
        self._memory = torch.cuda.graph_pool_handle()  # of all graphs, as no two of them run at once

    @torch.inference_mode()
    def __call__(
        self, x: Tensor, t: Tensor, y: Tensor, cls_token: Tensor | None = None, project: bool = False
    ) -> SiTOutput:
        """Return the network's velocities; the arguments are those of `SiT.forward`."""
        inputs = (x, t, y, cls_token)
        key = (project, *((tensor.shape, tensor.dtype) for tensor in inputs if tensor is not None))
        if key not in self._captured:
            self._captured[key] = self._capture(inputs, project)
        captured = self._captured[key]
        for static, given in zip(captured.inputs, inputs, strict=True):
            if static is not None:
                static.copy_(given)
        captured.graph.replay()
        return captured.output

    def _capture(self, given: tuple[Tensor | None, ...], project: bool) -> _Captured:
        inputs = tuple(None if tensor is None else tensor.clone() for tensor in given)
        x, t, y, cls_token = inputs
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_CALLS):
                self.model(x, t, y, cls_token=cls_token, project=project)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": threads that draw noise or write images may go on meanwhile.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            output = self.model(x, t, y, cls_token=cls_token, project=project)
        return _Captured(graph, inputs, output)

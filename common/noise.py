"""Noise of samples that depends on nothing but the seed of each image."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

# One thread takes 7 ms for 64 images of 256 px; small networks are faster. On the CPU, threads slow down the network.
GPU_NOISE_THREADS = 4


class ImageNoise:
    """Noise for a batch; each image has its own generator (as in EDM2), so its noise does not depend on the batch.

    Noise is drawn on the CPU, so it does not depend on the device either. Each call draws for every image the noise of
    the latents, then that of the class token.

    Args:
        seeds: one for each image of the batch, see `samplers.image_seeds`.
        shape: shape of one image's latents (C, H, W).
        cls_token_dim: width of the class token, or None.
        device: device of the returned noise.
        threads: number of threads that draw the next call's noise in the background; default: 4 for a GPU, else 0.
    """

    def __init__(
        self,
        seeds: list[int],
        shape: tuple[int, int, int],
        cls_token_dim: int | None,
        device: torch.device | str = "cpu",
        threads: int | None = None,
    ):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.cls_token_dim = shape, cls_token_dim
        self.device = torch.device(device)
        self.threads = threads if threads is not None else GPU_NOISE_THREADS * (self.device.type == "cuda")
        self._pool = ThreadPoolExecutor(self.threads) if self.threads else None
        self._pending = self._start()

    def __call__(self) -> tuple[Tensor, Tensor | None]:
        """Return standard normals (N, C, H, W) and (N, D) or None, float64."""
        state, drawing = self._pending
        for part in drawing:
            part()
        self._pending = self._start()
        x, cls = (part if part is None else part.to(self.device, non_blocking=True) for part in state)
        return x, cls

    def _start(self) -> tuple[tuple[Tensor, Tensor | None], list[Callable[[], None]]]:
        """Return tensors on the CPU, and functions to call; after the calls, the tensors contain noise."""
        pinned = self.device.type == "cuda"  # so that the copy to the GPU does not wait for the network
        count = len(self.generators)
        empty = partial(torch.empty, dtype=torch.float64, pin_memory=pinned)
        state = empty(count, *self.shape), empty(count, self.cls_token_dim) if self.cls_token_dim else None
        if self._pool is None:
            return state, [partial(self._fill, *state, range(count))]
        parts = [range(first, count, self.threads) for first in range(self.threads)]
        return state, [self._pool.submit(self._fill, *state, rows).result for rows in parts]

    @torch.inference_mode()  # the mode is set for each thread separately
    def _fill(self, x: Tensor, cls: Tensor | None, rows: range) -> None:
        for i in rows:
            x[i].normal_(generator=self.generators[i])
            if cls is not None:
                cls[i].normal_(generator=self.generators[i])

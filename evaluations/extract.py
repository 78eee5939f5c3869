"""Runs a feature network over images with all processes of an entry point, or takes its features from the cache."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from tqdm import tqdm

from common.cli import AUTO
from common.distributed import largest_batch
from common.io import InputError
from evaluations.batches import ImageBatch
from evaluations.features import Extraction, FeatureCache
from evaluations.inception.network import full_precision

CPU_BATCH = 32
LARGEST_BATCH = 512  # that an automatic batch size tries: more makes no GPU faster
Kind = TypeVar("Kind", bound=Extraction)


class Extractor:
    """Extracts features with all processes; the result is whole on the main one only. Hashes images meanwhile.

    batch_size: images at a time, or AUTO for as many as the GPU's memory holds, which each process finds for itself.
    """

    def __init__(self, accelerator: Accelerator, batch_size: int | str, cache: str | None = None):
        self.accelerator, self.batch_size = accelerator, batch_size
        self.device, self.is_main = accelerator.device, accelerator.is_main_process
        self._cache = FeatureCache(cache) if cache else None
        self._background = ThreadPoolExecutor(1)
        self._digests: dict[ImageBatch, Future[str]] = {}

    def __enter__(self) -> Extractor:
        return self

    def __exit__(self, *exception: object) -> None:
        self._background.shutdown(cancel_futures=True)

    def digest(self, images: ImageBatch) -> str:
        """Return the SHA-256 of the images' file or folder."""
        self._start_hashing(images)
        return self._digests[images].result()

    def __call__(self, network: nn.Module, name: str, images: ImageBatch, extraction: Kind) -> Kind:
        """Return the extraction, filled with the features that `network`, known as `name`, gives for all images."""
        if self.is_main:
            self._start_hashing(images)
        if self._cache is not None and self._from_cache(name, images, extraction):
            return extraction
        self._run(network, images, extraction)
        self._share(images, extraction)
        if self._cache is not None and self.is_main:
            self._cache.save(self.digest(images), name, extraction)
        return extraction

    def _start_hashing(self, images: ImageBatch) -> None:
        if images not in self._digests:
            self._digests[images] = self._background.submit(images.digest)

    def _from_cache(self, name: str, images: ImageBatch, extraction: Extraction) -> bool:
        found = [self.is_main and self._cache.load(self.digest(images), name, extraction, images.count)]
        return broadcast_object_list(found)[0]  # the other processes must know that there is nothing to do

    def _shard(self, images: ImageBatch, process: int) -> tuple[int, int]:
        """Return the range of images of a process: contiguous, so that features gather in order."""
        processes = self.accelerator.num_processes
        return images.count * process // processes, images.count * (process + 1) // processes

    def _run(self, network: nn.Module, images: ImageBatch, extraction: Extraction) -> None:
        start, stop = self._shard(images, self.accelerator.process_index)
        size = self._find_batch_size(network, images) if self.batch_size == AUTO else self.batch_size
        bar = tqdm(total=stop - start, desc=images.path.name, unit="image", disable=not self.is_main)
        with bar, full_precision(self.device):
            for first, batch in images.batches(start, stop, size):
                extraction.update(network(batch.to(self.device)), first)
                bar.update(len(batch))

    def _find_batch_size(self, network: nn.Module, images: ImageBatch) -> int:
        if self.device.type != "cuda":
            return CPU_BATCH

        def attempt(count: int) -> None:
            network(torch.zeros(count, 3, images.height, images.width, dtype=torch.uint8, device=self.device))

        with full_precision(self.device):
            return largest_batch(attempt, min(LARGEST_BATCH, images.count))

    def _share(self, images: ImageBatch, extraction: Extraction) -> None:
        """Add up the sums of all processes, and gather the features that are kept."""
        if self.accelerator.num_processes > 1:
            extraction.load(self.accelerator.reduce(extraction.state(), reduction="sum"))
            if extraction.keep:
                self._gather(images, extraction)
        if not all(tensor.isfinite().all() for tensor in extraction.state().values()):
            raise InputError(f"{images.path}: the network gives features that are not finite (NaN or infinity)")

    def _gather(self, images: ImageBatch, extraction: Extraction) -> None:
        shards = [self._shard(images, process) for process in range(self.accelerator.num_processes)]
        sizes = [stop - start for start, stop in shards]
        mine = torch.cat(extraction.kept).to(self.device)  # all shards have to be equally long to be gathered
        padded = torch.nn.functional.pad(mine, (0, 0, 0, max(sizes) - len(mine)))
        parts = self.accelerator.gather(padded).cpu().split(max(sizes))
        extraction.kept = [part[:size] for part, size in zip(parts, sizes, strict=True)]

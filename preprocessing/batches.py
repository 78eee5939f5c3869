"""Batches of a converted data set for the programs that encode it: reading, dividing, resuming, writing.

Batches are fixed slices of the data set, distributed over all processes. A batch of which a file is missing is encoded
again completely, because the rounding of a network may depend on the batch size.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.checks import AUTO, BATCH_SIZE, MAX_WORKERS, Check
from common.cli import Config, batch_size, setting
from common.distributed import largest_batch, long_collective_timeout, start_processes
from common.errors import InputError
from common.image_files import convert_command
from common.images import decode_rgb
from common.io import real_path
from common.loader import ErrorsAsItems, batches_of, check_shared_memory, start_worker
from common.progress import progress_bar
from common.sources import FileSource, mirrored_name
from preprocessing.destination import Destination
from preprocessing.listing import Listing, describe_files, image_index

GPU_BATCH, CPU_BATCH = 32, 1  # larger batches do not fit into a CPU's caches
LARGEST_BATCH = 128  # of --batch-size auto; larger batches are not faster on any GPU
WORKERS = Check(f"from 0 to {MAX_WORKERS:,}", lambda value: 0 <= value <= MAX_WORKERS)
PREFETCHED = 2  # batches of each process that reads
WRITES_IN_FLIGHT = 3  # batches: enough to hide the disk's latency


@dataclass(frozen=True, kw_only=True)
class BatchSettings(Config):
    """Batches."""

    batch_size: int | str | None = setting(
        None,
        f"images per batch on each device (default: {GPU_BATCH} on a GPU, {CPU_BATCH} on a CPU); auto: the largest "
        "that fits into the GPU's memory, which may differ when an interrupted run continues",
        check=BATCH_SIZE,
        parse=batch_size,
    )
    flip: bool = setting(False, "encode the mirrored images as well, for train.py --flip; this doubles the time")
    tf32: bool = setting(True, "use TF32 on GPUs, which is much faster and slightly less accurate")
    workers: int = setting(2, "processes that read images for each device; 0: the main process", check=WORKERS)


class Batch(NamedTuple):
    """A fixed slice of the data set: names of its images, names of the files made of them, and whether to mirror."""

    sources: tuple[str, ...]
    outputs: tuple[str, ...]
    flip: bool


@dataclass(frozen=True)
class Encoding:
    """What a program makes of the images of a batch.

    Attributes:
        what: the name of the results in messages, such as "latents".
        file_name: returns the name of an image's file from the image's index.
        encode: returns the results (N, ...) of images (N, 3, R, R), uint8, on the device.
        save: writes the results of a batch to the destination; a thread calls it.
    """

    what: str
    file_name: Callable[[int], str]
    encode: Callable[[Tensor], Tensor]
    save: Callable[[Destination, Batch, Tensor], None]


@dataclass(frozen=True)
class ImageBatches(Dataset):
    """Decoded batches, (N, 3, R, R) uint8. Raises InputError for an image that is broken or of another size."""

    source: FileSource
    batches: list[Batch]
    resolution: int

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> Tensor:
        images = np.stack([read_rgb(self.source, name, self.resolution) for name in self.batches[i].sources])
        if self.batches[i].flip:
            images = images[:, :, ::-1]
        return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def read_rgb(source: FileSource, name: str, resolution: int | None = None) -> np.ndarray:
    """Return an image of a converted data set, (R, R, 3) uint8. Raises InputError, naming it, if it is not that."""
    try:
        return source.load(name, partial(decode_rgb, resolution=resolution))
    except InputError as error:
        advice = "images must be those that convert.py writes; convert photographs with"
        raise InputError(f"{error}; {advice}:\n{convert_command(source.path)}") from error


def start_encoding(tf32: bool) -> Accelerator:
    """Return accelerate's object for the processes; an interrupted run gives the bytes of an uninterrupted one."""
    accelerator = start_processes("auto", kwargs_handlers=[long_collective_timeout()])
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    return accelerator


def describe_source(source: FileSource, listing: Listing, resolution: int) -> dict[str, Any]:
    """Return what a destination records of its source, so that a restart notices other images."""
    return {
        "source": str(real_path(source.path)),
        "listing": listing.digest(),
        "resolution": resolution,
        "images": describe_files(source, listing.names),
    }


def plan(names: Sequence[str], batch_size: int, flip: bool, file_name: Callable[[int], str]) -> list[Batch]:
    """Return all batches of the data set; with `flip`, those of the mirrored images follow."""
    parts = [tuple(names[start : start + batch_size]) for start in range(0, len(names), batch_size)]
    plain = [Batch(part, tuple(file_name(image_index(name)) for name in part), flip=False) for part in parts]
    mirrored = [Batch(sources, tuple(map(mirrored_name, outputs)), flip=True) for sources, outputs, _ in plain]
    return plain + mirrored if flip else plain


def encode_missing(
    config: BatchSettings,
    encoding: Encoding,
    source: FileSource,
    listing: Listing,
    resolution: int,
    destination: Destination,
    accelerator: Accelerator,
) -> None:
    """Encode this process's share of the missing batches, and wait for the other processes."""
    size = find_batch_size(config.batch_size, accelerator, encoding.encode, resolution)
    batches = plan(listing.names, size, config.flip, encoding.file_name)
    # Shared before looking for existing files: another process may write some in between.
    share = batches[accelerator.process_index :: accelerator.num_processes]
    missing = find_missing(share, source, destination, encoding.what)
    encode_batches(config.workers, encoding, ImageBatches(source, missing, resolution), destination, accelerator)
    accelerator.wait_for_everyone()


def find_missing(batches: list[Batch], source: FileSource, destination: Destination, what: str) -> list[Batch]:
    """Return the batches of which a file is missing, or was written before its image was changed or replaced."""
    missing, changed = [], ""
    for batch in batches:
        pairs = zip(batch.sources, batch.outputs, strict=True)
        if not all(map(destination.has, batch.outputs)):
            missing.append(batch)
        elif old := [name for name, output in pairs if destination.is_older(output, source.changed(name))]:
            missing.append(batch)
            changed = changed or old[0]
    if changed:
        print(f"{source.describe(changed)} or others were changed after their {what} were written; encoded again")
    return missing


def find_batch_size(
    wanted: int | str | None, accelerator: Accelerator, encode: Callable[[Tensor], Tensor], resolution: int
) -> int:
    """Return the number of images per batch, the same on every process."""
    on_gpu = accelerator.device.type == "cuda"
    if wanted != AUTO or not on_gpu:
        return wanted if isinstance(wanted, int) else GPU_BATCH if on_gpu else CPU_BATCH

    def attempt(count: int) -> None:
        encode(torch.zeros(count, 3, resolution, resolution, dtype=torch.uint8, device=accelerator.device))

    return largest_batch(attempt, LARGEST_BATCH)


def encode_batches(
    workers: int, encoding: Encoding, images: ImageBatches, destination: Destination, accelerator: Accelerator
) -> None:
    """Encode batches and write their files. Processes read ahead, and a thread writes while the device computes.

    Raises InputError if an image is broken or of another size, or if results are not finite; LostProcess if a process
    that reads has ended.
    """
    device = accelerator.device
    if images.batches:
        batch_bytes = 3 * images.resolution**2 * max(len(batch.outputs) for batch in images.batches)
        check_shared_memory("--workers", min(workers, len(images.batches)), PREFETCHED, batch_bytes)
    loader = DataLoader(
        ErrorsAsItems(images),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCHED if workers else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=start_worker,
    )
    total = sum(len(batch.outputs) for batch in images.batches)
    progress = progress_bar(total=total, desc="encoding", unit="image", main=accelerator.is_main_process, lines=True)
    writing: deque[Future] = deque()
    with ThreadPoolExecutor(1) as writer, progress:
        for batch, pixels in zip(images.batches, batches_of(loader, "--workers"), strict=True):
            results = encoding.encode(pixels.to(device, non_blocking=True))
            writing.append(writer.submit(encoding.save, destination, batch, results))
            if len(writing) > WRITES_IN_FLIGHT:
                writing.popleft().result()
            progress.update(len(batch.outputs))
        for pending in writing:
            pending.result()


def write_arrays(destination: Destination, batch: Batch, arrays: np.ndarray, problem: str) -> None:
    """Write the arrays (N, ...) of a batch, one .npy file per image.

    Raises InputError, naming the image and then the `problem`, if a value is not finite.
    """
    contents = {}
    for name, source, array in zip(batch.outputs, batch.sources, arrays, strict=True):
        if not np.isfinite(array).all():
            raise InputError(f"{source}: {problem}")
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        contents[name] = buffer.getvalue()
    destination.write_batch(contents)

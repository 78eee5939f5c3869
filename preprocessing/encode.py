"""Encode images to the latents that training reads: mean and standard deviation of each image's latents, or one draw.

    python preprocessing/encode.py --source DATA/images --dest DATA/vae-sd --vae sd-vae-ft-mse
    accelerate launch --num_processes 8 preprocessing/encode.py --source ... (the same, on eight GPUs)

writes `DATA/vae-sd/00000/img-mean-std-00000000.npy`, ... (2 C, h, w), and a `dataset.json` with the labels and the
codec's format. For a codec that does not state scale and shift of its latents, they are measured at the end. After an
interruption, the same command continues and gives the same bytes as an uninterrupted run: batches are fixed slices of
the data set, and an incomplete batch is encoded again completely, because the rounding of a network may depend on the
batch size.
"""

from __future__ import annotations

import hashlib
import io
import sys
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.checks import AUTO, BATCH_SIZE, MAX_WORKERS, NON_NEGATIVE, Check
from common.cli import batch_size, parse, setting
from common.distributed import broadcast_from_main, largest_batch, long_collective_timeout, start_processes
from common.errors import InputError, run_cli
from common.image_files import convert_command
from common.images import decode_rgb
from common.io import real_path
from common.loader import ErrorsAsItems, batches_of, check_shared_memory, start_worker
from common.progress import progress_bar
from common.sources import FileSource, latents_name, mirrored_name
from dataset import STORED, decode_latents
from models.autoencoder import Codec, load_codec
from models.latent_format import LatentFormat
from preprocessing.destination import Destination, InputOutput, explain_write_errors
from preprocessing.latent_statistics import measured_format, spread
from preprocessing.listing import Listing, describe_files, image_index, list_converted
from samplers import image_seeds

GPU_BATCH, CPU_BATCH = 32, 1  # larger batches do not fit into a CPU's caches
LARGEST_BATCH = 128  # of --batch-size auto; larger batches are not faster on any GPU
WORKERS = Check(f"from 0 to {MAX_WORKERS:,}", lambda value: 0 <= value <= MAX_WORKERS)
PREFETCHED = 2  # batches of each process that reads
STATISTICS_IMAGES = 10_000
DRAW_SEED = 0  # of the draws that are stored; each image has its own noise
WRITES_IN_FLIGHT = 3  # batches: enough to hide the disk's latency


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(InputOutput):
    """Settings of encode.py."""

    vae: str = setting("sd-vae-ft-mse", "codec: a name such as taesd or pixel, a repository of the hub, or a folder")
    batch_size: int | str | None = setting(
        None,
        f"images per batch on each device (default: {GPU_BATCH} on a GPU, {CPU_BATCH} on a CPU); auto: the largest "
        "that fits into the GPU's memory, which may differ when an interrupted run continues",
        check=BATCH_SIZE,
        parse=batch_size,
    )
    dtype: str = setting("float32", "number format of the files", choices=("float32", "float16"))
    store: str = setting(
        "moments",
        "what the files contain: mean and standard deviation, of which training draws in each step; or one draw for "
        "each image, always the same and half the size",
        choices=STORED,
    )
    statistics_images: int | None = setting(
        None,
        "images from whose latents mean and standard deviation of each channel are measured, at equal distances; "
        "dataset.json then has scale and shift that give zero mean and unit variance (default: "
        f"{STATISTICS_IMAGES:,}, or all if fewer, for a codec whose config.json has no scale; else 0, its own scale)",
        check=NON_NEGATIVE,
    )
    flip: bool = setting(False, "encode the mirrored images as well, for train.py --flip; this doubles the time")
    tf32: bool = setting(True, "use TF32 on GPUs, which is much faster and slightly less accurate")
    workers: int = setting(2, "processes that read images for each device; 0: the main process", check=WORKERS)


class Batch(NamedTuple):
    """A fixed slice of the data set: names of its images, names of their latents, and whether to mirror the images."""

    sources: tuple[str, ...]
    outputs: tuple[str, ...]
    flip: bool


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


def plan(names: Sequence[str], batch_size: int, flip: bool) -> list[Batch]:
    """Return all batches of the data set; with `flip`, those of the mirrored images follow."""
    parts = [tuple(names[start : start + batch_size]) for start in range(0, len(names), batch_size)]
    plain = [Batch(part, tuple(latents_name(image_index(name)) for name in part), flip=False) for part in parts]
    mirrored = [Batch(sources, tuple(map(mirrored_name, outputs)), flip=True) for sources, outputs, _ in plain]
    return plain + mirrored if flip else plain


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    # Open the source and load the codec.
    config = parse(EncodeConfig, __doc__.splitlines()[0], argv)
    source = FileSource(config.source)
    listing = list_converted(source)
    resolution = read_rgb(source, listing.names[0]).shape[0]
    accelerator = start_processes("auto", kwargs_handlers=[long_collective_timeout()])
    torch.backends.cudnn.deterministic = True  # an interrupted run must give the bytes of an uninterrupted one
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.tf32
    codec = load_codec(config.vae, accelerator.device)
    if resolution % codec.format.factor:
        needed = f"codec {config.vae} needs a multiple of {codec.format.factor}"
        raise InputError(f"{config.source}: images of {resolution} px; {needed}")
    measured = images_to_measure(config, codec.format)
    destination = Destination(config.dest, "encode")

    def claim() -> bool:
        settings = {
            "source": str(real_path(config.source)),
            "listing": listing.digest(),
            "resolution": resolution,
            "images": describe_files(source, listing.names),
            "codec": codec.format.to_json(),
            "codec weights": weights_digest(codec),
            **{name: getattr(config, name) for name in ("dtype", "flip", "tf32")},
            # Not recorded in destinations of earlier versions, where they had these values.
            **({"store": config.store} if config.store != "moments" else {}),
            **({"statistics_images": measured} if measured else {}),
        }
        with explain_write_errors(config.dest):
            return destination.claim(settings, added=("codec weights",))

    if broadcast_from_main(accelerator, claim):
        accelerator.print(f"{config.dest}: already complete")
        return

    # Encode this process's share of the missing batches.
    with explain_write_errors(config.dest):
        batches = plan(listing.names, find_batch_size(config.batch_size, accelerator, codec, resolution), config.flip)
        # Shared before looking for existing files: another process may write some in between.
        share = batches[accelerator.process_index :: accelerator.num_processes]
        images = ImageBatches(source, find_missing(share, source, destination), resolution)
        encode(config, codec, images, destination, accelerator)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            finish(config, destination, listing, codec.format, measured)


def images_to_measure(config: EncodeConfig, latent_format: LatentFormat) -> int:
    """Return from how many images the statistics of the latents are measured, 0 if the codec's own are used."""
    if config.statistics_images is None:
        return STATISTICS_IMAGES if latent_format.scale is None else 0
    if config.statistics_images == 0 and latent_format.scale is None:
        problem = "has no scale and shift of its latents, so they have to be measured"
        raise InputError(f"--statistics-images 0: codec {latent_format.codec} {problem}; allowed: from 1")
    return config.statistics_images


def weights_digest(codec: Codec) -> str:
    """Return a checksum of a codec's weights: another codec may have the same name."""
    digest = hashlib.sha256()
    for name, tensor in codec.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.float().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def find_missing(batches: list[Batch], source: FileSource, destination: Destination) -> list[Batch]:
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
        print(f"{source.describe(changed)} or others were changed after their latents were written; encoded again")
    return missing


def find_batch_size(wanted: int | str | None, accelerator: Accelerator, codec: Codec, resolution: int) -> int:
    """Return the number of images per batch, the same on every process."""
    on_gpu = accelerator.device.type == "cuda"
    if wanted != AUTO or not on_gpu:
        return wanted if isinstance(wanted, int) else GPU_BATCH if on_gpu else CPU_BATCH

    def attempt(count: int) -> None:
        codec.encode(torch.zeros(count, 3, resolution, resolution, dtype=torch.uint8, device=accelerator.device))

    return largest_batch(attempt, LARGEST_BATCH)


def encode(
    config: EncodeConfig, codec: Codec, images: ImageBatches, destination: Destination, accelerator: Accelerator
) -> None:
    """Encode batches and write their files. Processes read ahead, and a thread writes while the device computes.

    Raises InputError if an image is broken or of another size, or if latents are not finite; LostProcess if a process
    that reads has ended.
    """
    device = accelerator.device
    if images.batches:
        batch_bytes = 3 * images.resolution**2 * max(len(batch.outputs) for batch in images.batches)
        check_shared_memory("--workers", min(config.workers, len(images.batches)), PREFETCHED, batch_bytes)
    loader = DataLoader(
        ErrorsAsItems(images),
        batch_size=None,
        num_workers=config.workers,
        prefetch_factor=PREFETCHED if config.workers else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=start_worker,
    )
    total = sum(len(batch.outputs) for batch in images.batches)
    progress = progress_bar(total=total, desc="encoding", unit="image", main=accelerator.is_main_process, lines=True)
    writing: deque[Future] = deque()
    with ThreadPoolExecutor(1) as writer, progress:
        for batch, pixels in zip(images.batches, batches_of(loader, "--workers"), strict=True):
            moments = codec.encode(pixels.to(device, non_blocking=True))
            writing.append(writer.submit(save, destination, batch, moments, config.dtype, config.store))
            if len(writing) > WRITES_IN_FLIGHT:
                writing.popleft().result()
            progress.update(len(batch.outputs))
        for pending in writing:
            pending.result()


def save(destination: Destination, batch: Batch, moments: Tensor, dtype: str, store: str = "moments") -> None:
    """Write a batch's moments (N, 2 C, h, w), or a draw from them (N, C, h, w), one file per image.

    Raises InputError if a value is not finite.
    """
    latents = moments.cpu() if store == "moments" else draw(moments.cpu(), batch)
    with np.errstate(over="ignore"):  # an overflow to float16 is found below
        arrays = latents.numpy().astype(dtype)
    contents = {}
    for name, source, array in zip(batch.outputs, batch.sources, arrays, strict=True):
        if not np.isfinite(array).all():
            raise InputError(f"{source}: its latents are not finite as {dtype}; is --vae the right codec?")
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        contents[name] = buffer.getvalue()
    destination.write_batch(contents)


def draw(moments: Tensor, batch: Batch) -> Tensor:
    """Return mean + std * noise (N, C, h, w) of moments (N, 2 C, h, w); an image's noise depends on its index only."""
    mean, std = moments.chunk(2, dim=1)
    noise = torch.empty_like(mean, memory_format=torch.contiguous_format)
    seeds = image_seeds(DRAW_SEED, [2 * image_index(name) + batch.flip for name in batch.sources])
    for one, seed in zip(noise, seeds, strict=True):
        one.normal_(generator=torch.Generator().manual_seed(seed))
    return mean + std * noise


def finish(
    config: EncodeConfig, destination: Destination, listing: Listing, latent_format: LatentFormat, measured: int
) -> None:
    """Write dataset.json: labels, the format of the latents, and whether those of the mirrored images exist.

    Scale and shift are measured from the written latents of `measured` images, if that is not 0.
    """
    names = {i: latents_name(image_index(name)) for i, name in enumerate(listing.names)}
    record = {}
    if measured:
        chosen = [names[i] for i in spread(len(names), measured)]
        latent_format = measured_format(
            latent_format, chosen, lambda name: decode_latents(destination.read(name)), config.store
        )
        record["statistics_images"] = len(chosen)
        print(f"{destination.path}: scale and shift measured from the latents of {len(chosen):,} images")
    if config.store != "moments":
        record["latents"] = config.store
    destination.finish({**listing.table(names), "codec": latent_format.to_json(), "flip": config.flip, **record})
    print(f"{destination.path}: latents of {len(names):,} images, codec {latent_format.codec}")


if __name__ == "__main__":
    run_cli(main, memory_advice="give it a smaller --batch-size")

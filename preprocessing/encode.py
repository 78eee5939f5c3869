"""Encode a data set of images into the latents that training reads: mean and standard deviation of each image.

    python preprocessing/encode.py --source DATA/images --dest DATA/vae-sd --vae sd-vae-ft-mse
    accelerate launch --num_processes 8 preprocessing/encode.py --source ... (the same, on eight GPUs)

makes `DATA/vae-sd/00000/img-mean-std-00000000.npy`, ... (2 C, h, w), and `dataset.json` with the labels and the codec's
format. Killed at any moment, the same command goes on where it stopped and ends with the same bytes: batches are fixed
slices of the data set, and a batch that is not complete is encoded again as a whole, because a network's rounding may
depend on the size of its batch.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.cli import AUTO, SWITCH, batch_size, check_batch_size
from common.distributed import largest_batch, long_collective_timeout
from common.images import decode_rgb
from common.io import InputError, run_cli
from common.sources import FileSource, latents_name, mirrored_name
from models.autoencoder import Codec, load_codec
from preprocessing.destination import Destination, explain_write_errors
from preprocessing.listing import Listing, describe_files, image_index, list_converted

BATCH_SIZE, CPU_BATCH_SIZE = 32, 1  # a CPU's caches hold no more
LARGEST_BATCH = 128  # that --batch-size auto tries: more makes no GPU faster
WRITES_IN_FLIGHT = 3  # batches: enough to hide the disk, few enough to need little memory


class Batch(NamedTuple):
    """A fixed slice of the data set: source names and output names of its images, and whether they are mirrored."""

    sources: tuple[str, ...]
    outputs: tuple[str, ...]
    flip: bool


@dataclass(frozen=True)
class ImageBatches(Dataset):
    """Decoded batches, (N, 3, R, R) uint8, for a DataLoader that reads ahead in other processes.

    An unusable image gives its InputError as the item: raised here, it would reach the user as a worker's traceback.
    """

    source: FileSource
    batches: list[Batch]
    resolution: int

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> Tensor | InputError:
        try:
            images = np.stack([read_rgb(self.source, name, self.resolution) for name in self.batches[i].sources])
        except InputError as error:
            return error
        if self.batches[i].flip:
            images = images[:, :, ::-1]
        return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def read_rgb(source: FileSource, name: str, resolution: int | None = None) -> np.ndarray:
    """Return an image of a converted data set, (R, R, 3) uint8; raise InputError, naming it, if it is not that."""
    data = source.read(name)
    try:
        return decode_rgb(data, resolution)
    except InputError as error:
        raise InputError(f"{source.describe(name)}: {error}; run preprocessing/convert.py first") from error


def plan(names: Sequence[str], batch_size: int, flip: bool) -> list[Batch]:
    """Return all batches of the data set, the plain ones first; `flip` adds those of the mirrored images."""
    parts = [tuple(names[start : start + batch_size]) for start in range(0, len(names), batch_size)]
    plain = [Batch(part, tuple(latents_name(image_index(name)) for name in part), flip=False) for part in parts]
    mirrored = [Batch(sources, tuple(map(mirrored_name, outputs)), flip=True) for sources, outputs, _ in plain]
    return plain + mirrored if flip else plain


def encode(
    codec: Codec,
    images: ImageBatches,
    destination: Destination,
    device: torch.device,
    dtype: str,
    workers: int,
    show_progress: bool,
) -> None:
    """Encode batches and write their files as `dtype`; while the device computes, `workers` processes read ahead and a
    thread writes behind.

    Raises InputError for an unusable image and for latents that are not finite.
    """
    loader = DataLoader(images, batch_size=None, num_workers=workers, pin_memory=device.type == "cuda")
    total = sum(len(batch.outputs) for batch in images.batches)
    progress = tqdm(total=total, desc="encoding", unit="image", disable=not show_progress)
    writing: deque[Future] = deque()
    with ThreadPoolExecutor(1) as writer, progress:
        for batch, pixels in zip(images.batches, loader, strict=True):
            if isinstance(pixels, InputError):
                raise pixels
            moments = codec.encode(pixels.to(device, non_blocking=True))
            writing.append(writer.submit(save, destination, batch, moments, dtype))
            if len(writing) > WRITES_IN_FLIGHT:
                writing.popleft().result()
            progress.update(len(batch.outputs))
        for pending in writing:
            pending.result()


def save(destination: Destination, batch: Batch, moments: Tensor, dtype: str) -> None:
    """Write a batch's moments (N, 2 C, h, w), one file an image. Raises InputError if a value is not finite."""
    with np.errstate(over="ignore"):  # looked for below
        arrays = moments.cpu().numpy().astype(dtype)
    contents = {}
    for name, source, array in zip(batch.outputs, batch.sources, arrays, strict=True):
        if not np.isfinite(array).all():
            raise InputError(f"{source}: its latents are not finite as {dtype}; is this the right codec?")
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        contents[name] = buffer.getvalue()
    destination.write_batch(contents)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser("encode.py", description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="images made by convert.py, folder or zip")
    parser.add_argument("--dest", type=Path, required=True, help="folder to make, or a zip if it ends in .zip")
    parser.add_argument(
        "--vae",
        default="sd-vae-ft-mse",
        help="codec: a name such as sd-vae-ft-mse (the default) or pixel, a repository of the hub, or a local folder",
    )
    parser.add_argument(
        "--batch-size",
        type=batch_size,
        help=f"images encoded at once, on each device (default: {BATCH_SIZE} on a GPU, {CPU_BATCH_SIZE} on a CPU); "
        "auto: as many as the GPU's memory holds, which may be others when an interrupted run goes on",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="number format of the files (default: float32)",
    )
    parser.add_argument(
        "--flip",
        action="store_true",
        help="encode every image mirrored as well, for train.py --flip (off by default: it doubles the time)",
    )
    parser.add_argument(
        "--tf32",
        action=SWITCH,
        default=True,
        help="let GPUs compute in TF32, much faster and a little coarser (on by default; no effect on CPUs)",
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="processes that read images, for each device (default: 2)"
    )
    args = parser.parse_args(argv)
    if args.batch_size is not None:
        check_batch_size("--batch-size", args.batch_size)
    if args.workers < 0:
        raise InputError(f"--workers {args.workers}: must be 0 (read in the main process) or more")
    if args.dest.resolve().is_relative_to(args.source.resolve()):
        raise InputError(f"--dest {args.dest}: lies inside --source {args.source}; give another place")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = parse_arguments(argv)
    source = FileSource(args.source)
    listing = list_converted(source)
    resolution = read_rgb(source, listing.names[0]).shape[0]
    accelerator = Accelerator(kwargs_handlers=[long_collective_timeout()])
    device = accelerator.device
    torch.backends.cudnn.deterministic = True  # a run that was interrupted must give the bytes of one that was not
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.tf32
    codec = load_codec(args.vae, device).to(memory_format=torch.channels_last)
    if resolution % codec.format.factor:
        raise InputError(
            f"{args.source}: images of {resolution} px; codec {args.vae} needs a multiple of {codec.format.factor}"
        )
    destination = Destination(args.dest, "encode")
    with explain_write_errors(args.dest):
        if accelerator.is_main_process and destination.claim(settings_of(args, source, listing, resolution, codec)):
            print(f"{args.dest}: complete already")
        accelerator.wait_for_everyone()
        if destination.is_zip and args.dest.exists():
            return
        batches = plan(listing.names, find_batch_size(args.batch_size, accelerator, codec, resolution), args.flip)
        # Shared out before looking at what is there: what one process sees may be changing by another's hand.
        mine = batches[accelerator.process_index :: accelerator.num_processes]
        missing = [batch for batch in mine if not all(destination.has(name) for name in batch.outputs)]
        images = ImageBatches(source, missing, resolution)
        encode(codec, images, destination, device, args.dtype, args.workers, accelerator.is_main_process)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            finish(destination, listing, codec, args.flip)


def settings_of(
    args: argparse.Namespace, source: FileSource, listing: Listing, resolution: int, codec: Codec
) -> dict[str, object]:
    """Return all that decides what the latents are, to be compared when the same destination is written to again."""
    return {
        "source": str(args.source.resolve()),
        "listing": listing.digest(),
        "resolution": resolution,
        "images": describe_files(source, listing.names),
        "codec": codec.format.to_json(),
        "dtype": args.dtype,
        "flip": args.flip,
        "tf32": args.tf32,
    }


def find_batch_size(wanted: int | str | None, accelerator: Accelerator, codec: Codec, resolution: int) -> int:
    """Return how many images to encode at once, the same on every process."""
    on_gpu = accelerator.device.type == "cuda"
    if wanted != AUTO or not on_gpu:
        return wanted if isinstance(wanted, int) else BATCH_SIZE if on_gpu else CPU_BATCH_SIZE

    def attempt(count: int) -> None:
        codec.encode(torch.zeros(count, 3, resolution, resolution, dtype=torch.uint8, device=accelerator.device))

    found = torch.tensor([largest_batch(attempt, LARGEST_BATCH)], device=accelerator.device)
    return int(accelerator.gather(found).min())


def finish(destination: Destination, listing: Listing, codec: Codec, flip: bool) -> None:
    """Write dataset.json: the plain latents' labels, the codec's format, and whether mirrored latents lie beside."""
    labels = [
        [latents_name(image_index(name)), label] for name, label in zip(listing.names, listing.labels, strict=True)
    ]
    classes = {"classes": listing.classes} if listing.classes else {}
    destination.finish({"labels": labels, **classes, "codec": codec.format.to_json(), "flip": flip})
    print(f"{destination.path}: latents of {len(labels):,} images, codec {codec.format.codec}")


if __name__ == "__main__":
    run_cli(main)

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
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.checks import NON_NEGATIVE
from common.cli import parse, setting
from common.distributed import broadcast_from_main
from common.errors import InputError, run_cli
from common.sources import FileSource, latents_name
from dataset import STORED, decode_latents
from models.autoencoder import Codec, load_codec
from models.latent_format import LatentFormat
from preprocessing.batches import (
    Batch,
    BatchSettings,
    Encoding,
    describe_source,
    encode_missing,
    read_rgb,
    start_encoding,
    write_arrays,
)
from preprocessing.destination import Destination, InputOutput, explain_write_errors
from preprocessing.latent_statistics import measured_format, spread
from preprocessing.listing import Listing, image_index, list_converted
from samplers import image_seeds

STATISTICS_IMAGES = 10_000
DRAW_SEED = 0  # of the draws that are stored; each image has its own noise


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(InputOutput, BatchSettings):
    """Settings of encode.py."""

    vae: str = setting("sd-vae-ft-mse", "codec: a name such as taesd or pixel, a repository of the hub, or a folder")
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


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    # Open the source and load the codec.
    config = parse(EncodeConfig, __doc__.splitlines()[0], argv)
    source = FileSource(config.source)
    listing = list_converted(source)
    resolution = read_rgb(source, listing.names[0]).shape[0]
    accelerator = start_encoding(config.tf32)
    codec = load_codec(config.vae, accelerator.device)
    if resolution % codec.format.factor:
        needed = f"codec {config.vae} needs a multiple of {codec.format.factor}"
        raise InputError(f"{config.source}: images of {resolution} px; {needed}")
    measured = images_to_measure(config, codec.format)
    destination = Destination(config.dest, "encode")

    def claim() -> bool:
        settings = {
            **describe_source(source, listing, resolution),
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

    def save_batch(place: Destination, batch: Batch, moments: Tensor) -> None:
        save(place, batch, moments, config.dtype, config.store)

    encoding = Encoding("latents", latents_name, codec.encode, save_batch)
    with explain_write_errors(config.dest):
        encode_missing(config, encoding, source, listing, resolution, destination, accelerator)
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


def save(destination: Destination, batch: Batch, moments: Tensor, dtype: str, store: str = "moments") -> None:
    """Write a batch's moments (N, 2 C, h, w), or a draw from them (N, C, h, w), one file per image.

    Raises InputError if a value is not finite.
    """
    latents = moments.cpu() if store == "moments" else draw(moments.cpu(), batch)
    with np.errstate(over="ignore"):  # an overflow to float16 is found below
        arrays = latents.numpy().astype(dtype)
    write_arrays(destination, batch, arrays, f"its latents are not finite as {dtype}; is --vae the right codec?")


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

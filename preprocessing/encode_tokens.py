"""Encode images to the tokens of a frozen encoder, which train.py --cached-tokens reads instead of running the encoder.

    python preprocessing/encode_tokens.py --source DATA/images --dest DATA/tokens-dinov2-vit-b --enc-type dinov2-vit-b
    accelerate launch --num_processes 8 preprocessing/encode_tokens.py --source ... (the same, on eight GPUs)

writes `DATA/tokens-dinov2-vit-b/00000/img-tokens-00000000.npy`, ... (1 + T, D) float16: the class token, then the patch
tokens. Its `dataset.json` describes the encoder and has mean and standard deviation of each channel of the class token
over all images. After an interruption, the same command continues and gives the same bytes as an uninterrupted run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.checks import Check
from common.cli import parse, setting
from common.distributed import broadcast_from_main
from common.errors import run_cli
from common.sources import FileSource, map_files, tokens_name
from models.cached_tokens import DTYPE, TokenFormat, images_digest
from models.encoders import Encoder, encoders_digest, load_encoder, name_with_tokens
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
from preprocessing.listing import Listing, image_index, list_converted

ONE_NAME = Check("the name of one encoder, without a comma", lambda value: "," not in value)


@dataclass(frozen=True, kw_only=True)
class EncodeTokensConfig(InputOutput, BatchSettings):
    """Settings of encode_tokens.py."""

    enc_type: str = setting("dinov2-vit-b", "frozen encoder, as in train.py", check=ONE_NAME)
    enc_weights: str | None = setting(None, "weights file of the encoder; default: the hub")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    # Open the source and load the encoder.
    config = parse(EncodeTokensConfig, __doc__.splitlines()[0], argv)
    source = FileSource(config.source)
    listing = list_converted(source)
    resolution = read_rgb(source, listing.names[0]).shape[0]
    accelerator = start_encoding(config.tf32)
    encoder = load_encoder(config.enc_type, resolution, config.enc_weights, accelerator.device)
    destination = Destination(config.dest, "encode_tokens")
    form = token_format(config.enc_type, encoder, source, listing, resolution)

    def claim() -> bool:
        settings = {
            **describe_source(source, listing, resolution),
            "encoder": form.name,
            "encoder weights": form.weights,
            "input_size": form.input_size,
            **{name: getattr(config, name) for name in ("flip", "tf32")},
        }
        with explain_write_errors(config.dest):
            return destination.claim(settings)

    if broadcast_from_main(accelerator, claim):
        accelerator.print(f"{config.dest}: already complete")
        return

    encoding = Encoding("tokens", tokens_name, lambda images: encode(encoder, images), save)
    with explain_write_errors(config.dest):
        encode_missing(config, encoding, source, listing, resolution, destination, accelerator)
        if accelerator.is_main_process:
            finish(config, destination, listing, form)


def token_format(enc_type: str, encoder: Encoder, source: FileSource, listing: Listing, resolution: int) -> TokenFormat:
    """Return the description of the tokens for dataset.json."""
    return TokenFormat(
        name=name_with_tokens(enc_type),
        weights=encoders_digest([encoder]),
        images=images_digest(source, sorted(listing.names, key=image_index)),
        resolution=resolution,
        input_size=encoder.input_size,
        tokens=encoder.num_tokens,
        width=encoder.width,
    )


def encode(encoder: Encoder, images: Tensor) -> Tensor:
    """Return class token and patch tokens (N, 1 + T, D) float16 of images (N, 3, R, R) uint8."""
    output = encoder(images)
    return torch.cat([output.cls_token.unsqueeze(1), output.patch_tokens], dim=1).half()


def save(destination: Destination, batch: Batch, tokens: Tensor) -> None:
    """Write the tokens of a batch, (N, 1 + T, D) float16, one file per image.

    Raises InputError if a value is not finite.
    """
    problem = f"its tokens are not finite as {DTYPE}; are the weights of --enc-type right?"
    write_arrays(destination, batch, tokens.cpu().numpy(), problem)


def finish(config: EncodeTokensConfig, destination: Destination, listing: Listing, form: TokenFormat) -> None:
    """Write dataset.json: labels, the encoder, whether tokens of the mirrored images exist, and the statistics."""
    names = {i: tokens_name(image_index(name)) for i, name in enumerate(listing.names)}
    mean, std = class_token_statistics(destination.folder, list(names.values()))
    record = {"encoder": form.to_json(), "flip": config.flip}
    record["cls_token"] = {"mean": mean.tolist(), "std": std.tolist()}
    destination.finish({**listing.table(names), **record})
    size = f"{form.tokens} patch tokens of width {form.width}"
    print(f"{destination.path}: tokens of {len(names):,} images, encoder {form.name}, {size}")


def class_token_statistics(folder: Path, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and population standard deviation (D,) float64 of the class tokens in the files `names` of a folder.

    They are computed in the order of the files, so they do not depend on how the work was divided. The first token is
    subtracted before the sums, so that a constant channel has the standard deviation 0.
    """

    def read(name: str) -> np.ndarray:  # only the pages of the first row are read
        return np.load(folder / name, mmap_mode="r", allow_pickle=False)[0].astype(np.float64)

    first = read(names[0])
    total, squares = np.zeros_like(first), np.zeros_like(first)
    for tokens in map_files(read, names):
        for token in tokens:
            total += token - first
            squares += (token - first) ** 2
    mean = total / len(names)
    return first + mean, np.sqrt(np.maximum(squares / len(names) - mean**2, 0))


if __name__ == "__main__":
    run_cli(main, memory_advice="give it a smaller --batch-size")

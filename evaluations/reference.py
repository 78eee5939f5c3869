"""Make a reference .npz for the evaluator from any data set: statistics of all its images, and some of the images.

    python evaluations/reference.py --source DATA/images --dest reference.npz

It holds what ADM's references hold (mu, sigma, mu_s, sigma_s over all images; arr_0, 10,000 of them, for precision and
recall), which network made it, and on request an encoder's statistics. Several processes share the work:
`accelerate launch evaluations/reference.py ...`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from accelerate import Accelerator

from common.cli import batch_size, check_batch_size
from common.distributed import long_collective_timeout
from common.io import InputError, atomic_write, check_writable, run_cli
from evaluations.batches import open_images
from evaluations.extract import Extractor
from evaluations.features import EncoderExtraction, InceptionExtraction, encoder_name
from evaluations.inception.network import load_inception
from evaluations.npz import write_npz
from models.encoders import load_encoder


def main() -> None:
    args = parse_args()
    check_args(args)
    images = open_images(args.source)
    if images.count < 2:
        raise InputError(f"{args.source}: {images.count} image; a covariance needs at least 2")
    accelerator = Accelerator(cpu=args.cpu, kwargs_handlers=[long_collective_timeout()])
    device = accelerator.device
    with accelerator.local_main_process_first():  # one process of a machine downloads, the others find the file
        inception = load_inception(args.inception, device)
        encoder = load_encoder(args.encoder, images.height, args.enc_weights, device) if args.encoder else None

    with Extractor(accelerator, args.batch_size) as extractor:
        features = extractor(inception, inception.name, images, InceptionExtraction(images.count, False, device))
        if encoder is not None:
            name = encoder_name(args.encoder, args.enc_weights)
            tokens = extractor(encoder, name, images, EncoderExtraction(encoder.width, device))
        if not accelerator.is_main_process:
            return
        pool, spatial = features.statistics("pool"), features.statistics("spatial")
        arrays = {"mu": pool.mean, "sigma": pool.covariance, "mu_s": spatial.mean, "sigma_s": spatial.covariance}
        arrays |= {"num_images": np.array(images.count), "inception": np.array(inception.name)}
        if encoder is not None:
            statistics = tokens.statistics("cls")
            arrays |= {"mu_enc": statistics.mean, "sigma_enc": statistics.covariance, "encoder": np.array(name)}
    chosen = draw(images.count, args.num_images, args.seed)
    kept = (images.read(number, number + 1) for number in chosen)
    with atomic_write(args.dest) as file:
        write_npz(file, kept, (len(chosen), images.height, images.width, 3), arrays)
    print(f"{args.dest}: statistics of {images.count:,} images, network {inception.name}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", required=True, help="images: a folder, a zip, or an .npz with arr_0; all of one size"
    )
    parser.add_argument("--dest", required=True, help="reference file to write (.npz)")
    parser.add_argument("--num-images", type=int, default=10_000, help="images kept in it, at most (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="draws the images that are kept (default: 0)")
    parser.add_argument("--inception", help="Inception weights, .pb or PyTorch port (default: downloaded once)")
    parser.add_argument("--encoder", help="also the statistics of this encoder's class tokens, e.g. dinov2-vit-l")
    parser.add_argument("--enc-weights", help="weights file of --encoder (default: the encoder's own download)")
    parser.add_argument(
        "--batch-size",
        type=batch_size,
        default=32,
        help="images at a time and process (default: 32); auto: as many as the GPU's memory holds",
    )
    parser.add_argument("--cpu", action="store_true", help="use the CPU although there is a GPU")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for values that cannot be meant, and for a place where nothing can be written."""
    check_batch_size("--batch-size", args.batch_size)
    for flag, value, lowest in (
        ("--num-images", args.num_images, 1),
        ("--seed", args.seed, 0),
    ):
        if value < lowest:
            raise InputError(f"{flag} {value}: expected {lowest} or more")
    if not args.dest.endswith(".npz"):
        raise InputError(f"--dest {args.dest}: the name of a reference ends in .npz")
    check_writable(args.dest, "--dest")
    if args.enc_weights and not args.encoder:
        raise InputError(f"--enc-weights {args.enc_weights}: needs --encoder, which says whose weights they are")


def draw(count: int, wanted: int, seed: int) -> np.ndarray:
    """Return the numbers of the images that are kept, in order: `wanted` different ones of `count`, drawn by seed."""
    return np.sort(np.random.default_rng(seed).choice(count, size=min(wanted, count), replace=False))


if __name__ == "__main__":
    run_cli(main)

"""How fast a codec encodes: one image at a time against batches, and both against the device's arithmetic.

    python benchmarks/encode.py [--vae FOLDER] [--device cuda] [--tf32] [--json encode.json]

Without --vae it measures Stable Diffusion's architecture with random weights, which takes the same time as the real
ones. The share of the arithmetic limit is the encoder's floating-point operations per second against those of a large
matrix product on the same device, in the same precision.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import matrix_rate, peak_memory, seconds
from files import InputError, run_cli, write_json
from models.autoencoder import SD_FORMAT, Codec, KLCodec, load_codec


def sd_architecture() -> Codec:
    """Return the codec of Stable Diffusion 1.x (83.7 M parameters) with random weights."""
    from diffusers import AutoencoderKL

    autoencoder = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[128, 256, 512, 512],
        layers_per_block=2,
        latent_channels=4,
    )
    return KLCodec(autoencoder, SD_FORMAT)


def measure(
    codec: Codec, resolution: int, batch_size: int, device: torch.device, at_least: float
) -> tuple[float, float]:
    """Return images per second and peak memory in GB, from uint8 images in memory to moments in memory."""
    images = torch.randint(0, 256, (batch_size, 3, resolution, resolution), dtype=torch.uint8)
    if device.type == "cuda":
        images = images.pin_memory()
        torch.cuda.reset_peak_memory_stats()
    time_each = seconds(lambda: codec.encode(images.to(device, non_blocking=True)).cpu(), device, at_least)
    return batch_size / time_each, peak_memory(device)


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", help="codec to measure (default: Stable Diffusion's architecture, random weights)")
    parser.add_argument("--resolution", type=int, default=256, help="side of the images")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 32, 64], help="batches to measure")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to encode")
    parser.add_argument("--tf32", action="store_true", help="let a GPU use TF32, as encode.py does by default")
    parser.add_argument("--seconds", type=float, default=5, help="least time of each measurement")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    args = parser.parse_args()
    if min(args.batch_sizes) < 1 or args.resolution < 1:
        raise InputError("--batch-sizes and --resolution must be at least 1")
    device = torch.device(args.device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.tf32
    codec = load_codec(args.vae) if args.vae else sd_architecture()
    codec = codec.to(device=device, memory_format=torch.channels_last)
    with FlopCounterMode(display=False) as counter:
        codec.encode(torch.zeros(1, 3, args.resolution, args.resolution, dtype=torch.uint8, device=device))
    operations = counter.get_total_flops()
    limit = matrix_rate(device, args.seconds)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.vae or 'SD-VAE, random weights'}, {args.resolution} px: {operations / 1e9:.1f} GFLOP an image")
    print(f"{name}, TF32 {'on' if args.tf32 else 'off'}, matrix product {limit / 1e12:.2f} TFLOP/s\n")
    print("| batch | images/s | share of the arithmetic limit | peak memory, GB |\n|---|---|---|---|")
    rows = []
    for batch_size in args.batch_sizes:
        rate, memory = measure(codec, args.resolution, batch_size, device, args.seconds)
        rows.append(
            {"batch": batch_size, "images_per_s": rate, "share": rate * operations / limit, "memory_gb": memory}
        )
        print(f"| {batch_size} | {rate:.2f} | {rate * operations / limit:.0%} | {memory:.2f} |", flush=True)
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        write_json(args.json, {"hardware": name, "gflop": operations / 1e9, "limit": limit, **settings, "rows": rows})


if __name__ == "__main__":
    run_cli(main)

"""How fast a codec encodes and decodes: written plainly, then with each switch added in turn, all in one run.

    python benchmarks/encode.py [--vae FOLDER] [--device cuda] [--dtype fp16] [--json encode.json]

Without --vae it measures Stable Diffusion's architecture with random weights, which takes the same time as the real
ones. Plainly means float32 (on a GPU TF32), channels first, one image at a time. Utilisation compares the codec's
floating-point operations per second with those of a large matrix product on the same device, in the same precision.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import in_turns, matrix_rate, parse_with_json, peak_memory, require, write_result
from common.cli import AUTO, SWITCH, batch_size, check_batch_size
from common.distributed import largest_batch
from common.io import InputError, run_cli
from models.autoencoder import SD_FORMAT, Codec, KLCodec, load_codec
from models.inference import NETWORK_DTYPES

LARGEST_BATCH = 128


class Setting(NamedTuple):
    """One row: a codec, how many images it gets at a time, and the precision of its arithmetic."""

    name: str
    codec: Codec
    batch_size: int
    dtype: str


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


def build_settings(plain: Codec, args: argparse.Namespace) -> list[Setting]:
    """Return the rows; encode.py and generate.py work as the third, with the batch size they are given."""
    settings = [
        Setting("one image at a time", plain, 1, "float32"),
        Setting("+ batch", plain, args.batch_size, "float32"),
    ]
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    settings.append(Setting("+ channels last", last, args.batch_size, "float32"))
    if args.dtype != "float32":
        last = copy.deepcopy(last).to(NETWORK_DTYPES[args.dtype])
        settings.append(Setting(f"+ network in {args.dtype}", last, args.batch_size, args.dtype))
    if args.compile:
        last = copy.deepcopy(last)
        for part in (last.autoencoder.encoder, last.autoencoder.decoder):
            part.compile(dynamic=False)
        settings.append(Setting("+ compiled", last, args.batch_size, settings[-1].dtype))
    return settings


def encode(codec: Codec, images: Tensor, device: torch.device, count: int) -> Tensor:
    """Return moments in the host's memory, of uint8 images there, `count` at a time."""
    return torch.cat([codec.encode(part.to(device, non_blocking=True)) for part in images.split(count)]).cpu()


def decode(codec: Codec, latents: Tensor, device: torch.device, count: int) -> Tensor:
    """Return uint8 images in the host's memory, of latents on the device, `count` at a time."""
    return torch.cat([codec.decode(part) for part in latents.split(count)]).cpu()


def measure(
    work: Callable[..., Tensor], inputs: Tensor, settings: list[Setting], flops: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row for each setting, of encoding or decoding `inputs`; `flops`: of one image."""
    device = torch.device(args.device)
    runs, results, memory = {}, {}, {}
    for setting in tqdm(settings, desc="first runs", unit="setting"):
        runs[setting.name] = partial(work, setting.codec, inputs, device, setting.batch_size)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        results[setting.name] = runs[setting.name]().float()
        memory[setting.name] = peak_memory(device)
    times = in_turns(runs, device, args.rounds)
    ceilings = {dtype: matrix_rate(device, 1, NETWORK_DTYPES[dtype]) for dtype in {each.dtype for each in settings}}
    plain, rows = results[settings[0].name], []
    for setting in settings:
        rate = len(inputs) / statistics.median(times[setting.name])
        difference = results[setting.name] - plain
        rows.append(
            {
                "work": work.__name__,
                "setting": setting.name,
                "batch": setting.batch_size,
                "images_per_s": rate,
                "ratio": rate / rows[0]["images_per_s"] if rows else 1.0,
                "utilisation": rate * flops / ceilings[setting.dtype],
                "memory_gb": memory[setting.name],
                "max_deviation": difference.abs().max().item(),
                "rms_deviation": (difference.square().mean() / plain.square().mean()).sqrt().item(),
            }
        )
    return rows


def count_flops(codec: Codec, images: Tensor, latents: Tensor) -> dict[str, int]:
    """Return the floating-point operations of encoding and of decoding one image, counted."""
    found = {}
    for name, run in (("encode", lambda: codec.encode(images[:1])), ("decode", lambda: codec.decode(latents[:1]))):
        with FlopCounterMode(display=False) as counter:
            run()
        found[name] = counter.get_total_flops()
    return found


def parse_args() -> argparse.Namespace:
    """Return the settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", help="codec to measure (default: Stable Diffusion's architecture, random weights)")
    parser.add_argument("--resolution", type=int, default=256, help="side of the images (%(default)s)")
    parser.add_argument(
        "--batch-size", type=batch_size, default=32, help="images at a time; auto: all that fit (%(default)s)"
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device, help="(%(default)s)")
    parser.add_argument(
        "--dtype", default="float32", choices=NETWORK_DTYPES, help="half precision; float32: none (%(default)s)"
    )
    parser.add_argument("--compile", action=SWITCH, default=True, help="measure the compiled codec as well")
    parser.add_argument("--tf32", action=SWITCH, default=True, help="let a GPU use TF32, as encode.py does by default")
    parser.add_argument("--rounds", type=int, default=3, help="timings of each setting (%(default)s)")
    args = parse_with_json(parser)
    check_batch_size("--batch-size", args.batch_size)
    if min(args.rounds, args.resolution) < 1:
        raise InputError("--rounds and --resolution must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no CUDA device")
    if args.vae == "pixel":
        raise InputError("--vae pixel: it computes nothing that could be measured")
    require("diffusers", "measuring a codec")
    return args


def main() -> None:
    """Run the program."""
    args = parse_args()
    device, side = torch.device(args.device), args.resolution
    on_gpu = device.type == "cuda"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.tf32
    torch.manual_seed(0)
    codec = (load_codec(args.vae) if args.vae else sd_architecture()).to(device)
    if args.batch_size == AUTO:
        blank = torch.zeros(LARGEST_BATCH, 3, side, side, dtype=torch.uint8, device=device)
        args.batch_size = largest_batch(lambda n: codec.encode(blank[:n]), LARGEST_BATCH) if on_gpu else 1
    images = torch.randint(0, 256, (args.batch_size, 3, side, side), dtype=torch.uint8)
    shape = (codec.format.channels, side // codec.format.factor, side // codec.format.factor)
    latents = torch.randn(args.batch_size, *shape, device=device)
    flops = count_flops(codec, images.to(device), latents)
    settings = build_settings(codec, args)
    rows = measure(encode, images.pin_memory() if on_gpu else images, settings, flops["encode"], args)
    rows += measure(decode, latents, settings, flops["decode"], args)

    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    counts = ", ".join(f"{work} {count / 1e9:.1f} GFLOP" for work, count in flops.items())
    print(f"{args.vae or 'SD-VAE, random weights'}, {side} px, an image: {counts}")
    print(f"{name}, torch {torch.__version__}, TF32 {'on' if args.tf32 else 'off'}\n")
    print("| work | setting | batch | images/s | ratio | utilisation | peak memory, GB | deviation | rms |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['work']} | {row['setting']} | {row['batch']} | {row['images_per_s']:.2f} | {row['ratio']:.2f} "
            f"| {row['utilisation']:.0%} | {row['memory_gb']:.2f} | {row['max_deviation']:.1e} "
            f"| {row['rms_deviation']:.1e} |"
        )
    if args.json:
        write_result(args.json, {"flops": flops, "rows": rows}, device)


if __name__ == "__main__":
    run_cli(main)

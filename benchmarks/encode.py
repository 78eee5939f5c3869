"""Measures how fast a codec encodes and decodes: plain, then with one optimisation after the other, in one run.

    python benchmarks/encode.py [--vae FOLDER] [--device cuda] [--dtype fp16] [--json encode.json]

Without --vae it measures Stable Diffusion's architecture with random weights, which is as fast as with trained ones.
The plain form is float32 (TF32 on a GPU), channels first, one image at a time. Utilisation compares the codec's
floating-point operations per second with those of a large matrix product on the same device in the same precision.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import timing
from common.cli import AUTO, BATCH_SIZE, POSITIVE, batch_size, parse, require, setting
from common.distributed import largest_batch
from common.io import InputError, run_cli
from models.autoencoder import SD_FORMAT, Codec, KLCodec, load_codec
from models.inference import NETWORK_DTYPES

LARGEST_BATCH = 128


@dataclass(frozen=True, kw_only=True)
class Encode(timing.DeviceBenchmark):
    """Settings of the benchmark."""

    vae: str | None = setting(None, "codec to measure; default: Stable Diffusion's architecture, random weights")
    resolution: int = setting(256, "side of the images, px", check=POSITIVE)
    batch_size: int | str = setting(
        32, "images at a time; auto: the largest that fits into memory", check=BATCH_SIZE, parse=batch_size
    )
    dtype: str = setting("float32", "half precision to measure; float32: none", choices=tuple(NETWORK_DTYPES))
    compile: bool = setting(True, "also measure the compiled codec")
    tf32: bool = setting(True, "allow TF32 on a GPU, which is also the default of preprocessing/encode.py")
    rounds: int = setting(3, "timings of each form", check=POSITIVE)

    def check_combination(self) -> None:
        super().check_combination()
        if self.vae == "pixel":
            raise InputError("--vae pixel: it computes nothing that could be measured")
        require("diffusers", "measuring a codec")


class Form(NamedTuple):
    """One row: a codec, its batch size, and the precision of its arithmetic."""

    name: str
    codec: Codec
    batch_size: int
    dtype: str


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    config = parse(Encode, "Measure how fast a codec encodes and decodes.", argv)
    device, side = config.torch_device, config.resolution
    on_gpu = device.type == "cuda"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.tf32
    torch.manual_seed(0)
    codec = (load_codec(config.vae) if config.vae else sd_architecture()).to(device)
    if config.batch_size == AUTO:
        blank = torch.zeros(LARGEST_BATCH, 3, side, side, dtype=torch.uint8, device=device)
        count = largest_batch(lambda n: codec.encode(blank[:n]), LARGEST_BATCH) if on_gpu else 1
        config = replace(config, batch_size=count)

    # Inputs and rows
    images = torch.randint(0, 256, (config.batch_size, 3, side, side), dtype=torch.uint8)
    shape = (codec.format.channels, side // codec.format.factor, side // codec.format.factor)
    latents = torch.randn(config.batch_size, *shape, device=device)
    flops = {
        "encode": timing.count_flops(lambda: codec.encode(images[:1].to(device))),
        "decode": timing.count_flops(lambda: codec.decode(latents[:1])),
    }
    forms = build_forms(codec, config)
    peaks = {dtype: timing.matrix_rate(device, 1, NETWORK_DTYPES[dtype]) for dtype in {form.dtype for form in forms}}
    limits = {work: {dtype: peak / count for dtype, peak in peaks.items()} for work, count in flops.items()}
    rows = measure(encode, images.pin_memory() if on_gpu else images, forms, limits["encode"], config)
    rows += measure(decode, latents, forms, limits["decode"], config)

    # Report
    counts = ", ".join(f"{work} {count / 1e9:.1f} GFLOP" for work, count in flops.items())
    print(f"{config.vae or 'SD-VAE, random weights'}, {side} px, one image: {counts}")
    print(f"{timing.hardware(device)}, torch {torch.__version__}, TF32 {'on' if config.tf32 else 'off'}\n")
    headings = "work | setting | batch | images/s | ratio | utilisation | peak memory, GB | deviation | rms"
    line = "{work} | {setting} | {batch} | {images_per_s:.2f} | {ratio:.2f} | {utilisation:.0%} | {memory_gb:.2f} "
    line += "| {max_deviation:.1e} | {rms_deviation:.1e}"
    print(timing.markdown_table(headings, [line.format(**row) for row in rows]))
    timing.write_result(config.json, {"flops": flops, "rows": rows}, device)


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


def build_forms(plain: Codec, config: Encode) -> list[Form]:
    """Return the rows. preprocessing/encode.py and generate.py use the third, with their own batch size."""
    forms = [
        Form("one image at a time", plain, 1, "float32"),
        Form("+ batch", plain, config.batch_size, "float32"),
    ]
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    forms.append(Form("+ channels last", last, config.batch_size, "float32"))
    if config.dtype != "float32":
        last = copy.deepcopy(last).to(NETWORK_DTYPES[config.dtype])
        forms.append(Form(f"+ network in {config.dtype}", last, config.batch_size, config.dtype))
    if config.compile:
        last = copy.deepcopy(last)
        for part in (last.autoencoder.encoder, last.autoencoder.decoder):
            part.compile(dynamic=False)
        forms.append(Form("+ compiled", last, config.batch_size, forms[-1].dtype))
    return forms


def encode(codec: Codec, images: Tensor, device: torch.device, count: int) -> Tensor:
    """Return moments in host memory, from uint8 images in host memory, `count` at a time."""
    return torch.cat([codec.encode(part.to(device, non_blocking=True)) for part in images.split(count)]).cpu()


def decode(codec: Codec, latents: Tensor, device: torch.device, count: int) -> Tensor:
    """Return uint8 images in host memory, from latents on the device, `count` at a time."""
    return torch.cat([codec.decode(part) for part in latents.split(count)]).cpu()


def measure(
    work: Callable[..., Tensor], inputs: Tensor, forms: list[Form], limits: dict[str, float], config: Encode
) -> list[dict[str, Any]]:
    """Return one row for each form of encoding or decoding `inputs`. `limits`: highest possible images/s, by dtype."""
    device = config.torch_device
    runs, results, memory = {}, {}, {}
    for form in tqdm(forms, desc="first runs", unit="form"):
        runs[form.name] = partial(work, form.codec, inputs, device, form.batch_size)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        results[form.name] = runs[form.name]().float()
        memory[form.name] = timing.peak_memory(device)
    times = timing.in_turns(runs, device, config.rounds)
    rates = {name: len(inputs) / statistics.median(found) for name, found in times.items()}
    return [
        {
            "work": work.__name__,
            "setting": form.name,
            "batch": form.batch_size,
            "images_per_s": rates[form.name],
            "ratio": rates[form.name] / rates[forms[0].name],
            "utilisation": rates[form.name] / limits[form.dtype],
            "memory_gb": memory[form.name],
            **timing.deviation(results[form.name], results[forms[0].name]),
        }
        for form in forms
    ]


if __name__ == "__main__":
    run_cli(main)

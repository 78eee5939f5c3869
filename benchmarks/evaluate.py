"""Measures time and memory of the evaluation: our Inception network, a straightforward one, and the complete evaluator.

    python benchmarks/evaluate.py --images 64                  # both networks, on the CPU
    python benchmarks/evaluate.py --device cuda --evaluate 50000

The straightforward network has the same layers and weights. Each convolution is followed by its own batch norm, in
PyTorch's default memory layout. Each measurement runs in its own process, so that peak memory is measured separately.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import timing
from common.cli import AUTO, BATCH_SIZE, NON_NEGATIVE, POSITIVE, batch_size, parse, setting
from common.distributed import largest_batch
from common.io import run_cli
from evaluations.features import CPU_BATCH
from evaluations.inception.layers import NUM_CLASSES, NUM_FEATURES, SPATIAL_LAYER, inception_layers
from evaluations.inception.network import SPATIAL_CHANNELS, Inception, InceptionOutput, full_precision, load_inception
from evaluations.inception.network import resize_bilinear_tf1 as resize
from evaluations.inception.weights import load_weights
from evaluations.npz import write_npz

RESOLUTION = 256


@dataclass(frozen=True, kw_only=True)
class Evaluate(timing.DeviceBenchmark):
    """Settings of the benchmark."""

    device: str = setting("cpu", "where to measure; auto: CUDA if available", choices=("auto", "cpu", "cuda"))
    images: int = setting(64, f"images of {RESOLUTION} px for each timing", check=POSITIVE)
    batch_size: int | str = setting(
        32, "images at a time; auto: the largest that fits into memory", check=BATCH_SIZE, parse=batch_size
    )
    repeats: int = setting(3, "timings, of which the best is reported", check=POSITIVE)
    threads: int = setting(torch.get_num_threads(), "CPU threads", check=POSITIVE)
    inception: str | None = setting(None, "Inception weights; default: random ones, which are equally fast")
    evaluate: int = setting(0, "also run the evaluator on this many samples", check=NON_NEGATIVE)
    references: int = setting(10_000, "images of the evaluator's reference", check=POSITIVE)


class PlainInception(torch.nn.Module):
    """A straightforward implementation of the network: convolution, batch norm, ReLU."""

    def __init__(self, weights: Path, device: torch.device):
        super().__init__()
        tensors = load_weights(weights).tensors
        self.classifier = tensors.pop("fc.weight").to(device)
        self.layers = inception_layers().to_empty(device=device).eval()
        self.layers.load_state_dict(tensors, strict=False)  # without num_batches_tracked

    def forward(self, images: Tensor) -> InceptionOutput:
        with full_precision(images.device):
            x = (resize(images.contiguous(), 299) - 128) / 128
            for name, layer in self.layers.named_children():
                x = layer(x)
                if name == SPATIAL_LAYER:
                    spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
            pool = F.avg_pool2d(x, 8).flatten(1)
            return InceptionOutput(pool, spatial, pool @ self.classifier.t())


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    config = parse(Evaluate, "Measure time and memory of the evaluation.", argv)
    torch.set_num_threads(config.threads)
    device = config.torch_device
    machine = {"device": timing.hardware(device), "torch": torch.__version__}
    machine |= {"batch_size": config.batch_size, "images": config.images}
    result: dict[str, Any] = {"machine": machine, "networks": {}}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(config.inception) if config.inception else write_random_weights(Path(folder) / "random.pth")
        context = multiprocessing.get_context("spawn")
        for name in ("plain", "ours"):
            with context.Pool(1) as process:
                result["networks"][name] = process.apply(measure, (name, weights, config))
        plain, ours = (result["networks"][name].pop("pool") for name in ("plain", "ours"))
        result["relative_difference"] = float(np.linalg.norm(plain - ours) / np.linalg.norm(plain))
        if config.evaluate:
            result["evaluation"] = run_evaluator(Path(folder), weights, config)
    show(result)
    timing.write_result(config.json, result, device)


def measure(name: str, weights: Path, config: Evaluate) -> dict[str, Any]:
    """Return time per image, utilisation, peak memory beyond that before the measurement, and the pool features."""
    device = config.torch_device
    torch.set_num_threads(config.threads)
    network: Inception | PlainInception
    network = load_inception(weights, device) if name == "ours" else PlainInception(weights, device)
    pixels = np.random.default_rng(0).integers(0, 256, (config.images, RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    before = timing.peak_memory(device)
    flops = timing.count_flops(lambda: network(images[:1].to(device)))
    size = config.batch_size
    if size == AUTO:
        on_gpu = device.type == "cuda"
        size = largest_batch(lambda count: network(images[:count].to(device)), len(images)) if on_gpu else CPU_BATCH

    def run() -> Tensor:
        return torch.cat([network(batch.to(device)).pool for batch in images.split(size)]).cpu()

    pool = run()  # warm-up
    best = min(timing.timed(run, device) for _ in range(config.repeats)) / config.images
    peak = timing.peak_memory(device)
    with full_precision(device):
        ceiling = timing.matrix_rate(device, 1)
    return {
        "seconds_per_image": best,
        "batch_size": size,
        "utilisation": flops / best / ceiling,
        "peak_gb": peak - before,
        "pool": pool.numpy(),
    }


def run_evaluator(folder: Path, weights: Path, config: Evaluate) -> dict[str, Any]:
    """Run evaluator.py on noise images in its own process; return its seconds and peak memory."""
    batches = {"--ref_batch": config.references, "--sample_batch": config.evaluate}
    flags = ["--inception", weights, "--batch-size", config.batch_size, "--save_path", folder / "out.json"]
    for number, (flag, count) in enumerate(batches.items()):
        flags += [flag, write_noise(folder / f"batch{number}.npz", count)]
    flags += ["--cpu"] if config.torch_device.type == "cpu" else []
    seconds, memory = timing.run_measured([sys.executable, ROOT / "evaluations" / "evaluator.py", *flags])
    return {"samples": config.evaluate, "references": config.references, "seconds": seconds, "host_memory_gb": memory}


def write_noise(path: Path, count: int) -> Path:
    """Write an .npz of `count` noise images, one by one, and return its path."""
    rng, shape = np.random.default_rng(count), (RESOLUTION, RESOLUTION, 3)
    with open(path, "wb") as file:
        write_npz(file, (rng.integers(256, size=shape, dtype=np.uint8) for _ in range(count)), (count, *shape))
    return path


def write_random_weights(path: Path) -> Path:
    """Write random weights in the layout of the PyTorch port, with activations of a usual magnitude."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    values = {"weight": 1.0, "bias": 0.1, "running_mean": 0.0, "running_var": 1.0}
    for name, like in inception_layers().state_dict().items():
        if like.ndim == 4:
            deviation = (2 / like[0].numel()) ** 0.5
            state[name] = torch.randn(like.shape, generator=generator) * deviation
        elif like.ndim == 1:
            state[name] = torch.full(like.shape, values[name.rpartition(".")[2]])
    state["fc.weight"] = torch.randn(NUM_CLASSES, NUM_FEATURES, generator=generator) * 0.02
    torch.save(state, path)
    return path


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    print(f"{result['machine']['device']}, torch {result['machine']['torch']}, images of {RESOLUTION} px")
    print(f"relative difference of the features of plain and ours: {result['relative_difference']:.1e}\n")
    plain = result["networks"]["plain"]["seconds_per_image"]
    rows = [
        f"{name} | {1000 * row['seconds_per_image']:.2f} | {plain / row['seconds_per_image']:.2f} "
        f"| {row['utilisation']:.0%} | {row['peak_gb']:.2f}"
        for name, row in result["networks"].items()
    ]
    print(timing.markdown_table("network | ms an image | ratio | utilisation | peak memory, GB", rows))
    if row := result.get("evaluation"):
        print(
            f"evaluator: {row['samples']:,} samples, {row['references']:,} references: {row['seconds']:.1f} s, "
            f"{row['host_memory_gb']:.2f} GB on the host"
        )


if __name__ == "__main__":
    run_cli(main)

"""Measures time and memory of the evaluation: our Inception network, a straightforward one, and the complete evaluator.

    python benchmarks/evaluate.py --images 64                  # both networks, on the CPU
    python benchmarks/evaluate.py --device cuda --evaluate 50000

The straightforward network has the same layers and weights. Each convolution is followed by its own batch norm, in
PyTorch's default memory layout. Both are in memory at the same time.

With --seconds, the evaluator runs on as many samples as are expected to fit into this time. Its time for all samples is
then extrapolated, with a lower and an upper bound: only the time of the network grows with the number of images, or all
that follows the imports does.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import timing
from common.checks import AUTO, BATCH_SIZE, NON_NEGATIVE, POSITIVE, between
from common.cli import batch_size, parse, setting
from common.distributed import largest_batch
from common.errors import run_cli
from common.io import read_json
from evaluations.features import CPU_BATCH
from evaluations.inception.layers import NUM_CLASSES, NUM_FEATURES, SPATIAL_LAYER, inception_layers
from evaluations.inception.network import SPATIAL_CHANNELS, Inception, InceptionOutput, full_precision, load_inception
from evaluations.inception.network import resize_bilinear_tf1 as resize
from evaluations.inception.weights import load_weights
from evaluations.npz import write_npz

RESOLUTION = 256
FEWEST_SAMPLES = 1000  # of the evaluator, however short --seconds is
ASSUMED_START = 15  # seconds of an evaluator without images: imports, weights, metrics
NOISE_IMAGES = 256  # images of noise that are drawn; the others are made from them
COLUMNS = {
    "network": "{setting}", "s an image": "{seconds_per_image:.5f}", "images/s": "{images_per_s:.1f}",
    "quartiles, s": "{seconds_quartiles[0]:.3f}, {seconds_quartiles[1]:.3f}", "ratio": "{ratio:.2f}",
    "utilisation": "{utilisation:.0%}", "memory, GB": "{memory_gb:.2f}", "features, rms": "{rms_deviation:.1e}",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Evaluate(timing.TimedBenchmark):
    """Settings of the benchmark."""

    device: str = setting("cpu", "where to measure; auto: CUDA if available", choices=("auto", "cpu", "cuda"))
    images: int = setting(64, f"images of {RESOLUTION} px for each timing", check=POSITIVE)
    batch_size: int | str = setting(32, "images at a time; auto: the most that fit", check=BATCH_SIZE, parse=batch_size)
    repeats: int = setting(3, "timings of each network", check=POSITIVE)
    threads: int = setting(torch.get_num_threads(), "CPU threads", check=between(1, 1024))
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
    start = time.perf_counter()
    config = parse(Evaluate, "Measure time and memory of the evaluation.", argv)
    torch.set_num_threads(config.threads)
    device = config.torch_device
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(config.inception) if config.inception else write_random_weights(Path(folder) / "random.pth")
        # A third of the time is for the networks, if the evaluator also runs.
        rows = measure(weights, config, config.until(start, 1 / 3 if config.evaluate else 1))
        print(f"{timing.hardware(device)}, torch {torch.__version__}, images of {RESOLUTION} px\n")
        print(timing.markdown_table(COLUMNS, rows), flush=True)
        timing.write_result(config.json, {"rows": rows}, device)
        if config.evaluate:
            found = run_evaluator(Path(folder), weights, config, rows[-1]["images_per_s"], config.until(start))
            print("evaluator: " + ", ".join(f"{name} {value:g}" for name, value in found.items()))
            timing.write_result(config.json, {"rows": rows, "evaluation": found}, device)


def measure(weights: Path, config: Evaluate, until: float | None) -> list[dict[str, Any]]:
    """Return the rows of both networks; deviations are those of the pool features. `until`: see `rounds_until`."""
    device, size = config.torch_device, config.batch_size
    networks = {"plain": PlainInception(weights, device), "ours": load_inception(weights, device)}
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (config.images, 3, RESOLUTION, RESOLUTION), dtype=torch.uint8, generator=generator)
    flops = {name: timing.count_flops(partial(network, images[:1].to(device))) for name, network in networks.items()}
    if size == AUTO:
        attempt = partial(pool_features, networks["plain"], images, device)
        size = largest_batch(attempt, len(images)) if device.type == "cuda" else CPU_BATCH
    runs = {name: partial(pool_features, network, images, device, size) for name, network in networks.items()}
    rows = timing.compare(runs, device, config.repeats, until)
    with full_precision(device):
        ceiling = timing.matrix_rate(device, 1)
    for row in rows:
        row |= {"batch": size, "seconds_per_image": row["seconds"] / config.images}
        row["images_per_s"] = 1 / row["seconds_per_image"]
        row["utilisation"] = flops[row["setting"]] / row["seconds_per_image"] / ceiling
    return rows


@torch.no_grad()
def pool_features(network: Inception | PlainInception, images: Tensor, device: torch.device, size: int) -> Tensor:
    """Return the pool features (N, 2048) of images in host memory, `size` at a time."""
    return torch.cat([network(batch.to(device)).pool for batch in images.split(size)]).cpu()


def run_evaluator(
    folder: Path, weights: Path, config: Evaluate, rate: float, until: float | None
) -> dict[str, float | int]:
    """Run evaluator.py on noise images in its own process; return its seconds and peak memory.

    rate: images per second of the Inception network. `until`: time of `perf_counter` at which the run should end.
    """
    began = time.perf_counter()
    reference = write_noise(folder / "reference.npz", config.references)
    count = config.evaluate
    if until is not None:
        writing = (time.perf_counter() - began) / config.references  # seconds of an image
        left = until - time.perf_counter() - ASSUMED_START - config.references / rate
        count = min(count, max(FEWEST_SAMPLES, int(left / (writing + 1 / rate))))
    samples, out = write_noise(folder / "samples.npz", count), folder / "out.json"
    flags = [reference, samples, "--inception", weights, "--batch-size", config.batch_size, "--save_path", out]
    flags += ["--cpu"] if config.torch_device.type == "cpu" else []
    seconds, memory = timing.run_measured([sys.executable, ROOT / "evaluations" / "evaluator.py", *flags])
    found = {"samples": count, "references": config.references, "seconds": seconds, "host_memory_gb": memory}
    working = read_json(out)["seconds"]  # without the imports
    if count < config.evaluate:
        factor = (config.evaluate + config.references) / (count + config.references)
        found |= {
            "extrapolated_to_samples": config.evaluate,
            "at_least_seconds": seconds + (config.evaluate - count) / rate,
            "at_most_seconds": seconds + (factor - 1) * working,
        }
    return {**found, "seconds_without_imports": working}


def write_noise(path: Path, count: int) -> Path:
    """Write an .npz of `count` different noise images, one by one, and return its path."""
    rng = np.random.default_rng(count)
    drawn = rng.integers(256, size=(NOISE_IMAGES, RESOLUTION, RESOLUTION, 3), dtype=np.uint8)

    def images() -> Iterator[np.ndarray]:  # drawing all of them would take longer than the network
        for number in range(count):
            yield drawn[number % NOISE_IMAGES] ^ np.uint8(number // NOISE_IMAGES % 256)

    with open(path, "wb") as file:
        write_npz(file, images(), (count, RESOLUTION, RESOLUTION, 3))
    return path


def write_random_weights(path: Path) -> Path:
    """Write random weights in the layout of the PyTorch port, with activations of a usual magnitude."""
    torch.manual_seed(0)
    layers = inception_layers().to_empty(device="cpu")
    for layer in layers.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
        elif isinstance(layer, torch.nn.BatchNorm2d):
            layer.reset_parameters()
    torch.save({**layers.state_dict(), "fc.weight": torch.randn(NUM_CLASSES, NUM_FEATURES) * 0.02}, path)
    return path


if __name__ == "__main__":
    run_cli(main)

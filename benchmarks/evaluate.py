"""Time and memory of the evaluation: our Inception network against a straightforward one, and the whole evaluator.

    python benchmarks/evaluate.py --images 64                  # the networks, on this machine's CPU
    python benchmarks/evaluate.py --device cuda --evaluate 50000

The straightforward network has the same layers and weights, each convolution followed by its own batch norm, in
PyTorch's default layout. Each measurement has a process of its own, so that peak memory is its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import matrix_rate, parse_with_json, peak_memory, run_measured, write_result
from common.cli import AUTO, batch_size, check_batch_size
from common.distributed import largest_batch
from common.io import InputError, run_cli
from evaluations.extract import CPU_BATCH
from evaluations.inception.layers import NUM_CLASSES, NUM_FEATURES, SPATIAL_LAYER, inception_layers
from evaluations.inception.network import SPATIAL_CHANNELS, Inception, InceptionOutput, full_precision, load_inception
from evaluations.inception.network import resize_bilinear_tf1 as resize
from evaluations.inception.weights import load_weights
from evaluations.npz import write_npz

RESOLUTION = 256


class PlainInception(torch.nn.Module):
    """The network as one would write it down: convolution, batch norm, ReLU."""

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


def main() -> None:
    args = parse_args()
    result: dict[str, Any] = {"machine": machine(args), "networks": {}}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(args.inception) if args.inception else write_random_weights(Path(folder) / "random.pth")
        context = multiprocessing.get_context("spawn")
        for name in ("plain", "ours"):
            with context.Pool(1) as process:
                result["networks"][name] = process.apply(measure, (name, weights, vars(args)))
        plain, ours = (result["networks"][name].pop("pool") for name in ("plain", "ours"))
        result["relative_difference"] = float(np.linalg.norm(plain - ours) / np.linalg.norm(plain))
        if args.evaluate:
            result["evaluation"] = evaluate(Path(folder), weights, args)
    show(result)
    if args.json:
        write_result(args.json, result, torch.device(args.device))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure (default: cpu)")
    parser.add_argument("--images", type=int, default=64, help="images of 256 px for each timing (default: 64)")
    parser.add_argument(
        "--batch-size", type=batch_size, default=32, help="images at a time; auto: all that fit (default: 32)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timings, of which the best counts (default: 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--inception", help="Inception weights (default: random ones, equally fast)")
    parser.add_argument("--evaluate", type=int, default=0, help="also run the evaluator on so many (default: 0)")
    parser.add_argument("--references", type=int, default=10_000, help="images of its reference (default: 10000)")
    args = parse_with_json(parser)
    check_batch_size("--batch-size", args.batch_size)
    if args.images < 1 or args.repeats < 1 or args.evaluate < 0:
        raise InputError("--images and --repeats: expected 1 or more, --evaluate 0 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no CUDA device")
    return args


def measure(name: str, weights: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Return time per image, utilisation, peak memory beyond what is there before, and the pool features."""
    device = torch.device(options["device"])
    torch.set_num_threads(options["threads"])
    network: Inception | PlainInception
    network = load_inception(weights, device) if name == "ours" else PlainInception(weights, device)
    pixels = np.random.default_rng(0).integers(0, 256, (options["images"], RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    before = peak_memory(device)
    flops = count_flops(network, images[:1].to(device))
    size = options["batch_size"]
    if size == AUTO:
        on_gpu = device.type == "cuda"
        size = largest_batch(lambda count: network(images[:count].to(device)), len(images)) if on_gpu else CPU_BATCH
    seconds = []
    for _ in range(options["repeats"] + 1):  # the first warms up
        start = time.perf_counter()
        pool = torch.cat([network(batch.to(device)).pool for batch in images.split(size)])
        pool = pool.cpu()  # waits for the device
        seconds.append(time.perf_counter() - start)
    best, peak = min(seconds[1:]) / options["images"], peak_memory(device)
    with full_precision(device):
        ceiling = matrix_rate(device, 1)
    return {
        "seconds_per_image": best,
        "batch_size": size,
        "utilisation": flops / best / ceiling,
        "peak_gb": peak - before,
        "pool": pool.numpy(),
    }


def count_flops(network: torch.nn.Module, image: Tensor) -> int:
    """Return the floating-point operations of one image, counted."""
    with FlopCounterMode(display=False) as counter:
        network(image)
    return counter.get_total_flops()


def evaluate(folder: Path, weights: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run evaluator.py on noise images, in a process of its own; return its seconds and peak memory."""
    batches = {"--ref_batch": args.references, "--sample_batch": args.evaluate}
    flags = ["--inception", str(weights), "--batch-size", str(args.batch_size), "--save_path", str(folder / "out.json")]
    for number, (flag, count) in enumerate(batches.items()):
        flags += [flag, str(write_noise(folder / f"batch{number}.npz", count))]
    flags += ["--cpu"] if args.device == "cpu" else []
    seconds, memory = run_measured([sys.executable, ROOT / "evaluations" / "evaluator.py", *flags])
    return {"samples": args.evaluate, "references": args.references, "seconds": seconds, "host_memory_gb": memory}


def write_noise(path: Path, count: int) -> Path:
    """Write an .npz of `count` noise images, one by one."""
    rng, shape = np.random.default_rng(count), (RESOLUTION, RESOLUTION, 3)
    with open(path, "wb") as file:
        write_npz(file, (rng.integers(256, size=shape, dtype=np.uint8) for _ in range(count)), (count, *shape))
    return path


def write_random_weights(path: Path) -> Path:
    """Write weights in the layout of the PyTorch port that keep activations at a usual size."""
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


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the figures belong to."""
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    return {"device": name, "torch": torch.__version__, "batch_size": args.batch_size, "images": args.images}


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    print(f"{result['machine']['device']}, torch {result['machine']['torch']}, images of {RESOLUTION} px")
    print(f"features of plain and ours differ by {result['relative_difference']:.1e} of their norm\n")
    print("| network | ms an image | ratio | utilisation | peak memory, GB |")
    print("|---|---|---|---|---|")
    for name, row in result["networks"].items():
        ratio = result["networks"]["plain"]["seconds_per_image"] / row["seconds_per_image"]
        print(
            f"| {name} | {1000 * row['seconds_per_image']:.2f} | {ratio:.2f} | {row['utilisation']:.0%} "
            f"| {row['peak_gb']:.2f} |"
        )
    if "evaluation" in result:
        row = result["evaluation"]
        print(
            f"evaluator: {row['samples']:,} samples, {row['references']:,} references: {row['seconds']:.1f} s, "
            f"{row['host_memory_gb']:.2f} GB on the host"
        )


if __name__ == "__main__":
    run_cli(main)

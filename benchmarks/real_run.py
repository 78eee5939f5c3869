"""Runs train.py and generate.py themselves, on synthetic data, and checks that a resumed run continues as before.

    python benchmarks/real_run.py --compile --json run.json
    python benchmarks/real_run.py --codec sd --model SiT-XL/2 --resolution 256 --compile --json loader.json

With --codec pixel, the first run trains --steps steps and saves a checkpoint in the middle. A second run resumes from
this checkpoint. Its losses and its last weights are compared with those of the first run, and generate.py makes images
from its last checkpoint. On a CPU the runs are equal to the last bit. On a GPU some kernels add in any order, so the
losses may differ by rounding: by 0.1 % in the first step after the checkpoint, and by 2 % later.

With --codec sd, images and latents have the size of Stable Diffusion's. One run measures the speed with the loader of
train.py. Nothing is generated, because the weights of this codec are not available everywhere. With --cached-tokens,
preprocessing/encode_tokens.py then writes the tokens of all images, and a second run reads them.

Encoders have random weights.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import timing
from benchmarks.training_steps import write_random_weights
from common.checks import POSITIVE, between
from common.cli import parse, setting
from common.errors import InputError, run_cli
from common.images import save_png
from common.io import read_metrics, write_json
from common.sources import image_name, latents_name, tokens_name
from models.autoencoder import SD_FORMAT
from models.checkpoint import load_checkpoint

CLASSES = 10
PIXEL_CODEC = {"codec": "pixel", "channels": 3, "factor": 1, "scale": 1.0, "shift": 0.0}
WRITERS = 16  # threads that write images
FIRST_LOSS, LATER_LOSSES = 1e-3, 2e-2  # largest relative differences between the losses of two equal runs
SAMPLING = "--num-steps 50 --cfg-scale 2.3 --guidance-high 0.85"


@dataclass(frozen=True, kw_only=True)
class RealRun(timing.Benchmark):
    """Settings of the runs."""

    codec: str = setting("pixel", "latents: the pixels themselves, or Stable Diffusion's", choices=("pixel", "sd"))
    resolution: int = setting(32, "of the images, px", check=between(8, 1024))
    images: int = setting(1024, "images of the data set", check=POSITIVE)
    encoder: str = setting("dinov2-vit-b:input=224", "--enc-type of train.py")
    model: str = setting("SiT-B/2", "preset")
    depth: int | None = setting(None, "number of blocks, instead of the preset's", check=between(1, 1000))
    batch_size: int = setting(256, "images of a step", check=POSITIVE)
    steps: int = setting(40, "training steps, an even number", check=between(2, 10**6))
    precision: str = setting("fp16", "autocast of training", choices=("no", "fp16", "bf16"))
    compile: bool = setting(False, "compile in all programs")
    num_workers: int = setting(4, "loader processes", check=between(0, 1024))
    cached_tokens: bool = setting(False, "with --codec sd: a second run, which reads cached tokens of the encoder")
    samples: int = setting(96, "images to generate, in batches of two thirds of this number", check=POSITIVE)

    def check_combination(self) -> None:
        super().check_combination()
        if self.steps % 2:
            raise InputError(f"--steps {self.steps}: must be even, because a checkpoint is saved in the middle")
        if self.cached_tokens and self.codec != "sd":
            raise InputError(f"--cached-tokens: needs --codec sd, not {self.codec}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the programs, and write and print their times and the comparison."""
    config = parse(RealRun, "Run train.py and generate.py on synthetic data.", argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = run_programs(config, Path(folder))
    print(json.dumps(rows, indent=2))


def run_programs(config: RealRun, folder: Path) -> list[dict[str, Any]]:
    """Run the programs of one --codec in a folder and return a row for each; they are written after every program."""
    rows: list[dict[str, Any]] = []

    def done(row: dict[str, Any]) -> None:
        rows.append(row)
        timing.write_result(config.json, {"rows": rows}, torch.device("cpu"))

    start = time.perf_counter()
    write_data_set(folder / "data", config)
    torch.manual_seed(0)
    weights = write_random_weights(folder, config.encoder, config.resolution)
    done({"program": "data", "seconds": time.perf_counter() - start})
    train = partial(run_training, config, folder, weights)

    if config.codec == "sd":
        rarely = ("--checkpointing-steps", config.steps, "--log-steps", max(1, config.steps // 4))
        done(train("run", *rarely))
        if config.cached_tokens:
            done(write_tokens(config, folder / "data", weights))
            done(train("cached", *rarely, "--cached-tokens", "tokens"))
        return rows
    every_step = ("--checkpointing-steps", config.steps // 2, "--log-steps", 1)
    done(train("first", *every_step))
    checkpoints = {name: folder / "exps" / name / "checkpoints" for name in ("first", "resumed")}
    middle, last = (f"{step:07d}.pt" for step in (config.steps // 2, config.steps))
    done(train("resumed", *every_step, "--resume", checkpoints["first"] / middle))
    rows[-1] |= compare(*(folder / "exps" / name for name in checkpoints), middle, last)
    done(run_generation(config, folder, checkpoints["resumed"] / last))
    check_losses(rows[-2])
    return rows


def run_training(config: RealRun, folder: Path, weights: str, name: str, *flags: Any) -> dict[str, Any]:
    """Run train.py and return its duration, and the median speed and wait for data of its rows."""
    command = ["train.py", "--exp-name", name, "--output-dir", folder / "exps", "--data-dir", folder / "data"]
    command += ["--device", config.torch_device.type, "--mixed-precision", config.precision]
    command += ["--enc-type", config.encoder, "--enc-weights", weights, "--model", config.model]
    command += ["--depth", config.depth, "--encoder-depth", 1] if config.depth else []
    command += ["--batch-size", config.batch_size, "--max-train-steps", config.steps, "--sampling-steps", 0]
    command += ["--num-workers", config.num_workers, *(["--compile"] if config.compile else []), *flags]
    seconds = run(command)
    rows = read_metrics(folder / "exps" / name / "metrics.jsonl")[1:]  # without the first: it contains compilation
    medians = {key: statistics.median(row[key] for row in rows) for key in ("images_per_second", "data_wait")}
    return {"program": f"train.py, {name}", "seconds": seconds, **medians}


def write_tokens(config: RealRun, data: Path, weights: str) -> dict[str, Any]:
    """Run encode_tokens.py and return its duration and the bytes of an image's file."""
    command = ["preprocessing/encode_tokens.py", "--source", data / "images", "--dest", data / "tokens"]
    seconds = run([*command, "--enc-type", config.encoder, "--enc-weights", weights, "--workers", config.num_workers])
    size = (data / "tokens" / tokens_name(0)).stat().st_size
    return {"program": "encode_tokens.py", "seconds": seconds, "images": config.images, "bytes_per_image": size}


def run_generation(config: RealRun, folder: Path, checkpoint: Path) -> dict[str, Any]:
    """Run generate.py, on a GPU with CUDA graphs, and return its duration and number of images."""
    batch = -(-config.samples * 2 // 3)  # the last batch is smaller
    command = ["generate.py", "--ckpt", checkpoint, "--sample-dir", folder / "samples", "--name", "set"]
    command += ["--num-fid-samples", config.samples, "--per-proc-batch-size", batch, *SAMPLING.split()]
    command += ["--device", config.torch_device.type, *(["--compile"] if config.compile else [])]
    command += ["--cuda-graphs", "--network-dtype", "bf16"] if config.torch_device.type == "cuda" else []
    seconds = run(command)
    images = list((folder / "samples" / "set" / "images").rglob("*.png"))
    return {"program": "generate.py", "seconds": seconds, "images": len(images)}


def run(command: Sequence[Any]) -> float:
    """Run a program of the repository and return its duration. Raises InputError if it fails."""
    command = [str(part) for part in command]
    print(f"-- {shlex.join(command)}", flush=True)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]])
    if done.returncode:
        raise InputError(f"{command[0]} failed with status {done.returncode}")
    return time.perf_counter() - start


def compare(first: Path, resumed: Path, middle: str, last: str) -> dict[str, Any]:
    """Return how a resumed run differs from the run that was not stopped.

    first_loss, later_losses: largest relative difference of the first loss, and of the others. weights: distance of the
    two last networks, relative to how far training moved the network since the checkpoint. equal: losses, last weights
    and last averaged weights are equal to the last bit.
    """
    losses = read_losses(resumed)
    expected_losses = {step: loss for step, loss in read_losses(first).items() if step > int(Path(middle).stem)}
    # Steps that are skipped because a gradient overflows have no loss; they must be the same in both runs.
    same_steps = losses and losses.keys() == expected_losses.keys()
    apart = [abs(losses[step] / expected_losses[step] - 1) for step in losses] if same_steps else [math.inf]
    files = [run / "checkpoints" / name for run, name in ((first, middle), (first, last), (resumed, last))]
    start, expected, found = (load_checkpoint(file, verify=False) for file in files)
    moved = distance(expected["model"], start["model"])
    weights = distance(found["model"], expected["model"])
    averages = distance(found["ema"], expected["ema"])
    return {
        "first_loss": apart[0],
        "later_losses": max(apart[1:], default=0.0),
        "weights": weights / moved if moved else math.inf,
        "equal": max(apart) == weights == averages == 0,
    }


def read_losses(run: Path) -> dict[int, float]:
    """Return the losses of a run by step."""
    return {row["step"]: row["loss"] for row in read_metrics(run / "metrics.jsonl") if row.get("loss") is not None}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the Euclidean distance of two states of a network."""
    squares = [(found[name].double() - value.double()).square().sum() for name, value in expected.items()]
    return torch.stack(squares).sum().sqrt().item()


def check_losses(row: dict[str, Any]) -> None:
    """Raise InputError if the losses of the resumed run are not those of the first, up to rounding."""
    if not (row["first_loss"] <= FIRST_LOSS and row["later_losses"] <= LATER_LOSSES):
        raise InputError(
            f"the losses of the resumed run differ from those of the first by {row['first_loss']:.1e} in its first "
            f"step and {row['later_losses']:.1e} later; allowed: {FIRST_LOSS:g} and {LATER_LOSSES:g}"
        )


def write_data_set(folder: Path, config: RealRun) -> None:
    """Write images, smooth patterns with a little noise, and their latents; each class has its own pattern."""
    side = config.resolution if config.codec == "pixel" else config.resolution // SD_FORMAT.factor
    codec = PIXEL_CODEC if config.codec == "pixel" else SD_FORMAT.to_json()
    patterns = np.random.default_rng(0).integers(60, 180, (CLASSES, 4, 4, 3), dtype=np.uint8)

    def write(index: int) -> None:
        rng, size = np.random.default_rng(index), (config.resolution, config.resolution)
        smooth = np.asarray(Image.fromarray(patterns[index % CLASSES]).resize(size, Image.Resampling.BICUBIC))
        pixels = smooth + rng.integers(0, 32, (*size, 3), dtype=np.uint8)  # at most 255: bicubic overshoots a little
        save_png(folder / "images" / image_name(index), Image.fromarray(pixels))
        mean = pixels.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
        if config.codec == "sd":
            mean = rng.standard_normal((SD_FORMAT.channels, side, side), dtype=np.float32) / SD_FORMAT.scale
        path = folder / "vae-sd" / latents_name(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.concatenate([mean, np.zeros_like(mean)]))

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, range(config.images)))
    for name, file_name, more in (("images", image_name, {}), ("vae-sd", latents_name, {"codec": codec})):
        labels = [[file_name(index), index % CLASSES] for index in range(config.images)]
        write_json(folder / name / "dataset.json", {"labels": labels, **more})


if __name__ == "__main__":
    run_cli(main, memory_advice="give it a smaller --batch-size")

"""What more GPUs would bring: the time of a training step on 1 to 256 of them, from steps measured on one GPU.

    python benchmarks/scaling.py --measured train_step.json [--global-batch 256]
    python benchmarks/scaling.py --step-seconds 0.4 --batch-size 256 --gradient-bytes 2737436160

On paper, not measured. Each GPU keeps its batch, or shares --global-batch with the others; a step takes a fixed time
and a time for each image, told apart where the file has several batch sizes, else all counts as the images'. Gradients
(float32) are all-reduced in two rings, inside a machine and between machines: a ring of n moves 2 (n - 1) / n of the
bytes over its slowest link (Patarasuk and Yuan, 2009). DDP reduces bucket by bucket while the backward pass, two thirds
of a step, still runs; what does not fit into --overlap of that time, and the last bucket in any case, makes the step
longer. Stragglers and the reading of data are left out.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.io import InputError, read_json, run_cli

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BACKWARD = 2 / 3  # of a step: backward costs twice the forward pass
BUCKET = 25 * 2**20  # bytes, DDP's default


@dataclass(frozen=True)
class Network:
    """What connects the GPUs: bytes/s of one GPU inside its machine, bytes/s of a machine to others, seconds a hop."""

    gpus_per_machine: int
    inside: float
    between: float
    latency: float

    def all_reduce(self, gpus: int, size: float) -> float:
        """Return the seconds of an all-reduce of `size` bytes."""
        local = min(gpus, self.gpus_per_machine)
        machines = -(-gpus // self.gpus_per_machine)
        moved = 2 * (local - 1) / local * size / self.inside + 2 * (machines - 1) / machines * size / self.between
        return moved + 2 * (local - 1 + machines - 1) * self.latency


def step_time(network: Network, gpus: int, step: float, gradients: float, overlap: float) -> float:
    """Return the predicted seconds of a step on `gpus` GPUs; `step` and `gradients` (bytes) are those of one."""
    if gpus == 1:
        return step
    buckets = max(1, round(gradients / BUCKET))
    one = network.all_reduce(gpus, gradients / buckets)
    return step + max((buckets - 1) * one - overlap * BACKWARD * step, 0) + one


@dataclass(frozen=True)
class Measured:
    """A step on one GPU: seconds apart from the images, seconds of an image, images, bytes of gradients."""

    name: str
    fixed: float
    per_image: float
    batch_size: int
    gradients: float


def main() -> None:
    """Print the prediction."""
    args = parse_args()
    network = Network(args.gpus_per_machine, args.inside * 1e9, args.between * 1e9, args.latency / 1e6)
    print(
        f"assumed: {args.gpus_per_machine} GPUs a machine, {args.inside:g} GB/s inside, {args.between:g} GB/s between "
        f"machines, {args.latency:g} us a hop, {args.overlap:.0%} of the backward pass to hide behind\n"
    )
    print("| workload | GPUs | batch, each | all-reduce, ms | step, ms | images/s | efficiency |")
    print("|---|---|---|---|---|---|---|")
    for one in read_measured(args.measured) if args.measured else given(args):
        alone = (one.fixed + one.per_image * one.batch_size) / one.batch_size
        for gpus in GPUS:
            batch = args.global_batch / gpus if args.global_batch else one.batch_size
            if batch < 1:
                continue
            seconds = step_time(network, gpus, one.fixed + one.per_image * batch, one.gradients, args.overlap)
            rate = gpus * batch / seconds
            print(
                f"| {one.name} | {gpus} | {batch:g} | {1e3 * network.all_reduce(gpus, one.gradients):.1f} "
                f"| {1e3 * seconds:.1f} | {rate:.0f} | {rate * alone / gpus:.1%} |"
            )


def parse_args() -> argparse.Namespace:
    """Return the checked settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--measured", type=Path, help="JSON of train_step.py: the fastest form of each model and size counts")
    add("--step-seconds", type=float, help="instead of --measured: a step on one GPU")
    add("--batch-size", type=int, default=256, help="with --step-seconds: images of that step (%(default)s)")
    add("--gradient-bytes", type=float, help="with --step-seconds: 4 for each parameter")
    add("--global-batch", type=int, help="images of a step over all GPUs; default: each keeps the measured batch")
    add("--gpus-per-machine", type=int, default=8, help="(%(default)s)")
    add(
        "--inside",
        type=float,
        default=360,
        help="GB/s of a GPU to others of its machine, assumed (%(default)s)",
    )
    add("--between", type=float, default=320, help="GB/s of a machine to others, assumed (%(default)s: 8 x 400 Gb/s)")
    add("--latency", type=float, default=10, help="microseconds a hop, assumed (%(default)s)")
    add("--overlap", type=float, default=0.9, help="share of the backward pass to reduce behind (%(default)s)")
    args = parser.parse_args()
    if (args.measured is None) == (args.step_seconds is None or args.gradient_bytes is None):
        raise InputError("give either --measured or both --step-seconds and --gradient-bytes")
    return args


def given(args: argparse.Namespace) -> list[Measured]:
    """Return the step that the command line describes."""
    return [Measured("given", 0, args.step_seconds / args.batch_size, args.batch_size, args.gradient_bytes)]


def read_measured(path: Path) -> list[Measured]:
    """Return the fastest form of each model, resolution and precision in a file of benchmarks/train_step.py."""
    forms: dict[tuple[str, str], list[tuple[int, float, int]]] = {}
    for row in read_json(path)["rows"]:
        slot = "" if row["class_slot"] else ", no class slot"
        name = f"{row['model']}, {row['resolution']} px, {row['precision']}{slot}"
        if row["seconds"]:
            points = forms.setdefault((name, row["form"]), [])
            points.append((row["batch_size"], row["seconds"], row["gradient_bytes"]))
    fastest: dict[str, Measured] = {}
    for (name, _), points in forms.items():
        (least, time_of_least, _), (batch, seconds, gradients) = min(points), max(points)
        per_image = (seconds - time_of_least) / (batch - least) if batch > least else seconds / batch
        found = Measured(name, max(seconds - per_image * batch, 0), per_image, batch, gradients)
        before = fastest.get(name)
        if before is None or seconds / batch < before.fixed / before.batch_size + before.per_image:
            fastest[name] = found
    return list(fastest.values())


if __name__ == "__main__":
    run_cli(main)

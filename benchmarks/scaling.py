"""What more GPUs would bring: the time of a training step on 1 to 256 of them, from one measured on one GPU.

    python benchmarks/scaling.py --json train_step.json
    python benchmarks/scaling.py --step-seconds 0.4 --batch-size 256 --gradient-bytes 2737436160

On paper, not measured. Each GPU keeps its batch; gradients (float32) are all-reduced in two rings, inside a machine and
between machines: a ring of n moves 2 (n - 1) / n of the bytes over its slowest link (Patarasuk and Yuan, 2009). DDP
reduces bucket by bucket while the backward pass, two thirds of a step, still runs; what does not fit into --overlap of
that time, and the last bucket in any case, makes the step longer. Stragglers and the reading of data are left out.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from files import InputError, read_json, run_cli

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


def main() -> None:
    """Print the prediction."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--json", type=Path, help="what benchmarks/train_step.py wrote: the fastest form of each model and size")
    add("--step-seconds", type=float, help="instead of --json: a step on one GPU")
    add("--batch-size", type=int, default=256, help="with --step-seconds: images of that step (%(default)s)")
    add("--gradient-bytes", type=float, help="with --step-seconds: 4 for each parameter")
    add("--gpus-per-machine", type=int, default=8, help="(%(default)s)")
    add(
        "--inside",
        type=float,
        default=360,
        help="GB/s of a GPU to its machine's others, assumed (%(default)s: NVLink 4)",
    )
    add("--between", type=float, default=320, help="GB/s of a machine to others, assumed (%(default)s: 8 x 400 Gb/s)")
    add("--latency", type=float, default=10, help="microseconds a hop, assumed (%(default)s)")
    add(
        "--overlap",
        type=float,
        default=0.9,
        help="share of the backward pass that reducing can hide behind (%(default)s)",
    )
    args = parser.parse_args()
    if (args.json is None) == (args.step_seconds is None or args.gradient_bytes is None):
        raise InputError("give either --json or both --step-seconds and --gradient-bytes")
    network = Network(args.gpus_per_machine, args.inside * 1e9, args.between * 1e9, args.latency / 1e6)
    print(
        f"assumed: {args.gpus_per_machine} GPUs a machine, {args.inside:g} GB/s inside, {args.between:g} GB/s between "
        f"machines, {args.latency:g} us a hop, {args.overlap:.0%} of the backward pass to hide behind\n"
    )
    print("| workload | GPUs | all-reduce, ms | step, ms | images/s | efficiency |\n|---|---|---|---|---|---|")
    for name, step, batch_size, gradients in workloads(args):
        for gpus in GPUS:
            seconds = step_time(network, gpus, step, gradients, args.overlap)
            reduce = network.all_reduce(gpus, gradients)
            print(
                f"| {name} | {gpus} | {1e3 * reduce:.1f} | {1e3 * seconds:.1f} | {gpus * batch_size / seconds:.0f} "
                f"| {step / seconds:.1%} |"
            )


def workloads(args: argparse.Namespace) -> list[tuple[str, float, int, float]]:
    """Return name, seconds of a step, batch and bytes of gradients of what was measured or given."""
    if not args.json:
        return [("given", args.step_seconds, args.batch_size, args.gradient_bytes)]
    fastest: dict[str, tuple[str, float, int, float]] = {}
    for row in read_json(args.json)["rows"]:
        slot = "" if row["class_slot"] else ", no class slot"
        name = f"{row['model']}, {row['resolution']} px, batch {row['batch_size']}, {row['precision']}{slot}"
        if row["seconds"] and (name not in fastest or row["seconds"] < fastest[name][1]):
            fastest[name] = (name, row["seconds"], row["batch_size"], row["gradient_bytes"])
    return list(fastest.values())


if __name__ == "__main__":
    run_cli(main)

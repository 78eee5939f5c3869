"""Does the fast path learn the same: losses of plain and fast training steps from one start, beside float32's.

    python benchmarks/losses.py --json losses.json --picture losses.png

All forms see the same batches and noise in the same order. One more run tells rounding from error: the reference again,
its first weights moved by one unit in the last place of float32. What that run does away from the reference, any change
in the order of a sum may do.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import parse_with_json, write_result
from benchmarks.training_steps import OurForm, PlainForm, Workload
from common.io import InputError, atomic_write, check_writable, run_cli

ONE_ULP = 1 + 2**-23  # moves a float32 to a neighbour
PARTED = 1e-3  # relative difference from which on two losses count as parted
READ_EVERY = 20  # steps


def main() -> None:
    """Train as the command line says, in each form."""
    args = parse_args()
    losses: dict[str, list[float]] = {}
    for precision in ("no", *args.precision):
        losses |= train_all(args, precision)
    if args.json:
        device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
        write_result(args.json, {"losses": losses}, device)
    print(table(losses))
    if args.picture:
        draw(losses, args.picture)


def parse_args() -> argparse.Namespace:
    """Return the checked settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="SiT-S/2", help="preset (%(default)s)")
    add("--depth", type=int, default=4, help="number of blocks (%(default)s)")
    add("--batch-size", type=int, default=8, help="images of a step (%(default)s)")
    add("--resolution", type=int, default=128, help="of the images, px (%(default)s)")
    add("--batches", type=int, default=8, help="different batches, in turn (%(default)s)")
    add("--encoder", default="timm/vit_tiny_patch16_224:input=128", help="as --enc-type of train.py (%(default)s)")
    add("--enc-weights", help="its file; default: random weights")
    add("--precision", nargs="+", choices=["bf16", "fp16"], default=["bf16"], help="of the fast path (%(default)s)")
    add("--learning-rate", type=float, default=1e-4, help="constant (%(default)s)")
    add("--steps", type=int, default=200, help="of each form (%(default)s)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: CUDA if there is one")
    add("--backend", default="inductor", help="of torch.compile (%(default)s)")
    add("--picture", type=Path, help="draw the losses into this PNG")
    args = parse_with_json(parser)
    if args.picture:
        check_writable(args.picture, "--picture")
    if min(args.steps, args.batch_size, args.batches, args.depth) < 1:
        raise InputError("--steps, --batch-size, --batches and --depth must be at least 1")
    return args


def train_all(args: argparse.Namespace, precision: str) -> dict[str, list[float]]:
    """Return the losses of each form's steps in one precision, by name; the first is plain."""
    flags = f"--model {args.model} --batch-size {args.batch_size} --mixed-precision {precision} --device {args.device}"
    flags += f" --enc-type {args.encoder} --learning-rate {args.learning_rate} --no-allow-tf32"
    flags += f" --depth {args.depth} --encoder-depth 1"
    torch.compiler.reset()  # which keeps but a few compilations of one function
    work = Workload(flags.split(), args.resolution, args.batches, args.enc_weights)
    losses = {}
    for name, make, first in (
        ("plain", lambda: PlainForm(work), 1.0),
        *([("plain, start moved by one ulp", lambda: PlainForm(work), ONE_ULP)] if precision == "no" else []),
        ("train.py", lambda: OurForm(work), 1.0),
        ("train.py --compile", lambda: OurForm(work, compiled=True, backend=args.backend), 1.0),
    ):
        work.reset()
        form, name = make(), f"{name}, {'float32' if precision == 'no' else precision}"
        with torch.no_grad():
            for parameter in work.network.parameters():
                parameter.mul_(first)
        losses[name] = []
        for step in tqdm(range(1, args.steps + 1), desc=name):
            form.step()
            if step % READ_EVERY == 0 or step == args.steps:
                losses[name] += form.finish()
    return losses


def table(losses: dict[str, list[float]]) -> str:
    """Return, as Markdown, how far each form is from the first one, the reference."""
    reference = next(iter(losses.values()))
    lines = [
        f"| form | loss, last tenth | largest difference, first tenth | mean difference, last tenth "
        f"| parted by {PARTED} after step |\n|---|---|---|---|---|"
    ]
    tenth = max(1, len(reference) // 10)
    for name, values in losses.items():
        apart = [abs(a - b) for a, b in zip(values, reference, strict=True)]
        parted = next((i for i, (d, b) in enumerate(zip(apart, reference, strict=True)) if d > PARTED * abs(b)), None)
        lines.append(
            f"| {name} | {statistics.mean(values[-tenth:]):.4f} | {max(apart[:tenth]):.1e} "
            f"| {statistics.mean(apart[-tenth:]):.1e} | {'never' if parted is None else parted} |"
        )
    return "\n".join(lines)


def draw(losses: dict[str, list[float]], path: Path) -> None:
    """Write a PNG: the losses above, their distances from the first form's below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    reference = next(iter(losses.values()))
    for name, values in losses.items():
        steps = range(1, len(values) + 1)
        above.plot(steps, values, label=name, linewidth=0.8)
        apart = [max(abs(a - b), 1e-9) for a, b in zip(values, reference, strict=True)]
        below.plot(steps, apart, linewidth=0.8)
    above.set_ylabel("loss")
    above.legend(fontsize="small")
    below.set(yscale="log", xlabel="step", ylabel=f"distance from {next(iter(losses))}")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


if __name__ == "__main__":
    run_cli(main)

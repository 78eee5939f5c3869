"""Compares the losses of plain and fast training steps from the same start with those of the plain step in float32.

    python benchmarks/losses.py --json losses.json --picture losses.png

All forms get the same batches and the same noise in the same order. One more run distinguishes rounding from errors:
the plain step in float32, with initial weights changed by one unit in the last place (ulp). Any change in the order of
a sum may cause a deviation as large as that of this run.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import markdown_table, write_result
from benchmarks.training_steps import OurForm, PlainForm, TrainingBenchmark, Workload
from common.cli import POSITIVE, parse, setting
from common.io import atomic_write, check_writable, run_cli

ONE_ULP = 1 + 2**-23  # changes a float32 to a neighbouring one
SEPARATED = 1e-3  # relative difference from which on two losses count as separated
READ_EVERY = 20  # steps


@dataclass(frozen=True, kw_only=True)
class Losses(TrainingBenchmark):
    """Settings of the benchmark."""

    model: str = setting("SiT-S/2", "preset")
    depth: int = setting(4, "number of blocks", check=POSITIVE)
    batch_size: int = setting(8, "images of a step", check=POSITIVE)
    resolution: int = setting(128, "of the images, px", check=POSITIVE)
    batches: int = setting(8, "number of different batches, repeated in a cycle", check=POSITIVE)
    encoder: str = setting("timm/vit_tiny_patch16_224:input=128", "--enc-type of train.py")
    precision: tuple[str, ...] = setting(("bf16",), "precisions in addition to float32", choices=("bf16", "fp16"))
    learning_rate: float = setting(1e-4, "constant learning rate", check=POSITIVE)
    steps: int = setting(200, "steps of each form", check=POSITIVE)
    picture: Path | None = setting(None, "draw the losses into this PNG")

    def check_combination(self) -> None:
        super().check_combination()
        if self.picture:
            check_writable(self.picture, "--picture")


def main(argv: Sequence[str] | None = None) -> None:
    """Train with each form, print a table and draw the losses."""
    config = parse(Losses, "Compare the losses of plain and fast training steps.", argv)
    losses: dict[str, list[float]] = {}
    for precision in ("no", *config.precision):
        losses |= train_all(config, precision)
    write_result(config.json, {"losses": losses}, config.torch_device)
    print(table(losses))
    if config.picture:
        draw(losses, config.picture)


def train_all(config: Losses, precision: str) -> dict[str, list[float]]:
    """Return the losses of each form's steps in one precision, by the form's name; the first is plain."""
    flags = f"--model {config.model} --batch-size {config.batch_size} --mixed-precision {precision}"
    flags += f" --device {config.device} --learning-rate {config.learning_rate} --no-allow-tf32"
    torch.compiler.reset()  # it keeps only a few versions of a compiled function
    work = Workload(flags.split(), config.encoder, config.resolution, config.batches, config.enc_weights, config.depth)
    forms = [(PlainForm(work), 1.0), (PlainForm(work), ONE_ULP), (OurForm(work), 1.0)]
    forms += [(OurForm(work, compiled=True, backend=config.backend), 1.0)]
    losses = {}
    for form, factor in forms:
        if factor != 1 and precision != "no":
            continue
        work.reset()
        with torch.no_grad():
            for parameter in work.network.parameters():
                parameter.mul_(factor)
        start_moved = ", start moved by one ulp" if factor != 1 else ""
        name = f"{form.name}{start_moved}, {'float32' if precision == 'no' else precision}"
        losses[name] = []
        for step in tqdm(range(1, config.steps + 1), desc=name):
            form.step()
            if step % READ_EVERY == 0 or step == config.steps:
                losses[name] += form.finish()
    return losses


def table(losses: dict[str, list[float]]) -> str:
    """Return the difference between each form and the first, the reference, as Markdown."""
    reference = next(iter(losses.values()))
    tenth = max(1, len(reference) // 10)
    headings = "form | loss, last tenth | largest difference, first tenth | mean difference, last tenth "
    headings += f"| separated by {SEPARATED} after step"
    rows = []
    for name, values in losses.items():
        differences = [abs(a - b) for a, b in zip(values, reference, strict=True)]
        beyond = (i for i, (d, b) in enumerate(zip(differences, reference, strict=True)) if d > SEPARATED * abs(b))
        rows.append(
            f"{name} | {statistics.mean(values[-tenth:]):.4f} | {max(differences[:tenth]):.1e} "
            f"| {statistics.mean(differences[-tenth:]):.1e} | {next(beyond, 'never')}"
        )
    return markdown_table(headings, rows)


def draw(losses: dict[str, list[float]], path: Path) -> None:
    """Write a PNG: the losses at the top, their distances from the first form's at the bottom."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True)
    reference = next(iter(losses.values()))
    for name, values in losses.items():
        steps = range(1, len(values) + 1)
        top.plot(steps, values, label=name, linewidth=0.8)
        differences = [max(abs(a - b), 1e-9) for a, b in zip(values, reference, strict=True)]
        bottom.plot(steps, differences, linewidth=0.8)
    top.set_ylabel("loss")
    top.legend(fontsize="small")
    bottom.set(yscale="log", xlabel="step", ylabel=f"distance from {next(iter(losses))}")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


if __name__ == "__main__":
    run_cli(main)

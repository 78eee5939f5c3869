"""Measures what checkpoints cost, and what train.py adds to a training step to survive faults.

    python benchmarks/checkpoint.py --model SiT-B/2 --batch-size 1 [--json checkpoint.json]

Three kinds of steps alternate in one process: a straightforward step with all optimisations, train.py's step (which
skips bad updates without waiting for the device, and reports and logs the loss), and train.py's step while a checkpoint
is written. The data are random and the encoder is tiny. The smaller the batch, the larger the share of the additions.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from benchmarks.timing import DeviceBenchmark, in_turns, markdown_table, timed, write_result
from benchmarks.training_steps import OPTIMISATIONS, OurForm, PlainForm, Workload
from common.cli import POSITIVE, parse, setting
from common.io import InputError, run_cli
from models.checkpoint import verify_checkpoint
from models.sit import SiT_models
from training.checkpoint_writer import CheckpointWriter

RESOLUTION = 256
# One block of DINOv2-B's width; its patches are those of the network on latents, which are 8 times smaller.
ENCODER = "timm/vit_tiny_patch16_224:input={resolution}:patch_size={patch}:depth=1:embed_dim=768:num_heads=12"
SAVES = 3


@dataclass(frozen=True, kw_only=True)
class Checkpoint(DeviceBenchmark):
    """Settings of the benchmark."""

    model: str = setting("SiT-B/2", "preset", choices=tuple(SiT_models))
    depth: int | None = setting(None, "number of blocks, instead of the preset's", check=POSITIVE)
    batch_size: int = setting(1, "images of a step", check=POSITIVE)
    rounds: int = setting(10, "steps of each kind", check=POSITIVE)
    folder: Path = setting(Path(tempfile.gettempdir()), "folder on the disk to measure")

    def check_combination(self) -> None:
        super().check_combination()
        if not self.folder.is_dir():
            raise InputError(f"--folder {self.folder}: no such folder")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    config = parse(Checkpoint, "Measure what checkpoints cost.", argv)
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        figures = measure(config, Path(folder))
    print(f"{config.model}, batch {config.batch_size}, torch {torch.__version__}; times in seconds\n")
    print(markdown_table("figure | ", [f"{name.replace('_', ' ')} | {value:.4g}" for name, value in figures.items()]))
    write_result(config.json, figures, config.torch_device)


def measure(config: Checkpoint, folder: Path) -> dict[str, float]:
    """Return seconds and their ratios."""
    flags = ["--model", config.model, "--batch-size", str(config.batch_size), "--device", config.device]
    flags += ["--mixed-precision", "no"]
    encoder = ENCODER.format(resolution=RESOLUTION, patch=8 * int(config.model.split("/")[1]))
    work = Workload(flags, encoder, RESOLUTION, depth=config.depth, folder=folder)
    run, device = work.run, work.device
    plain, watched = PlainForm(work, tuple(OPTIMISATIONS)), OurForm(work)

    # Steps without a save. The first ones are slower and are not measured.
    plain.step()
    watched.step()
    times = in_turns({"plain": plain.step, "watched": watched.step}, device, config.rounds)

    # Steps during a save. The first save allocates memory and is not measured.
    train.save(watched.run)
    run.writer.finish()
    stalls, writes, during = [], [], []
    for _ in range(SAVES):
        watched.step()
        start = time.perf_counter()
        stalls.append(timed(partial(train.save, watched.run), device))
        while run.writer.busy:
            during.append(timed(watched.step, device))
        run.writer.finish()
        writes.append(time.perf_counter() - start)
    (path,) = (run.folder / "checkpoints").glob("*.pt")
    checkpoint_gb, verify = path.stat().st_size / 1e9, timed(partial(verify_checkpoint, path), device)

    foreground = replace(watched.run, writer=CheckpointWriter(folder, background=False), step=0)
    step = statistics.median(times["plain"])
    return {
        "step": step,
        "watched_over_plain": statistics.median(times["watched"]) / step,
        "fastest_watched_over_fastest_plain": min(times["watched"]) / min(times["plain"]),
        "checkpoint_gb": checkpoint_gb,
        "save_in_the_foreground": timed(partial(train.save, foreground), device),
        "stall_of_a_save": statistics.median(stalls),
        "stall_over_step": statistics.median(stalls) / step,
        "save_in_the_background": statistics.median(writes),
        "step_during_a_save_over_plain": statistics.median(during) / step if during else float("nan"),
        "verify": verify,
    }


if __name__ == "__main__":
    run_cli(main)

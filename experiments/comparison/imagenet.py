"""The comparison at the paper's size (REG, arXiv 2507.01467, table 1, figure 1), for a cluster: the commands, and the
scores read from the runs. train.py itself scores the averaged network by FID while it trains."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from common.io import read_json, read_metrics
from experiments.comparison.presets import ablations

STEPS, EVERY = 400_000, 50_000  # the steps of the paper's tables
ENCODERS = {"REG": "dinov2-vit-b", "DINOv2-L": "dinov2-vit-l", "CLIP-L": "clip-vit-L"}
ROWS = ablations(depths=(2, 6, 8), coefficients=("0.01", "0.02", "0.05", "0.1"), encoders=ENCODERS)


def commands(args: argparse.Namespace) -> dict[tuple[str, int], list[str]]:
    """Return the command of each row and seed; given again it goes on, and it does nothing once the run is done."""
    settings = f"--model {args.model} --data-dir {args.data_dir} --output-dir {args.out} --max-train-steps {STEPS}"
    settings += f" --checkpointing-steps {EVERY} --eval-steps {EVERY} --eval-samples {args.samples or 50_000}"
    settings += f" --eval-ref {args.eval_ref} --sampling-steps {EVERY} --resume latest"
    return {
        (row, seed): ["accelerate", "launch", "train.py", *shlex.split(settings), "--seed", str(seed), "--exp-name",
                      run_name(row, seed), *shlex.split(flags)]
        for row, flags in ROWS[args.ablation].items()
        for seed in args.seeds or (0,)
    }  # fmt: skip


def run_name(row: str, seed: int) -> str:
    """Return the folder's name of a row's run."""
    return f"{row.lower().replace(' ', '-')}-seed{seed}"


def collect(args: argparse.Namespace) -> dict[str, Any] | None:
    """Return what the runs have measured so far, up to the step that all have reached; None if one has no score."""
    scores, seconds = {}, {}
    for row, seed in commands(args):
        path = args.out / run_name(row, seed) / "metrics.jsonl"
        logged = read_metrics(path) if path.exists() else []
        speeds = [line["images_per_second"] for line in logged if "images_per_second" in line]
        found = [{**line, "distance": line["fid"]} for line in logged if line.get("fid") is not None]
        if not found or not speeds:
            return None
        scores.setdefault(row, {})[str(seed)] = found
        seconds[row] = read_json(path.with_name("args.json"))["batch_size"] / sorted(speeds)[len(speeds) // 2]
    reached = min(run[-1]["step"] for seeds in scores.values() for run in seeds.values())
    scores = {
        row: {seed: [line for line in run if line["step"] <= reached] for seed, run in seeds.items()}
        for row, seeds in scores.items()
    }
    return {
        "preset": "imagenet",
        "ablation": args.ablation,
        "metric": "FID",
        "rows": ROWS[args.ablation],
        "seeds": list(args.seeds or (0,)),
        "real": None,
        "seconds_per_step": seconds,
        "scores": scores,
    }

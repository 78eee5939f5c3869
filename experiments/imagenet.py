"""The comparison at the paper's size (REG, arXiv 2507.01467, table 1, figure 1), for a cluster: the commands, and the
scores read from the runs. train.py computes the FID of the averaged network during training."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.io import read_json, read_metrics
from experiments.presets import ablations, row_flags

if TYPE_CHECKING:
    from experiments.convergence import Convergence

STEPS, EVERY = 400_000, 50_000  # the steps of the paper's tables
ENCODERS = {"REG": "dinov2-vit-b", "DINOv2-L": "dinov2-vit-l", "CLIP-L": "clip-vit-L"}
ROWS = ablations((2, 6, 8), ("0.01", "0.02", "0.05", "0.1"), ENCODERS, STEPS, muon_rate="1e-3")


def common_flags(config: Convergence) -> str:
    """Return the flags of train.py that all rows have."""
    folders = {"--data-dir": config.data_dir, "--output-dir": config.out, "--eval-ref": config.eval_ref}
    flags = f"--model {config.model} {shlex.join(str(part) for pair in folders.items() for part in pair)}"
    flags += f" --max-train-steps {STEPS} --checkpointing-steps {EVERY} --eval-steps {EVERY}"
    return f"{flags} --eval-samples {config.samples or 50_000} --sampling-steps {EVERY} --resume latest {config.flags}"


def rows(config: Convergence) -> dict[str, str]:
    """Return the further flags of each row. Raises InputError if train.py does not accept them."""
    common = common_flags(config)
    return {row: row_flags(common, flags, config.reg_flags) for row, flags in ROWS[config.ablation].items()}


def commands(config: Convergence) -> dict[tuple[str, int], list[str]]:
    """Return the command of each row and seed. The same command resumes a run, and does nothing if it is complete."""
    common = ["accelerate", "launch", "train.py", *shlex.split(common_flags(config))]
    return {
        (row, seed): [*common, "--seed", str(seed), "--exp-name", run_name(row, seed), *shlex.split(flags)]
        for row, flags in rows(config).items()
        for seed in config.seeds or (0,)
    }


def run_name(row: str, seed: int) -> str:
    """Return the name of the folder of a row's run."""
    return f"{row.lower().replace(' ', '-')}-seed{seed}"


def collect(config: Convergence) -> tuple[dict[str, Any] | None, dict[tuple[str, int], Path]]:
    """Return the results of the runs up to the step that all have reached (None if a run has no score), and folders."""
    runs = {(row, seed): Path(config.out) / run_name(row, seed) for row, seed in commands(config)}
    scores: dict[str, dict[str, list[dict[str, Any]]]] = {}
    seconds = {}
    for (row, seed), folder in runs.items():
        path = folder / "metrics.jsonl"
        logged = read_metrics(path) if path.exists() else []
        speeds = [line["images_per_second"] for line in logged if "images_per_second" in line]
        found = [{**line, "distance": line["fid"]} for line in logged if line.get("fid") is not None]
        if not found or not speeds:
            return None, runs
        scores.setdefault(row, {})[str(seed)] = found
        seconds[row] = read_json(folder / "args.json")["batch_size"] / sorted(speeds)[len(speeds) // 2]
    reached = min(run[-1]["step"] for seeds in scores.values() for run in seeds.values())
    scores = {
        row: {seed: [line for line in run if line["step"] <= reached] for seed, run in seeds.items()}
        for row, seeds in scores.items()
    }
    about = {"preset": "imagenet", "ablation": config.ablation, "metric": "FID", "rows": rows(config)}
    about |= {"flags": config.flags, "seeds": list(config.seeds or (0,)), "real": None}
    return {**about, "seconds_per_step": seconds, "scores": scores}, runs

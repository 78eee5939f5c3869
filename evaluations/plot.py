"""Plot FID against training steps from the metrics.jsonl of one or several runs, beside the published curves.

    python evaluations/plot.py runs/*/metrics.jsonl --out fid.png --published B/2

A metrics.jsonl has one JSON object a line; those with `step` and `fid` are evaluations.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

from files import InputError, atomic_write, run_cli

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt

Curve = list[tuple[int, float]]

# FID at step, 50,000 images by SDE in 250 steps without guidance, global batch 256, ImageNet 256 x 256 (arXiv
# 2507.01467). They compare with a run of the same setting only.
PUBLISHED: dict[str, dict[str, Curve]] = {
    "B/2": {
        "REG": [(50_000, 64.7), (100_000, 36.1), (200_000, 22.1), (400_000, 15.2)],
        "REPA": [(400_000, 24.4)],
        "SiT": [(400_000, 33.0)],
    },
    "L/2": {
        "REG": [(50_000, 30.1), (100_000, 11.4), (200_000, 6.6), (400_000, 4.6)],
        "REPA": [(400_000, 10.0)],
        "SiT": [(400_000, 18.8)],
    },
    "XL/2": {
        "REG": [(50_000, 26.7), (100_000, 8.9), (200_000, 5.0), (400_000, 3.4), (4_000_000, 1.8)],
        "REPA": [(4_000_000, 5.9)],
        "SiT": [(7_000_000, 8.3)],
    },
}


def main() -> None:
    args = parse_args()
    if args.names and len(args.names) != len(args.runs):
        raise InputError(f"--names: {len(args.names)} names for {len(args.runs)} runs")
    names = args.names or [str(Path(run).parent) if Path(run).name == "metrics.jsonl" else run for run in args.runs]
    curves = {name: read_curve(run, args.metric) for name, run in zip(names, args.runs, strict=True)}
    if args.published and args.metric != "fid":
        raise InputError(f"--published {args.published}: there are published curves of fid only, not of {args.metric}")
    published = PUBLISHED[args.published] if args.published else {}
    plot(curves, {f"{name} {args.published}, published": curve for name, curve in published.items()}, args)
    print(f"written to {args.out}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="metrics.jsonl of one or several runs")
    parser.add_argument("--out", default="fid.png", help="picture to write, .png, .pdf or .svg (default: fid.png)")
    parser.add_argument("--names", nargs="+", help="names of the runs in the legend (default: their folders)")
    parser.add_argument("--metric", default="fid", help="which number of the evaluations is plotted (default: fid)")
    parser.add_argument("--published", choices=sorted(PUBLISHED), help="also the published curves of this model")
    return parser.parse_args()


def read_curve(path: str | Path, metric: str) -> Curve:
    """Return (step, value) of all evaluations in a metrics.jsonl, by step; the last one counts if a step comes twice.

    Raises InputError, naming file and line, for a missing file, a line that is not JSON, a file without evaluations.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    curve: dict[int, float] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error})") from error
        if isinstance(row, dict) and "step" in row and isinstance(row.get(metric), int | float):
            curve[int(row["step"])] = float(row[metric])
    points = [(step, value) for step, value in sorted(curve.items()) if math.isfinite(value)]
    if not points:
        raise InputError(f"{path}: no line with `step` and a number `{metric}`")
    return points


def plot(curves: dict[str, Curve], published: dict[str, Curve], args: argparse.Namespace) -> None:
    """Draw the runs as lines, the published curves dashed and grey, both axes logarithmic."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), marker="o", label=name)
    for (name, curve), grey in zip(published.items(), ("0.2", "0.5", "0.7"), strict=False):
        axes.plot(*zip(*curve, strict=True), marker="s", linestyle="--", color=grey, label=name)
    axes.set(xlabel="training steps", ylabel=args.metric.upper() if args.metric == "fid" else args.metric)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    suffix = Path(args.out).suffix.lstrip(".").lower()
    if suffix not in figure.canvas.get_supported_filetypes():
        raise InputError(f"--out {args.out}: the name has to end in .png, .pdf or .svg")
    with atomic_write(args.out) as file:
        figure.savefig(file, format=suffix, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    run_cli(main)
